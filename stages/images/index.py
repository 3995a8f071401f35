"""The outputs of `split`: three index files with the class of each image, a summary, and changes since the last one."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.common.commits import read_versions
from stages.common.files import read_csv, write_csv
from stages.common.format import enumerate_names, plural
from stages.common.params import Params, Split
from stages.images.collection import Collection

PARTS = ("train", "val", "test")
# The number of each image's group, (n,).
Groups = NDArray[np.int64]
ClassCounts = dict[str, dict[str, int]]  # class -> part -> images
_COLUMNS = ["path", "label", "class", "sha256"]
# Prefix of the names of near-duplicate groups; a SHA-256 follows.
NEAR = "near "
# DVC shows each number in nested objects as a metric, but ignores lists.
_MOST_CLASSES = 20
_MOST_SHOWN = 3
_LEFT_OUT = {
    "system": ("file or folder hidden or made by a system", "files and folders hidden or made by a system"),
    "loose": ("image beside the class folders", "images beside the class folders"),
    "unlisted": ("image that the table does not list", "images that the table does not list"),
    "unlabelled": ("image of a folder without labels", "images of folders without labels"),
    "other_kind": ("image about another one (a mask, a label)", "images about others (masks, labels)"),
    "overlap": ("copy of an image of another part", "copies of images of another part"),
}


@dataclass(frozen=True)
class Entry:
    """An image: its path below `data.path` (with `/`), its class by number and name, and the SHA-256 of its file.

    `group`: images that stay in one part, by `split.group` or as near-duplicates; empty: only duplicates do.
    """

    path: str
    label: int
    class_name: str
    sha256: str
    group: str = ""


Parts = dict[str, list[Entry]]


def count(parts: Parts) -> ClassCounts:
    """Return class -> part -> number of images; classes in the order of their labels."""
    numbers = Counter((entry.class_name, part) for part, entries in parts.items() for entry in entries)
    names = class_names([entry for entries in parts.values() for entry in entries])
    return {name: {part: numbers[name, part] for part in parts} for name in names}


def count_once(entries: list[Entry]) -> list[Entry]:
    """Return one entry for each group of files with the same bytes."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.sha256, entry)
    return list(first.values())


def number_groups(entries: Sequence[Entry]) -> Groups | None:
    """Return the number of each image's group, (n,); an image without one forms its own. `None`: no groups at all."""
    if not any(entry.group for entry in entries):
        return None
    numbers: dict[tuple[str, str], int] = {}
    keys = ((entry.group, "" if entry.group else entry.path) for entry in entries)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def class_names(entries: list[Entry]) -> list[str]:
    """Return the names of the classes, in the order of their labels."""
    return [name for _, name in sorted({(entry.label, entry.class_name) for entry in entries})]


def write_index(path: Path, entries: list[Entry], grouped: bool = False) -> None:
    """Write an index file (CSV, UTF-8), whole or not at all; `grouped`: with a column for groups."""
    columns = _COLUMNS + ["group"] * grouped
    rows = ([entry.path, entry.label, entry.class_name, entry.sha256, entry.group] for entry in entries)
    write_csv(path, columns, (row[: len(columns)] for row in rows))


def read_index(path: Path) -> list[Entry]:
    """Read an index file; raises StageError if it is damaged, OSError if it is missing."""
    try:
        columns, rows = read_csv(path)
        if columns not in (_COLUMNS, [*_COLUMNS, "group"]):
            raise ValueError("unexpected columns")
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("rows of another length than the header")
        return [Entry(name, int(label), *rest) for name, label, *rest in rows]
    except ValueError as error:
        raise StageError(f"{path}: not an index file ({error}); `dvc repro split` writes it again") from error


class _Place(NamedTuple):
    """An image's part and class in an index."""

    part: str
    class_name: str


_Index = dict[str, _Place]  # by SHA-256


def find_kept(index: Path, params: Path, settings: Params) -> dict[str, str]:
    """Return SHA-256 -> part of the images in the committed index, which keep their parts as far as possible.

    Empty without such a commit, if its seed or split parameters were different, and with folds, which are equal
    parts.
    """
    if settings.split.folds is not None or not (committed := read_versions(params.parent, params.name)):
        return {}
    try:
        values: dict[str, Any] = yaml.safe_load(committed[0][0])
        before = _division(Split(**values["split"]), values["seed"])
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        return {}
    versions = _read_committed(index)
    if not versions or before != _division(settings.split, settings.seed):
        return {}
    return {digest: place.part for digest, place in versions[0].items()}


def _division(split: Split, seed: int) -> tuple[int, dict[str, Any]]:
    """Return the parameters that the split depends on."""
    return seed if split.seed is None else split.seed, split.model_dump(exclude={"rejected_limit", "seed"})


def _read_committed(folder: Path) -> list[_Index]:
    """Return the committed index, and the one that it replaced."""
    versions = []
    for contents in read_versions(folder, *(f"{part}.csv" for part in PARTS)):
        rows = {part: csv.DictReader(io.StringIO(text, newline="")) for part, text in zip(PARTS, contents, strict=True)}
        versions.append({row["sha256"]: _Place(part, row["class"]) for part, some in rows.items() for row in some})
    return versions


def describe_changes(index: Path, parts: Parts) -> dict[str, int]:
    """Count changes against the last committed index that differs from this one; empty if no image is in both.

    So the result of a run is the same before and after it is committed.
    """
    now = {entry.sha256: _Place(part, entry.class_name) for part, entries in parts.items() for entry in entries}
    before = next((one for one in _read_committed(index) if one != now), {})
    both = before.keys() & now.keys()
    if not both:
        return {}
    tested, testing = ({digest for digest in one if one[digest].part == "test"} for one in (before, now))
    return {
        "added": len(now) - len(both),
        "gone": len(before) - len(both),
        "relabelled": sum(before[digest].class_name != now[digest].class_name for digest in both),
        "test_added": len(testing - tested),
        "test_gone": len(tested - testing),
    }


