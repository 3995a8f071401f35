"""Random numbers that hang on a seed and an epoch."""

import hashlib
from pathlib import Path

import torch
from conftest import make_images

from stages.common.device import generator_for
from stages.images.batches import Batches, Order
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing


def test_each_pair_of_seed_and_epoch_has_its_own_stream() -> None:
    pairs = [(seed, epoch) for seed in (0, 1, 2, 42, 2**8, 2**24, 2**32 - 1) for epoch in (0, 1, 2, 2**8)]
    streams = {tuple(torch.rand(4, generator=generator_for(*pair)).tolist()) for pair in pairs}
    assert len(streams) == len(pairs)
    assert torch.equal(torch.rand(4, generator=generator_for(1, 2)), torch.rand(4, generator=generator_for(1, 2)))


def test_neighbouring_seeds_do_not_share_orders(tmp_path: Path) -> None:
    root = make_images(tmp_path, count=20, size=8)
    entries = [
        Entry(path.relative_to(root).as_posix(), 0, path.parent.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.rglob("*.png"))
    ]

    def orders(seed: int) -> list[tuple[float, ...]]:
        batches = Batches(root, entries, Preprocessing(crop=8), 40, 0, order=Order(len(entries), seed))
        means = []
        for epoch in range(4):
            batches.set_epoch(epoch)
            means += [tuple(images.mean(dim=(1, 2, 3)).tolist()) for images, _ in batches]
        return means

    assert len({*orders(1), *orders(2), *orders(3)}) == 12
    assert orders(1) == orders(1)
