"""The finished networks on the test pictures, behind what they share; and what a backbone makes of others."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.common import ranks
from stages.common.device import resolve_device
from stages.common.params import Params
from stages.common.workers import resolve_workers
from stages.images.index import Entry
from stages.network.checkpoint import Description
from stages.network.network import Network, count_shared_blocks, cut, pool_features
from stages.training import cache
from stages.training.activations import keep
from stages.training.inputs import open_batches, read_all
from stages.training.loop import Trainer, predict
from stages.training.parallel import interleave
from stages.training.prefix import FrozenPrefix
from stages.training.thumbnails import thumbnails_of

# Some pictures -> what is made of them, in batches.
Read = Callable[[list[Entry]], Iterator[Tensor]]


def predict_with_both(
    head: Network, finetuned: Network, description: Description, test: list[Entry], params: Params
) -> tuple[list[Tensor], Tensor]:
    """Predict with both networks in one pass, behind the blocks that they share.

    Returns:
        The logits of `head` and of `finetuned`, (n, outputs), float64; and what enters the classifier of `head`,
        pooled, (n, channels). On the CPU.
    """
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    device = resolve_device(params.device)
    blocks, tail = cut(head.to(device), unfrozen)
    prefix = _put_in_front(description, params)(blocks)
    kept = keep(prefix, prefix.share.local(test), params.cache.max_gigabytes)
    trainers = [Trainer(network, device, params.precision) for network in (tail, cut(finetuned, unfrozen)[1])]
    features: list[Tensor] = []
    logits = predict(
        trainers,
        open_batches(prefix, test, kept, params.evaluate.batch_size),
        on_features=lambda activations: features.append(pool_features(activations.float()).cpu()),
    )
    return logits, interleave(torch.cat(features) if features else None)


def open_features(network: Network, description: Description, params: Params, entries: list[Entry]) -> Read:
    """Keep what enters a network's classifier for `entries`; return what reads it, pooled, for some: (n, channels)."""
    # As the head phase has kept them.
    blocks, _ = cut(network.to(resolve_device(params.device)), unfreeze=0)
    whole = _put_in_front(description, params)(blocks)
    kept = keep(whole, whole.share.local(entries), params.cache.max_gigabytes)

    def read(some: list[Entry]) -> Iterator[Tensor]:
        for activations in read_all(whole, some, kept, params.evaluate.batch_size, "features"):
            yield pool_features(activations)

    return read


def open_thumbnails(description: Description, params: Params, entries: list[Entry]) -> Read:
    """Keep small grey versions of `entries`, as the network sees them; return what reads them, as `thumbnails_of`."""
    like = _put_in_front(description, params)(nn.Sequential())
    return thumbnails_of(entries, like, params.cache.max_gigabytes, params.evaluate.batch_size)


def _put_in_front(description: Description, params: Params) -> partial[FrozenPrefix]:
    """Return what makes a `FrozenPrefix` of some blocks."""
    return partial(
        FrozenPrefix,
        root=Path(params.data.path),
        preprocessing=description.preprocessing,
        device=resolve_device(params.device),
        precision=params.precision,
        workers=resolve_workers(params.workers),
        share=ranks.share(cache.activations_folder()),
    )
