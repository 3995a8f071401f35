"""Labels from a table: the images stay where they are, in any layout."""

import csv
import os
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.common.cli import StageError
from stages.common.format import enumerate_names, plural
from stages.common.params import Given
from stages.images.collection import Collection, Sample, walk
from stages.images.names import column_for, part_named

_DELIMITERS = ",;\t"
_USED = ("path", "label", "split", "group")
# What pandas and spreadsheets write where there is nothing.
_NO_LABEL = ("", "nan", "<na>", "n/a", "#n/a", "null")
_QUOTES = " []'\""  # around labels and in lists of them
_ABSENT = "not there, but listed"


@dataclass(frozen=True, order=True)
class _Row:
    label: str
    part: str
    group: str


def read_labels(root: Path, table: Path, given: Given) -> Collection:
    """List the images of a table with the columns `path` (below `root`) and `label`, perhaps `split` and `group`.

    The table is UTF-8; commas, semicolons or tabs separate its cells. A file that is not there, one without a label and
    one with two labels, splits or groups are rejected; images below `root` that are not listed are counted. A name
    may differ from the file's in case or extension. Labels that are equal as numbers are one class.

    Args:
        root: the data set.
        table: the file.
        given: `auto`: the column `split` is used, if there is one; `ignore`: it is not.

    Raises:
        StageError: it cannot be read, lacks a column, or has a row that cannot be understood.
    """
    if not root.is_dir():
        raise StageError(f"data.path: {root} is not a folder; give the one that the paths of {table} are relative to")
    columns, lines = _read_lines(root, table)
    found = Collection()
    there = set(walk(root, "", found))
    _leave_out(table, root, found)
    files = _Files(root, there)
    _require_single_labels(table, [cells["label"] for _, cells in lines])
    spelt = _merge_numbers([cells["label"] for _, cells in lines], found)
    rows: dict[str, set[_Row]] = defaultdict(set)
    for number, cells in lines:
        path = files.find(cells["path"], f"data.labels: {table}, line {number}")
        part = _part(cells.get("split", ""), f"data.labels: {table}, line {number}") if given == "auto" else ""
        rows[path].add(_Row(spelt[cells["label"]], part, cells.get("group", "")))
    _require_whole_split(rows, table)
    for path, contents in sorted(rows.items()):
        first = min(contents)
        if reason := _problem(root / path, contents):
            found.rejected[path] = f"{reason} in {table.name}{files.near(path) if reason == _ABSENT else ''}"
        if first.label:
            found.samples.append(Sample(path, first.label, path, first.part, first.group))
    repeated, unlisted = len(lines) - sum(map(len, rows.values())), len(there - rows.keys())
    if repeated:
        found.notes.append(f"{plural(repeated, 'row')} of {table.name} repeated")
    if unlisted:
        found.left_out["unlisted"] = unlisted
    if given == "ignore" and "split" in columns:
        found.notes.append(f"the column split of {table.name} not used (split.given)")
    if files.otherwise:
        found.notes.append(f"{plural(files.otherwise, 'path')} of {table.name} found by another case or extension")
    found.notes += _unused_columns(columns, lines, table)
    if not found.samples:
        raise StageError(f"data.labels: {table} gives no image a label; fill in its column label")
    return found


