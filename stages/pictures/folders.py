"""Labels from folders: one for each class, or those of a split that is given, with one for each class in them."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from stages.common.params import Given
from stages.common.stage import StageError
from stages.common.words import plural
from stages.pictures.collection import Collection, Picture
from stages.pictures.index import PARTS
from stages.pictures.scan import extension, identify, is_picture, list_names, reason, walk

_PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_WANTED = "give a folder that holds one folder of pictures per class"


def part_named(name: str) -> str | None:
    """Return the part of the split that a name such as `Validation` or `test_set` means, `None` if it means none."""
    word = re.sub(r"[ _-]?(set|data)$", "", name.strip().casefold())
    return next((part for part, names in _PART_NAMES.items() if word in names), None)


def read_folders(root: Path, given: Given) -> Collection:
    """List the pictures under each class folder, and the part that each belongs to where the folders give a split.

    Each folder in `root` is a class, and its pictures lie at any depth. Where all of them are named as parts of a split
    and hold folders, these are the classes.

    Args:
        root: the data set.
        given: `auto`: such parts are used as they are; `ignore`: their pictures are put together again.

    Raises:
        StageError: `root` is missing, not a folder, or holds fewer than two classes, or one without pictures; or it is
            a split that cannot be used as given.
    """
    found = Collection()
    names = _list_top(root, found)
    parts = _find_parts(root, names, given)
    if parts:
        _read_parts(root, parts, given, found)
        return found
    if len(names) == 1:
        raise StageError(f"data.path: {root} holds one class only ({names[0]}){_suggest_wrapped(root, names[0])}")
    for name in names:
        before = found.ignored.copy()
        if not _read_class(root, name, name, "", found):
            others = _other_files(found.ignored - before)
            raise StageError(f"data.path: no pictures in {root / name}{others}; add some or remove the folder")
    _note_inner_parts(found)
    return found


def _list_top(root: Path, found: Collection) -> list[str]:
    """Return the names of the folders in `root`; count what lies beside them."""
    if not root.exists():
        raise StageError(f"data.path: {root} does not exist; {_WANTED}")
    if not root.is_dir():
        raise StageError(f"data.path: {root} is not a folder; {_WANTED}")
    folders = _list_folders(root, "", found)
    if not folders:
        loose = found.left_out["loose"]
        here = f" but {plural(loose, 'picture')}" if loose else ""
        raise StageError(
            f"data.path: {root} holds no folders{here}; put the pictures of each class into a folder"
            + (", or name a table of their labels as data.labels" if loose else "")
        )
    return folders


def _list_folders(root: Path, folder: str, found: Collection) -> list[str]:
    """Return the names of the folders in a folder of `root`; count the files beside them."""
    folders = []
    for name in list_names(root / folder, found):
        path = root / folder / name
        if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir fails where permission is denied)
            folders.append(name)
        elif is_picture(name):
            found.left_out["loose"] += 1
        elif path.is_symlink() and not path.exists() and not extension(name):
            raise StageError(f"data.path: {path} is a broken link; repair or remove it")
        else:
            found.ignored[extension(name)] += 1
    return folders


def _read_class(root: Path, folder: str, name: str, part: str, found: Collection) -> bool:
    """Add the pictures of a class folder; return whether there are any."""
    paths = list(walk(root, folder, found, ancestors=(identify(root),)))
    if folder in found.rejected:
        raise StageError(f"data.path: {root / folder}: {found.rejected[folder]}; make it readable or remove it")
    found.pictures += [Picture(path, name, path.removeprefix(f"{folder}/"), part) for path in paths]
    return bool(paths)


def _other_files(ignored: Counter[str]) -> str:
    if not ignored:
        return ""
    kind, number = ignored.most_common(1)[0]
    return f", among whose files are {number:,} {kind or 'without extension'}"


def _note_inner_parts(found: Collection) -> None:
    """Say that a split inside of the classes is not taken for one."""
    inner = {picture.below.split("/")[0] for picture in found.pictures if "/" in picture.below}
    if len({part_named(name) for name in inner} - {None}) > 1:
        names = _join(sorted(name for name in inner if part_named(name)))
        found.notes.append(f"folders {names} inside of classes not taken for a split")


def _suggest_wrapped(root: Path, name: str) -> str:
    """Ask whether the folders inside the only folder are meant."""
    inner, folders = root / name, _folders_of(root / name)
    while len(folders) == 1 and not part_named(folders[0]):
        inner, folders = inner / folders[0], _folders_of(inner / folders[0])
    if not folders:
        return "; add a folder for each other class"
    shown = ", ".join(folders[:3]) + (" ..." if len(folders) > 3 else "")
    return f", whose folders are {shown}: did you mean data.path={inner}?"


def _folders_of(folder: Path) -> list[str]:
    try:
        return [name for name in list_names(folder, Collection()) if (folder / name).is_dir()]
    except OSError:
        return []


def _find_parts(root: Path, names: list[str], given: Given) -> dict[str, str]:
    """Return part -> folder where the folders in `root` are those of a split.

    Raises:
        StageError: they look like those of a split, but cannot be used as one.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if part := part_named(name):
            parts[part].append(name)
    named = [name for part in PARTS for name in parts.get(part, [])]
    bare = [name for name in named if not _folders_of(root / name)]
    others = [name for name in names if name not in named]
    if others or not named or len(bare) == len(named):
        # `train` may be a class beside `bus`, and even `train` and `test` may be; but not two with the same classes.
        if given == "auto" and "train" in parts and len(parts) > 1 and (not others or _share_classes(root, named)):
            if others:
                problem = f"beside them is {others[0]}; move that away"
            else:
                problem = "they hold no class folders; sort their pictures into such, or name a table as data.labels"
            raise StageError(
                f"data.path: {root} has {_join(named)}, which look like a split, but {problem}, or set "
                "split.given=ignore, which takes each for a class"
            )
        return {}
    if len(named) == 1 and "train" not in parts:
        return {}
    if bare:
        raise StageError(
            f"data.path: {root / bare[0]} holds no folders, so its pictures have no class; "
            "move it away, or sort its pictures into class folders as in the other parts"
        )
    for part, folders in parts.items():
        if len(folders) > 1:
            raise StageError(f"data.path: {root} has {_join(folders)}, both for {part}; merge them or move one away")
    if "train" not in parts and given == "auto":
        raise StageError(
            f"data.path: {root} has {_join(named)}, but no folder train; add it, or set split.given=ignore"
        )
    return {part: parts[part][0] for part in PARTS if part in parts}


def _share_classes(root: Path, named: list[str]) -> bool:
    first, *others = (set(_folders_of(root / name)) for name in named)
    return bool(first.intersection(*others))


def _join(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _read_parts(root: Path, parts: dict[str, str], given: Given, found: Collection) -> None:
    for part, top in parts.items():
        folder = top
        try:
            classes = _list_folders(root, folder, found)
            if len(classes) == 1 and part_named(classes[0]) == part:  # training_set/training_set/{cats,dogs}
                folder = f"{folder}/{classes[0]}"
                classes = _list_folders(root, folder, found)
        except OSError as error:
            raise StageError(f"data.path: {root / folder}: {reason(error)}; make it readable or remove it") from error
        for name in classes:
            any_there = _read_class(root, f"{folder}/{name}", name, part if given == "auto" else "", found)
            if not any_there and part == "train" and given == "auto":
                raise StageError(f"data.path: no pictures in {root / folder / name}; add some or remove the class")
    folders = _join(list(parts.values()))
    if given == "ignore":
        found.notes.append(f"the pictures of {folders} put together and divided again (split.given)")
