"""Training many heads at once, on the device, on features in memory.

Linear heads are logistic regressions with an L2 penalty, as in linear evaluation (DINOv2 trains 52 heads in one pass,
https://arxiv.org/abs/2304.07193); one eigendecomposition serves all of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.common.device import generator_for
from stages.common.params import TrainHead
from stages.network import objective
from stages.network.network import Network
from stages.training.optimizer import make_optimizer, schedule_rate


@dataclass(frozen=True)
class Data:
    """Training data of the heads.

    `features`: (n, d), standardized; `labels`: (n,), on the same device; `outputs`: number of logits; `weights`:
    (classes,), as for `objective.loss`, or `None`.
    """

    features: Tensor
    labels: Tensor
    outputs: int
    weights: Tensor | None = None


def train_linear(
    data: Data, rows: Sequence[Tensor], penalties: Sequence[float], smoothing: float, passes: int, every: int
) -> Iterator[list[nn.Module]]:
    """Train linear heads at once, each with its own images and penalty; yield them after every `every` steps.

    The loss is the sum over the images, plus half the penalty times the squared weights. In the principal axes of the
    features, its curvature has a diagonal bound (Böhning 1992, https://doi.org/10.1007/BF00048682). A step is the
    gradient divided by the bound, which cannot overshoot, with Nesterov's momentum, restarted when it points uphill
    (https://arxiv.org/abs/1204.3982).

    Args:
        data: features and labels of all images.
        rows: positions of the images of each head.
        penalties: one per head, above 0.
        smoothing: label smoothing, in [0, 1).
        passes: number of steps, each over all images.
        every: steps between yields.
    """
    used = torch.unique(torch.cat(list(rows))).to(data.features.device)
    squares, axes = _find_axes(data.features[used])
    features = torch.cat([data.features[used] @ axes, axes.new_ones(len(used), 1)], dim=1)
    labels, heads = data.labels[used], len(rows)
    targets = functional.one_hot(labels, data.outputs).float() if data.outputs > 1 else labels[:, None].float()
    targets = targets * (1 - smoothing) + smoothing / max(2, data.outputs)
    weight = features.new_ones(len(used)) if data.weights is None else data.weights.to(features)[labels]
    counted = torch.stack([torch.isin(used, own.to(used)) for own in rows], dim=1) * weight[:, None]
    squares = torch.cat([squares, squares.new_tensor([float(len(used))])])
    penalty = squares.new_tensor(penalties).repeat(len(squares), 1)
    penalty[-1] = 0  # none for the bias
    curvature = (0.25 if data.outputs == 1 else 0.5) * float(weight.max())
    bound, penalty = (curvature * squares[:, None] + penalty)[:, :, None], penalty[:, :, None]

    last = features.new_zeros(len(squares), heads, data.outputs)
    ahead, momentum = last, features.new_ones(heads)
    for number in range(1, passes + 1):
        logits = (features @ ahead.flatten(1)).view(-1, heads, data.outputs)
        predicted = logits.sigmoid() if data.outputs == 1 else logits.softmax(2)
        errors = (predicted - targets[:, None]) * counted[:, :, None]
        gradient = (features.T @ errors.flatten(1)).view_as(last) + penalty * ahead
        step = ahead - gradient / bound
        uphill = (gradient * (step - last)).sum((0, 2)) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        carried = torch.where(uphill, 0.0, (momentum - 1) / following)
        ahead, last, momentum = step + carried[None, :, None] * (step - last), step, following
        if number % every == 0:
            yield [nn.Sequential(_linear((axes @ last[:-1, head]).T, last[-1, head])) for head in range(heads)]


def _find_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nonzero eigenvalues of `features.T @ features`, (axes,), and their eigenvectors, (d, axes)."""
    wide = features.shape[1] > len(features)
    small = features.T if wide else features
    # In float64, on the CPU: Apple's GPUs have neither this nor `eigh`.
    squares, vectors = torch.linalg.eigh((small.T @ small).cpu().double())
    kept = squares > squares[-1] * 1e-7
    squares, vectors = squares[kept], vectors[:, kept]
    if wide:
        vectors = features.cpu().double().T @ vectors / squares.sqrt()
    return squares.float().to(features.device), vectors.float().to(features.device)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), device="meta")
    layer.weight, layer.bias = (nn.Parameter(tensor.detach().clone().contiguous()) for tensor in (weight, bias))
    return layer


class _Heads(nn.Module):
    """Several heads with a hidden layer and the same initial values: (heads, n, inputs) -> (heads, n, outputs)."""

    def __init__(self, count: int, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__()
        self.weights = nn.ParameterList([layer.weight.T.detach().repeat(count, 1, 1) for layer in (first, last)])
        self.biases = nn.ParameterList([layer.bias.detach().repeat(count, 1, 1) for layer in (first, last)])

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.biases[0], features, self.weights[0]).relu()
        return torch.baddbmm(self.biases[1], hidden, self.weights[1])

    def clip_gradients(self, largest: float) -> None:
        """Limit the norm of each head's gradients: a common limit would depend on the number of heads."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norms = sum(gradient.square().sum((1, 2)) for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient *= (largest / (norms + 1e-6)).clamp(max=1)[:, None, None]

    def single(self, number: int) -> nn.Module:
        first, last = (
            _linear(weight[number].T, bias[number, 0]) for weight, bias in zip(self.weights, self.biases, strict=True)
        )
        return nn.Sequential(first, nn.ReLU(), last)


def train_hidden(
    data: Data, rows: Sequence[Tensor], hidden: int, phase: TrainHead, seed: int
) -> Iterator[list[nn.Module]]:
    """Train heads with `hidden` units at once, each on its own images; yield them after each epoch.

    An epoch takes as many of each head's images, positions `rows`, as the head with the fewest has.
    """
    device, generator = data.features.device, generator_for(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        layers = nn.Linear(data.features.shape[1], hidden), nn.Linear(hidden, data.outputs)
    heads = _Heads(len(rows), *layers).to(device)
    least = min(map(len, rows))
    steps = math.ceil(least / phase.batch_size)
    optimizer = make_optimizer(Network(nn.Sequential(), nn.Sequential(heads)), phase)
    schedule = schedule_rate(optimizer, phase, phase.epochs * steps)
    weights = None if data.weights is None else data.weights.to(device)
    for _ in range(phase.epochs):
        order = torch.stack([own[torch.randperm(len(own), generator=generator)[:least]] for own in rows]).to(device)
        for batch in torch.split(order, phase.batch_size, dim=1):
            logits, labels = heads(data.features[batch]), data.labels[batch]
            # Times the number of heads, so that each has the gradient of its own mean.
            loss = len(rows) * objective.loss(logits.flatten(0, 1), labels.flatten(), weights, phase.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if phase.clip_norm is not None:
                heads.clip_gradients(phase.clip_norm)
            optimizer.step()
            schedule.step()
        yield [heads.single(number) for number in range(len(rows))]
