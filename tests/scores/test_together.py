"""What several runs say together."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.scores.folds import combine_folds, combine_seeds, corrected_half, describe_folds, describe_seeds, join
from stages.scores.predictions import Predictions
from stages.scores.verdict import compare, describe_gain, paired_interval


def predictions(name: str, head: NDArray[np.bool_], finetuned: NDArray[np.bool_]) -> Predictions:
    """Of two classes, right or wrong as given."""
    labels = np.arange(len(head)) % 2

    def probabilities(right: NDArray[np.bool_]) -> NDArray[np.float64]:
        of_one = np.where(right == (labels == 1), 0.9, 0.1)
        return np.stack([1 - of_one, of_one], axis=1)

    paths = [f"{name}/{number}" for number in range(len(head))]
    return Predictions(paths, labels, ["cat", "dog"], probabilities(head), probabilities(finetuned))


def test_the_interval_equals_that_of_the_paper() -> None:
    # Five differences with variance 0.00025; t(0.975, 4) is 2.776445. With independent runs, the plain t interval.
    for ratio in (0.25, 0.0):
        expected = 2.776445105 * math.sqrt((1 / 5 + ratio) * 0.00025)
        assert corrected_half([0.0, 0.01, 0.02, 0.03, 0.04], ratio) == pytest.approx(expected, rel=1e-8)


def test_folds_together_are_one_test_of_all_images() -> None:
    chance = np.random.default_rng(0)
    runs = {
        f"fold {fold}": predictions(f"{fold}", chance.random(60 + fold) < 0.7, chance.random(60 + fold) < 0.95)
        for fold in range(5)
    }
    together = combine_folds(runs, 0.25)
    pooled = join(list(runs.values()))
    gain = compare(pooled.labels, pooled.head, pooled.finetuned)
    assert together.images == len(pooled.paths) == 310
    for name in ("accuracy", "loss", "fixed", "broken", "mcnemar_p"):
        assert getattr(together.gain, name) == getattr(gain, name)
    assert together.head == pytest.approx((pooled.head.argmax(axis=1) == pooled.labels).mean())
    assert together.gain.accuracy_low <= gain.accuracy_low < gain.accuracy_high <= together.gain.accuracy_high
    assert together.gain.verdict == together.gain.loss_verdict == "better"
    line = describe_folds(together).splitlines()[-1]
    assert line == f"{describe_gain(together.gain)} 5 folds, each image tested once."
    # Equal folds are no certainty: the interval is that of one test of 150 images.
    right = np.arange(50) % 10 > 0
    equal = combine_folds({f"{fold}": predictions(f"{fold}", right, right) for fold in range(3)}, 0.5).gain
    assert (equal.accuracy_low, equal.accuracy_high) == paired_interval(135, 0, 0, 150)
    assert equal.verdict == equal.loss_verdict == "no evidence"


def test_folds_that_differ_have_a_wider_interval_and_no_verdict() -> None:
    right = np.zeros(100, dtype=bool)
    after = [np.arange(100) < fixed for fixed in (30, 0, 0)]
    runs = {f"{fold}": predictions(f"{fold}", right, values) for fold, values in enumerate(after)}
    pooled = join(list(runs.values()))
    gain, together = compare(pooled.labels, pooled.head, pooled.finetuned), combine_folds(runs, 0.5)
    assert gain.verdict == gain.loss_verdict == "better"
    assert together.gain.verdict == together.gain.loss_verdict == "no evidence"
    assert together.gain.loss_low < gain.loss_low < gain.loss_high < 0 < together.gain.loss_high


def test_folds_report_groups_and_watched_test_images() -> None:
    right = np.arange(40) >= 8
    runs = {f"{fold}": predictions(f"{fold}", right, np.ones(40, dtype=bool)) for fold in range(3)}
    assert combine_folds(runs, 0.5).gain.verdict == "better"
    grouped = combine_folds(runs, 0.5, np.arange(120) // 8)
    assert (grouped.gain.groups, grouped.gain.verdict) == (15, "no evidence")
    plain = combine_folds(runs, 0.5)
    assert grouped.head_low < plain.head_low < plain.head_high < grouped.head_high
    watched = combine_folds(runs, 0.5, watched=True)
    assert (watched.gain.verdict, watched.gain.loss_verdict, watched.gain.mcnemar_p) == (None, None, None)
    assert "NO VERDICT" in describe_folds(watched)


def test_runs_of_different_data_are_refused() -> None:
    right = np.ones(10, dtype=bool)
    same = predictions("a", right, right)
    with pytest.raises(StageError, match="the folds are of different data"):
        combine_folds({"0": same, "1": same}, 0.25)
    with pytest.raises(StageError, match="the seeds are of different data"):
        combine_seeds({"1": same, "2": predictions("b", right, right)})


@pytest.mark.parametrize("gained", [(2, 3, 4), (3, 3, 3)])
def test_seeds_have_a_mean_and_a_range_and_no_verdict(gained: tuple[int, ...]) -> None:
    right = np.arange(100) >= 10
    runs = {f"{seed}": predictions("a", right, np.arange(100) >= 10 - more) for seed, more in enumerate(gained)}
    together = combine_seeds(runs)
    gain = together.gain
    assert (together.finetuned_low, together.finetuned_high) == ((90 + min(gained)) / 100, (90 + max(gained)) / 100)
    assert gain.accuracy == pytest.approx(0.03)
    assert (gain.accuracy_low, gain.accuracy_high) == pytest.approx((min(gained) / 100, max(gained) / 100))
    assert gain.loss == pytest.approx(np.mean([run.loss for run in together.runs]))
    assert (gain.verdict, gain.loss_verdict, gain.mcnemar_p) == (None, None, None)
    text = describe_seeds(together)
    assert "95%" not in text
    assert "No verdict" in text.splitlines()[-1]
