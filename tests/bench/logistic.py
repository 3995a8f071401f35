"""scikit-learn's logistic regression on what the frozen backbone of the pipeline makes of the images, for comparison.

Reads the pipeline's files in the present folder, and prints its results as one line of JSON.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.preprocessing import StandardScaler

from stages.common.params import load_params
from stages.images.index import PARTS, count_once, read_index
from stages.network.checkpoint import load_checkpoint
from stages.network.network import cut
from stages.scores.metrics import Labels
from stages.training.batches import read_all
from stages.training.features import BATCH, Kept
from stages.training.phase import open_prefix, prepare
from stages.training.search import PENALTIES, assign_folds
from tests.bench.project import measure_scores

STRENGTHS = [1 / penalty for penalty in PENALTIES]

Features = NDArray[np.float64]


def main() -> None:
    """Choose the strength by the folds by which `train_head` chooses a head; fit and test."""
    params = load_params(Path("params.yaml"))
    device = prepare(params)
    train, val, test = (read_index(Path("data/index") / f"{part}.csv") for part in PARTS)
    entries = [*train, *val, *count_once(test)]
    network, description = load_checkpoint(Path("data/checkpoints/initial.safetensors"))
    prefix = open_prefix(cut(network.to(device), 0)[0], description, device, params)
    rows = torch.cat([batch.flatten(1) for batch in read_all(prefix, entries, Kept(), BATCH, "features")])
    labels = np.array([entry.label for entry in entries])
    folds = assign_folds([*train, *val], params.seed).numpy()
    print(json.dumps(compare(rows.double().numpy(), labels, len(train), folds)))


def compare(features: Features, labels: Labels, count: int, folds: Labels) -> dict[str, dict[str, float]]:
    """Return the test scores of a regression fitted to the training images, and of one also to the validation images.

    Args:
        features: (n, d), of the images of training, validation and test, in this order.
        labels: (n,).
        count: of the training images.
        folds: of the images of training and validation.
    """
    scaled, known = StandardScaler().fit(features[:count]).transform(features), len(folds)
    strength = choose_strength(scaled[:known], labels[:known], folds)
    report = {}
    for name, rows in (("sklearn", count), ("sklearn, train+val", known)):
        started = time.perf_counter()
        fitted = regression(strength).fit(scaled[:rows], labels[:rows])
        seconds = time.perf_counter() - started
        scores = measure_scores(labels[known:], fitted.predict_proba(scaled[known:]))
        report[name] = {"seconds": seconds, **scores}
    return report


def choose_strength(features: Features, labels: Labels, folds: Labels) -> float:
    """Return the C with the lowest log-loss out-of-fold."""
    split, classes = PredefinedSplit(folds), range(labels.max() + 1)

    def loss(strength: float) -> float:
        method = {"cv": split, "method": "predict_proba"}
        return float(
            log_loss(labels, cross_val_predict(regression(strength), features, labels, **method), labels=classes)
        )

    return min(STRENGTHS, key=loss)


def regression(strength: float) -> Any:
    """Return an unfitted regression."""
    return LogisticRegression(C=strength, max_iter=1000)


if __name__ == "__main__":
    main()
