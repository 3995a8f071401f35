"""The frozen prefix of a network: the blocks that training does not change, and the pictures that go through them."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.common.device import autocast, dtype_of
from stages.common.memory import require_memory
from stages.common.params import Augment, Precision
from stages.common.ranks import Share
from stages.images.batches import Batches, Order
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing
from stages.network.footprint import widest_layer
from stages.training.kernels import fold_batchnorm

# A batch of pictures, numbers of blocks -> what the blocks make of it after so many of them, contiguous.
Forward = Callable[[Tensor, Collection[int]], list[Tensor]]

# Part of each folder's name: to be raised when the same prefix and picture give other values than before.
_FORMAT = 2
# One size for all: the last digits of a convolution may depend on the number of pictures in the batch.
BATCH = 32
# Pixels of a thumbnail's side. Measured for near-duplicates, whose cosine has to be 0.9 (docs/results.md): different
# digits of the bundled sample have 0.94 at most with 8 pixels, 0.86 with 12, 0.73 with 16; copies of them resized to a
# quarter have 0.98, 0.92, 0.86 at worst.
THUMBNAIL = 12


@dataclass(frozen=True)
class FrozenPrefix:
    """The blocks that training does not change, and the pictures that go through them.

    `blocks` are on `device`, all of them frozen; `behind` are more of them, whose results are not kept: what is kept
    goes through them each time it is used; `root` is the folder that the entries' paths are relative to; `share`:
    what this process computes of a pass, if there are several. All of them then do the same with the same pictures.
    """

    blocks: nn.Sequential
    root: Path
    preprocessing: Preprocessing
    device: torch.device
    precision: Precision
    workers: int
    share: Share = field(default_factory=Share)
    behind: nn.Sequential = field(default_factory=nn.Sequential)

    def read(self, entries: list[Entry], batch_size: int, augment: Augment, order: Order) -> Batches:
        """Return batches of preprocessed pictures, not yet seen by the blocks."""
        pinned = self.device.type == "cuda"
        return Batches(self.root, entries, self.preprocessing, batch_size, self.workers, augment, order, pinned)

    @cached_property
    def forward(self) -> Forward:
        """What computes activations of batches of `BATCH` pictures (`pad` fills them up).

        Raises:
            StageError: there is not the memory for it.
        """
        if self.device.type == "cpu":
            crop = self.preprocessing.crop
            # A batch stays there, as read and as padded, until its rows are computed.
            require_memory(BATCH, widest_layer(self.blocks, crop) + 2 * 3 * crop**2 * 4, crop)
        return _forward_through(self.blocks, self)

    @cached_property
    def forward_behind(self) -> Forward:
        """What goes on with the blocks `behind`."""
        return _forward_through(self.behind, self)

    @cached_property
    def thumbnails(self) -> "FrozenPrefix":
        """What makes small versions of the same pictures, (3, `THUMBNAIL`, `THUMBNAIL`)."""
        blocks = nn.Sequential(nn.AdaptiveAvgPool2d(THUMBNAIL))
        # On the processor, in float32: shrinking takes no time there, and a GPU of Apple's cannot do it at every size.
        return replace(self, blocks=blocks, behind=nn.Sequential(), device=torch.device("cpu"), precision="float32")

    def row_sizes(self, cuts: list[int]) -> list[int]:
        """Return the bytes of a picture's activations after some numbers of blocks."""
        crop = self.preprocessing.crop
        return [row.nbytes for row in self.forward(torch.zeros(1, 3, crop, crop), cuts)]

    def names(self) -> list[str]:
        """Return names for the activations after 0, 1, 2 ... blocks: hashes of all that they come from."""
        about: dict[str, object] = {
            "format": _FORMAT,
            "preprocessing": self.preprocessing.to_json(),
            "precision": self.precision,
            # The same computation elsewhere differs in its last digits.
            "device": self.device.type,
            "torch": torch.__version__,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        names = [digest.hexdigest()]
        for block in self.blocks:
            digest.update(repr(block).encode())
            for key, tensor in block.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            names.append(digest.hexdigest())
        return [name[:40] for name in names]


def pad(images: Tensor) -> Tensor:
    """Fill a batch up with zeros."""
    return torch.cat([images, images.new_zeros(BATCH - len(images), *images.shape[1:])])


def _forward_through(frozen: nn.Sequential, prefix: FrozenPrefix) -> Forward:
    # Block by block: what leaves a block has to be what the plain network has there.
    blocks = [fold_batchnorm(block).eval().to(memory_format=torch.channels_last) for block in frozen]

    # Not inference_mode: its tensors cannot enter what autograd looks at.
    @torch.no_grad()
    def forward(images: Tensor, cuts: Collection[int]) -> list[Tensor]:
        # Tokens have no such layout: it is one of maps.
        layout = torch.channels_last if images.dim() == 4 else torch.contiguous_format
        activations = images.to(prefix.device, memory_format=layout, non_blocking=True)
        after: dict[int, Tensor] = {}
        with autocast(prefix.device, prefix.precision):
            for number, block in enumerate([nn.Identity(), *blocks]):
                activations = block(activations)
                if number in cuts:
                    # A copy: the next block may begin with a layer that works in place.
                    kept = torch.empty(activations.shape, dtype=dtype_of(prefix.precision), device=prefix.device)
                    after[number] = kept.copy_(activations)
        return [after[cut] for cut in cuts]

    return forward
