"""The images of a dataset and their labels, from folders or a table, corrected by another table."""

import csv
import os
import posixpath
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from stages.common.cli import StageError
from stages.common.commits import git
from stages.common.files import read_csv
from stages.common.format import enumerate_names, plural
from stages.common.params import Given, Params
from stages.images.collection import Collection, Sample, column_for, extension, part_named, walk
from stages.images.folders import read_folders

# A correction beside the names of classes.
DROP = "drop"
# Missing values as pandas and spreadsheets write them.
_NO_LABEL = ("", "nan", "<na>", "n/a", "#n/a", "null")
_QUOTES = " []'\""  # around labels and in lists of them
_ABSENT = "not there, but listed"


def collect(params: Params, root: Path) -> Collection:
    """List the images with their corrected labels and their groups, before any is read."""
    given, labels, corrections = params.split.given, params.data.labels, params.data.corrections
    found = read_folders(root, given) if labels is None else _read_labels(root, Path(labels), given)
    if corrections is not None:
        _correct(found, read_corrections(Path(corrections)), Path(corrections))
    _require_classes(found, root, table=labels is not None)
    _set_groups(found, params.split.group)
    return found


def read_corrections(table: Path) -> dict[str, str]:
    """Return path below `data.path` -> correction, a class or `drop`; rows without a correction are skipped."""
    try:
        header, rows = read_csv(table)
        places = [header.index(name) for name in ("path", "correction")]
    except FileNotFoundError as error:
        raise StageError(f"data.corrections: {table} does not exist; give a CSV file or null") from error
    except (OSError, ValueError) as error:
        raise StageError(f"data.corrections: {table} is no CSV with the columns path and correction") from error
    corrections: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise StageError(f"data.corrections: {table}, line {number}: not as many cells as the first line has")
        name, correction = (row[place] for place in places)
        if correction and corrections.setdefault(name, correction) != correction:
            raise StageError(f"data.corrections: {table}, line {number}: {name} has another correction above")
    return corrections


def _correct(found: Collection, corrections: dict[str, str], table: Path) -> None:
    """Correct the classes of images, and drop those marked `drop`."""
    classes = found.by_class()
    for name, correction in corrections.items():
        if correction != DROP and correction not in classes:
            raise StageError(
                f"data.corrections: {table}: {name} should be {correction}, which is no class of the data set "
                f"({enumerate_names(list(classes))}) and not {DROP}"
            )
    corrected = [replace(one, class_name=corrections.get(one.path, one.class_name)) for one in found.samples]
    dropped = {one.path for one in corrected if one.class_name == DROP}
    pairs = zip(corrected, found.samples, strict=True)
    changed = sum(one.class_name not in (before.class_name, DROP) for one, before in pairs)
    absent = len(corrections.keys() - {one.path for one in corrected})
    found.samples = [one for one in corrected if one.path not in dropped]
    found.rejected = {name: why for name, why in found.rejected.items() if name not in dropped}
    found.notes += [f"{plural(changed, 'label')} corrected, {plural(len(dropped), 'image')} dropped by {table.name}"]
    found.notes += [f"{plural(absent, 'row')} of {table.name} without an image"] * bool(absent)


def _require_classes(found: Collection, root: Path, table: bool) -> None:
    """Refuse a single class, and two classes whose names look the same.

    Such names differ only in surrounding spaces or Unicode form, or, as folders, in case, which some file systems and
    tools ignore.
    """
    names: dict[str, str] = {}
    for name in found.by_class():
        key = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).strip())
        key = key if table else key.casefold()
        if key in names:
            one, other = (repr(each) if each.isascii() else f"{each!r} ({each!a})" for each in (names[key], name))
            raise StageError(
                f"data.path: {root} has two classes {one} and {other}, whose names differ only in case, in spaces or "
                "in Unicode form; rename one, or merge them"
                + ("" if table else ", or name a table as data.labels, in which case counts")
            )
        names[key] = name
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            found.notes.append(f"{other} and {name} taken for two classes, though they differ only in case")
    if len(names) == 1:
        raise StageError(f"data.path: {root} holds one class only ({next(iter(names.values()))}); add another")


def _set_groups(found: Collection, rule: str | None) -> None:
    """Set the group of each image, and count images without one; raises StageError if no image has one.

    `rule` is `split.group`. `folder`: the image's folder below that of its class, so `cat/scene 1` and `dog/scene 1`
    are one group; `column`: the table's column; a regular expression: what its parentheses match in the path below
    `data.path`; `None`: no groups.
    """
    if rule is None and any(image.group for image in found.samples):
        found.notes.append("the column group not used (split.group=column does)")
    found.samples = [replace(image, group=_group_of(image, rule)) for image in found.samples]
    alone = sum(not image.group for image in found.samples)
    if rule and alone == len(found.samples):
        causes = {
            "folder": "no image lies in a folder below that of its class",
            "column": "no table with a filled column group is named as data.labels",
        }
        cause = causes.get(rule, f"{rule!r} matches no image's path, such as {found.samples[0].path!r}")
        raise StageError(f"split.group: {cause}; set it to null for no groups")
    if rule and alone:
        found.notes.append(f"{plural(alone, 'image')} in no group")


