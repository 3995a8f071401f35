"""`split.json`: what the split made of the images, and what was left out or assumed."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.cli import StageError
from stages.common.format import enumerate_names, plural
from stages.images.check import Checked
from stages.images.collection import Collection
from stages.images.colour import GREY_RANGE
from stages.images.index import NEAR, PARTS, Entry, count
from stages.images.near_duplicates import Leak, Pair

# DVC shows each number in nested objects as a metric, in a row or a column; it ignores lists.
_MOST_CLASSES = 20
_MOST_SHOWN = 3

_LEFT_OUT = {
    "system": ("file or folder hidden or made by a system", "files and folders hidden or made by a system"),
    "loose": ("image beside the class folders", "images beside the class folders"),
    "unlisted": ("image that the table does not list", "images that the table does not list"),
    "unlabelled": ("image of a folder without labels", "images of folders without labels"),
    "other_kind": ("image about another one (a mask, a label)", "images about others (masks, labels)"),
    "overlap": ("copy of an image of another part", "copies of images of another part"),
}

_REMARKS = {
    "pages": ("image has", "images have", "more pages or frames than the first, which is taken"),
    "clear": ("image is", "images are", "transparent everywhere, and taken without that"),
    "band": ("image has", "images have", "a band of its own in place of transparency, which is left out"),
    "dim": ("image of 16 bits a colour is", "images of 16 bits a colour are", "dark: at most 14 bits are used"),
    "blank": ("image is", "images are", "of one colour"),
}

ClassCounts = dict[str, dict[str, int]]


def summarize(
    found: Collection,
    parts: dict[str, list[Entry]],
    part_of: dict[str, str],
    rejected: dict[str, str],
    duplicates: list[list[str]],
    overlap: list[str],
) -> dict[str, Any]:
    """Return the content of `split.json`.

    Args:
        found: the data set.
        parts: part -> its images.
        part_of: path -> the part that is given, if any.
        rejected: path -> reason.
        duplicates: groups of paths with the same bytes.
        overlap: paths left out because their bytes are also in another part.
    """
    left_out = {**found.left_out, "overlap": len(overlap)}
    groups = {
        part: {entry.group for entry in chosen if entry.group and not entry.group.startswith(NEAR)}
        for part, chosen in parts.items()
    }
    return {
        "pictures": sum(map(len, parts.values())),
        **describe_classes(count(parts)),
        **({"groups": {part: len(names) for part, names in groups.items()}} if any(groups.values()) else {}),
        "rejected": [{"path": path, "reason": reason} for path, reason in rejected.items()],
        "duplicates": duplicates,
        "ignored": dict(sorted(found.ignored.items())),
        "left_out": {kind: left_out[kind] for kind in _LEFT_OUT if left_out.get(kind)},
        "overlap": overlap,
        "notes": [
            *_describe_files(found.ignored, left_out),
            *found.notes,
            *_describe_given(parts, part_of),
            *_describe_groups(groups),
        ],
    }


def describe_classes(counts: ClassCounts) -> dict[str, Any]:
    """Return the number of images of each part, and of each class and part, as `split.json` has them.

    Up to 20 classes they are DVC's metrics, `classes`; more are a list, `class_counts`, which `dvc metrics diff` and
    `dvc exp show` ignore.
    """
    parts = {part: sum(numbers[part] for numbers in counts.values()) for part in PARTS}
    if len(counts) <= _MOST_CLASSES:
        return {"parts": parts, "classes": counts}
    return {"parts": parts, "class_counts": [{"class": name, **numbers} for name, numbers in counts.items()]}


def class_counts(split: dict[str, Any]) -> ClassCounts:
    """Return class -> part -> number of images, from the content of a `split.json`."""
    if "classes" in split:
        return dict(split["classes"])
    rows: Sequence[dict[str, Any]] = split["class_counts"]
    return {row["class"]: {part: row[part] for part in PARTS} for row in rows}


def read_summary(path: Path) -> dict[str, Any]:
    """Read a `split.json`.

    Raises:
        StageError: it is damaged, or of another version of this project.
        OSError: it is not there.
    """
    try:
        split = dict(json.loads(path.read_text(encoding="utf-8")))
        class_counts(split)
        if not all(isinstance(split[name], list) for name in ("rejected", "duplicates", "notes")):
            raise ValueError("a list is missing")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StageError(
            f"{path}: not what split writes ({error}); `dvc repro --force split` writes it again"
        ) from error
    return split


def describe_shapes(images: list[Checked]) -> dict[str, float]:
    """Return how wide images are for their height, and the share that a square cut from the middle discards.

    `aspect_low`, `aspect_median`, `aspect_high`: the 5th, 50th and 95th percentile of width / height; `crop_discards`:
    the mean share of pixels outside of the largest square, without the border that torchvision's transforms trim.
    """
    aspects = np.array([image.width / image.height for image in images])
    low, median, high = np.percentile(aspects, [5, 50, 95]).round(4).tolist()
    discarded = float((1 - np.minimum(aspects, 1 / aspects)).mean().round(4))
    return {"aspect_low": low, "aspect_median": median, "aspect_high": high, "crop_discards": discarded}


def describe_remarks(images: list[Checked]) -> list[str]:
    """Say how many images were read in part, show nothing, or are the same as others though their bytes differ."""
    counts = Counter(remark for image in images for remark in image.remarks)
    notes = [
        f"{plural(counts[remark], one, many)} {what}"
        for remark, (one, many, what) in _REMARKS.items()
        if counts[remark]
    ]
    files: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for image in images:
        if "blank" not in image.remarks:
            files[image.pixels, image.width, image.height].add(image.sha256)
    same = sum(len(hashes) for hashes in files.values() if len(hashes) > 1)
    return notes + [
        f"{same:,} images the same as another when decoded (JPEG: small), though their bytes differ"
    ] * bool(same)


def describe_near_duplicates(
    pairs: list[Pair], images: list[Entry], together: Mapping[str, str], leaks: list[Leak], flat: int
) -> list[str]:
    """Say how many images are nearly the same, which are kept together, and which labels contradict each other.

    Args:
        pairs: of positions in `images`.
        images: those whose bytes differ.
        together: SHA-256 -> group, of those that are kept in one part.
        leaks: pairs of a test image and one that is not.
        flat: how many images could not be compared.
    """
    notes = [f"{plural(flat, 'image')} with too little contrast to look for near-duplicates"] * bool(flat)
    if together:
        sizes = Counter(together.values())
        notes.append(
            f"{len(together):,} images in {plural(len(sizes), 'group')} (at most {max(sizes.values())}) are nearly the "
            "same, kept in one part"
        )
    if (tested := len({leak.test for leak in leaks})) or (pairs and not together):
        notes.append(f"{plural(tested, 'test image is', 'test images are')} nearly the same as one of another part")
    if contrary := [
        (images[one], images[other]) for one, other, _ in pairs if images[one].class_name != images[other].class_name
    ]:
        shown = enumerate_names([f"{one.path} and {other.path}" for one, other in contrary], 1)
        notes.append(f"{plural(len(contrary), 'pair')} nearly the same in two classes ({shown})")
    if 10 * len({place for pair in pairs for place in pair[:2]}) > len(images):
        notes.append("many are nearly the same: is it one scene or burst? split.group keeps that together")
    return notes


def describe_grey(images: list[Checked], grey_max: int | None) -> list[str]:
    """Say where 16-bit grey comes out dark because its values have fewer bits, or white above `data.grey_max`."""
    highest = [image.highest_grey for image in images if image.highest_grey is not None]
    if grey_max is None and highest and max(highest) < GREY_RANGE // 2:
        full = 2 ** max(highest).bit_length() - 1
        return [
            f"{plural(len(highest), 'image')} of 16-bit grey dark, with values up to {max(highest):,} of "
            f"{GREY_RANGE:,} only (data.grey_max={full} uses the whole range)"
        ]
    above = sum(value > grey_max for value in highest) if grey_max is not None else 0
    return [f"{plural(above, 'image')} with values above data.grey_max, which become white"] if above else []


def last_line(split: dict[str, Any], report: Path) -> str:
    """Say in one line what the split did; `split` is the content of the file `report`."""
    parts = ", ".join(f"{part} {number}" for part, number in split["parts"].items())
    copies = plural(len(split["duplicates"]), "group") + " of copies"
    counts = {name: sum(numbers.values()) for name, numbers in class_counts(split).items()}
    classes = enumerate_names([f"{name} {number:,}" for name, number in counts.items()])
    if len(counts) > 10:
        low, high = min(counts.values()), max(counts.values())
        classes += f", {low:,} each" if low == high else f", {low:,} to {high:,} each"
    said = "; ".join([f"classes: {classes}", f"{len(split['rejected'])} rejected, {copies}", *split["notes"]])
    return f"{parts}; {said}: see {report}"


def _describe_files(ignored: dict[str, int], left_out: dict[str, int]) -> list[str]:
    notes = []
    if ignored:
        kinds = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{number:,} {kind or 'without extension'}" for kind, number in kinds[:_MOST_SHOWN]]
        more = sum(number for _, number in kinds[_MOST_SHOWN:])
        listed = ", ".join(shown + [f"{more:,} others"] * bool(more))
        notes.append(f"{plural(sum(ignored.values()), 'file')} of other kinds ignored ({listed})")
    return notes + [
        f"{plural(left_out[kind], *words)} left out" for kind, words in _LEFT_OUT.items() if left_out.get(kind)
    ]


def _describe_given(parts: dict[str, list[Entry]], part_of: dict[str, str]) -> list[str]:
    given = [part for part in PARTS if part in set(part_of.values())]
    if not given:
        return []
    notes = [f"split as given ({', '.join(given)})"]
    notes += [f"{part} cut from train" for part in PARTS if part not in given and parts[part]]
    counts = count(parts)
    for part in given:
        lacking = [name for name, numbers in counts.items() if not numbers[part]]
        if lacking:
            examples = ", ".join(lacking[:_MOST_SHOWN]) + " ..." * (len(lacking) > _MOST_SHOWN)
            notes.append(f"{plural(len(lacking), 'class', 'classes')} without {part} images ({examples})")
    return notes


def _describe_groups(groups: dict[str, set[str]]) -> list[str]:
    everywhere = set().union(*groups.values())
    if not everywhere:
        return []
    notes = [f"groups: {', '.join(f'{part} {len(names)}' for part, names in groups.items())}"]
    parted = sum(sum(name in names for names in groups.values()) > 1 for name in everywhere)
    return notes + [f"{plural(parted, 'group')} in more than one part of the split that is given"] * bool(parted)
