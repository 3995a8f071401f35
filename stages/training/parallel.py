"""What several processes that train one network have to say to each other; what one does alone where it is alone."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torcheval.metrics import Metric
from torcheval.metrics.toolkit import sync_and_compute

from stages.common import ranks


def interleave(rows: Tensor | None) -> Tensor:
    """Return the rows of all places, (n, ...), where each process has those of its share, in order, on the CPU.

    Args:
        rows: (m, ...), `None` if this process has none.
    """
    parts = [part for part in ranks.gather(rows) if part is not None and len(part)]
    if len(parts) == 1:
        return parts[0]
    every = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        every[number :: ranks.count()] = part
    return every


def join_parts(inputs: Tensor, labels: Tensor, places: range) -> tuple[Tensor, Tensor]:
    """Return the inputs and the labels of a whole batch.

    Args:
        inputs: (n, ...), of this process.
        labels: (n,).
        places: n places in the batch.
    """
    if not ranks.joined():
        return inputs, labels
    parts = [part for part in ranks.gather((inputs.cpu(), labels.cpu(), places)) if len(part[2])]
    every, theirs, spread = zip(*parts, strict=True)
    order = torch.tensor([place for own in spread for place in own]).argsort()
    return torch.cat(every)[order].to(inputs.device), torch.cat(theirs)[order].to(labels.device)


def train_together(network: nn.Module) -> nn.Module:
    """Return the network, which from now on trains with the mean gradient of all processes."""
    return DistributedDataParallel(network, forward_sync_buffers=False) if ranks.joined() else network


def weigh(loss: Tensor, own: int, whole: int) -> Tensor:
    """Return what to differentiate, so that the mean gradient of all processes is that of the whole batch.

    Args:
        loss: the mean over this process's pictures; of none, anything that the parameters lead to.
        own: their number.
        whole: the number of all pictures of the batch.
    """
    return loss * (own * ranks.count() / whole)


def compute(metric: Metric[Tensor]) -> Tensor:
    """Return a metric over what all processes have seen."""
    if ranks.joined():
        return sync_and_compute(metric)
    return metric.compute()