def _group_of(image: Sample, rule: str | None) -> str:
    if rule is None:
        return ""
    if rule == "column":
        return image.group
    if rule == "folder":
        return posixpath.dirname(image.below)
    match = re.search(rule, image.path)
    return (match[1] or "") if match else ""


def describe_untracked(folder: Path) -> str:
    """Return a warning if a folder is in this repository and has files that git neither tracks nor ignores, or "".

    `dvc exp run` commits such files with the experiment. Files tracked by `dvc add` are ignored by git.
    """
    question = ("ls-files", "--others", "--exclude-standard", "--directory", "--no-empty-directory", "--")
    try:
        untracked = git(*question, str(folder.absolute()))
    except StageError:
        return ""
    if not untracked:
        return ""
    return (
        f"warning: data.path: {folder} is in the repository, but neither ignored by git nor tracked by DVC: `dvc exp "
        f"run` commits all images to git; move them out of it, or run `dvc add {shlex.quote(str(folder))}`"
    )


class _Row(NamedTuple):
    label: str
    part: str
    group: str


def _read_labels(root: Path, table: Path, given: Given) -> Collection:
    """List the images of a table with the columns `path` (below `root`) and `label`, perhaps `split` and `group`.

    The table is UTF-8, its cells separated by commas, semicolons or tabs. Missing files, and those without a label or
    with two labels, splits or groups, are rejected; images below `root` that are not listed are counted. Paths may
    differ from the files' in case or extension. Labels that are equal as numbers are one class.
    """
    if not root.is_dir():
        raise StageError(f"data.path: {root} is not a folder; give the one that the paths of {table} are relative to")
    columns, lines = _read_lines(root, table)
    found = Collection()
    there = set(walk(root, "", found))
    # The table itself does not count as ignored.
    if found.ignored[kind := table.suffix.lower()] and root.resolve() in table.resolve().parents:
        found.ignored[kind] -= 1
    files = _Files(root, there)
    labels = [cells["label"] for _, cells in lines]
    _require_single_labels(table, labels)
    spelt = _merge_numbers(labels, found)
    rows: dict[str, set[_Row]] = defaultdict(set)
    for number, cells in lines:
        where = f"data.labels: {table}, line {number}"
        path, split = files.find(cells["path"], where), cells.get("split", "") if given == "auto" else ""
        part = part_named(split) if split else ""
        if part is None:
            raise StageError(f"{where}: split is {split!r}, should be train, val or test; or set split.given=ignore")
        rows[path].add(_Row(spelt[cells["label"]], part, cells.get("group", "")))
    for path in rows.keys() - there:  # listed, but without an image's extension
        found.ignored[extension(path)] -= os.path.lexists(root / path)
    found.ignored = +found.ignored
    parts = [row.part for contents in rows.values() for row in contents]
    if any(parts) and not all(parts):
        raise StageError(
            f"data.labels: {table} has no split in {plural(parts.count(''), 'row')} and one in the others; fill it in, "
            "or set split.given=ignore"
        )
    if any(parts) and "train" not in parts:
        raise StageError(f"data.labels: {table} has no row whose split is train; add some, or set split.given=ignore")
    for path, contents in sorted(rows.items()):
        first = min(contents)
        if reason := _problem(root / path, contents):
            found.rejected[path] = f"{reason} in {table.name}{files.near(path) if reason == _ABSENT else ''}"
        if first.label:
            found.samples.append(Sample(path, first.label, path, first.part, first.group))
    if repeated := len(lines) - sum(map(len, rows.values())):
        found.notes.append(f"{plural(repeated, 'row')} of {table.name} repeated")
    if unlisted := len(there - rows.keys()):
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
        way = f"did you mean data.labels={root / table}?" if (root / table).is_file() else "give a CSV file or null"
        raise StageError(f"data.labels: {table} {'is not a file' if table.exists() else 'does not exist'}; {way}")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StageError(f"data.labels: {table} is not UTF-8 ({error.reason}); save it as CSV in UTF-8") from error
    header = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count))
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        for name in ("path", "label"):
            if columns.count(name) != 1:
                raise StageError(
                    f"data.labels: {table} should have one column {name} in its first line, has "
                    f"{', '.join(columns) or 'nothing'}{_explain_one_hot(columns, reader) if name == 'label' else ''}"
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
    """Explain how to give labels if the columns are one-hot; "" otherwise."""
    cells = [[cell.strip().removesuffix(".0") for cell in row] for row in rows if row]
    pairs = zip(columns, zip(*cells, strict=False), strict=False)
    found = {name: values for name, values in pairs if {"0", "1"}.issuperset(values)}
    if len(found) < 2 or any(row.count("1") != 1 for row in zip(*found.values(), strict=True)):
        return ""
    return (
        f"; its columns {enumerate_names(list(found), 3)} are one-hot: put the name of the one that is 1 into a "
        "column label"
    )


class _Files:
    """The images below `root`, by the spellings of their paths that a table may use."""

    def __init__(self, root: Path, there: set[str]) -> None:
        self.root, self.there, self.otherwise = root, there, 0
        self.exact = {unicodedata.normalize("NFC", path): path for path in sorted(there)}
        # By another case, extension or folder: used only if one file matches.
        self.looser: list[dict[str, list[str]]] = [defaultdict(list), defaultdict(list), defaultdict(list)]

    def find(self, path: str, where: str) -> str:
        """Return a path below `root`; the table's may begin with `root`, or differ in form, case or extension."""
        if not path:
            raise StageError(f"{where}: has no path; fill it in or remove the line")
        if "://" in path:
            return path
        root = self.root
        if os.path.isabs(path):  # noqa: PTH117 (text of a table)
            path = os.path.relpath(path, root.absolute())
        slashes = path.replace("\\", "/")
        whole = posixpath.normpath(slashes)
        candidates = [posixpath.normpath(path), whole, whole.removeprefix(f"{root.as_posix()}/")]
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
        """Suggest a file of the same name in another folder, or ""."""
        similar = self._similar(path, 2)
        return f"; did you mean {similar[0]}?" if similar else ""

    def _similar(self, path: str, kind: int) -> list[str]:
        if not self.looser[0]:
            for one in sorted(self.there):
                for keys, key in zip(self.looser, _loosen(one), strict=True):
                    keys[key].append(one)
        whole, stem, name = _loosen(path)
        # First without removing an extension: `.5` is none in `scan 2.5`.
        wanted = ((whole,), (whole, stem), (posixpath.basename(whole), name))[kind]
        return next((found for key in wanted if (found := self.looser[kind].get(key))), [])


def _loosen(path: str) -> tuple[str, str, str]:
    whole = unicodedata.normalize("NFC", path).casefold()
    stem = posixpath.splitext(whole)[0]
    return whole, stem, posixpath.basename(stem)


def _require_single_labels(table: Path, labels: list[str]) -> None:
    """Refuse labels of several names each.

    That is so if most are joined, or if parts also occur alone; with commas, all parts: `tench, Tinca tinca` is one
    name.
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
    """Return the class of each label; if all are numbers, equal ones are one class."""
    spelt = {label: "" if label.lower() in _NO_LABEL else label for label in labels}
    try:
        values = {label: float(label) for label in spelt if spelt[label]}
    except ValueError:
        return spelt
    shortest: dict[float, str] = {}
    for label, value in sorted(values.items(), key=lambda item: (len(item[0]), item[0])):
        spelt[label] = shortest.setdefault(value, label)
    if merged := [f"{label} as {spelt[label]}" for label in sorted(values) if spelt[label] != label]:
        found.notes.append(f"labels that are the same number taken for one class ({enumerate_names(merged, 3)})")
    return spelt


def _unused_columns(columns: list[str], lines: list[tuple[int, dict[str, str]]], table: Path) -> list[str]:
    """Name the columns that are not used, and those that look like a split or a group."""
    unused = [name for name in columns if name not in ("path", "label", "split", "group") and name]
    if not unused:
        return []
    notes = [f"columns of {table.name} not used: {enumerate_names(unused)}"]
    meant: dict[str, list[str]] = {"split": [], "group": []}
    for name in unused:
        parts = {part_named(cells[name]) for _, cells in lines}
        if wanted := "split" if len(parts) > 1 and None not in parts else column_for(name):
            meant[wanted].append(name)
    hints = {
        "split": "may be a split: if so, rename it to split, with train, val and test",
        "group": "may say what belongs together: if so, rename it to group, and set split.group=column",
    }
    return notes + [
        f"{enumerate_names(meant[column])} {hint}"
        for column, hint in hints.items()
        if meant[column] and column not in columns
    ]


def _problem(file: Path, rows: set[_Row]) -> str:
    """Return in a few words what is wrong with an image, or ""."""
    for name in _Row._fields:
        values = sorted({getattr(row, name) for row in rows})
        if len(values) > 1:
            return f"listed with two {name}s, {values[0]!r} and {values[1]!r},"
    if not min(rows).label:
        return "listed without a label"
    if ":/" in str(file):
        return "a URL, and no file below data.path,"
    return "" if os.path.lexists(file) else _ABSENT
