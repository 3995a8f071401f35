"""The division that was committed last: what `split` keeps of it, and what has changed since."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.common.commits import read_versions
from stages.common.format import plural
from stages.common.params import Params, Split
from stages.images.index import PARTS, Entry

# Of `split`, what the division does not depend on.
_BESIDE = {"rejected_limit", "seed"}


@dataclass(frozen=True)
class Image:
    """Of an image in a committed index: its part and its class."""

    part: str
    class_name: str


Index = dict[str, Image]  # by SHA-256


def find_kept(index: Path, params: Path, settings: Params) -> dict[str, str]:
    """Return SHA-256 -> part of the images in the committed index, which keep theirs as far as possible.

    None where there is no such commit, or where its seed or what it says of the division was another; nor with folds,
    whose parts are to be equal.
    """
    if settings.split.folds is not None or not (committed := read_versions(params.parent, params.name)):
        return {}
    try:
        values: dict[str, Any] = yaml.safe_load(committed[0][0])
        before = _division(Split(**values["split"]), values["seed"])
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        return {}
    versions = _read_indices(index)
    same = before == _division(settings.split, settings.seed)
    return {digest: image.part for digest, image in versions[0].items()} if versions and same else {}


def _division(split: Split, seed: int) -> tuple[int, dict[str, Any]]:
    return seed if split.seed is None else split.seed, split.model_dump(exclude=_BESIDE)


def describe_changes(index: Path, parts: dict[str, list[Entry]]) -> dict[str, int]:
    """Count what changed against the last committed index that differs from this one; nothing if no image is in both.

    So a run gives the same before and after its results are committed.
    """
    now = _by_bytes((part, entry.sha256, entry.class_name) for part, entries in parts.items() for entry in entries)
    before = next((one for one in _read_indices(index) if one != now), None)
    if before is None or not (both := before.keys() & now.keys()):
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
    """Return a sentence on what `describe_changes` found; none where it found nothing."""
    if not changes:
        return []
    return [
        f"since the last committed index {plural(changes['added'], 'image')} added, {changes['gone']} gone, "
        f"{changes['relabelled']} relabelled; test part +{changes['test_added']} -{changes['test_gone']}"
    ]


def _read_indices(folder: Path) -> list[Index]:
    """Return the committed index, and the one that it replaced."""
    indices = []
    for contents in read_versions(folder, *(f"{part}.csv" for part in PARTS)):
        rows = []
        for part, content in zip(PARTS, contents, strict=True):
            text = io.StringIO(content, newline="")
            rows += [(part, row["sha256"], row["class"]) for row in csv.DictReader(text)]
        indices.append(_by_bytes(rows))
    return indices


def _by_bytes(rows: Iterable[tuple[str, str, str]]) -> Index:
    return {digest: Image(part, name) for part, digest, name in rows}
