"""What a data set holds, before any of its pictures is read."""

import posixpath
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.common.cli import StageError
from stages.common.format import plural


@dataclass(frozen=True)
class Picture:
    """A picture before it is read: its path below `data.path`, with `/`, and what the data set says of it.

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

    pictures: list[Picture] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # path -> reason
    ignored: Counter[str] = field(default_factory=Counter)  # extension -> number of files that are not pictures by name
    left_out: Counter[str] = field(default_factory=Counter)  # kind -> number of pictures, or of files of the system
    notes: list[str] = field(default_factory=list)  # what was assumed

    def by_class(self) -> dict[str, list[Picture]]:
        """Return class -> pictures, classes in the order of their labels."""
        classes: dict[str, list[Picture]] = {name: [] for name in sorted({one.class_name for one in self.pictures})}
        for picture in self.pictures:
            classes[picture.class_name].append(picture)
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
    """Give each picture the name of its group, and count those that have none.

    Args:
        found: the data set; a table's column `group` is in its pictures already.
        rule: `split.group`. `folder`: the folder that the picture lies in, below that of its class, by its path there,
            so that `cat/scene 1` and `dog/scene 1` are one group; `column`: what the table says; a regular expression:
            what its group matches in the path below `data.path`; `None`: no groups.

    Raises:
        StageError: no picture has a group by this rule.
    """
    if rule is None:
        if any(picture.group for picture in found.pictures):
            found.notes.append("the column group not used (split.group=column does)")
        found.pictures = [replace(picture, group="") for picture in found.pictures]
        return
    found.pictures = [replace(picture, group=_group_of(picture, rule)) for picture in found.pictures]
    alone = sum(not picture.group for picture in found.pictures)
    if alone == len(found.pictures):
        causes = {
            "folder": "no picture lies in a folder below that of its class",
            "column": "no table with a filled column group is named as data.labels",
        }
        example = found.pictures[0].path
        cause = causes.get(rule, f"{rule!r} matches no picture's path, such as {example!r}")
        raise StageError(f"split.group: {cause}; set it to null for no groups")
    if alone:
        found.notes.append(f"{plural(alone, 'picture')} in no group")


def _group_of(picture: Picture, rule: str) -> str:
    if rule == "column":
        return picture.group
    if rule == "folder":
        return posixpath.dirname(picture.below)
    match = re.search(rule, picture.path)
    return (match.group(1) or "") if match else ""


def _spell(name: str) -> str:
    """Write a name so that it differs from one that looks like it."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"
