"""What the probabilities are worth, whether fine-tuning helped, and the file that the probabilities are kept in.

`python -m stages.common.scoring metrics/evaluation.json` tells the result again.
"""

import argparse
import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, log_loss, precision_recall_fscore_support, roc_auc_score

from stages.common.command import run
from stages.common.files import write_text
from stages.common.index import Entry

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

CONFIDENCE = 0.95
CALIBRATION_BINS = 15


def predict(probabilities: Probabilities) -> Labels:
    """Return the predicted labels (n,) for probabilities (n, classes); of two, 1 from a probability of 0.5 up."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= 0.5).astype(np.int64)
    labels: Labels = probabilities.argmax(axis=1)
    return labels


def score(labels: Labels, probabilities: Probabilities, classes: Sequence[str]) -> dict[str, Any]:
    """Score one model on at least one picture. A number that is undefined is `None`.

    Args:
        labels: (n,).
        probabilities: (n, classes).
        classes: names, in the order of their labels.

    Returns:
        `accuracy`, and its 95% interval by Wilson's score method (https://doi.org/10.1080/01621459.1927.10502953) from
        `accuracy_low` to `accuracy_high`;
        `balanced_accuracy`: the mean recall of the classes that are in the test set;
        `loss`: mean log-loss, nats;
        `auroc` and `average_precision`: of two classes, those of class 1; of more, the mean over each class against all
        others. A class without a picture in the test set has neither, and no `auroc` if all pictures are of that class;
        `f1_macro`: the mean over the classes that are in the test set or among the predictions;
        `brier`: the mean squared error of the probability of class 1, in [0, 1], for two classes; for more, the sum of
        the squared errors over the classes, in [0, 2] (Brier 1950), as scikit-learn's `brier_score_loss` has it;
        `ece`: see `expected_calibration_error`;
        `classes`: class name -> `precision` (`None`: never predicted), `recall` (`None`: not in the test set),
        `support` (pictures in the test set).
    """
    predicted = predict(probabilities)
    right = predicted == labels
    numbers = np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=numbers, zero_division=np.nan
    )
    low, high = wilson_interval(int(right.sum()), len(labels))
    ranked = [1] if len(classes) == 2 else list(range(len(classes)))
    positives = [labels == label for label in ranked]
    errors = probabilities - (labels[:, None] == numbers)
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": _mean(recall),
        "loss": float(log_loss(labels, probabilities, labels=numbers)),
        "auroc": _mean(
            roc_auc_score(positive, probabilities[:, label])
            for label, positive in zip(ranked, positives, strict=True)
            if 0 < positive.sum() < len(labels)
        ),
        "average_precision": _mean(
            average_precision_score(positive, probabilities[:, label])
            for label, positive in zip(ranked, positives, strict=True)
            if positive.any()
        ),
        "f1_macro": _mean(f1),
        "brier": float((errors[:, ranked] ** 2).sum(axis=1).mean()),
        "ece": expected_calibration_error(right, probabilities.max(axis=1)),
        "classes": {
            name: {
                "precision": _number(precision[label]),
                "recall": _number(recall[label]),
                "support": int(support[label]),
            }
            for label, name in enumerate(classes)
        },
    }


def compare(labels: Labels, head: Probabilities, finetuned: Probabilities) -> dict[str, Any]:
    """Return what fine-tuning added, on the same pictures: fine-tuned minus head.

    Args:
        labels: (n,).
        head: probabilities (n, classes).
        finetuned: likewise.

    Returns:
        `accuracy`, and its 95% interval (`paired_interval`) from `accuracy_low` to `accuracy_high`;
        `loss`: negative where fine-tuning lowered it;
        `fixed` and `broken`: the number of pictures that only the fine-tuned, or only the head checkpoint gets right;
        `mcnemar_p`: the exact two-sided p-value of McNemar's test (https://doi.org/10.1007/BF02295996): were both
        checkpoints equally good, `fixed` would be as tosses of a coin. 1 where there is nothing to toss for;
        `verdict`: `no evidence` where that p-value is not below 0.05, else `better` or `worse`.
    """
    right, right_after = predict(head) == labels, predict(finetuned) == labels
    fixed, broken = int((right_after & ~right).sum()), int((right & ~right_after).sum())
    low, high = paired_interval(int((right & right_after).sum()), fixed, broken, len(labels))
    p_value = float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0
    numbers = np.arange(head.shape[1])
    loss, loss_after = (float(log_loss(labels, values, labels=numbers)) for values in (head, finetuned))
    verdict = "no evidence"
    if p_value < 1 - CONFIDENCE:
        verdict = "better" if fixed > broken else "worse"
    return {
        "accuracy": (fixed - broken) / len(labels),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": loss_after - loss,
        "fixed": fixed,
        "broken": broken,
        "mcnemar_p": p_value,
        "verdict": verdict,
    }


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion by Wilson's score method, without continuity correction."""
    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(both: int, fixed: int, broken: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of the difference of two proportions of the same pictures.

    Newcombe's hybrid score method, number 10 of Statistics in Medicine 17:2635-2650 (1998),
    https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C. It joins the Wilson intervals of
    the two proportions by the correlation of their successes, and has a width where the models never differ, too.

    Args:
        both: pictures that both models get right.
        fixed: that only the second one does.
        broken: that only the first one does.
        count: of all pictures.
    """
    neither = count - both - fixed - broken
    first, second = both + broken, both + fixed
    p, q = first / count, second / count
    (p_low, p_high), (q_low, q_high) = wilson_interval(first, count), wilson_interval(second, count)
    product = float(both * neither - fixed * broken)
    if product > 0:  # continuity correction, which does not change the sign
        product = max(product - count / 2, 0.0)
    margins = first * (count - first) * second * (count - second)
    correlation = product / math.sqrt(margins) if margins else 0.0

    def join(below: float, above: float) -> float:
        return math.sqrt(max(below**2 - 2 * correlation * below * above + above**2, 0))

    difference = q - p
    return difference - join(q - q_low, p_high - p), difference + join(q_high - q, p - p_low)


def expected_calibration_error(right: NDArray[np.bool_], confidences: NDArray[np.float64]) -> float:
    """Return how far the highest probability is from the accuracy, in [0, 1]: 0 where 80% sure is right in 80%.

    Pictures are put into 15 equally wide bins by that probability, each with its upper edge; the distances of a bin's
    accuracy from its mean probability are averaged by the number of pictures (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599).

    Args:
        right: (n,), whether the prediction is right.
        confidences: (n,), the highest probability.
    """
    bins = np.ceil(confidences * CALIBRATION_BINS).astype(int)
    gaps = np.bincount(bins, weights=right - confidences)
    return float(np.abs(gaps).sum() / len(right))


def sentence(gain: dict[str, Any]) -> str:
    """Put what `compare` returns into one plain sentence."""
    if not (gain["loss"] or gain["fixed"] or gain["broken"]):
        return "No evidence that fine-tuning helped: both checkpoints make the same predictions."
    words = {
        "better": "Fine-tuning helped",
        "worse": "Fine-tuning made it worse",
        "no evidence": "No evidence that fine-tuning helped",
    }
    points, low, high = (f"{100 * gain[name]:+z.2f}" for name in ("accuracy", "accuracy_low", "accuracy_high"))
    p_value = gain["mcnemar_p"]
    evidence = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    pictures = "picture" if gain["fixed"] == 1 else "pictures"
    return (
        f"{words[gain['verdict']]}: {points} points (95% interval {low} to {high}, {evidence}): "
        f"{gain['fixed']} {pictures} fixed, {gain['broken']} broken."
    )


def table(head: dict[str, Any], finetuned: dict[str, Any], gain: dict[str, Any]) -> str:
    """Lay out what `score` returns for both checkpoints, and `compare`, as lines of aligned text."""
    rows = [("", "", "95% interval", "loss")]
    for name, scores in (("head", head), ("fine-tuned", finetuned)):
        interval = f"{scores['accuracy_low']:.2%} to {scores['accuracy_high']:.2%}"
        rows.append((name, f"Test accuracy: {scores['accuracy']:.2%}", interval, f"{scores['loss']:.4f}"))
    points, low, high = (f"{100 * gain[name]:+z.2f}" for name in ("accuracy", "accuracy_low", "accuracy_high"))
    rows.append(("gain", f"{points} points", f"{low} to {high}", f"{gain['loss']:+z.4f}"))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    )


def write_predictions(
    path: Path, entries: list[Entry], classes: tuple[str, ...], models: dict[str, Probabilities]
) -> None:
    """Write `path,label`, then `MODEL.CLASS` for each model and class, whole or not at all.

    Probabilities are written with all their digits: every score can be computed again from this file.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", *(f"{model}.{name}" for model in models for name in classes)])
    for position, entry in enumerate(entries):
        row = (float(value) for probabilities in models.values() for value in probabilities[position])
        writer.writerow([entry.path, entry.label, *row])
    write_text(path, text.getvalue())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean of the values that are defined, `None` if none is."""
    defined = [float(value) for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else None


def main() -> None:
    """Print the table and the verdict of an evaluation."""
    parser = argparse.ArgumentParser(prog="python -m stages.common.scoring", description=main.__doc__)
    parser.add_argument("evaluation", type=Path, help="JSON file, as `evaluate` writes it")
    evaluation = json.loads(parser.parse_args().evaluation.read_text())
    print(table(evaluation["head"], evaluation["finetuned"], evaluation["gain"]))
    print(sentence(evaluation["gain"]))


if __name__ == "__main__":
    run(main)
