"""The three index files: which image belongs to which class and to which part of the split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.common.files import read_csv, write_csv

PARTS = ("train", "val", "test")
# The number of each image's group, (n,).
Groups = NDArray[np.int64]
_COLUMNS = ["path", "label", "class", "sha256"]
_GROUP = "group"
# Begins the name of a group of near-duplicates that `split.group` does not name; the SHA-256 of one follows.
NEAR = "near "


@dataclass(frozen=True)
class Entry:
    """An image: its path below `data.path` (with `/`), its class by number and name, and the SHA-256 of its file.

    `group` names what it must stay together with, by `split.group` or as near-duplicates; empty: only its copies.
    """

    path: str
    label: int
    class_name: str
    sha256: str
    group: str = ""


def count(parts: dict[str, list[Entry]]) -> dict[str, dict[str, int]]:
    """Return class -> part -> number of images, classes in the order of their labels."""
    numbers = Counter((entry.class_name, part) for part, entries in parts.items() for entry in entries)
    names = class_names([entry for entries in parts.values() for entry in entries])
    return {name: {part: numbers[name, part] for part in parts} for name in names}


def count_once(entries: list[Entry]) -> list[Entry]:
    """Return the first of each group of files with the same bytes; the others would count one image several times."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.sha256, entry)
    return list(first.values())


def number_groups(entries: Sequence[Entry]) -> Groups | None:
    """Return the number of each image's group, (n,); one in no group is its own. `None` where there are no groups."""
    if not any(entry.group for entry in entries):
        return None
    numbers: dict[tuple[str, str], int] = {}
    keys = ((entry.group, "" if entry.group else entry.path) for entry in entries)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def write_index(path: Path, entries: list[Entry], grouped: bool = False) -> None:
    """Write an index file (CSV, UTF-8), whole or not at all; with a column for groups where there are some."""
    columns = _COLUMNS + [_GROUP] * grouped
    rows = ([entry.path, entry.label, entry.class_name, entry.sha256, entry.group] for entry in entries)
    write_csv(path, columns, (row[: len(columns)] for row in rows))


def read_index(path: Path) -> list[Entry]:
    """Read an index file.

    Raises:
        StageError: not an index file.
        OSError: not there.
    """
    try:
        columns, rows = read_csv(path)
        if columns not in (_COLUMNS, [*_COLUMNS, _GROUP]):
            raise ValueError("unexpected columns")
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("rows of another length than the header")
        return [Entry(name, int(label), *rest) for name, label, *rest in rows]
    except ValueError as error:
        raise StageError(f"{path}: not an index file ({error}); `dvc repro split` writes it again") from error


def class_names(entries: list[Entry]) -> list[str]:
    """Return the names of the classes, in the order of their labels."""
    return [name for _, name in sorted({(entry.label, entry.class_name) for entry in entries})]
