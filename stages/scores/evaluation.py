"""The result of the test: both checkpoints' scores, the gain, and whether the test is clean.

`python -m stages.scores.evaluation metrics` prints it again.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stages.common.cli import run
from stages.common.files import write_json
from stages.common.format import number, percent, percent_range, points, points_range, signed
from stages.common.records import read_record, write_record
from stages.scores.metrics import Scores
from stages.scores.near_duplicates import NearDuplicates
from stages.scores.remarks import BalancedGain
from stages.scores.verdict import Gain, describe_gain


@dataclass(frozen=True)
class Evaluation:
    """The content of `scores.json`.

    `balanced` is `None` where the classes are not very unequal; `remarks` are sentences.
    """

    head: Scores
    finetuned: Scores
    gain: Gain
    near_duplicates: NearDuplicates
    balanced: BalancedGain | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, Scores]:
        """The scores by checkpoint, in the order of training; the last one's alone where both are the same network."""
        both = {"head": self.head, "finetuned": self.finetuned}
        return {"finetuned": self.finetuned} if self.gain.identical else both


# Of `evaluation.json`, which `dvc metrics diff` and `dvc exp show` compare: a screen of it.
_COMPARED = {
    "head": ("accuracy", "loss"),
    "finetuned": ("accuracy", "loss", "balanced_accuracy"),
    "gain": ("accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high"),
}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `scores.json` and, of it, `evaluation.json` for DVC; a number that is undefined is null."""
    write_record(folder / "scores.json", evaluation)
    values = asdict(evaluation)
    compared = {part: {name: values[part][name] for name in names} for part, names in _COMPARED.items()}
    write_json(folder / "evaluation.json", compared)


def read_evaluation(folder: Path) -> Evaluation:
    """Read `scores.json`, as `write_evaluation` wrote it; raises what `read_record` does."""
    return read_record(folder / "scores.json", Evaluation, "evaluate")


def describe(evaluation: Evaluation) -> str:
    """Return the scores and the gain as lines of aligned text, the verdict below them, and what else to know."""
    rows, gain = [("", "", "95% interval", "loss")], evaluation.gain
    names = {"head": "head", "finetuned": "both" if gain.identical else "fine-tuned"}
    for model, scores in evaluation.scores.items():
        interval = percent_range(scores.accuracy_low, scores.accuracy_high)
        rows.append((names[model], f"Test accuracy: {percent(scores.accuracy)}", interval, number(scores.loss)))
    if not gain.identical:
        interval = points_range(gain.accuracy_low, gain.accuracy_high)
        rows.append(("gain", points(gain.accuracy), interval, signed(gain.loss)))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([*lines, describe_gain(gain), *evaluation.remarks])


def main() -> None:
    """Print the table and the verdict of an evaluation."""
    parser = argparse.ArgumentParser(prog="python -m stages.scores.evaluation", description=main.__doc__)
    parser.add_argument("metrics", type=Path, help="folder, as `evaluate` writes it")
    print(describe(read_evaluation(parser.parse_args().metrics)))


if __name__ == "__main__":
    run(main)