def _read_lines(root: Path, table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the names of the columns, and the number and the cells of each line."""
    if not table.is_file():
        inside = (
            f"; did you mean data.labels={root / table}?" if (root / table).is_file() else "; give a CSV file or null"
        )
        raise StageError(f"data.labels: {table} {'is not a file' if table.exists() else 'does not exist'}{inside}")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StageError(f"data.labels: {table} is not UTF-8 ({error.reason}); save it as CSV in UTF-8") from error
    header = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(_DELIMITERS, key=header.count))
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        for name in ("path", "label"):
            if columns.count(name) != 1:
                shown = ", ".join(columns) or "nothing"
                raise StageError(
                    f"data.labels: {table} should have one column {name} in its first line, has {shown}"
                    + _explain_one_hot(columns, reader) * (name == "label")
                )
        lines = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise StageError(
                    f"data.labels: {table}, line {reader.line_num}: has {plural(len(cells), 'cell')}, the first line "
                    f"{len(columns)}; quote a cell that holds the separator"
                )
            lines.append((reader.line_num, {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}))
    except csv.Error as error:
        raise StageError(f"data.labels: {table}, line {reader.line_num}: {error}; save it as CSV in UTF-8") from error
    return columns, lines


def _explain_one_hot(columns: list[str], rows: Iterable[list[str]]) -> str:
    """Say how to give labels where columns named as classes hold a single 1 in each row; nothing otherwise."""
    cells = [[cell.strip().removesuffix(".0") for cell in row] for row in rows if row]
    found = [
        (name, values)
        for name, values in zip(columns, zip(*cells, strict=False), strict=False)
        if {"0", "1"}.issuperset(values)
    ]
    if len(found) < 2 or any(row.count("1") != 1 for row in zip(*(values for _, values in found), strict=True)):
        return ""
    shown = enumerate_names([name for name, _ in found], 3)
    return f"; its columns {shown} are one-hot: put the name of the one that is 1 into a column label"


def _leave_out(table: Path, root: Path, found: Collection) -> None:
    """Do not count the table itself among the files that were ignored."""
    kind = table.suffix.lower()
    if found.ignored[kind] and root.resolve() in table.resolve().parents:
        found.ignored[kind] -= 1
    found.ignored = +found.ignored


class _Files:
    """The images below `root`, by ways in which a table may spell their paths."""

    def __init__(self, root: Path, there: set[str]) -> None:
        self.root, self.there, self.otherwise = root, there, 0
        self.exact = {unicodedata.normalize("NFC", path): path for path in sorted(there)}
        # Another case, another or no extension, another folder: taken only where it is one file.
        self.looser: list[dict[str, list[str]]] = [defaultdict(list), defaultdict(list), defaultdict(list)]

    def find(self, path: str, where: str) -> str:
        """Return a path as below `root`; the table may begin it with `root`, or differ in form, case or extension."""
        if not path:
            raise StageError(f"{where}: has no path; fill it in or remove the line")
        if "://" in path:
            return path
        root = self.root
        if os.path.isabs(path):  # noqa: PTH117 (text of a table)
            path = os.path.relpath(path, root.absolute())
        slashes = path.replace("\\", "/")
        candidates = [posixpath.normpath(one) for one in (path, slashes, slashes.removeprefix(f"{root.as_posix()}/"))]
        if candidates[0].split("/")[0] == "..":
            raise StageError(
                f"{where}: {path} is not below data.path, {root}; set data.path to a folder that holds all"
            )
        for candidate in candidates:
            known = candidate if candidate in self.there else self.exact.get(unicodedata.normalize("NFC", candidate))
            if known is not None:
                return known
        if listed := next((one for one in candidates if os.path.lexists(root / one)), None):
            return listed
        for candidate in candidates:
            for kind in (0, 1):
                if len(similar := self._similar(candidate, kind)) == 1:
                    self.otherwise += 1
                    return similar[0]
        return candidates[0]

    def near(self, path: str) -> str:
        """Ask whether a file of the same name in another folder is meant."""
        similar = self._similar(path, 2)
        return f"; did you mean {similar[0]}?" if similar else ""

    def _similar(self, path: str, kind: int) -> list[str]:
        if not self.looser[0]:
            for one in sorted(self.there):
                for keys, key in zip(self.looser, _loosen(one), strict=True):
                    keys[key].append(one)
        whole, stem, name = _loosen(path)
        # As if it had no extension first: `.5` is none in `scan 2.5`.
        wanted = ((whole,), (whole, stem), (posixpath.basename(whole), name))[kind]
        return next((found for key in wanted if (found := self.looser[kind].get(key))), [])


def _loosen(path: str) -> tuple[str, str, str]:
    whole = unicodedata.normalize("NFC", path).casefold()
    stem = posixpath.splitext(whole)[0]
    return whole, stem, posixpath.basename(stem)


def _require_single_labels(table: Path, labels: list[str]) -> None:
    """Refuse labels that hold several names each.

    They do where most are joined, or where what is joined also stands alone; by commas, all of it: `tench, Tinca tinca`
    is one name.
    """
    alone = Counter(labels)
    single = {label.strip(_QUOTES) for label in alone}
    for sign in ("|", ";", ","):
        joined = {label: [piece.strip(_QUOTES) for piece in label.split(sign)] for label in alone if sign in label}
        pieces = Counter(piece for found in joined.values() for piece in set(found))
        mixed = [
            label
            for label, found in joined.items()
            if (sign != "," and (2 * sum(alone[one] for one in joined) > len(labels) or not single.isdisjoint(found)))
            or all(piece in single or pieces[piece] > 1 for piece in found)
        ]
        if mixed and (sign != "," or len(mixed) > 1 or single.issuperset(joined[mixed[0]])):
            raise StageError(
                f"data.labels: {table} has multi-label rows, such as {mixed[0]!r}; an image has one class here: "
                "choose one for each row, or leave these rows out"
            )


def _merge_numbers(labels: list[str], found: Collection) -> dict[str, str]:
    """Return the spelling of each label; where all are numbers, equal ones are one class."""
    spelt = {label: "" if label.lower() in _NO_LABEL else label for label in labels}
    try:
        values = {label: float(label) for label in spelt if spelt[label]}
    except ValueError:
        return spelt
    shortest: dict[float, str] = {}
    for label, value in sorted(values.items(), key=lambda item: (len(item[0]), item[0])):
        spelt[label] = shortest.setdefault(value, label)
    if merged := sorted(label for label in values if spelt[label] != label):
        shown = enumerate_names([f"{label} as {spelt[label]}" for label in merged], 3)
        found.notes.append(f"labels that are the same number taken for one class ({shown})")
    return spelt


def _unused_columns(columns: list[str], lines: list[tuple[int, dict[str, str]]], table: Path) -> list[str]:
    """Name the columns that are not used, and those that look like a split or a group."""
    unused = [name for name in columns if name not in _USED and name]
    if not unused:
        return []
    notes = [f"columns of {table.name} not used: {enumerate_names(unused)}"]
    meant: dict[str, list[str]] = {"split": [], "group": []}
    for name in unused:
        parts = {part_named(cells[name]) for _, cells in lines}
        if wanted := "split" if len(parts) > 1 and None not in parts else column_for(name):
            meant[wanted].append(name)
    if meant["split"] and "split" not in columns:
        notes.append(
            f"{enumerate_names(meant['split'])} may be a split: if so, rename it to split, with train, val and test"
        )
    if meant["group"] and "group" not in columns:
        notes.append(
            f"{enumerate_names(meant['group'])} may say what belongs together: if so, rename it to group, and set "
            "split.group=column"
        )
    return notes


def _part(split: str, where: str) -> str:
    part = part_named(split) if split else ""
    if part is None:
        raise StageError(f"{where}: split is {split!r}, should be train, val or test; or set split.given=ignore")
    return part


def _require_whole_split(rows: dict[str, set[_Row]], table: Path) -> None:
    parts = [row.part for contents in rows.values() for row in contents]
    if any(parts) and not all(parts):
        raise StageError(
            f"data.labels: {table} has no split in {plural(parts.count(''), 'row')} and one in the others; fill it in, "
            "or set split.given=ignore"
        )
    if any(parts) and "train" not in parts:
        raise StageError(f"data.labels: {table} has no row whose split is train; add some, or set split.given=ignore")


def _problem(file: Path, rows: set[_Row]) -> str:
    """Say in a few words what is wrong with an image, nothing if nothing is."""
    for name in ("label", "part", "group"):
        values = sorted({getattr(row, name) for row in rows})
        if len(values) > 1:
            return f"listed with two {name}s, {values[0]!r} and {values[1]!r},"
    if not min(rows).label:
        return "listed without a label"
    if ":/" in str(file):
        return "a URL, and no file below data.path,"
    return "" if os.path.lexists(file) else _ABSENT
