"""Heads, freezing and weights on torchvision's architectures."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import families, image_size_of
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.cli import StageError
from stages.common.params import Head
from stages.images.preprocessing import Preprocessing
from stages.network.backbones import stock_model
from stages.network.layer_table import count_parameters
from stages.network.network import (
    Network,
    build_network,
    calibrate_batchnorm,
    cut,
    describe_untrained,
    require_blocks,
    set_trainable,
)
from stages.network.weights import METADATA_KEY, find_weights, load_into


def large(head: str) -> Network:
    return build_network(stock_model("mobilenet_v3_large"), head, 500, outputs=1, image_size=224)  # type: ignore[arg-type]


def small() -> Network:
    return build_network(stock_model("mobilenet_v3_small"), "pooled", 8, outputs=1, image_size=32)


def test_parameter_counts_of_the_stock_network() -> None:
    stock = stock_model("mobilenet_v3_large")
    assert sum(parameter.numel() for parameter in stock.parameters()) == 5_483_032
    assert all(parameter.requires_grad for parameter in stock.parameters())
    stock.features.requires_grad_(False)
    trainable = sum(parameter.numel() for parameter in stock.parameters() if parameter.requires_grad)
    assert (trainable, 5_483_032 - trainable) == (2_511_080, 2_971_952)


@pytest.mark.parametrize(
    ("head", "unfreeze", "total", "trainable", "frozen"),
    [
        ("pooled", 0, 3_452_953, 481_001, 2_971_952),
        ("flatten", 0, 26_492_953, 23_521_001, 2_971_952),
        ("flatten", 3, 26_492_953, 25_261_001, 1_231_952),
    ],
)
def test_parameter_counts_with_a_new_head(head: str, unfreeze: int, total: int, trainable: int, frozen: int) -> None:
    network = large(head)
    set_trainable(network, unfreeze)
    assert count_parameters(network) == {"total": total, "trainable": trainable, "frozen": frozen}


@pytest.mark.parametrize("unfreeze", [0, 1, 13])
def test_the_last_blocks_are_trainable_but_for_batchnorm(unfreeze: int) -> None:
    network = small()
    set_trainable(network, unfreeze)
    assert all(parameter.requires_grad for parameter in network.classifier.parameters())
    for position, block in enumerate(network.backbone):
        for module in block.modules():
            expected = position >= 13 - unfreeze and not isinstance(module, _BatchNorm)
            assert all(parameter.requires_grad == expected for parameter in module.parameters(recurse=False))


@pytest.mark.parametrize("unfreeze", [14, 99, -1])
def test_unfreeze_out_of_range_is_refused(unfreeze: int) -> None:
    for refuse in (set_trainable, require_blocks):
        with pytest.raises(StageError, match=f"finetune.unfreeze: should be from 0 to 13.* is {unfreeze}"):
            refuse(small(), unfreeze)


def test_refreezing_leaves_nothing_of_an_earlier_phase_trainable() -> None:
    network = small()
    set_trainable(network, 13)
    set_trainable(network, 0)
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())


def test_train_returns_the_network_and_leaves_batchnorm_and_frozen_blocks_in_evaluation_mode() -> None:
    network = build_network(stock_model("efficientnet_b0"), "original", 8, outputs=3, image_size=64)
    set_trainable(network, 2)
    assert network.train() is network
    assert network.training
    assert network.classifier.training
    assert not any(module.training for module in network.modules() if isinstance(module, _BatchNorm))
    assert not any(module.training for block in network.backbone[:-2] for module in block.modules())
    assert network.backbone[-2].training
    assert network.eval() is network
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("head", ["flatten", "pooled", "original"])
@pytest.mark.parametrize("arch", families())
def test_a_new_head_fits_every_family(arch: str, head: str) -> None:
    size = image_size_of(arch)
    network = build_network(stock_model(arch, size), head, 8, outputs=3, image_size=size)  # type: ignore[arg-type]
    set_trainable(network, 1)
    logits = network(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 3)
    logits.sum().backward()


def test_the_original_head_keeps_all_but_the_last_layer() -> None:
    stock = stock_model("mobilenet_v3_small")
    first = stock.classifier[0]
    network = build_network(stock, "original", 8, outputs=1, image_size=32)
    assert any(layer is first for layer in network.classifier)
    assert network.classifier[-1].out_features == 1


def test_a_similar_architecture_is_suggested() -> None:
    with pytest.raises(StageError, match=r"model\.arch: 'mobilenet_v3_larg'.*mobilenet_v3_large"):
        stock_model("mobilenet_v3_larg")


def test_calibrating_batchnorm_sets_the_statistics_and_nothing_else() -> None:
    torch.manual_seed(0)
    network = small()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images = torch.rand(32, 3, 32, 32)
    calibrate_batchnorm(network, [images, images])
    for key, tensor in network.state_dict().items():
        statistics = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, before[key]) != statistics, key
    first = network.backbone[0][0](images)
    assert torch.allclose(network.backbone[0][1].running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert not any(module.training for module in network.modules())


def weights_of(model: nn.Module, tmp_path: Path, drop: str = "classifier.", dtype: torch.dtype | None = None) -> Path:
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(drop)}
    if dtype:
        tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    preprocessing = {"resize": 64, "crop": 48, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}
    save_file(tensors, tmp_path / "weights.safetensors", {METADATA_KEY: json.dumps({"preprocessing": preprocessing})})
    return tmp_path / "weights.safetensors"


def test_a_file_without_classifier_gives_the_backbone_and_its_preprocessing(tmp_path: Path) -> None:
    source, target = stock_model("mobilenet_v3_small"), stock_model("mobilenet_v3_small")
    weights = find_weights("mobilenet_v3_small", str(weights_of(source, tmp_path, dtype=torch.float16)))
    load_into(target, weights, "mobilenet_v3_small")
    for key, tensor in target.features.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, source.features.state_dict()[key].to(torch.float16).to(tensor.dtype)), key
    assert weights.preprocessing == Preprocessing(64, 48, (0.5, 0.5, 0.5), (1, 1, 1))
    scaled = weights.preprocessing.framed(96, None)
    assert (scaled.resize, scaled.crop, scaled.mean) == (None, 96, (0.5, 0.5, 0.5))


def test_a_pth_file_loads_with_its_classifier(tmp_path: Path) -> None:
    source, target = stock_model("mobilenet_v3_small"), stock_model("mobilenet_v3_small")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    weights = find_weights("mobilenet_v3_small", str(tmp_path / "weights.pth"))
    load_into(target, weights, "mobilenet_v3_small")
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in target.state_dict().items())


@pytest.mark.parametrize(
    ("arch", "head", "kept"),
    [
        ("mobilenet_v3_small", "flatten", (576, 2, 2)),
        ("mobilenet_v3_small", "pooled", (576,)),
        ("mobilenet_v3_small", "original", (576,)),
        ("shufflenet_v2_x0_5", "original", (1024,)),
        ("resnet18", "pooled", (512,)),
        ("squeezenet1_1", "original", (512, 3, 3)),
        pytest.param("convnext_tiny", "original", (768, 1, 1), marks=pytest.mark.slow),
        pytest.param("vit_b_32", "pooled", (768,), marks=pytest.mark.slow),
    ],
)
def test_pooling_is_left_to_the_frozen_prefix(arch: str, head: Head, kept: tuple[int, ...]) -> None:
    network = build_network(stock_model(arch, 64), head, 8, 3, 64).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = network(images)
        blocks, tail = cut(network, unfreeze=0)
        activations = blocks.eval()(images)
        assert activations.shape == (2, *kept)
        assert torch.equal(tail.eval()(activations), plain)
        blocks, tail = cut(network, unfreeze=2)
        assert torch.equal(tail.eval()(blocks.eval()(images)), plain)
    assert len(blocks) == len(network.backbone) - 2


def test_blocks_without_trainable_parameters_are_named() -> None:
    dense = build_network(stock_model("densenet121"), "pooled", 8, outputs=1, image_size=32)
    set_trainable(dense, 1)
    assert "nothing is trained in features.norm5: it has only BatchNorm" in str(describe_untrained(dense, 1))
    set_trainable(dense, 2)
    assert "features.norm5:" in str(describe_untrained(dense, 2))
    mobile = build_network(stock_model("mobilenet_v3_small"), "pooled", 8, outputs=1, image_size=32)
    set_trainable(mobile, 3)
    assert describe_untrained(mobile, 3) is None


def test_a_linear_head_is_built_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear = build_network(stock_model("mobilenet_v3_small"), "pooled", 0, outputs=3, image_size=32)
    assert [layer.weight.shape for layer in linear.classifier if isinstance(layer, nn.Linear)] == [(3, 576)]
