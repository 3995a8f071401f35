"""What several runs say together."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.common.stage import StageError
from stages.scores.folds import combine_folds, combine_seeds, corrected_interval, describe_folds, join
from stages.scores.predictions import Predictions
from stages.scores.verdict import compare, paired_interval


def predictions(name: str, head: NDArray[np.bool_], finetuned: NDArray[np.bool_]) -> Predictions:
    """Of two classes, right or wrong as given."""
    labels = np.arange(len(head)) % 2

    def probabilities(right: NDArray[np.bool_]) -> NDArray[np.float64]:
        of_one = np.where(right == (labels == 1), 0.9, 0.1)
        return np.stack([1 - of_one, of_one], axis=1)

    paths = [f"{name}/{number}" for number in range(len(head))]
    return Predictions(paths, labels, ["cat", "dog"], probabilities(head), probabilities(finetuned))


def test_the_interval_is_that_of_the_paper() -> None:
    # Five differences with mean 0.02 and variance 0.00025; t(0.975, 4) is 2.776445.
    low, high = corrected_interval([0.0, 0.01, 0.02, 0.03, 0.04], 0.25)
    half = 2.776445105 * math.sqrt((1 / 5 + 0.25) * 0.00025)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-8)
    # With independent runs, the plain t interval.
    low, high = corrected_interval([0.0, 0.01, 0.02, 0.03, 0.04], 0.0)
    assert high - low == pytest.approx(2 * 2.776445105 * math.sqrt(0.00025 / 5), rel=1e-8)


def test_folds_together_are_one_test_of_all_pictures() -> None:
    chance = np.random.default_rng(0)
    runs = {
        f"fold {fold}": predictions(f"{fold}", chance.random(60 + fold) < 0.7, chance.random(60 + fold) < 0.95)
        for fold in range(5)
    }
    together = combine_folds(runs, 0.25)
    pooled = join(list(runs.values()))
    gain = compare(pooled.labels, pooled.head, pooled.finetuned)
    assert together.pictures == len(pooled.paths) == 310
    assert (together.fixed, together.broken, together.mcnemar_p) == (gain.fixed, gain.broken, gain.mcnemar_p)
    assert together.gain == pytest.approx(gain.accuracy)
    assert together.head == pytest.approx((pooled.head.argmax(axis=1) == pooled.labels).mean())
    assert together.gain_low <= gain.accuracy_low < gain.accuracy_high <= together.gain_high
    assert together.verdict == "better"
    assert describe_folds(together).splitlines()[-1].startswith("Fine-tuning helped: +")


def test_without_a_difference_the_interval_holds_zero_and_no_gain_is_claimed() -> None:
    chance, holds, claims = np.random.default_rng(1), 0, 0
    for _ in range(200):
        runs = {
            f"{fold}": predictions(f"{fold}", chance.random(80) < 0.9, chance.random(80) < 0.9) for fold in range(5)
        }
        together = combine_folds(runs, 0.25)
        holds += together.gain_low <= 0 <= together.gain_high
        claims += together.verdict != "no evidence"
    assert holds >= 190
    assert claims <= 10


def test_the_same_predictions_in_all_folds_are_no_evidence() -> None:
    right = np.arange(50) % 10 > 0
    together = combine_folds({f"{fold}": predictions(f"{fold}", right, right) for fold in range(3)}, 0.5)
    assert (together.gain, together.mcnemar_p) == (0, 1)
    # That of one test of 150 pictures: equal folds are no certainty.
    assert (together.gain_low, together.gain_high) == paired_interval(135, 0, 0, 150)
    assert together.gain_high - together.gain_low > 0.03
    assert together.verdict == "no evidence"


def test_runs_of_different_data_are_refused() -> None:
    right = np.ones(10, dtype=bool)
    same = predictions("a", right, right)
    with pytest.raises(StageError, match="the folds are of different data"):
        combine_folds({"0": same, "1": same}, 0.25)
    with pytest.raises(StageError, match="the seeds are of different data"):
        combine_seeds({"1": same, "2": predictions("b", right, right)})


def test_seeds_say_how_far_training_moves_the_gain() -> None:
    right = np.arange(100) >= 10
    after = [np.arange(100) >= 10 - gained for gained in (2, 3, 4)]
    together = combine_seeds({f"{seed}": predictions("a", right, values) for seed, values in enumerate(after)})
    assert (together.gain, together.verdict) == (pytest.approx(0.03), "better")
    assert (together.finetuned_low, together.finetuned_high) == (0.92, 0.94)
    assert together.mcnemar_p is None
    assert together.gain_low == pytest.approx(0.03 - 4.302652730 * 0.01 / math.sqrt(3))
