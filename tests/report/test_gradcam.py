"""Grad-CAM finds planted evidence in one network of every family."""

import pytest
import torch
from conftest import families
from made_up import looks_at_colors
from torch import Tensor, nn

from stages.network.backbones import stock_model
from stages.network.network import Network, build_network, calibrate_batchnorm
from stages.report.gradcam import enlarge, find_block, grad_cam

RED = torch.tensor([2.0, -2.0, 1.0])[:, None, None]


# The four are built of the same blocks as others.
ALIKE = {"googlenet", "mnasnet0_5", "mobilenet_v2", "regnet_y_400mf"}
SIZES = [
    pytest.param(arch, 299 if arch == "inception_v3" else 224, marks=pytest.mark.slow if arch in ALIKE else one.marks)
    for one in families()
    for arch in one.values
]


def quiet(count: int, size: int, generator: torch.Generator) -> Tensor:
    return 0.2 * torch.randn(count, 3, size, size, generator=generator)


def planted(corners: Tensor, size: int, colored: bool, generator: torch.Generator) -> Tensor:
    """Quiet images, each with a patch, a quarter as wide, at its corner."""
    images, side = quiet(len(corners), size, generator), size // 4
    for image, (row, column) in zip(images, corners.tolist(), strict=True):
        patch = RED if colored else 2 * torch.randn(3, side, side, generator=generator)
        image[:, row : row + side, column : column + side] += patch
    return images


def sees_patches(arch: str, size: int, colored: bool, generator: torch.Generator) -> Network:
    """A random backbone; the head looks for what patches, wherever they are, change in what enters it."""
    torch.manual_seed(0)
    network = build_network(stock_model(arch, size), "pooled", hidden=1, outputs=1, image_size=size)
    for name, parameter in network.named_parameters():
        if name.endswith("layer_scale"):  # of ConvNeXt: 1e-6 would switch its blocks off
            nn.init.ones_(parameter)
    anywhere = torch.randint(size - size // 4, (6, 2), generator=generator)
    without, patched = quiet(6, size, generator), planted(anywhere, size, colored, generator)
    calibrate_batchnorm(network, [torch.cat([without, patched])])
    *reduce, linear, _, last = network.classifier
    with torch.no_grad():
        before, after = (nn.Sequential(network.backbone, *reduce)(images).mean(0) for images in (without, patched))
        # Only what is new: behind LayerNorm, what quiet images have may be negative everywhere.
        direction = (after - before) - (after - before) @ before / (before @ before) * before
        linear.weight.copy_(direction[None] / direction.norm())
        linear.bias.fill_(100.0)  # the ReLU behind it lets all through
        last.weight.fill_(1.0)
    return network


@pytest.mark.parametrize(("arch", "size"), [*SIZES, ("mobilenet_v3_large", 64)])
def test_a_patch_is_found_in_its_quarter_of_the_image(arch: str, size: int) -> None:
    colored = arch in ("convnext_tiny", "swin_t", "vit_b_32")  # LayerNorm takes away how strong noise is
    generator = torch.Generator().manual_seed(1)
    network = sees_patches(arch, size, colored, generator)
    near, far = size // 8, size - size // 4 - size // 8
    corners = torch.tensor([[near, near], [near, far], [far, near], [far, far]])
    block = find_block(network, size)
    assert block is not None
    maps = grad_cam(network, planted(corners, size, colored, generator), torch.ones(4, dtype=torch.int64), block)
    rows, columns = maps.shape[1:]
    assert 7 <= rows == columns <= 14
    assert maps.min() >= 0
    assert maps.amax(dim=(1, 2)).tolist() == pytest.approx([1.0] * 4)
    half = (rows + 1) // 2
    sides = (slice(half), slice(-half, None))
    quarters = torch.stack([maps[:, r, c].mean(dim=(1, 2)) for r in sides for c in sides], dim=1)
    assert (quarters.argmax(dim=1) == torch.arange(4)).sum() >= 3  # by chance in 5 of 100 cases


@pytest.mark.parametrize(
    ("arch", "size", "block", "side"),
    [
        ("mobilenet_v3_large", 224, 16, 7),
        ("mobilenet_v3_large", 64, 6, 8),  # the last block has 2 x 2
        ("resnet18", 64, 4, 8),
        ("vit_b_32", 224, 11, 7),
        ("vit_b_32", 64, None, None),
        ("alexnet", 64, 0, 7),
    ],
)
def test_grad_cam_uses_the_last_block_with_a_spatial_map(
    arch: str, size: int, block: int | None, side: int | None
) -> None:
    network = build_network(stock_model(arch, size), "pooled", 8, 1, size).eval()
    assert find_block(network, size) == block
    if block is not None:
        maps = grad_cam(network, torch.randn(2, 3, size, size), torch.tensor([0, 1]), block)
        assert maps.shape == (2, side, side)


def red_and_green() -> Tensor:
    """A red square in the upper left of a black image, a green one in the lower right."""
    images = torch.zeros(1, 3, 32, 32)
    images[0, 0, 4:12, 4:12] = 1
    images[0, 1, 20:28, 20:28] = 1
    return images


@pytest.mark.parametrize(("label", "square"), [(0, slice(2, 14)), (1, slice(18, 30))], ids=["red", "green"])
def test_grad_cam_puts_its_heat_on_the_evidence_of_the_class(label: int, square: slice) -> None:
    maps = grad_cam(looks_at_colors(3), red_and_green(), torch.tensor([label]), 1)
    assert maps.shape == (1, 8, 8)
    heat = enlarge(maps, 32)[0]
    assert heat.max() == pytest.approx(1)
    assert heat[square, square].sum() / heat.sum() > 0.99
    assert not grad_cam(looks_at_colors(3), red_and_green(), torch.tensor([2]), 1).any()


def test_grad_cam_of_one_logit_takes_its_sign_from_the_class() -> None:
    maps = grad_cam(looks_at_colors(1), red_and_green().repeat(2, 1, 1, 1), torch.tensor([1, 0]), 1)
    assert maps[0, 1:3, 1:3].min() == pytest.approx(1)
    assert maps[0].sum() == pytest.approx(4)
    assert not maps[1].any()
