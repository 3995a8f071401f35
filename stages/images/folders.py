"""Labels from folders: one per class, perhaps inside the folders of a given split."""

import os
import shlex
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from stages.common.cli import StageError
from stages.common.format import enumerate_names, plural
from stages.common.params import Given
from stages.images.collection import (
    UNLABELLED,
    Collection,
    Sample,
    are_folds,
    classes_in_names,
    extension,
    identify,
    is_image,
    list_names,
    never_a_class,
    of_other_images,
    other_kinds,
    part_named,
    reason,
    take_apart,
    walk,
    words,
)
from stages.images.index import PARTS

_WANTED = "give a folder that holds one folder of images per class"
_EACH_A_CLASS = "set split.given=ignore, which takes each for a class"


def read_folders(root: Path, given: Given) -> Collection:
    """List the images of each class folder, with their parts if the folders give a split.

    Each folder in `root` is a class, with images at any depth. If several are named as parts of a split, the folders
    inside them are the classes; or each class folder contains folders with such names. With `given` `ignore`, the
    images of such parts are merged.
    """
    found = Collection()
    names = _list_top(root, found)
    if given == "auto":
        _refuse_kinds(root, "", names)
    parts = _find_parts(root, names, given, found)
    if parts:
        _read_parts(root, parts, given, found)
    else:
        _read_classes(root, names, given, found)
    _leave_out_other_kinds(found)
    if not parts:
        _look_into_classes(root, given, found)
    return found


def _list_top(root: Path, found: Collection) -> list[str]:
    """Return the names of the folders in `root`; count files beside them."""
    if not root.is_dir():
        raise StageError(f"data.path: {root} {'is not a folder' if root.exists() else 'does not exist'}; {_WANTED}")
    folders = _list_folders(root, "", found)
    if not folders:
        here, way = "", ""
        if loose := found.left_out["loose"]:
            here = f" but {plural(loose, 'image')}"
            way = f", or name a table of their labels as data.labels{_suggest_names(root)}"
        raise StageError(f"data.path: {root} holds no folders{here}; put the images of each class into a folder{way}")
    return folders


def _list_folders(root: Path, folder: str, found: Collection) -> list[str]:
    """Return the names of the folders in a folder of `root`; count the files beside them."""
    folders = []
    for name in list_names(root / folder, found):
        path = root / folder / name
        if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir fails where permission is denied)
            folders.append(name)
        elif is_image(name):
            found.left_out["loose"] += 1
        elif path.is_symlink() and not path.exists() and not extension(name):
            raise StageError(f"data.path: {path} is a broken link; repair or remove it")
        else:
            found.ignored[extension(name)] += 1
    return folders


def _folders_of(folder: Path) -> list[str]:
    try:
        return [name for name in list_names(folder, Collection()) if (folder / name).is_dir()]
    except OSError:
        return []


def _suggest_names(folder: Path) -> str:
    """Return a hint if file names tell the classes, or ""."""
    try:
        names = classes_in_names([name for name in list_names(folder, Collection()) if is_image(name)])
    except OSError:
        return ""
    if not names:
        return ""
    return (
        f"; file names in {folder} begin with {enumerate_names(names, 3)}: docs/pictures.md has a command that "
        "writes a table of such labels, for data.labels"
    )


