"""The history of a phase, as DVCLive writes it and DVC plots it."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common import ranks
from stages.common.files import write_json, write_text
from stages.training.line import Point

# Half of the last digit that a loss is shown with.
_SHOWN = 5e-5
SERIES = ("train_loss", "train_accuracy", "val_loss", "accuracy")


@dataclass(frozen=True)
class Epoch:
    """One line of the history: mean log-losses in nats, weighted by `class_weights`, and accuracies, fractions.

    Epoch 0 is the network before the phase. `val_loss`, of logits divided by `temperature`, and `accuracy` are of the
    watched images. `train_loss`, with `label_smoothing`, and `train_accuracy` are means over the epoch, taken while the
    weights changed.
    """

    number: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float
    accuracy: float
    temperature: float = 1.0


def best_epoch(epochs: Sequence[Epoch]) -> Epoch:
    """Return the first of the epochs with the lowest validation loss."""
    return min(epochs, key=lambda epoch: epoch.val_loss)


def out_of_patience(epochs: Sequence[Epoch], patience: int | None) -> bool:
    """Whether the validation loss has not fallen for `patience` epochs; `None`: never."""
    return bool(epochs) and patience is not None and epochs[-1].number - best_epoch(epochs).number >= patience


def still_falling(epochs: Sequence[Epoch], limit: int, patience: int | None) -> bool:
    """Whether a phase reached its last epoch, `limit`, while its validation loss was still falling.

    It has stopped falling after `patience` epochs without a lower one, or after one; also at 0 to all digits shown.
    """
    trained = [epoch for epoch in epochs if epoch.number > 0]
    return len(trained) == limit and not out_of_patience(trained, patience or 1) and trained[-1].val_loss >= _SHOWN


class History:
    """Writes one phase's history into a folder: `metrics.json`, and one table per series under `plots/metrics`.

    The format is DVCLive's, which DVC plots. Only ranks that write outputs write it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.epochs = folder, list[Epoch]()

    def add(self, epoch: Epoch) -> None:
        """Add an epoch and write; raises OSError."""
        self.epochs.append(epoch)
        if not ranks.writes_outputs():
            return
        for name in SERIES:
            values = [(each.number, getattr(each, name)) for each in self.epochs]
            rows = "".join(f"{number}\t{value}\n" for number, value in values if value is not None)
            write_text(_table(self.folder, name), f"step\t{name}\n{rows}")
        self.finish(epoch)

    def finish(self, selected: Epoch, point: Point | None = None) -> None:
        """Write the validation loss of the epoch or point that is kept, which `dvc metrics diff` compares."""
        kept = {"val_loss": selected.val_loss}
        if point is not None:
            kept = {"val_loss": point.val_loss, "alpha": point.alpha}
        write_json(self.folder / "metrics.json", kept)


def read_history(folder: Path) -> list[Epoch]:
    """Read a history; raises OSError."""
    columns: dict[str, dict[int, float]] = {}
    for name in SERIES:
        with _table(folder, name).open(encoding="utf-8", newline="") as file:
            columns[name] = {int(row["step"]): float(row[name]) for row in csv.DictReader(file, delimiter="\t")}
    train_loss, train_accuracy, val_loss, accuracy = (columns[name] for name in SERIES)
    return [
        Epoch(number, train_loss.get(number), train_accuracy.get(number), loss, accuracy[number])
        for number, loss in val_loss.items()
    ]


def _table(folder: Path, name: str) -> Path:
    return folder / "plots" / "metrics" / f"{name}.tsv"


def read_kept(folder: Path, epochs: Sequence[Epoch]) -> tuple[int, float]:
    """Return the number of the kept epoch, and the fraction of the phase's change that was kept.

    Without a line, the fraction is 0 for epoch 0 and otherwise 1. Raises OSError.
    """
    summary: dict[str, float] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if "alpha" in summary:
        return (epochs[-1].number if summary["alpha"] else 0), summary["alpha"]
    # The last epoch, if it has this loss; otherwise the first that has it.
    number = next(epoch.number for epoch in (epochs[-1], *epochs) if epoch.val_loss == summary["val_loss"])
    return number, float(number > 0)
