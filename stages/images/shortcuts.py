"""Whether how images are stored tells their classes: a network would learn that in place of what they show."""

import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import numpy as np

from stages.common.format import percent
from stages.images.check import Checked
from stages.images.collection import Collection

_BRIGHTNESS = "mean brightness"
_FOLDS = 5
_BINS = 10
# Of the images that always guessing the most common class gets wrong, a shortcut gets so many right.
_SKILL = 0.5
_SKILL_BY_LOOK = 0.8  # brightness, which may well belong to what an image shows
# Ten unrelated pairs of images have brightnesses so much alike (r > 0.97) twice in a million.
_LEAST_PAIRS, _ALIKE, _MOST_COMPARED = 10, 0.97, 50
_F1 = 0.9  # a shortcut tells one class so well


def find_shortcuts(images: Sequence[Checked], classes: Sequence[str]) -> list[str]:
    """Say which facts about the files tell the classes apart by themselves.

    Each is tried by folds: an image gets the class that is most common in other folds among those with the same
    format, mode, camera, size or brightness.
    """
    facts: dict[str, list[Hashable]] = {
        name: [one.storage[place] for one in images]
        for place, name in enumerate(("file format", "colour mode", "camera (EXIF)"))
    }
    areas = _bins([one.width * one.height for one in images])
    shapes = _bins([one.width / one.height for one in images])
    facts["size"] = list(zip(areas, shapes, strict=True))
    facts[_BRIGHTNESS] = list(_bins([one.brightness for one in images]))
    folds = [int(one.sha256[:8], 16) % _FOLDS for one in images]
    return [
        said
        for name, values in facts.items()
        if (said := _describe(name, values, folds, classes, _SKILL_BY_LOOK if name == _BRIGHTNESS else _SKILL))
    ]


def find_forms(found: Collection, checked: dict[str, Checked]) -> list[str]:
    """Say which classes hold images of the same names that are as bright one by one: small ones, or edited ones."""
    classes = {
        name: {os.path.splitext(one.below)[0]: checked[one.path].brightness for one in images if one.path in checked}  # noqa: PTH122
        for name, images in found.by_class().items()
    }
    notes = []
    for (name, first), (other, second) in combinations(list(classes.items())[:_MOST_COMPARED], 2):
        shared = sorted(first.keys() & second.keys())
        if len(shared) < _LEAST_PAIRS or len(shared) < 0.9 * min(len(first), len(second)):
            continue
        pairs = np.array([[first[stem], second[stem]] for stem in shared])
        if pairs.std(axis=0).min() > 1 and np.corrcoef(pairs.T)[0, 1] > _ALIKE:
            notes.append(
                f"{name} and {other} hold {len(shared):,} images of the same names that are as bright one by one: "
                "forms of the same images? split.group keeps them in one part"
            )
    return notes


def _bins(values: list[float]) -> list[int]:
    """Return each value's place among so many groups of about the same number of images."""
    ordered = sorted(values)
    edges = sorted({ordered[len(ordered) * number // _BINS] for number in range(1, _BINS)})
    return [bisect_left(edges, value) for value in values]


def _describe(name: str, values: list[Hashable], folds: list[int], classes: Sequence[str], skill: float) -> str:
    if len(set(values)) < 2:
        return ""
    counts = Counter(zip(values, folds, classes, strict=True))
    everywhere: dict[Hashable, Counter[str]] = defaultdict(Counter)
    here: dict[tuple[Hashable, int], Counter[str]] = defaultdict(Counter)
    for (value, fold, label), number in counts.items():
        everywhere[value][label] += number
        here[value, fold][label] += number
    totals = Counter(classes)
    usual = totals.most_common(1)[0][0]
    guessed, right = Counter[str](), Counter[str]()
    for (value, _), found in here.items():
        others = everywhere[value] - found
        guess = max(sorted(others), key=others.__getitem__) if others else usual
        guessed[guess] += found.total()
        right[guess] += found[guess]
    share, chance = right.total() / len(classes), totals[usual] / len(classes)
    if share - chance >= skill * (1 - chance):
        return f"{name} alone tells the classes apart ({percent(share)} right, {percent(chance)} by always the same)"
    best = max(totals, key=lambda label: 2 * right[label] / (guessed[label] + totals[label]))
    if 2 * right[best] / (guessed[best] + totals[best]) >= _F1 and len(totals) > 2:
        return f"{name} alone tells {best} from the other classes"
    return ""
