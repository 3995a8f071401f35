"""The history of a phase, as DVCLive writes it and DVC plots it."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common import ranks
from stages.common.files import write_text
from stages.training.line import Point

if TYPE_CHECKING:
    from dvclive.live import Live

SERIES = ("train_loss", "train_accuracy", "val_loss", "accuracy")


@dataclass(frozen=True)
class Epoch:
    """One line of the history.

    `number` counts from 1; epoch 0 is the network as the phase found it, without a training loss. Losses are mean
    log-losses in nats (both weighted by `class_weights`, the training's also smoothed by `label_smoothing`), accuracies
    are fractions. `val_loss` and `accuracy` are those on the watched pictures, the loss after division of the logits by
    `temperature`; the training's are means over the epoch, while the weights were changing.
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
    """Say whether the validation loss has not been lower for `patience` epochs; never without a patience."""
    return bool(epochs) and patience is not None and epochs[-1].number - best_epoch(epochs).number >= patience


def still_falling(epochs: Sequence[Epoch], limit: int, patience: int | None) -> bool:
    """Say whether a phase was ended by its number of epochs, `limit`, before its validation loss stopped falling.

    It has stopped when it has not been lower for `patience` epochs; without a patience, for one.
    """
    trained = [epoch for epoch in epochs if epoch.number > 0]
    return len(trained) == limit and not out_of_patience(trained, patience or 1)


class History:
    """Writes one phase's history into a folder: `metrics.json`, and a table a series under `plots/metrics`.

    DVC's pipeline describes these files itself, so DVCLive makes neither a `dvc.yaml` nor an experiment.

    Of several ranks, those that write no outputs have a history that is not written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._live = folder, None
        if ranks.writes_outputs():
            with self._naming_the_folder():
                self._live = _open_live(folder)

    def add(self, epoch: Epoch) -> None:
        """Write one epoch."""
        if self._live is None:
            return
        with self._naming_the_folder():
            self._live.step = epoch.number
            for name in SERIES:
                if (value := getattr(epoch, name)) is not None:
                    self._live.log_metric(name, value)
            self._live.make_summary()  # type: ignore[no-untyped-call]

    def finish(self, selected: Epoch, point: Point | None = None) -> None:
        """Write what was kept, and close: `metrics.json` gets its scores in place of those of the last epoch.

        Args:
            selected: the epoch.
            point: the point on the line from the start of the phase to this epoch, if one was chosen.
        """
        if self._live is None:
            return
        kept = {name: value for name in SERIES if (value := getattr(selected, name)) is not None}
        if point is not None:
            kept = {"alpha": point.alpha, "val_loss": point.val_loss, "accuracy": point.accuracy}
        with self._naming_the_folder():
            self._live.summary = {"selected_epoch": selected.number, **kept}
            self._live.end()  # type: ignore[no-untyped-call]
            for name in SERIES:  # a phase that kept its start may have no training loss, yet DVC looks for each table
                table = _table(self._folder, name)
                if not table.exists():
                    write_text(table, f"step\t{name}\n")

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """A full disk shows in a write, whose error names no file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(self._folder)) from error


def _open_live(folder: Path) -> "Live":
    # Here: most of what imports this module reads histories or judges epochs, and DVCLive takes a while to load.
    from dvclive.live import Live

    class RepositoryLeftAlone(Live):
        """DVCLive without its look at the repository, which takes a second and fails where git has no commit yet."""

        def _init_dvc(self) -> None:
            pass

    return RepositoryLeftAlone(str(folder), save_dvc_exp=False, dvcyaml=None)


def read_history(folder: Path) -> list[Epoch]:
    """Read a history.

    Raises:
        OSError: it is not there.
    """
    columns: dict[str, dict[int, float]] = {}
    for name in SERIES:
        with _table(folder, name).open(encoding="utf-8", newline="") as file:
            columns[name] = {int(row["step"]): float(row[name]) for row in csv.DictReader(file, delimiter="\t")}
    return [
        Epoch(
            number,
            columns["train_loss"].get(number),
            columns["train_accuracy"].get(number),
            val_loss,
            columns["accuracy"][number],
        )
        for number, val_loss in columns["val_loss"].items()
    ]


def _table(folder: Path, name: str) -> Path:
    return folder / "plots" / "metrics" / f"{name}.tsv"


def read_selected(folder: Path) -> int:
    """Return the number of the epoch whose weights were kept, or from which the line went back.

    Raises:
        OSError: it is not there.
    """
    return int(_read_summary(folder)["selected_epoch"])


def read_alpha(folder: Path) -> float:
    """Return the fraction of the phase's change that was kept; 1 where no line was measured, but for epoch 0.

    Raises:
        OSError: it is not there.
    """
    return float(_read_summary(folder).get("alpha", read_selected(folder) > 0))


def _read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return summary
