"""What a data set holds, before any of its images is read; walking through its folders."""

import errno
import os
import posixpath
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.common.cli import StageError
from stages.common.commits import git
from stages.common.format import plural

# Those of torchvision.datasets.folder.IMG_EXTENSIONS and more that Pillow reads; importing torchvision costs three
# seconds. A test holds the two together.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".gif", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# What systems and tools put beside images: Synology, QNAP, macOS, Windows, Linux, Python. In lower case.
_SYSTEM_NAMES = {
    *("@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "recycler"),
    *("network trash folder", "temporary items", "$recycle.bin", "system volume information", "thumbs.db"),
    *("ehthumbs.db", "desktop.ini", "lost+found", "__pycache__"),
}
_REASONS = {errno.ELOOP: "a link that loops", errno.ENOENT: "a broken link", errno.EACCES: "permission denied"}


@dataclass(frozen=True)
class Sample:
    """An image before it is read: its path below `data.path`, with `/`, and what the data set says of it.

    `below` is its path below the folder of its class, or below `data.path` where a table has the labels. `part` is
    empty where the split is not given, `group` where it belongs to none.
    """

    path: str
    class_name: str
    below: str
    part: str = ""
    group: str = ""


@dataclass
class Collection:
    """What a data set holds. Paths are relative to its folder, with `/`."""

    samples: list[Sample] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # path -> reason
    ignored: Counter[str] = field(default_factory=Counter)  # extension -> number of files that are not images by name
    left_out: Counter[str] = field(default_factory=Counter)  # kind -> number of images, or of files of the system
    notes: list[str] = field(default_factory=list)  # what was assumed

    def by_class(self) -> dict[str, list[Sample]]:
        """Return class -> images, classes in the order of their labels."""
        classes: dict[str, list[Sample]] = {name: [] for name in sorted({one.class_name for one in self.samples})}
        for image in self.samples:
            classes[image.class_name].append(image)
        return classes


def require_classes(found: Collection, root: Path, table: bool) -> None:
    """Refuse one class, and two whose names are the same to a reader.

    Raises:
        StageError: one class only; or names that differ in spaces around them or in their Unicode form alone, or, as
            names of folders, in case, which some file systems and tools take for one.
    """
    names: dict[str, str] = {}
    for name in found.by_class():
        key = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).strip())
        key = key if table else key.casefold()
        if key in names:
            raise StageError(
                f"data.path: {root} has two classes {_spell(names[key])} and {_spell(name)}, whose names differ only "
                "in case, in spaces or in Unicode form; rename one, or merge them"
                + ", or name a table as data.labels, in which case counts"
                * (not table)
            )
        names[key] = name
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            found.notes.append(f"{other} and {name} taken for two classes, though they differ only in case")
    if len(names) == 1:
        raise StageError(f"data.path: {root} holds one class only ({next(iter(names.values()))}); add another")


def set_groups(found: Collection, rule: str | None) -> None:
    """Give each image the name of its group, and count those that have none.

    Args:
        found: the data set; a table's column `group` is in its images already.
        rule: `split.group`. `folder`: the folder that the image lies in, below that of its class, by its path there,
            so that `cat/scene 1` and `dog/scene 1` are one group; `column`: what the table says; a regular expression:
            what its group matches in the path below `data.path`; `None`: no groups.

    Raises:
        StageError: no image has a group by this rule.
    """
    if rule is None:
        if any(image.group for image in found.samples):
            found.notes.append("the column group not used (split.group=column does)")
        found.samples = [replace(image, group="") for image in found.samples]
        return
    found.samples = [replace(image, group=_group_of(image, rule)) for image in found.samples]
    alone = sum(not image.group for image in found.samples)
    if alone == len(found.samples):
        causes = {
            "folder": "no image lies in a folder below that of its class",
            "column": "no table with a filled column group is named as data.labels",
        }
        example = found.samples[0].path
        cause = causes.get(rule, f"{rule!r} matches no image's path, such as {example!r}")
        raise StageError(f"split.group: {cause}; set it to null for no groups")
    if alone:
        found.notes.append(f"{plural(alone, 'image')} in no group")


def _group_of(image: Sample, rule: str) -> str:
    if rule == "column":
        return image.group
    if rule == "folder":
        return posixpath.dirname(image.below)
    match = re.search(rule, image.path)
    return (match.group(1) or "") if match else ""


def _spell(name: str) -> str:
    """Write a name so that it differs from one that looks like it."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"


def made_by_system(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems and tools make: thumbnails, waste, caches."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension, in any case."""
    return name.lower().endswith(EXTENSIONS)


def extension(name: str) -> str:
    """Return a name's extension, in lower case; empty where it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a name, not a path)


def walk(root: Path, folder: str, found: Collection, ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the images at any depth below a folder, sorted within each; links are followed.

    Args:
        root: `data.path`.
        folder: relative to `root`, with `/`; empty: `root` itself.
        found: takes what is not an image: folders that cannot be listed and links that loop (`rejected`), files with
            other extensions (`ignored`) and what systems make (`left_out`).
        ancestors: device and number of the folders above.
    """
    try:
        identity = identify(root / folder)
        if identity in ancestors:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        names = list_names(root / folder, found)
    except OSError as error:
        found.rejected[folder] = reason(error)
        return
    for name in names:
        path = f"{folder}/{name}" if folder else name
        if os.path.isdir(root / path):  # noqa: PTH112 (Path.is_dir fails where permission is denied)
            yield from walk(root, path, found, (*ancestors, identity))
        elif is_image(name):
            yield path
        else:
            found.ignored[extension(name)] += 1


def list_names(folder: Path, found: Collection) -> list[str]:
    """Return the sorted names of a folder's files and folders, without those that systems make, which are counted.

    Raises:
        OSError: it cannot be listed.
    """
    names = sorted(os.listdir(folder))  # noqa: PTH208 (names, not paths)
    kept = [name for name in names if not made_by_system(name)]
    found.left_out["system"] += len(names) - len(kept)
    return kept


def identify(folder: Path) -> tuple[int, int]:
    """Return what identifies a folder, whichever path leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def reason(error: OSError) -> str:
    """Say in a few words why a file or folder cannot be read."""
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__


def describe_untracked(folder: Path) -> str:
    """Warn of a folder in the current repository with files that git neither has nor ignores; "" where all is well.

    `dvc exp run` commits such files with the experiment. What `dvc add` tracks is ignored by git. Without git, "".
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
