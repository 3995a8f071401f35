"""Labels from a table: the pictures stay where they are, in any layout."""

import csv
import os
import posixpath
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from stages.common.params import Given
from stages.common.stage import StageError
from stages.common.words import plural
from stages.pictures.collection import Collection, Picture
from stages.pictures.folders import part_named
from stages.pictures.scan import walk

_DELIMITERS = ",;\t"


@dataclass(frozen=True, order=True)
class _Row:
    label: str
    part: str
    group: str


def read_table(root: Path, table: Path, given: Given) -> Collection:
    """List the pictures of a table with the columns `path` (below `root`) and `label`, perhaps `split` and `group`.

    The table is UTF-8; commas, semicolons or tabs separate its cells. A file that is not there, one without a label and
    one with two labels, splits or groups are rejected; pictures below `root` that are not listed are counted.

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
    spellings = {unicodedata.normalize("NFC", path): path for path in sorted(there)}
    rows: dict[str, set[_Row]] = defaultdict(set)
    for number, cells in lines:
        path = _find(root, cells["path"], there, spellings, f"data.labels: {table}, line {number}")
        part = _part(cells.get("split", ""), f"data.labels: {table}, line {number}") if given == "auto" else ""
        rows[path].add(_Row(cells["label"], part, cells.get("group", "")))
    _require_whole_split(rows, table)
    for path, contents in sorted(rows.items()):
        first = min(contents)
        if reason := _problem(root / path, contents):
            found.rejected[path] = f"{reason} in {table.name}"
        if first.label:
            found.pictures.append(Picture(path, first.label, path, first.part, first.group))
    repeated, unlisted = len(lines) - sum(map(len, rows.values())), len(there - rows.keys())
    if repeated:
        found.notes.append(f"{plural(repeated, 'row')} of {table.name} repeated")
    if unlisted:
        found.left_out["unlisted"] = unlisted
    if given == "ignore" and "split" in columns:
        found.notes.append(f"the column split of {table.name} not used (split.given)")
    if not found.pictures:
        raise StageError(f"data.labels: {table} gives no picture a label; fill in its column label")
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
                raise StageError(f"data.labels: {table} should have one column {name} in its first line, has {shown}")
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


def _leave_out(table: Path, root: Path, found: Collection) -> None:
    """Do not count the table itself among the files that were ignored."""
    kind = table.suffix.lower()
    if found.ignored[kind] and root.resolve() in table.resolve().parents:
        found.ignored[kind] -= 1
    found.ignored = +found.ignored


def _find(root: Path, path: str, there: set[str], spellings: dict[str, str], where: str) -> str:
    """Return a path as it is below `root`; it may begin with `root`, be of Windows, or have another Unicode form."""
    if not path:
        raise StageError(f"{where}: has no path; fill it in or remove the line")
    if os.path.isabs(path):  # noqa: PTH117 (text of a table)
        path = os.path.relpath(path, root.absolute())
    slashes = path.replace("\\", "/")
    candidates = [posixpath.normpath(one) for one in (path, slashes, slashes.removeprefix(f"{root.as_posix()}/"))]
    if candidates[0].split("/")[0] == "..":
        raise StageError(f"{where}: {path} is not below data.path, {root}; set data.path to a folder that holds all")
    for candidate in candidates:
        known = candidate if candidate in there else spellings.get(unicodedata.normalize("NFC", candidate))
        if known is not None:
            return known
    return next((one for one in candidates if os.path.lexists(root / one)), candidates[0])


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
    """Say in a few words what is wrong with a picture, nothing if nothing is."""
    for name in ("label", "part", "group"):
        values = sorted({getattr(row, name) for row in rows})
        if len(values) > 1:
            return f"listed with two {name}s, {values[0]!r} and {values[1]!r},"
    if not min(rows).label:
        return "listed without a label"
    return "" if os.path.lexists(file) else "not there, but listed"
