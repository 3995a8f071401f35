"""Small grey versions of the pictures that a network sees, kept as activations are."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from stages.pictures.index import Entry
from stages.training.activations import keep
from stages.training.inputs import read_all
from stages.training.prefix import FrozenPrefix

# Pixels of a side. Measured for near-duplicates, whose cosine has to be 0.9 (docs/results.md): different digits of the
# bundled sample have 0.94 at most with 8 pixels, 0.86 with 12, 0.73 with 16; copies of them resized to a quarter have
# 0.98, 0.92, 0.86 at worst.
SIDE = 12


def thumbnails_of(
    entries: list[Entry], like: FrozenPrefix, max_gigabytes: float, batch_size: int
) -> Callable[[list[Entry]], Iterator[Tensor]]:
    """Keep the thumbnails of pictures in the cache, as `keep` does, and return what reads them.

    Args:
        entries: the pictures.
        like: where they are and how they are preprocessed; its blocks are not used.
        max_gigabytes: of the whole cache.
        batch_size: pictures per batch.

    Returns:
        Some of the pictures -> batches of them: grey, (n, `SIDE`, `SIDE`), normalized as for the network.
    """
    # On the processor, in float32: shrinking takes no time there, and a GPU of Apple's cannot do it at every size.
    shrink = replace(
        like, blocks=nn.Sequential(nn.AdaptiveAvgPool2d(SIDE)), device=torch.device("cpu"), precision="float32"
    )
    kept = keep(shrink, shrink.share.local(entries), max_gigabytes)

    def read(some: list[Entry]) -> Iterator[Tensor]:
        for pictures in read_all(shrink, some, kept, batch_size, "thumbnails"):
            yield pictures.mean(dim=1)

    return read
