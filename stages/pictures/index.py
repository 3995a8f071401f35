"""The three index files: which picture belongs to which class and to which part of the split."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from stages.common.files import read_rows, write_csv
from stages.common.stage import StageError

PARTS = ("train", "val", "test")
_COLUMNS = ["path", "label", "class", "sha256"]


@dataclass(frozen=True)
class Entry:
    """A picture: its path below `data.path` (with `/`), its class by number and name, and the SHA-256 of its file."""

    path: str
    label: int
    class_name: str
    sha256: str


def find_copies(hashes: dict[str, str], class_of: dict[str, str]) -> tuple[list[list[str]], dict[str, str]]:
    """Find files with the same bytes.

    Args:
        hashes: path -> SHA-256.
        class_of: path -> class name.

    Returns:
        The groups of copies within one class, and path -> reason of the copies that claim different classes: which of
        those is right cannot be known.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for path in sorted(hashes):
        groups[hashes[path]].append(path)
    duplicates, contradictions = [], {}
    for group in groups.values():
        if len({class_of[path] for path in group}) > 1:
            for path in group:
                other = next(copy for copy in group if class_of[copy] != class_of[path])
                contradictions[path] = f"same bytes as {other}, which is in another class"
        elif len(group) > 1:
            duplicates.append(group)
    return duplicates, contradictions


def assign(entries: list[Entry], test_size: float, val_size: float, seed: int) -> dict[str, list[Entry]]:
    """Divide pictures into train, val and test, each class by the same fractions.

    A picture's place depends on the seed and its bytes alone: neither its name nor the order of the folder matters,
    copies go together, and adding a few pictures moves hardly any other.

    Args:
        entries: all pictures.
        test_size: fraction of each class, in (0, 1); at least one picture.
        val_size: the same, in [0, 1); 0 leaves the part empty.
        seed: another seed gives another division.

    Returns:
        part -> its entries, sorted by path.

    Raises:
        StageError: a class has too few different pictures to have one in each part.
    """
    classes: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        classes[entry.class_name][entry.sha256].append(entry)
    parts: dict[str, list[Entry]] = {part: [] for part in PARTS}
    for name, groups in classes.items():
        needed = 3 if val_size else 2
        if len(groups) < needed:
            raise StageError(
                f"data.path: class {name!r} is too small to split: {len(groups)} different pictures, "
                f"needs {needed}; add pictures or remove the class"
            )
        count = sum(map(len, groups.values()))
        wanted = {"test": max(1, round(test_size * count)), "val": max(1, round(val_size * count)) if val_size else 0}
        chosen: dict[str, list[Entry]] = {part: [] for part in PARTS}
        shuffled = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        for position, digest in enumerate(shuffled):
            left = len(shuffled) - position
            # The last groups are kept for the parts that come after: a large group of copies may have filled no part.
            if len(chosen["test"]) < wanted["test"] and (not chosen["test"] or left >= needed):
                part = "test"
            elif len(chosen["val"]) < wanted["val"] and (not chosen["val"] or left >= 2):
                part = "val"
            else:
                part = "train"
            chosen[part] += groups[digest]
        for part in PARTS:
            parts[part] += chosen[part]
    return {part: sorted(chosen, key=lambda entry: entry.path) for part, chosen in parts.items()}


def count(parts: dict[str, list[Entry]]) -> dict[str, dict[str, int]]:
    """Return class -> part -> number of pictures, classes in the order of their labels."""
    names = class_names([entry for entries in parts.values() for entry in entries])
    return {
        name: {part: sum(entry.class_name == name for entry in entries) for part, entries in parts.items()}
        for name in names
    }


def write_index(path: Path, entries: list[Entry]) -> None:
    """Write an index file (CSV, UTF-8), whole or not at all."""
    write_csv(path, _COLUMNS, ([entry.path, entry.label, entry.class_name, entry.sha256] for entry in entries))


def read_index(path: Path) -> list[Entry]:
    """Read an index file.

    Raises:
        StageError: not an index file.
        OSError: not there.
    """
    try:
        return [
            Entry(name, int(label), class_name, digest) for name, label, class_name, digest in read_rows(path, _COLUMNS)
        ]
    except ValueError as error:
        raise StageError(f"{path}: not an index file ({error}); `dvc repro split` writes it anew") from error


def read_watched(folder: Path) -> list[Entry]:
    """Return the pictures watched during training: the validation part, or the test part where that is empty."""
    return read_index(folder / "val.csv") or read_index(folder / "test.csv")


def class_names(entries: list[Entry]) -> list[str]:
    """Return the names of the classes, in the order of their labels."""
    return [name for _, name in sorted({(entry.label, entry.class_name) for entry in entries})]
