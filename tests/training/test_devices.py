"""What would go wrong on a GPU, found without one: tensors that say they are on one, and have no values.

An operation on tensors of two devices fails on them as it would there, and so does one that has to wait for a value.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import families, image_size_of
from test_training import make_phase
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stages.common.ranks import Share
from stages.images.preprocessing import Preprocessing
from stages.network.backbones import stock_model
from stages.network.network import Network, build_network, cut, set_trainable
from stages.training import loop
from stages.training.batches import Part
from stages.training.features import FrozenPrefix
from stages.training.heads import Data, train_hidden
from stages.training.loop import Trainer
from stages.training.optimizer import make_optimizer

CUDA = torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class NoWaiting(TorchDispatchMode):
    """Fails where the processor would wait for the GPU: a tensor is copied to it, or a value read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"{name} waits for a value"
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor) and result.device.type == "cpu":
            given = [one for one in args if isinstance(one, Tensor)]
            assert all(one.device.type == "cpu" for one in given), f"{name} copies from the GPU"
        return result


@contextmanager
def pretended(network: Network, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without values, those of the network on the device."""
    with FakeTensorMode():
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
        # They are there already, and such tensors cannot be exchanged.
        monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
        yield


@pytest.mark.parametrize("arch", families())
def test_features_and_a_step_stay_on_the_gpu_and_never_synchronize(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, unfreeze = image_size_of(arch), 2
    network = build_network(stock_model(arch, size), "pooled", 8, 3, size)
    set_trainable(network, unfreeze)
    with pretended(network, CUDA, monkeypatch):
        blocks, tail = cut(network, unfreeze)
        prefix = FrozenPrefix(blocks, Path(), Preprocessing(crop=size), CUDA, "float32", 0, Share())
        with NoWaiting():
            (inputs,) = prefix.forward(torch.empty(5, 3, size, size))
        assert inputs.device.type == "cuda"
        phase = make_phase(lr=1e-3, clip_norm=1.0, label_smoothing=0.1, weight_decay=0.1)
        trainer = Trainer(tail, CUDA, "float32", torch.ones(3))
        optimizer = make_optimizer(tail, phase)

        def backward(loss: Tensor) -> None:  # autograd's own thread would ask for the GPU
            assert loss.device.type == "cuda"
            for tensor in tail.parameters():
                tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None

        monkeypatch.setattr(Tensor, "backward", backward)
        part = Part(inputs, torch.zeros(5, dtype=torch.int64, device=CUDA), range(5), 5)
        with NoWaiting():
            loss, logits = trainer.step(part, optimizer, phase)
            assert trainer.logits(inputs).shape == logits.shape == (5, 3)
        assert loss.device.type == logits.device.type == "cuda"


@pytest.mark.parametrize("arch", families())
def test_a_step_runs_backwards_on_one_device(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Gradients too, which tensors that pretend cannot have: on a device without values.
    size, meta = image_size_of(arch), torch.device("meta")
    network = build_network(stock_model(arch, size), "pooled", 8, 1, size).to(meta)
    set_trainable(network, 1)
    blocks, tail = cut(network, 1)
    with torch.no_grad():
        inputs = blocks.eval()(torch.empty(4, 3, size, size, device=meta))
    phase = make_phase(lr=1e-3, optimizer="sgd")
    monkeypatch.setattr(loop, "autocast", lambda *_: nullcontext())  # there is none on this device
    trainer = Trainer(tail, meta)
    part = Part(inputs, torch.zeros(4, dtype=torch.int64, device=meta), range(4), 4)
    loss, _ = trainer.step(part, make_optimizer(tail, phase), phase)
    assert loss.device == meta
    trained = [tensor for tensor in tail.parameters() if tensor.requires_grad]
    assert trained
    assert all(tensor.grad is not None and tensor.grad.device == meta for tensor in trained)


def test_heads_with_a_hidden_layer_are_searched_for_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: None)
    with FakeTensorMode():
        data = Data(torch.empty(30, 7, device=CUDA), torch.zeros(30, dtype=torch.int64, device=CUDA), 3)
        monkeypatch.setattr(nn.Module, "to", move)
        phase = make_phase(lr=1e-3, optimizer="adamw", epochs=2, batch_size=8)
        rows = [torch.arange(12), torch.arange(14)]
        for heads in train_hidden(data, rows, 4, phase, seed=0):
            assert [head(data.features).device.type for head in heads] == ["cuda", "cuda"]


def move(module: nn.Module, device: torch.device) -> nn.Module:
    for parent in module.modules():
        for name, tensor in parent._parameters.items():
            if tensor is not None:
                parent._parameters[name] = nn.Parameter(torch.empty_like(tensor, device=device))
    return module
