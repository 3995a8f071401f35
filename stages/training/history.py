"""The history of a phase, as DVCLive writes it and DVC plots it."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvclive.live import Live

SERIES = ("train_loss", "train_accuracy", "val_loss", "accuracy")


@dataclass(frozen=True)
class Epoch:
    """One line of the history.

    `number` counts from 1; losses are mean log-losses in nats, accuracies are fractions. `val_loss` and `accuracy` are
    those on the watched pictures; the training's are means over the epoch, while the weights were changing.
    """

    number: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    accuracy: float


class _Live(Live):
    """DVCLive without its look at the repository, which takes a second and fails where git has no commit yet."""

    def _init_dvc(self) -> None:
        pass


class History:
    """Writes one phase's history into a folder: `metrics.json`, and a table a series under `plots/metrics`.

    DVC's pipeline describes these files itself, so DVCLive makes neither a `dvc.yaml` nor an experiment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._naming_the_folder():
            self._live = _Live(str(folder), save_dvc_exp=False, dvcyaml=None)

    def add(self, epoch: Epoch) -> None:
        """Write one epoch."""
        with self._naming_the_folder():
            self._live.step = epoch.number
            for name in SERIES:
                self._live.log_metric(name, getattr(epoch, name))
            self._live.make_summary()  # type: ignore[no-untyped-call]

    def finish(self, selected: Epoch) -> None:
        """Write which epoch's weights were kept, and close."""
        with self._naming_the_folder():
            self._live.summary["selected_epoch"] = selected.number
            self._live.end()  # type: ignore[no-untyped-call]

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """A full disk shows in a write, whose error names no file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(self._folder)) from error


def read_history(folder: Path) -> list[Epoch]:
    """Read a history.

    Raises:
        OSError: it is not there.
    """
    columns = []
    for name in SERIES:
        with (folder / "plots" / "metrics" / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
            columns.append([(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")])
    return [Epoch(rows[0][0], *(value for _, value in rows)) for rows in zip(*columns, strict=True)]


def read_selected(folder: Path) -> int:
    """Return the number of the epoch whose weights were kept.

    Raises:
        OSError: it is not there.
    """
    return int(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["selected_epoch"])
