"""Several runs of one pipeline, of folds or of seeds: what they say together."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.files import write_json
from stages.common.stage import StageError
from stages.common.words import p_value, percent, percent_range, plural, points, points_range
from stages.scores.metrics import CONFIDENCE, predicted_labels, wilson_interval
from stages.scores.predictions import Predictions
from stages.scores.verdict import Verdict, describe_verdict, mcnemar_p, paired_interval


@dataclass(frozen=True)
class Run:
    """One of the runs: its `name`, the number of its test pictures, both accuracies, and what fine-tuning changed."""

    name: str
    pictures: int
    head: float
    finetuned: float
    fixed: int
    broken: int

    @property
    def gain(self) -> float:
        """Fine-tuned minus head."""
        return self.finetuned - self.head


@dataclass(frozen=True)
class Together:
    """What several runs say together.

    Of folds, in which each picture is tested once, `head` and `finetuned` are the accuracies on all `pictures`, with
    their 95% intervals by Wilson; of seeds, whose test pictures are the same, the means over the runs, and the lowest
    and the highest of them.

    `gain` is the mean over the runs; its 95% interval is `corrected_interval`, for folds at least as wide as
    `verdict.paired_interval` on all pictures, which has a width where all folds gain the same, too. `fixed` and
    `broken` are sums over the runs, `mcnemar_p` is of folds alone. `verdict`: `no evidence` where the interval holds 0,
    or that p-value is not below 0.05.
    """

    runs: list[Run]
    pictures: int
    head: float
    head_low: float
    head_high: float
    finetuned: float
    finetuned_low: float
    finetuned_high: float
    gain: float
    gain_low: float
    gain_high: float
    fixed: int
    broken: int
    mcnemar_p: float | None
    verdict: Verdict


def corrected_interval(gains: Sequence[float], test_to_train: float) -> tuple[float, float]:
    """Return the 95% interval of a mean over runs that share training pictures.

    The corrected resampled t-test of Nadeau and Bengio (2003, https://doi.org/10.1023/A:1024068626366): the variance of
    the mean is (1 / runs + test / train) times that of the runs, for training sets overlap, and gains that come of
    nearly the same training vary less than gains at large.

    Args:
        gains: one a run, at least two.
        test_to_train: number of test over number of training pictures of a run; 0: the runs are independent.
    """
    from scipy.stats import t

    runs = len(gains)
    mean = sum(gains) / runs
    variance = sum((gain - mean) ** 2 for gain in gains) / (runs - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, runs - 1)) * math.sqrt((1 / runs + test_to_train) * variance)
    return mean - half, mean + half


def combine_folds(predictions: dict[str, Predictions], test_to_train: float) -> Together:
    """Put the runs of all folds together.

    Args:
        predictions: by the fold's name.
        test_to_train: as for `corrected_interval`.

    Raises:
        StageError: a picture was tested in two folds: they are of different data.
    """
    paths = [path for run in predictions.values() for path in run.paths]
    if len(set(paths)) < len(paths):
        raise StageError("the folds are of different data: a picture is in the test part of two")
    runs = _runs(predictions)
    right = [sum(round(getattr(run, model) * run.pictures) for run in runs) for model in ("head", "finetuned")]
    intervals = [wilson_interval(count, len(paths)) for count in right]
    fixed, broken = sum(run.fixed for run in runs), sum(run.broken for run in runs)
    p = mcnemar_p(fixed, broken)
    low, high = corrected_interval([run.gain for run in runs], test_to_train)
    gain = (fixed - broken) / len(paths)
    # Around the gain on all pictures; folds differ in size by a picture or so, hence the means hardly.
    shift = gain - (low + high) / 2
    both = sum(int(np.count_nonzero(_right(run, 0) & _right(run, 1))) for run in predictions.values())
    paired = paired_interval(both, fixed, broken, len(paths))
    low, high = min(low + shift, paired[0]), max(high + shift, paired[1])
    return Together(
        runs, len(paths), right[0] / len(paths), *intervals[0], right[1] / len(paths), *intervals[1],
        gain, low, high, fixed, broken, p, _judge(low, high, p),
    )  # fmt: skip


def combine_seeds(predictions: dict[str, Predictions]) -> Together:
    """Put runs of other seeds on one split together.

    Args:
        predictions: by the seed.

    Raises:
        StageError: they were tested on different pictures.
    """
    if len({tuple(run.paths) for run in predictions.values()}) > 1:
        raise StageError("the seeds are of different data: their test parts are not the same")
    runs = _runs(predictions)
    heads, finetuned = [run.head for run in runs], [run.finetuned for run in runs]
    low, high = corrected_interval([run.gain for run in runs], 0.0)
    return Together(
        runs, runs[0].pictures, sum(heads) / len(runs), min(heads), max(heads),
        sum(finetuned) / len(runs), min(finetuned), max(finetuned),
        sum(run.gain for run in runs) / len(runs), low, high,
        sum(run.fixed for run in runs), sum(run.broken for run in runs), None, _judge(low, high, 0.0),
    )  # fmt: skip


def _runs(predictions: dict[str, Predictions]) -> list[Run]:
    runs = []
    for name, run in predictions.items():
        before, after = _right(run, 0), _right(run, 1)
        runs.append(
            Run(
                name,
                len(run.paths),
                float(before.mean()),
                float(after.mean()),
                int((after & ~before).sum()),
                int((before & ~after).sum()),
            )
        )
    return runs


def _right(run: Predictions, model: int) -> NDArray[np.bool_]:
    """Whether the head (0) or the fine-tuned checkpoint (1) gets each picture right, (n,)."""
    right: NDArray[np.bool_] = predicted_labels((run.head, run.finetuned)[model]) == run.labels
    return right


def _judge(low: float, high: float, p: float) -> Verdict:
    if p >= 1 - CONFIDENCE or low <= 0 <= high:
        return "no evidence"
    return "better" if low > 0 else "worse"


def join(predictions: Sequence[Predictions]) -> Predictions:
    """Return the predictions of all folds as those of one test."""
    first = predictions[0]
    return Predictions(
        [path for run in predictions for path in run.paths],
        np.concatenate([run.labels for run in predictions]),
        first.classes,
        np.concatenate([run.head for run in predictions]),
        np.concatenate([run.finetuned for run in predictions]),
    )


def write_together(path: Path, together: Together) -> None:
    """Write JSON, whole or not at all."""
    write_json(path, asdict(together))


def describe_folds(together: Together) -> str:
    """Put the result of all folds into lines."""
    rows = [("head", together.head, together.head_low, together.head_high)]
    rows.append(("fine-tuned", together.finetuned, together.finetuned_low, together.finetuned_high))
    lines = [
        f"{name:<10}  accuracy on all {together.pictures:,} pictures: {percent(accuracy)}  {percent_range(low, high)}"
        for name, accuracy, low, high in rows
    ]
    return "\n".join([*lines, _verdict(together, f"{plural(len(together.runs), 'fold')}, each picture tested once")])


def describe_seeds(together: Together) -> str:
    """Put the result of several seeds into lines."""
    rows = [("head", together.head, together.head_low, together.head_high)]
    rows.append(("fine-tuned", together.finetuned, together.finetuned_low, together.finetuned_high))
    lines = [
        f"{name:<10}  accuracy, mean of {len(together.runs)}: {percent(mean)}  lowest and highest "
        f"{percent_range(low, high)}"
        for name, mean, low, high in rows
    ]
    line = _verdict(together, f"{plural(len(together.runs), 'seed')}, the same {together.pictures:,} test pictures")
    return "\n".join([*lines, f"{line} The interval is of the training's chance alone."])


def _verdict(together: Together, what: str) -> str:
    interval = points_range(together.gain_low, together.gain_high)
    p = "" if together.mcnemar_p is None else f", {p_value(together.mcnemar_p)}"
    return (
        f"{describe_verdict(together.verdict)}: {points(together.gain)} (95% interval {interval}{p}; {what}): "
        f"{plural(together.fixed, 'picture')} fixed, {together.broken:,} broken."
    )