def say_changes(changes: dict[str, int]) -> list[str]:
    """Return a sentence on the changes that `describe_changes` found, if any."""
    if not changes:
        return []
    return [
        f"since the last committed index {plural(changes['added'], 'image')} added, {changes['gone']} gone, "
        f"{changes['relabelled']} relabelled; test part +{changes['test_added']} -{changes['test_gone']}"
    ]


def summarize(
    found: Collection,
    parts: Parts,
    part_of: dict[str, str],
    rejected: dict[str, str],
    duplicates: list[list[str]],
    overlap: list[str],
) -> dict[str, Any]:
    """Return the content of `split.json`.

    `part_of`: path -> its given part; `rejected`: path -> reason; `duplicates`: groups of paths with the
    same bytes; `overlap`: paths left out because their bytes are also in another part.
    """
    counts, left_out = count(parts), {**found.left_out, "overlap": len(overlap)}
    as_rows = [{"class": name, **numbers} for name, numbers in counts.items()]
    groups = {
        part: {entry.group for entry in chosen if entry.group and not entry.group.startswith(NEAR)}
        for part, chosen in parts.items()
    }
    return {
        "pictures": sum(map(len, parts.values())),
        "parts": {part: len(parts[part]) for part in PARTS},
        # Many classes as a list, which DVC does not show as metrics.
        **({"classes": counts} if len(counts) <= _MOST_CLASSES else {"class_counts": as_rows}),
        **({"groups": {part: len(names) for part, names in groups.items()}} if any(groups.values()) else {}),
        "rejected": [{"path": path, "reason": reason} for path, reason in rejected.items()],
        "duplicates": duplicates,
        "ignored": dict(sorted(found.ignored.items())),
        "left_out": {kind: left_out[kind] for kind in _LEFT_OUT if left_out.get(kind)},
        "overlap": overlap,
        "notes": [
            *_describe_ignored(found.ignored),
            *(f"{plural(left_out[kind], *words)} left out" for kind, words in _LEFT_OUT.items() if left_out.get(kind)),
            *found.notes,
            *_describe_given(parts, part_of),
            *_describe_groups(groups),
        ],
    }


def _describe_ignored(ignored: Counter[str]) -> list[str]:
    if not ignored:
        return []
    kinds = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{number:,} {kind or 'without extension'}" for kind, number in kinds[:_MOST_SHOWN]]
    if more := sum(number for _, number in kinds[_MOST_SHOWN:]):
        shown.append(f"{more:,} others")
    return [f"{plural(sum(ignored.values()), 'file')} of other kinds ignored ({', '.join(shown)})"]


def _describe_given(parts: Parts, part_of: dict[str, str]) -> list[str]:
    given = [part for part in PARTS if part in set(part_of.values())]
    if not given:
        return []
    notes = [f"split as given ({', '.join(given)})"]
    notes += [f"{part} cut from train" for part in PARTS if part not in given and parts[part]]
    counts = count(parts)
    for part in given:
        if lacking := [name for name, numbers in counts.items() if not numbers[part]]:
            examples = ", ".join(lacking[:_MOST_SHOWN]) + " ..." * (len(lacking) > _MOST_SHOWN)
            notes.append(f"{plural(len(lacking), 'class', 'classes')} without {part} images ({examples})")
    return notes


def _describe_groups(groups: dict[str, set[str]]) -> list[str]:
    parts_with = Counter(name for names in groups.values() for name in names)
    if not parts_with:
        return []
    notes = [f"groups: {', '.join(f'{part} {len(names)}' for part, names in groups.items())}"]
    parted = sum(number > 1 for number in parts_with.values())
    return notes + [f"{plural(parted, 'group')} in more than one part of the split that is given"] * bool(parted)


def class_counts(split: dict[str, Any]) -> ClassCounts:
    """Return class -> part -> number of images, from the content of a `split.json`."""
    if "classes" in split:
        return dict(split["classes"])
    return {row["class"]: {part: row[part] for part in PARTS} for row in split["class_counts"]}


def read_summary(path: Path) -> dict[str, Any]:
    """Read a `split.json`; raises StageError if it is damaged or of another version, OSError if it is missing."""
    try:
        split = dict(json.loads(path.read_text(encoding="utf-8")))
        class_counts(split)
        if not all(isinstance(split[name], list) for name in ("rejected", "duplicates", "notes")):
            raise ValueError("a list is missing")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StageError(
            f"{path}: not what split writes ({error}); `dvc repro --force split` writes it again"
        ) from error
    return split


def last_line(split: dict[str, Any], report: Path) -> str:
    """Return one line on the split; `split` is the content of the file `report`."""
    parts = ", ".join(f"{part} {number}" for part, number in split["parts"].items())
    copies = plural(len(split["duplicates"]), "group") + " of copies"
    counts = {name: sum(numbers.values()) for name, numbers in class_counts(split).items()}
    classes = enumerate_names([f"{name} {number:,}" for name, number in counts.items()])
    if len(counts) > 10:
        low, high = min(counts.values()), max(counts.values())
        classes += f", {low:,} each" if low == high else f", {low:,} to {high:,} each"
    said = "; ".join([f"classes: {classes}", f"{len(split['rejected'])} rejected, {copies}", *split["notes"]])
    return f"{parts}; {said}: see {report}"
