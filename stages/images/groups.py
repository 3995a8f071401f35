"""Pictures that must not be parted: those of one patient, scene, video or burst."""

import posixpath
import re
from dataclasses import replace

from stages.common.cli import StageError
from stages.common.format import plural
from stages.images.collection import Collection, Picture


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
