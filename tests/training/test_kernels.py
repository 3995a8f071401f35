"""Fused networks compute and train what the plain ones do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stages.common.params import Head
from stages.network import objective
from stages.network.backbones import stock_model
from stages.network.network import Network, build_network, calibrate_batchnorm, set_trainable
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
def test_logits_and_gradients_equal_those_of_the_plain_network(arch: str, fuse: Callable[[Network], Network]) -> None:
    plain = network(arch, "pooled")
    plain.eval()
    fused = fuse(plain).eval()
    images = torch.randn(5, 3, 32, 32)
    assert torch.allclose(fused(images), plain(images), atol=1e-4)
    for expected, got in zip(gradients(plain, plain), gradients(fused, plain), strict=True):
        assert torch.allclose(got, expected, atol=1e-4 * max(1.0, expected.abs().max().item()))


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
