"""Small grey versions of the pictures that a network sees, kept as activations are."""

from collections.abc import Callable, Iterator

from torch import Tensor

from stages.images.index import Entry
from stages.training.activations import keep
from stages.training.inputs import read_all
from stages.training.prefix import FrozenPrefix


def thumbnails_of(
    entries: list[Entry], like: FrozenPrefix, max_gigabytes: float, batch_size: int
) -> Callable[[list[Entry]], Iterator[Tensor]]:
    """Keep the thumbnails of pictures in the cache, as `keep` does, and return what reads them.

    Where the pictures have been through a network, `keep` has kept them already.

    Args:
        entries: the pictures.
        like: where they are and how they are preprocessed; its blocks are not used.
        max_gigabytes: of the whole cache.
        batch_size: pictures per batch.

    Returns:
        Some of the pictures -> batches of them: grey, (n, `THUMBNAIL`, `THUMBNAIL`), normalized as for the network.
    """
    shrink = like.thumbnails
    kept = keep(shrink, shrink.share.local(entries), max_gigabytes)

    def read(some: list[Entry]) -> Iterator[Tensor]:
        for pictures in read_all(shrink, some, kept, batch_size, "thumbnails"):
            yield pictures.mean(dim=1)

    return read
