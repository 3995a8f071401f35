"""A network on trial: the head that is found on its frozen features, by folds; how fast it is, and how large."""

import time
from functools import partial

import numpy as np
import torch

from stages.common.params import Params
from stages.images.index import number_groups
from stages.network.initial import build_initial
from stages.network.network import cut
from stages.network.objective import probabilities, weigh_classes
from stages.report.backbones import Tried
from stages.scores.metrics import score
from stages.training.batches import READ_AT_ONCE, read_all
from stages.training.features import BATCH, FrozenPrefix, keep
from stages.training.phase import Entries, open_prefix
from stages.training.search import find_head


def with_network(params: Params, arch: str, weights: str) -> Params:
    """Return the parameters with another network, whose head is found."""
    model = {"arch": arch, "weights": None if weights == "null" else weights, "head": "pooled"}
    update = {
        "model": params.model.model_copy(update=model),
        "train_head": params.train_head.model_copy(update={"search": True, "augment": "none"}),
    }
    return params.model_copy(update=update)


def try_network(params: Params, entries: Entries, device: torch.device) -> Tried:
    """Keep a network's features, find its head, and measure it; raises a `StageError` where it cannot be made."""
    network, description, _ = build_initial(params, entries.train)
    blocks, _ = cut(network.to(device), unfreeze=0)
    prefix = open_prefix(blocks, description, device, params)
    every = [*entries.train, *entries.watched]
    kept = keep(prefix, {len(blocks): every}, params.cache.max_gigabytes)[len(blocks)]
    weights = weigh_classes(params.class_weights, entries.train)
    read = partial(read_all, prefix, kept=kept, batch_size=READ_AT_ONCE, title="features")
    found = find_head(read, entries, params.model.hidden, params.train_head, weights, params.seed, device)
    values = probabilities(found.logits.double(), found.temperature).numpy()
    labels = np.array([entry.label for entry in found.entries])
    scores = score(labels, values, number_groups(found.entries))
    return Tried(
        params.model.arch,
        params.model.weights or "null",
        scores.accuracy,
        scores.accuracy_low,
        scores.accuracy_high,
        scores.loss,
        round(measure_speed(prefix), 1),
        round(sum(tensor.nbytes for tensor in network.state_dict().values()) / 1e6, 1),
        min(params.finetune.unfreeze, len(network.backbone)),
    )


def measure_speed(prefix: FrozenPrefix) -> float:
    """Return how many images a second the backbone takes, without reading them."""
    crop = prefix.preprocessing.crop
    images = torch.zeros(BATCH, 3, crop, crop)
    prefix.forward(images)[0].cpu()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 1 or count < 3:
        prefix.forward(images)[0].cpu()
        count += 1
    return count * BATCH / seconds
