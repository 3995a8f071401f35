"""The table of predictions: CSV or JSON lines."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.cli import StageError
from stages.scores.metrics import Probabilities, predicted_labels

# Writes a row: the path, probabilities (classes,) or why the image cannot be read, and how unlike it is.
Row = Callable[[str, Probabilities | str, float], None]


@contextmanager
def open_table(
    output: str, classes: Sequence[str], top: int | None, reject: float, tells_unlike: bool
) -> Iterator[Row]:
    """Open a table for predictions; each row is written at once, whole.

    CSV has `path,prediction,probability`, perhaps `unlike`, then the next most probable classes, `top` in all, or every
    class (`None`; a column each), then `problem`: why an image cannot be read. JSON lines have one object an image.
    `output`: a file, or `-`: CSV to the standard output; `reject`: below this probability no class is predicted, nor
    where `unlike` is above 1; 0: always one.
    """
    ending = ".csv" if output == "-" else Path(output).suffix.lower()
    if ending not in (".csv", ".jsonl"):
        raise StageError(f"--output: {output} should end in .csv or .jsonl, or be - for the standard output")
    if output == "-":
        sys.stdout.reconfigure(errors="surrogateescape", newline="")  # type: ignore[union-attr]
    shown = len(classes) if top is None else min(top, len(classes))
    following = [f"{name}_{place}" for place in range(2, shown + 1) for name in ("prediction", "probability")]
    more = [*["unlike"] * tells_unlike, *(classes if top is None else following)]
    columns = ["path", "prediction", "probability", *more, "problem"]
    encoding: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with nullcontext(sys.stdout) if output == "-" else Path(output).open("w", **encoding) as file:
        writer = csv.writer(file, lineterminator="\n")
        if ending == ".csv":
            writer.writerow(columns)

        def write(path: str, answer: Probabilities | str, unlike: float) -> None:
            if isinstance(answer, str):
                record: dict[str, Any] = {"problem": answer}
                cells: list[Any] = [*[""] * (len(columns) - 2), answer]
            else:
                # The label as in the scores, which on a tie need not be the first of the most probable ones.
                label, values = int(predicted_labels(answer[None])[0]), answer.tolist()
                order = [label, *(other for other in np.argsort(-answer, kind="stable").tolist() if other != label)]
                rejected = reject > 0 and (values[label] < reject or unlike > 1)
                names = [""] * len(classes) if rejected else classes
                record = {"prediction": names[label], "probability": values[label]}
                if tells_unlike:
                    record["unlike"] = float(unlike)
                pairs = [cell for other in order[1:shown] for cell in (names[other], values[other])]
                cells = [*record.values(), *(values if top is None else pairs), ""]
                record["probabilities"] = {classes[other]: values[other] for other in order[:shown]}
            if ending == ".csv":
                writer.writerow([path, *cells])
            else:
                file.write(json.dumps({"path": path, **record}, ensure_ascii=False) + "\n")
            file.flush()

        yield write
