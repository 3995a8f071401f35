"""Fused networks compute and train what the plain ones do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops.misc import SqueezeExcitation

from stages.common.params import Head
from stages.network import objective
from stages.network.backbones import stock_model
from stages.network.network import Network, build_network, calibrate_batchnorm, set_trainable
from stages.training import kernels
from stages.training.kernels import fold_batchnorm, fuse_for_training

CPU = torch.device("cpu")


def network(arch: str, head: Head = "flatten") -> Network:
    torch.manual_seed(0)
    made = build_network(stock_model(arch), head, 8, outputs=1, image_size=32)
    calibrate_batchnorm(made, [torch.randn(32, 3, 32, 32)])
    set_trainable(made, 2)
    return made


def gradients(module: nn.Module, of: Network) -> list[Tensor]:
    of.zero_grad()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    objective.loss(module(images).float(), torch.tensor([0, 1, 0, 1, 1, 0])).backward()
    return [parameter.grad.clone() for parameter in of.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "vgg11_bn"])
@pytest.mark.parametrize("fuse", [fold_batchnorm, lambda module: fuse_for_training(module, CPU, "float32")])
def test_logits_and_gradients_are_those_of_the_plain_network(
    arch: str, fuse: Callable[[Network], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_WIDE", 1)
    plain = network(arch, "pooled")
    plain.eval()
    fused = fuse(plain).eval()
    images = torch.randn(5, 3, 32, 32)
    assert torch.allclose(fused(images), plain(images), atol=1e-4)
    for expected, got in zip(gradients(plain, plain), gradients(fused, plain), strict=True):
        assert torch.allclose(got, expected, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("maps", [(9, 8), (4, 5), (2, 2), (1, 1)])
@pytest.mark.parametrize(("size", "bias"), [(5, False), (5, True), (7, True)])
def test_convolutions_of_single_channels_have_the_gradients_of_plain_ones(
    size: int, bias: bool, maps: tuple[int, int], stride: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 12, size, stride, padding=size // 2, groups=12, bias=bias)
    plain, followed = nn.Sequential(conv), nn.Sequential(conv, nn.BatchNorm2d(12).eval().requires_grad_(False))
    images = torch.randn(3, 12, *maps).to(memory_format=torch.channels_last)
    for module in (plain, followed):
        fused = fuse_for_training(module, CPU, "float32").eval()
        results = []
        for each in (module, fused):
            inputs = images.clone().requires_grad_()
            outputs = each(inputs)
            conv.zero_grad()
            (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum().backward()
            results.append([outputs, inputs.grad, *(parameter.grad.clone() for parameter in conv.parameters())])
        for expected, got in zip(*results, strict=True):
            assert torch.allclose(got, expected, atol=1e-4 * max(1.0, expected.abs().max().item()))
        assert "ConvolveEachChannel" in str(fused(images.clone().requires_grad_()).grad_fn)


@pytest.mark.parametrize("frozen", [(), ("fc1.weight",), ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")])
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.SiLU(inplace=True)])
def test_squeeze_and_excitation_has_the_gradients_of_the_plain_one(
    activation: Callable[[], nn.Module], frozen: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    layer = SqueezeExcitation(12, 4, activation, nn.Hardsigmoid)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    plain = nn.Sequential(layer)
    images = torch.randn(3, 12, 9, 8).to(memory_format=torch.channels_last)
    results = []
    for module in (plain, fuse_for_training(plain, CPU, "float32")):
        inputs = images.clone().requires_grad_()
        outputs = module(inputs)
        layer.zero_grad()
        (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum().backward()
        results.append([outputs, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
        with torch.no_grad():
            assert torch.allclose(module(images), outputs, atol=1e-6)
    assert "SqueezeAndExcite" in str(outputs.grad_fn)
    for expected, got in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_gradients_of_squeeze_and_excitation_have_the_strides_that_several_processes_expect() -> None:
    layer = SqueezeExcitation(12, 4).to(memory_format=torch.channels_last)
    strides = {}
    for name, parameter in layer.named_parameters():
        # The last of its calls is that with what reaches the parameter.
        parameter.register_hook(lambda gradient, name=name: strides.update({name: gradient.stride()}))
    fuse_for_training(nn.Sequential(layer), CPU, "float32")(torch.randn(3, 12, 9, 8)).sum().backward()
    assert strides == {name: parameter.stride() for name, parameter in layer.named_parameters()}


def test_a_wide_linear_layer_takes_inputs_of_any_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WIDE", 1)
    plain = nn.Sequential(nn.Linear(6, 5))
    fused = fuse_for_training(plain, CPU, "float32")
    for shape in ((6,), (3, 6), (2, 3, 6), (2, 3, 4, 6)):
        inputs = torch.randn(shape)
        assert torch.allclose(fused(inputs), plain(inputs), atol=1e-6)


def test_a_fused_network_shares_the_tensors_and_leaves_batchnorm_as_it_was() -> None:
    plain = network("mobilenet_v3_small")
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    fused = fuse_for_training(plain, CPU, "float32").train()
    trainable = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} <= {id(parameter) for parameter in fused.parameters()}
    gradients(fused, plain)
    torch.optim.SGD(trainable, lr=0.1).step()
    changed = {key for key, tensor in plain.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {name for name, parameter in plain.named_parameters() if parameter.requires_grad}


def test_bfloat16_trains_nearly_the_same() -> None:
    plain = network("mobilenet_v3_small").eval()
    fused = fuse_for_training(plain, CPU, "bfloat16").eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fused(images).float()
    assert torch.allclose(logits, plain(images), atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(fused, plain)
    for expected, got in zip(gradients(plain, plain), rough, strict=True):
        assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.95
