"""Both finished networks on the test images."""

from pathlib import Path

from torch import Tensor

from stages.common.device import resolve_device
from stages.common.machine import resolve_workers
from stages.common.params import Params
from stages.images.index import Entry
from stages.network.checkpoint import Description
from stages.network.network import Network, count_shared_blocks, cut
from stages.training.batches import open_batches
from stages.training.features import FrozenPrefix, keep
from stages.training.loop import Trainer, predict


def predict_with_both(
    head: Network, finetuned: Network, description: Description, test: list[Entry], params: Params
) -> list[Tensor]:
    """Run both checkpoints on images, in one pass over what the blocks that they share make of them.

    Returns:
        The logits of `head` and of `finetuned`, (n, outputs), float64, on the CPU.
    """
    device, root, workers = resolve_device(params.device), Path(params.data.path), resolve_workers(params.workers)
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    blocks, tail = cut(head.to(device), unfrozen)
    prefix = FrozenPrefix(blocks, root, description.preprocessing, device, params.precision, workers)
    kept = keep(prefix, {len(blocks): test}, params.cache.max_gigabytes)[len(blocks)]
    trainers = [Trainer(network, device, params.precision) for network in (tail, cut(finetuned, unfrozen)[1])]
    return predict(trainers, open_batches(prefix, test, kept, params.evaluate.batch_size))
