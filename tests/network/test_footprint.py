"""The memory that pictures take on their way through frozen blocks."""

import pytest
import torch
from conftest import families, image_size_of
from torch import nn

from stages.network.backbones import cut_into_blocks, stock_model
from stages.network.footprint import widest_layer


def test_the_widest_layer_counts_what_it_reads_and_writes() -> None:
    wide = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    blocks = nn.Sequential(wide, nn.Conv2d(8, 4, 1))
    assert widest_layer(blocks, 64) == 4 * (3 * 64 * 64 + 8 * 32 * 32)
    assert widest_layer(nn.Sequential(nn.Identity()), 64) == 4 * 3 * 64 * 64
    assert wide.weight.device == torch.device("cpu")


@pytest.mark.parametrize("arch", families())
def test_the_widest_layer_of_each_family_grows_with_the_pictures(arch: str) -> None:
    size = image_size_of(arch)
    blocks = nn.Sequential(*cut_into_blocks(stock_model(arch, size)).blocks.values())
    assert widest_layer(blocks, size) > 4 * 3 * size * size
