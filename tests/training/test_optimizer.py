"""The course of the learning rate, and which rate each block learns at."""

import math
from itertools import pairwise

import pytest
import torch
from test_training import make_phase

from stages.network.backbones import stock_model
from stages.network.network import build_network, cut, set_trainable
from stages.training.optimizer import make_optimizer, rate_factor, schedule_rate


def rates(steps: int, schedule: str, warmup: float) -> list[float]:
    return [rate_factor(step, steps, schedule, warmup) for step in range(steps)]


def test_a_constant_rate_without_warmup_is_exactly_the_rate() -> None:
    assert rates(7, "constant", 0) == [1.0] * 7


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warmup_rises_evenly_from_above_zero_to_the_full_rate(schedule: str) -> None:
    factors = rates(400, schedule, 0.1)
    assert factors[:41] == pytest.approx([step / 41 for step in range(1, 42)])


@pytest.mark.parametrize(("steps", "rising"), [(12, 6), (30, 10), (100, 10), (200, 20)])
def test_a_short_phase_still_warms_up_over_several_steps(steps: int, rising: int) -> None:
    factors = rates(steps, "cosine", 0.1)
    assert factors[: rising + 1] == pytest.approx([step / (rising + 1) for step in range(1, rising + 2)])
    assert max(factors[rising + 1 :]) < 1


def test_a_cosine_falls_from_the_full_rate_to_nearly_zero_and_is_halfway_in_the_middle() -> None:
    factors = rates(100, "cosine", 0)
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert all(later < earlier for earlier, later in pairwise(factors))
    assert rates(100, "cosine", 0.2)[20:] == rates(80, "cosine", 0)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_phase_of_few_steps_has_rates_above_zero(schedule: str, steps: int, warmup: float) -> None:
    assert all(0 < factor <= 1 for factor in rates(steps, schedule, warmup))


def tail(unfreeze: int) -> torch.nn.Module:
    network = build_network(stock_model("mobilenet_v3_small"), "pooled", 4, outputs=1, image_size=32)
    set_trainable(network, unfreeze)
    return cut(network, unfreeze)[1]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_biases_and_normalization_layers_do_not_decay(optimizer: str) -> None:
    network = build_network(stock_model("convnext_tiny", 32), "pooled", 4, outputs=1, image_size=32)
    set_trainable(network, 1)
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    for tensor in network.parameters():
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    make_optimizer(network, make_phase(optimizer=optimizer, lr=0.1, weight_decay=0.5)).step()
    moved = {name for name, tensor in network.named_parameters() if not torch.equal(tensor, before[name])}
    trained = {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}
    assert moved == {name for name, tensor in trained.items() if tensor.dim() > 1}
    assert any("bias" in name for name in trained.keys() - moved)


def test_layer_decay_lowers_the_rate_of_each_block_towards_the_input() -> None:
    network = tail(3)
    optimizer = make_optimizer(network, make_phase(lr=0.1), layer_decay=0.5)
    rate_of = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
    parts = [network.classifier, *reversed(network.backbone)]
    for depth, part in enumerate(parts):
        for parameter in part.parameters():
            if parameter.requires_grad:
                assert rate_of.pop(id(parameter)) == pytest.approx(0.1 * 0.5**depth)
    assert not rate_of


def test_without_layer_decay_all_blocks_have_one_rate() -> None:
    assert {group["lr"] for group in make_optimizer(tail(3), make_phase(lr=0.1)).param_groups} == {0.1}


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {"amsgrad": True}),
        ("adamw", torch.optim.AdamW, {"amsgrad": False}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_the_named_optimizer_is_used(name: str, kind: type, options: dict[str, object]) -> None:
    optimizer = make_optimizer(tail(1), make_phase(optimizer=name, weight_decay=0.3))
    assert type(optimizer) is kind
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    for group in optimizer.param_groups:
        assert options.items() <= group.items()


def test_a_resumed_schedule_continues_where_it_stopped() -> None:
    phase = make_phase(schedule="cosine", warmup=0.2, lr=0.1)

    def take(optimizer: torch.optim.Optimizer, count: int, done: int = 0) -> list[list[float]]:
        schedule = schedule_rate(optimizer, phase, 20, done)
        seen = []
        for _ in range(count):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return seen

    whole = take(make_optimizer(tail(2), phase, 0.5), 20)
    first, second = make_optimizer(tail(2), phase, 0.5), make_optimizer(tail(2), phase, 0.5)
    begun = take(first, 13)
    second.load_state_dict(first.state_dict())
    assert begun + take(second, 7, done=13) == whole
    assert math.isclose(max(rate for rates in whole for rate in rates), 0.1)
