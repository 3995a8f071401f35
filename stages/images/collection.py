"""What a data set holds, before any of its pictures is read."""

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stages.common.cli import StageError


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


def _spell(name: str) -> str:
    """Write a name so that it differs from one that looks like it."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"
