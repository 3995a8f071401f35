"""What a data set holds, before any of its images is read."""

import posixpath
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.common.cli import StageError
from stages.common.format import plural


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