def _join(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _refuse_kinds(root: Path, inside: str, names: list[str]) -> None:
    """Refuse folders that hold different kinds of file, such as images and masks, in place of classes."""
    others = other_kinds(names)
    if not others:
        return
    images = [name for name in names if name not in others]
    holding = next((name for name in images if len(_folders_of(root / inside / name)) > 1), None)
    if holding and not inside and len(images) == 1:
        way = f"; set data.path={root / holding}"
    else:
        way = _suggest_names(root / inside / images[0]) or "; move the others away, or name a table as data.labels"
    raise StageError(
        f"data.path: {_join(names)} in {root / inside} are no classes, but images and what belongs to them "
        f"({_join(others)}){way}, or {_EACH_A_CLASS}"
    )


def _read_classes(root: Path, names: list[str], given: Given, found: Collection) -> None:
    if len(names) == 1:
        raise StageError(f"data.path: {root} holds one class only ({names[0]}){_suggest_wrapped(root / names[0])}")
    for name in names:
        part = part_named(name)
        if given == "auto" and part == UNLABELLED and len(names) > 2:
            _leave_out_unlabelled(root, name, found)
            continue
        if given == "auto" and (never_a_class(name) or part in ("test", UNLABELLED)):
            meant = "a part of a split" if part else "what belongs to images"
            raise StageError(
                f"data.path: {root / name} is named for {meant}, not for a class; move it away, or {_EACH_A_CLASS}"
            )
        before = found.ignored.copy()
        if not _read_class(root, name, name, "", found):
            others = "".join(
                f", among whose files are {number:,} {kind or 'without extension'}"
                for kind, number in (found.ignored - before).most_common(1)
            )
            raise StageError(f"data.path: no images in {root / name}{others}; add some or remove the folder")


def _suggest_wrapped(inner: Path) -> str:
    """Suggest the folders inside the only folder as classes, or file names that tell classes."""
    folders = _folders_of(inner)
    while len(folders) == 1 and not part_named(folders[0]):
        inner, folders = inner / folders[0], _folders_of(inner / folders[0])
    if not folders:
        return _suggest_names(inner) or "; add a folder for each other class"
    shown = ", ".join(folders[:3]) + (" ..." if len(folders) > 3 else "")
    return f", whose folders are {shown}: did you mean data.path={inner}?"


def _read_class(root: Path, folder: str, name: str, part: str, found: Collection) -> bool:
    """Add the images of a class folder; return whether there are any."""
    paths = list(walk(root, folder, found, ancestors=(identify(root),)))
    if folder in found.rejected:
        raise StageError(f"data.path: {root / folder}: {found.rejected[folder]}; make it readable or remove it")
    found.samples += [Sample(path, name, path.removeprefix(f"{folder}/"), part) for path in paths]
    return bool(paths)


def _leave_out_unlabelled(root: Path, name: str, found: Collection) -> None:
    found.left_out["unlabelled"] += len(list(walk(root, name, Collection())))
    found.notes.append(f"`python -m stages.predict {shlex.quote(str(root / name))}` answers for those")


class _Part(NamedTuple):
    """A folder named as a part of a split: the folder with its classes, perhaps deeper, and files beside them."""

    name: str
    part: str
    folder: str
    classes: list[str]
    beside: Collection


def _open_part(root: Path, name: str, part: str) -> _Part:
    """List the classes of a part, which may be in a wrapper: `training_set/training_set/{cats,dogs}`."""
    folder, beside = name, Collection()
    try:
        classes = _list_folders(root, folder, beside)
        while len(classes) == 1 and not beside.left_out["loose"]:
            inner = take_apart(classes[0])
            if not inner.part and inner.kind != "image" and len(_folders_of(root / folder / classes[0])) < 2:
                break
            folder = f"{folder}/{classes[0]}"
            classes = _list_folders(root, folder, beside)
    except OSError as error:
        raise StageError(f"data.path: {root / folder}: {reason(error)}; make it readable or remove it") from error
    return _Part(name, part, folder, classes, beside)


def _named_parts(root: Path, names: list[str]) -> list[_Part]:
    """Return the folders named as parts of one split; none if these names may well be of classes.

    `test tubes` is a class, and so is `train` beside `bus`; `seg_train` and `seg_test` are parts.
    """
    told = {name: one for name in names if (one := take_apart(name)).part}
    kinds, alone = {one.part for one in told.values()}, len(told) == len(names)
    if len(kinds) < 2 and (kinds != {"train"} or len(names) > 2 or [one.rest for one in told.values()] != [()]):
        return []
    alike = any(
        one.part != other.part
        and (not (one.rest or other.rest) or (alone and (one.rest == other.rest or not one.rest or not other.rest)))
        for one, other in combinations(told.values(), 2)
    )
    # Of `test` and `eval`, the second is for validation.
    tests = sum(one.part == "test" for one in told.values())
    parts = [
        _open_part(root, name, "val" if tests > 1 and "eval" in words(name) else one.part or "")
        for name, one in told.items()
    ]
    if len(parts) == 1:
        # Alone, or beside a folder without folders, but not `train` beside `bus`.
        flat = not any(_folders_of(root / name) for name in names if name not in told)
        return parts if len(parts[0].classes) > 1 - alone and flat else []
    parts.sort(key=lambda part: (*PARTS, UNLABELLED).index(part.part))
    shared = any(
        one.part != other.part and set(one.classes).intersection(other.classes) for one, other in combinations(parts, 2)
    )
    return parts if alike or shared else []


def _find_parts(root: Path, names: list[str], given: Given, found: Collection) -> list[_Part]:
    """Return the folders in `root` that are parts of a split; those without labels are left out."""
    folds = are_folds(names)
    parts = [_open_part(root, name, "train") for name in names] if folds else _named_parts(root, names)
    if not parts:
        return []
    named, others = [part.name for part in parts], [name for name in names if name not in {one.name for one in parts}]
    looks = f"data.path: {root} has {_join(named)}, which look like {'pieces of one set' if folds else 'a split'}"
    if given == "ignore" and (not any(part.classes for part in parts) or (others and len(parts) == 1)):
        return []
    if not any(part.classes for part in parts):
        raise StageError(
            f"{looks}, but they hold no class folders; sort their images into such, or name a table as data.labels, "
            f"or {_EACH_A_CLASS}{_suggest_names(root / parts[0].folder)}"
        )
    if folds and any(part_named(name) for part in parts for name in part.classes):
        raise StageError(f"{looks}, each with a split of its own; give one of them as data.path")
    if folds and given == "auto":
        raise StageError(f"{looks}; set split.given=ignore, which puts all together and divides again")
    if others and len(parts) == 1:
        raise StageError(
            f"data.path: {root} has {named[0]}, which looks like a part of a split, but also {others[0]}; move that "
            f"away, or {_EACH_A_CLASS}"
        )
    if others:
        raise StageError(f"{looks}, but beside them is {others[0]}; move that away")
    trained = {name for part in parts if part.part == "train" for name in part.classes}
    used = []
    for part in parts:
        may_lack_labels = part.part in ("test", UNLABELLED)
        lone = may_lack_labels and len(part.classes) == 1 and not trained.intersection(part.classes)
        if part.classes and not lone and part.part != UNLABELLED:
            used.append(part)
        elif may_lack_labels and not _suggest_names(root / part.folder):
            _leave_out_unlabelled(root, part.name, found)
        else:
            raise StageError(
                f"data.path: {root / part.folder} holds no folders, so its images have no class; move it away, or "
                "sort its images into class folders as in the other parts, or name a table as data.labels"
                f"{_suggest_names(root / part.folder)}"
            )
    if given == "ignore":
        return used
    for one, other in combinations(used, 2):
        if one.part == other.part:
            raise StageError(
                f"data.path: {root} has {one.name} and {other.name}, both for {one.part}; merge them or move one away"
            )
    if all(part.part != "train" for part in used):
        raise StageError(
            f"data.path: {root} has {_join([part.name for part in used])}, but no folder train; add it, or set "
            "split.given=ignore"
        )
    return used


def _read_parts(root: Path, parts: list[_Part], given: Given, found: Collection) -> None:
    for part in parts:
        _refuse_kinds(root, part.folder, part.classes)
        found.ignored += part.beside.ignored
        found.left_out += part.beside.left_out
        for name in part.classes:
            any_there = _read_class(root, f"{part.folder}/{name}", name, part.part if given == "auto" else "", found)
            if not any_there and part.part == "train" and given == "auto":
                raise StageError(f"data.path: no images in {root / part.folder / name}; add some or remove the class")
    if given == "ignore":
        names = _join([part.folder for part in parts])
        found.notes.append(f"the images of {names} put together and divided again (split.given)")
    elif other := [f"{part.part} is {part.folder}" for part in parts if part.folder != part.part]:
        found.notes.append(", ".join(other))


def _leave_out_other_kinds(found: Collection) -> None:
    """Leave out files about other images: `cat/masks/1.png` beside `cat/images/`, `1_mask.png` beside `1.png`."""
    inner: dict[str, set[str]] = defaultdict(set)  # the folder of a class -> the folders in it
    for image in found.samples:
        if "/" in image.below:
            inner[image.path.removesuffix(image.below)].add(image.below.split("/")[0])
    others = {f"{folder}{name}" for folder, names in inner.items() for name in other_kinds(names)}
    masks = of_other_images(image.path for image in found.samples)
    kept = [
        image
        for image in found.samples
        if image.path not in masks and image.path.removesuffix(image.below) + image.below.split("/")[0] not in others
    ]
    found.left_out["other_kind"] += len(found.samples) - len(kept)
    found.samples = kept


def _look_into_classes(root: Path, given: Given, found: Collection) -> None:
    """Use a split inside the classes (`cat/train`, `cat/test`), and report what other folders there may mean."""
    inner: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # class -> the folders of its images
    for image in found.samples:
        inner[image.class_name].add(tuple(image.below.split("/")[:-1]))
    firsts = {name: {path[0] for path in paths if path} for name, paths in inner.items()}
    for name, folders in firsts.items():
        if given == "auto" and len(same := sorted(folders & (inner.keys() - {name}))) > 1:
            raise StageError(
                f"data.path: {root / name} holds folders that are named as its neighbours, {enumerate_names(same, 3)}; "
                f"move it away, or {_EACH_A_CLASS}"
            )
    every = set().union(*firsts.values())
    parts = {name: part for name in sorted(every) if (part := part_named(name)) in PARTS}
    whole = parts.keys() == every and all(() not in paths for paths in inner.values())
    if len(set(parts.values())) > 1 and "train" in parts.values() and whole and given == "auto":
        seconds = Counter(second for paths in inner.values() for second in {path[1] for path in paths if path[1:]})
        if sum(classes > 1 for classes in seconds.values()) > 1:
            raise StageError(
                f"data.path: {enumerate_names(sorted(inner), 3)} in {root} each hold {_join(list(parts))}, with "
                f"{enumerate_names(sorted(seconds), 3)} inside; give one of them as data.path, or {_EACH_A_CLASS}"
            )
        found.samples = [replace(one, part=parts[one.below.split("/")[0]]) for one in found.samples]
    elif len(set(parts.values())) > 1:
        found.notes.append(f"folders {_join(list(parts))} inside of classes not taken for a split")
    elif len(every) > 1 and all(folders == every and () not in inner[name] for name, folders in firsts.items()):
        found.notes.append(f"folders {enumerate_names(sorted(every), 3)} inside of each class not taken for classes")
