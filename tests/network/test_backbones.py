"""Every classifier of torchvision, cut into blocks, is the stock model."""

import pytest
import torch
from conftest import FAMILIES, image_size_of, randomize_batchnorm
from torch import nn

from stages.common.cli import StageError
from stages.network.backbones import architectures, cut_into_blocks, stock_model, stock_shapes
from stages.network.layer_table import count_parameters
from stages.network.network import build_network, set_trainable

ALL = architectures()


def stock_with_statistics(arch: str, image_size: int) -> nn.Module:
    torch.manual_seed(0)
    stock = stock_model(arch, image_size).eval()
    randomize_batchnorm(stock)
    return stock


def slow_unless(quick: bool, arch: str) -> object:
    return pytest.param(arch, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("arch", [slow_unless(arch in FAMILIES.values(), arch) for arch in ALL])
def test_the_blocks_and_the_networks_own_head_give_the_stock_models_logits(arch: str) -> None:
    size = image_size_of(arch)
    stock = stock_with_statistics(arch, size)
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        expected = stock(images)
        parts = cut_into_blocks(stock)
        logits = nn.Sequential(*parts.blocks.values(), *parts.head).eval()(images)
    assert logits.shape == (2, 1000)
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("arch", [slow_unless("regnet" not in arch or arch in FAMILIES.values(), arch) for arch in ALL])
def test_blocks_and_head_have_every_parameter_exactly_once_by_torchvisions_names(arch: str) -> None:
    stock = stock_shapes(arch, image_size_of(arch))
    assert type(stock).__name__ in FAMILIES
    names = {id(tensor): name for name, tensor in stock.state_dict(keep_vars=True).items()}
    parts = cut_into_blocks(stock)
    seen = [
        (id(tensor), block)
        for block, module in [*parts.blocks.items(), *(("", layer) for layer in parts.head)]
        for tensor in module.state_dict(keep_vars=True).values()
    ]
    assert len(seen) == len({number for number, _ in seen})
    unused = set(names.values()) - {names[number] for number, _ in seen}
    assert {name.partition(".")[0] for name in unused} <= {"aux1", "aux2", "AuxLogits"}
    for block in parts.blocks:
        first = next((names[number] for number, own in seen if own == block), None)
        # A vision transformer's first tensor is its class token.
        assert first is None or first.startswith(block) or block == "conv_proj", (first, block)


COUNTS = {
    # arch: blocks, parameters of the backbone, trained of these with `unfreeze` 0, 1, 3 and all
    "resnet18": (9, 11_176_512, 0, 4_718_592, 9_568_256, 11_166_912),
    "resnet50": (17, 23_508_032, 0, 4_456_448, 14_942_208, 23_454_912),
    "vit_b_16": (14, 85_798_656, 0, 1_536, 14_177_280, 85_798_656),
    "swin_t": (17, 27_519_354, 0, 1_536, 14_185_392, 27_519_354),
    "regnet_y_400mf": (17, 3_903_144, 0, 516_230, 1_548_690, 3_875_992),
    "convnext_tiny": (22, 27_818_592, 0, 4_763_136, 14_289_408, 27_818_592),
    "efficientnet_b0": (18, 4_007_548, 0, 409_600, 1_704_544, 3_965_532),
}


@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts(arch: str) -> None:
    network = build_network(stock_shapes(arch), "pooled", 8, outputs=1, image_size=224)
    blocks = len(network.backbone)
    trained = []
    for unfreeze in (0, 1, 3, blocks):
        set_trainable(network, unfreeze)
        head = sum(parameter.numel() for parameter in network.classifier.parameters())
        trained.append(count_parameters(network)["trainable"] - head)
    total = sum(parameter.numel() for parameter in network.backbone.parameters())
    assert (blocks, total, *trained) == COUNTS[arch]


@pytest.mark.parametrize(
    ("arch", "size", "advice"),
    [("vit_b_16", 100, "multiples of 16 pixels, is 100; use 96 or 112"), ("maxvit_t", 64, "use 224 or 448")],
)
def test_an_image_size_that_does_not_fit_the_patches_is_refused_with_one_that_does(
    arch: str, size: int, advice: str
) -> None:
    with pytest.raises(StageError, match=f"model.image_size: {arch} .*{advice}"):
        stock_model(arch, size)


def test_images_too_small_for_the_network_are_refused() -> None:
    with pytest.raises(StageError, match=r"model\.image_size: 64 is too small"):
        build_network(stock_model("inception_v3", 64), "pooled", 8, outputs=1, image_size=64)


@pytest.mark.parametrize("arch", ["fasterrcnn_resnet50_fpn", "raft_small", "quantized_resnet18", "r3d_18", "resnet19"])
def test_a_name_that_is_not_a_classifier_is_refused_with_similar_ones(arch: str) -> None:
    with pytest.raises(StageError, match=r"model\.arch: .* is no classifier of torchvision's; "):
        stock_model(arch)


def test_squeezenets_own_head_can_give_negative_logits() -> None:
    """It has a ReLU behind its last layer, which would keep a logit from being negative."""
    torch.manual_seed(0)
    network = build_network(stock_model("squeezenet1_1", 64), "original", 8, outputs=1, image_size=64).eval()
    nn.init.constant_(network.classifier[1].bias, -5.0)
    with torch.inference_mode():
        assert (network(torch.rand(3, 3, 64, 64)) < 0).all()
