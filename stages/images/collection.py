"""The content of a dataset by file and folder names, before any image is read."""

import errno
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# torchvision.datasets.folder.IMG_EXTENSIONS, and more that Pillow reads. Not imported, which takes three seconds; a
# test compares the two.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".gif", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Files and folders made by Synology, QNAP, macOS, Windows, Linux and Python. In lower case.
_SYSTEM_NAMES = {
    *("@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "recycler"),
    *("network trash folder", "temporary items", "$recycle.bin", "system volume information", "thumbs.db"),
    *("ehthumbs.db", "desktop.ini", "lost+found", "__pycache__"),
}
_REASONS = {errno.ELOOP: "a link that loops", errno.ENOENT: "a broken link", errno.EACCES: "permission denied"}
UNLABELLED = "unlabelled"


def _split(words: str) -> frozenset[str]:
    return frozenset(words.split())


_PARTS = {
    "train": "train training trn labeled labelled",
    "val": "val valid validate validation validating dev devel development",
    "test": "test testing tst eval evaluation holdout heldout",
    UNLABELLED: "unlabeled unlabelled unannotated nolabel nolabels pred predict prediction submission inference",
}
_PART_OF = {word: part for part, words in _PARTS.items() for word in words.split()}
# Words without meaning for the content, as in `trainset`, `test_images`, `Training Data`, `tests`, `valid2`.
_FILLERS = _split(
    "s set sets data dataset datasets image images img imgs picture pictures pic pics photo photos folder folders dir "
    "file files the full all small mini sample samples split splits final copy new input inputs"
)
# Names of folders of images, and of folders with something else about the same images.
_IMAGES = _split(
    "image images img imgs jpg jpeg jpegs jpegimages png pngs picture pictures pic pics photo photos frame frames "
    "original originals orig rgb color colour raw input inputs scan scans"
)
_NEVER_CLASSES = _split(
    "annotation annotations annot annots annos groundtruth groundtruths trimap trimaps bbox bboxes thumb thumbs "
    "thumbnail thumbnails augmented augmentation augmentations segmentations xml xmls imagesets"
)
_OTHERS = _NEVER_CLASSES | _split(
    "anno mask masks label labels gt gts truth target targets segmentation segmented contour contours edge "
    "edges depth heatmap heatmaps saliency keypoints landmarks preview previews resized cropped aug "
    "grayscale greyscale gray grey json txt csv mat overlay overlays polygons"
)
_MARK = re.compile(
    r"[ _.-]+(masks?|gt|groundtruth|labels?|seg|segmentation|annotations?|trimap|thumb(nail)?)([ _.-]*\d+)?$"
)
_FOLDS = _split("fold folds kfold cv split part partition batch chunk shard subset")
_GROUPS = _split(
    "patient patients subject participant person people actor donor individual animal specimen plant tree family scene "
    "video clip movie burst sequence seq session visit case study series slide site location place camera station "
    "lesion group cluster pair"
)
_SPLITS = _split("fold folds kfold split subset partition phase usage")
_NUMBERED = re.compile(r"(.*[^\W\d_])[\W\d_]+$")


@dataclass(frozen=True)
class Sample:
    """An image before it is read: its path below `data.path`, with `/`, its class, part and group.

    `below`: its path below the folder of its class, or below `data.path` if a table has the labels. `part` is empty
    if the split is not given, `group` if it is in none.
    """

    path: str
    class_name: str
    below: str
    part: str = ""
    group: str = ""

    @property
    def stem(self) -> str:
        """`below` without its extension."""
        return posixpath.splitext(self.below)[0]


@dataclass
class Collection:
    """The content of a dataset. Paths are relative to its folder, with `/`."""

    samples: list[Sample] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # path -> reason
    ignored: Counter[str] = field(default_factory=Counter)  # extension -> number of files that are not images by name
    left_out: Counter[str] = field(default_factory=Counter)  # kind -> number of images, or of files of the system
    notes: list[str] = field(default_factory=list)  # what was assumed

    def by_class(self) -> dict[str, list[Sample]]:
        """Return class -> images; classes in the order of their labels."""
        classes: dict[str, list[Sample]] = {name: [] for name in sorted({one.class_name for one in self.samples})}
        for image in self.samples:
            classes[image.class_name].append(image)
        return classes


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension, in any case."""
    return name.lower().endswith(EXTENSIONS)


def extension(name: str) -> str:
    """Return a name's extension, in lower case; empty where it has none."""
    return posixpath.splitext(name)[1].lower()


def walk(root: Path, folder: str, found: Collection, ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the images at any depth below a folder, sorted within each; links are followed.

    `folder` is relative to `root`, with `/`; empty: `root` itself. Everything else is counted in `found`: unreadable
    folders and links that loop (`rejected`), files with other extensions (`ignored`) and system files (`left_out`).
    `ancestors` identify the folders above.
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
    """Return the sorted names in a folder; hidden and system files are left out and counted."""
    names = sorted(os.listdir(folder))  # noqa: PTH208 (names, not paths)
    kept = [name for name in names if not name.startswith(".") and name.lower() not in _SYSTEM_NAMES]
    found.left_out["system"] += len(names) - len(kept)
    return kept


def identify(folder: Path) -> tuple[int, int]:
    """Return the device and inode of a folder, which identify it under any path."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def reason(error: OSError) -> str:
    """Return in a few words why a file or folder cannot be read."""
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__


class Name(NamedTuple):
    """A parsed name: its part of a split, its kind (`image` or `other`), other words, and its numbers."""

    part: str | None
    kind: str | None
    rest: tuple[str, ...]  # without words for a part
    bare: tuple[str | None, ...]  # its part, and `rest` without words for a kind of file
    numbers: tuple[int, ...]


def words(name: str) -> list[str]:
    """Return the words and numbers of a name such as `seg_train2`, `TrainImages` or `Training Set`, in lower case."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])", " ", name)
    return [
        # `train` for `trainset`.
        next((part for part in _PART_OF if word.startswith(part) and word[len(part) :] in _FILLERS), word)
        for word in re.split(r"[\W_]+", spaced.casefold())
        if word
    ]


def take_apart(name: str) -> Name:
    """Parse a name."""
    every = words(name)
    told = [word for word in every if not word.isdecimal()]
    parts = {_PART_OF[word] for word in told if word in _PART_OF}
    if "trainval" in told or parts == {"train", "val"}:
        parts = {"train"}
    rest = tuple(word for word in told if word not in _PART_OF and word not in _FILLERS and word != "trainval")
    part = next(iter(parts)) if len(parts) == 1 else None
    bare = (part, *(word for word in rest if word not in _IMAGES and word not in _OTHERS and word != "ground"))
    kind = "other" if _OTHERS.intersection(told) else "image" if _IMAGES.intersection(told) else None
    return Name(part, kind, rest, bare, tuple(int(word) for word in every if word.isdecimal()))


def part_named(name: str) -> str | None:
    """Return the part of a split if a name means nothing else, such as `Validation` or `test_set`."""
    told = take_apart(name)
    return None if told.rest else told.part


def never_a_class(name: str) -> bool:
    """Whether a folder of this name never holds a class, such as `annotations`."""
    told = [word for word in words(name) if not word.isdecimal() and word not in _FILLERS]
    return bool(told) and (_NEVER_CLASSES.issuperset(told) or told == ["ground", "truth"])


def other_kinds(names: Iterable[str]) -> list[str]:
    """Return sibling folders that hold another kind of file than their neighbours, such as `masks` beside `images`.

    `cat_masks` beside `cat` counts only if there are several such pairs: `face` and `face_mask` are two classes.
    """
    told = {name: take_apart(name) for name in names}
    beside: dict[tuple[str | None, ...], set[str | None]] = {}
    for one in told.values():
        beside.setdefault(one.bare, set()).add("image" if one.kind is None and one.part else one.kind)
    plain = [bare for bare, kinds in beside.items() if {None, "other"} <= kinds]
    return [
        name
        for name, one in told.items()
        if one.kind == "other" and ("image" in beside[one.bare] or (one.bare in plain and len(plain) > 1))
    ]


def of_other_images(paths: Iterable[str]) -> set[str]:
    """Return the images named as belonging to another one: `a_mask.png` beside `a.jpg`."""
    stems = {path: path.rpartition(".")[0].casefold() for path in paths}
    there = set(stems.values())
    return {path for path, stem in stems.items() if (mark := _MARK.search(stem)) and stem[: mark.start()] in there}


def are_folds(names: list[str]) -> bool:
    """Whether folders are named as pieces of one set: `fold1`, `fold2`, or `images_part_1`, `images_part_2`."""
    told = [take_apart(name) for name in names]
    numbers = sorted(one.numbers[-1] for one in told if one.numbers)
    return (
        len(names) > 1
        and all(_FOLDS.intersection(words(name)) for name in names)
        and len({one.rest for one in told}) == 1
        and numbers in (list(range(len(names))), list(range(1, len(names) + 1)))
    )


def classes_in_names(files: list[str]) -> list[str]:
    """Return the classes by which nearly all file names begin, before a number, such as `cat.1.jpg`, if any."""
    counts = Counter(match[1] for file in files if (match := _NUMBERED.match(PurePosixPath(file).stem)))
    found = sorted(name for name, number in counts.items() if number > 1)
    return found if len(found) > 1 and sum(counts[name] for name in found) >= 0.9 * len(files) else []


def column_for(name: str) -> str | None:
    """Return `split` or `group` if a column's name probably means that."""
    told = words(name)
    if _GROUPS.intersection(word.removesuffix("id") for word in told):
        return "group"
    return "split" if _SPLITS.intersection(told) or part_named(re.sub("^is", "", name)) else None
