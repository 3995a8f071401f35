"""What is predicted for images without labels, as tables that grow row by row."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.scores.metrics import predicted_labels

# Writes one image's row: its path, and its probabilities, (classes,), or why it cannot be read; how unlike it is.
Row = Callable[[str, NDArray[np.float64] | str, float | None], None]


@contextmanager
def open_table(
    output: str, classes: Sequence[str], top: int | None, reject: float, tells_unlike: bool
) -> Iterator[Row]:
    """Open a table for predictions; each row is written at once, whole.

    CSV has `path,prediction,probability`, perhaps `unlike`, then the next most probable classes, or all (a column
    each), then `problem`: why an image cannot be read. JSON lines have one object an image.

    Args:
        output: a file, `.csv` or `.jsonl`; `-`: CSV to the standard output.
        classes: names by label.
        top: how many of the most probable classes; `None`: all of them.
        reject: below this probability no class is predicted, nor where `unlike` is above 1; 0: always one.
        tells_unlike: there is such a number for each image that can be read.

    Raises:
        StageError: an unknown extension.
        OSError: it cannot be written.
    """
    ending = ".csv" if output == "-" else Path(output).suffix.lower()
    if ending not in (".csv", ".jsonl"):
        raise StageError(f"--output: {output} should end in .csv or .jsonl, or be - for the standard output")
    if output == "-":
        sys.stdout.reconfigure(errors="surrogateescape", newline="")  # type: ignore[union-attr]
        yield _make_row(sys.stdout, ending, classes, top, reject, tells_unlike)
        return
    with Path(output).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield _make_row(file, ending, classes, top, reject, tells_unlike)


def _make_row(
    file: IO[str], ending: str, classes: Sequence[str], top: int | None, reject: float, tells_unlike: bool
) -> Row:
    shown = len(classes) if top is None else min(top, len(classes))
    writer = csv.writer(file, lineterminator="\n")
    if ending == ".csv":
        more = [f"{name}_{place}" for place in range(2, shown + 1) for name in ("prediction", "probability")]
        columns = ["unlike"] * tells_unlike + (list(classes) if top is None else more)
        writer.writerow(["path", "prediction", "probability", *columns, "problem"])
        width = len(columns)

    def write(path: str, answer: NDArray[np.float64] | str, unlike: float | None) -> None:
        if isinstance(answer, str):
            if ending == ".csv":
                writer.writerow([path, "", "", *[""] * width, answer])
            else:
                _write_json(file, {"path": path, "problem": answer})
            file.flush()
            return
        # The label that the scores would count, which on a tie need not be the first of the most probable.
        label = int(predicted_labels(answer[None])[0])
        order = [label, *(int(other) for other in np.argsort(-answer, kind="stable") if other != label)][:shown]
        values = answer.tolist()
        rejected = reject > 0 and (values[label] < reject or (unlike or 0) > 1)
        novelty = {} if unlike is None else {"unlike": unlike}
        name = "" if rejected else classes[label]
        if ending == ".csv":
            if top is None:
                cells: list[Any] = values
            else:
                cells = [cell for other in order[1:] for cell in ("" if rejected else classes[other], values[other])]
            writer.writerow([path, name, values[label], *novelty.values(), *cells, ""])
        else:
            probabilities = {classes[other]: values[other] for other in order}
            first = {"path": path, "prediction": name, "probability": values[label]}
            _write_json(file, {**first, **novelty, "probabilities": probabilities})
        file.flush()

    return write


def _write_json(file: IO[str], value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
