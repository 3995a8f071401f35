"""Both finished networks on the test images, and what a backbone makes of others."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.common.device import resolve_device
from stages.common.params import Params
from stages.common.workers import resolve_workers
from stages.images.index import Entry
from stages.network.checkpoint import Description
from stages.network.network import Network, count_shared_blocks, cut, pool_features
from stages.training.batches import interleave, open_batches, read_all
from stages.training.features import FrozenPrefix, keep
from stages.training.loop import Trainer, predict


def predict_with_both(
    head: Network, finetuned: Network, description: Description, test: list[Entry], params: Params
) -> tuple[list[Tensor], Tensor]:
    """Run both checkpoints on images, in one pass over what the blocks that they share make of them.

    Returns:
        The logits of `head` and of `finetuned`, (n, outputs), float64; and what enters the classifier of `head`,
        pooled, (n, channels). On the CPU.
    """
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    blocks, tail = cut(head.to(resolve_device(params.device)), unfrozen)
    prefix = _open_prefix(blocks, description, params)
    kept = keep(prefix, {len(blocks): test}, params.cache.max_gigabytes)[len(blocks)]
    trainers = [Trainer(each, prefix.device, params.precision) for each in (tail, cut(finetuned, unfrozen)[1])]
    features: list[Tensor] = []
    logits = predict(
        trainers,
        open_batches(prefix, test, kept, params.evaluate.batch_size),
        on_features=lambda activations: features.append(pool_features(activations.float()).cpu()),
    )
    return logits, interleave(torch.cat(features) if features else None)


def open_features(
    network: Network, description: Description, params: Params, entries: list[Entry]
) -> Callable[[list[Entry]], Iterator[Tensor]]:
    """Keep what enters a network's classifier for `entries`; return what reads it, pooled, for some: (n, channels)."""
    blocks, _ = cut(network.to(resolve_device(params.device)), unfreeze=0)
    prefix = _open_prefix(blocks, description, params)
    kept = keep(prefix, {len(blocks): entries}, params.cache.max_gigabytes)[len(blocks)]

    def read(some: list[Entry]) -> Iterator[Tensor]:
        for activations in read_all(prefix, some, kept, params.evaluate.batch_size, "features"):
            yield pool_features(activations)

    return read


def _open_prefix(blocks: nn.Sequential, description: Description, params: Params) -> FrozenPrefix:
    device, root, workers = resolve_device(params.device), Path(params.data.path), resolve_workers(params.workers)
    return FrozenPrefix(blocks, root, description.preprocessing, device, params.precision, workers)
