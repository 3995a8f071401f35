"""Splitting images into train, val and test: stratified by class, with duplicates and groups in one part."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from stages.common.cli import StageError
from stages.common.format import plural
from stages.common.params import Split
from stages.images.index import NEAR, PARTS, Entry, Parts

# A part may exceed its share of a class by this fraction, or by one image.
_OVERSHOOT = 0.1
# If two given parts have the same bytes, the later one keeps them.
_STRICTER = ("", "train", "val", "test")
NONE: Mapping[str, str] = MappingProxyType({})
CONFLICT = "which is in another class"


def find_copies(hashes: dict[str, str], class_of: dict[str, str]) -> tuple[list[list[str]], dict[str, str]]:
    """Return groups of files with the same bytes, and path -> reason for such files with different classes.

    `hashes`: path -> SHA-256.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for path in sorted(hashes):
        groups[hashes[path]].append(path)
    duplicates, contradictions = [], {}
    for group in groups.values():
        first = group[0]
        stranger = next((path for path in group if class_of[path] != class_of[first]), None)
        if stranger is not None:
            for path in group:
                other = stranger if class_of[path] == class_of[first] else first
                contradictions[path] = f"same bytes as {other}, {CONFLICT}"
        elif len(group) > 1:
            duplicates.append(group)
    return duplicates, contradictions


def find_overlap(hashes: dict[str, str], part_of: dict[str, str], rejected: Container[str]) -> list[str]:
    """Return the images, not `rejected`, to leave out because another part of a given split has the same bytes.

    The test's copy is kept, otherwise validation's. `part_of`: path -> its given part, or "".
    """
    parts: dict[str, str] = {}
    for path, digest in hashes.items():
        if path not in rejected:
            parts[digest] = max(parts.get(digest, ""), part_of[path], key=_STRICTER.index)
    return sorted(path for path, digest in hashes.items() if path not in rejected and part_of[path] != parts[digest])


@dataclass
class Unit:
    """Images that go into one part together: duplicates and groups."""

    key: str
    entries: list[Entry]
    classes: Counter[str]  # class -> number of images
    part: str = "train"
    before: str = ""  # the part to stay in


def order_units(entries: list[Entry], seed: int) -> list[Unit]:
    """Return the units of images, in an order that depends only on the seed and each unit's content."""
    members: dict[str, list[Entry]] = defaultdict(list)
    group_of = _join(entries)
    for entry in entries:
        group = group_of.get(entry.sha256, f"{NEAR}{entry.sha256}")
        # A unit without a group has the hash of its bytes as key.
        members[group.removeprefix(NEAR) if group.startswith(NEAR) else f"group {group}"].append(entry)
    units = [Unit(key, chosen, Counter(entry.class_name for entry in chosen)) for key, chosen in members.items()]
    return sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit.key}".encode()).digest())


def join_groups(entries: list[Entry], near: Mapping[str, str]) -> list[Entry]:
    """Return images with their groups of `split.group` joined with those of near-duplicates, SHA-256 -> name."""
    group_of = _join([*entries, *(replace(one, group=near[one.sha256]) for one in entries if one.sha256 in near)])
    return [replace(entry, group=group_of.get(entry.sha256, "")) for entry in entries]


def _join(entries: list[Entry]) -> dict[str, str]:
    """Return SHA-256 -> its group, named before near-duplicate ones; groups that share an image are merged."""
    joined: dict[str, set[str]] = {}  # a group -> all groups merged with it
    group_of: dict[str, str] = {}
    for digest, group in sorted({(entry.sha256, entry.group) for entry in entries if entry.group}):
        one, other = joined.setdefault(group, {group}), joined.setdefault(group_of.setdefault(digest, group), {group})
        if one is not other:
            small, large = sorted((one, other), key=len)
            large |= small
            joined.update(dict.fromkeys(small, large))
    first = {id(one): min(one, key=lambda group: (group.startswith(NEAR), group)) for one in joined.values()}
    return {digest: first[id(joined[group])] for digest, group in group_of.items()}


class _Division:
    """Units in parts, with counts of units and images by part and class."""

    def __init__(self, units: list[Unit], sizes: Mapping[str, float]) -> None:
        totals = Counter(entry.class_name for unit in units for entry in unit.entries)
        # Part, except train -> class -> number of images.
        self.wanted = {
            part: {name: max(1, round(size * total)) for name, total in totals.items()} for part, size in sizes.items()
        }
        self.images = {part: Counter[str]() for part in PARTS}
        self.counts = {part: Counter[str]() for part in PARTS}  # of units
        self.units = units

    def put(self, unit: Unit, part: str, number: int = 1) -> None:
        """Put a unit into a part; `number` -1 takes it out."""
        unit.part = part
        for name, images in unit.classes.items():
            self.images[part][name] += number * images
            self.counts[part][name] += number

    def move(self, unit: Unit, part: str) -> None:
        self.put(unit, unit.part, -1)
        self.put(unit, part)

    def missing(self, part: str, name: str) -> int:
        return self.wanted[part][name] - self.images[part][name]

    def tolerance(self, part: str, name: str) -> float:
        """Return how far the number of images of a class may be from the wanted number."""
        return max(1, _OVERSHOOT * self.wanted[part][name])

    def has_room(self, unit: Unit, part: str) -> bool:
        """Whether a part lacks a class of the unit, and the unit exceeds the tolerance of none."""
        return any(self.missing(part, name) > 0 for name in unit.classes) and all(
            images - self.missing(part, name) <= self.tolerance(part, name) for name, images in unit.classes.items()
        )

    def can_spare(self, unit: Unit) -> bool:
        """Whether a unit may leave its part: its classes remain there, and it was not in the test split before."""
        return unit.before != "test" and all(self.counts[unit.part][name] > 1 for name in unit.classes)

    def improvement(self, unit: Unit, part: str) -> float:
        """Return how much nearer a unit brings a part to the wanted numbers, relative to these, summed over classes."""
        total = 0.0
        for name, images in unit.classes.items():
            missing = self.missing(part, name)
            total += (abs(missing) - abs(missing - images)) / self.wanted[part][name]
        return total

    def complete(self, part: str) -> None:
        """Move the smallest spare unit of each class that a part lacks into it."""
        for name in sorted({name for unit in self.units for name in unit.classes}):
            if self.counts[part][name]:
                continue
            holding = [unit for unit in self.units if unit.part != part and name in unit.classes]
            spare = [unit for unit in holding if self.can_spare(unit)]
            if not spare:
                raise StageError(
                    f"split.group: class {name!r} has no group for each part that no other class needs elsewhere; "
                    "form smaller groups, or try another seed"
                )
            self.move(min(spare, key=lambda unit: len(unit.entries)), part)

    def top_up(self, part: str) -> None:
        """If a part is still too small, move the units of train that bring it nearest to its wanted size."""
        while any(self.missing(part, name) > self.tolerance(part, name) for name in self.wanted[part]):
            spare = [unit for unit in self.units if unit.part == "train" and self.can_spare(unit)]
            best = max(spare, key=lambda unit: self.improvement(unit, part), default=None)
            if best is None or self.improvement(best, part) <= 0:
                return
            self.move(best, part)


def assign(entries: list[Entry], test_size: float, val_size: float, seed: int, kept: Mapping[str, str] = NONE) -> Parts:
    """Split images into train, val and test by fractions of each class, with at least one image unless it is 0.

    Without groups, an image's part depends only on the seed and its bytes: neither names nor order matter, duplicates
    stay together, and adding a few images moves hardly any other. For a group, its name takes the place of the bytes.
    Units are taken in the order of a hash, into the first part that lacks their classes; one too large for a part goes
    to train, unless nothing else brings a class into that part.

    `kept`: SHA-256 -> an image's part in the last split: it stays there, and new images fill up the parts. So a test
    image is never trained on later; after many removals, test and validation may be larger than asked for.
    """
    sizes = {part: size for part, size in (("test", test_size), ("val", val_size)) if size}
    units = order_units(entries, seed)
    for unit in units:
        before = {kept[entry.sha256] for entry in unit.entries if entry.sha256 in kept}
        unit.before = max(before, key=_STRICTER.index, default="")
    # First units that stay in val or test, then new ones, then those of train.
    units.sort(key=lambda unit: (unit.before not in sizes, unit.before == "train"))
    division = _Division(units, sizes)
    left = Counter(name for unit in units for name in unit.classes)
    _require_enough(left, len(sizes) + 1, units)
    for unit in units:
        part = unit.before if unit.before in sizes else "train"
        if not unit.before:
            for position, wanting in enumerate(sizes):
                # The last units of a class are left for the later parts.
                kept_back = len(sizes) - position + 1
                spare = all(not division.counts[wanting][name] or left[name] >= kept_back for name in unit.classes)
                if spare and division.has_room(unit, wanting):
                    part = wanting
                    break
        division.put(unit, part)
        left.subtract(unit.classes.keys())
    for part in (*sizes, "train"):
        division.complete(part)
    for part in sizes:
        division.top_up(part)
    parts: Parts = {part: [] for part in PARTS}
    for unit in units:
        parts[unit.part] += unit.entries
    return parts


def _require_enough(classes: Counter[str], needed: int, units: list[Unit]) -> None:
    for name, number in classes.items():
        if number >= needed:
            continue
        if any(unit.key.startswith("group ") for unit in units):
            raise StageError(
                f"split.group: class {name!r} lies in {plural(number, 'group')} only, needs {needed}, one for each "
                "part; add some, remove the class, or form smaller groups"
            )
        alike = any(name in unit.classes and len({one.sha256 for one in unit.entries}) > 1 for unit in units)
        raise StageError(
            f"data.path: class {name!r} is too small to split: {number} different images, needs {needed}; "
            "add images or remove the class"
            + ", or set split.near_duplicates=report, which parts those that are nearly the same"
            * alike
        )


def divide(
    entries: list[Entry], part_of: dict[str, str], split: Split, seed: int, kept: Mapping[str, str] = NONE
) -> Parts:
    """Put images into given parts, and take missing parts from train; without given parts, split all images.

    `seed` and `kept` as in `assign`; with folds, `kept` is not used.
    """
    given: Parts = defaultdict(list)
    for entry in entries:
        given[part_of[entry.path]].append(entry)
    train = given.pop("train", []) + given.pop("", [])
    trained = {entry.class_name for entry in train}
    for part, chosen in given.items():
        for entry in chosen:
            if entry.class_name not in trained:
                raise StageError(
                    f"data.path: class {entry.class_name!r} has no training images, but {entry.path} for {part}; "
                    "add some, remove the class, or set split.given=ignore"
                )
    test_size, val_size = 0 if "test" in given else split.test_size, 0 if "val" in given else split.val_size
    if split.folds is None:
        parts = assign(train, test_size, val_size, seed, kept)
    elif "test" in given:
        raise StageError("split.folds: the test part is given; set split.folds=null, or split.given=ignore")
    else:
        tested = _find_fold(order_units(train, seed), split.folds, split.fold)
        rest = [entry for entry in train if entry.sha256 not in tested]
        # val_size is a fraction of all images, not of the rest.
        parts = assign(rest, 0, val_size * split.folds / (split.folds - 1), seed)
        parts["test"] = [entry for entry in train if entry.sha256 in tested]
    return {part: sorted(chosen, key=lambda entry: entry.path) for part, chosen in {**parts, **given}.items()}


def _find_fold(units: list[Unit], folds: int, fold: int) -> set[str]:
    """Return the SHA-256 of the images of one fold, stratified by class.

    The order of `units` is cut into equal parts for each class: each image is in one fold, and a few more images move
    hardly any other. A unit of several classes goes by the mean of its positions.
    """
    totals = Counter(entry.class_name for unit in units for entry in unit.entries)
    _require_enough(Counter(name for unit in units for name in unit.classes), folds, units)
    seen = Counter[str]()
    members: list[list[Unit]] = [[] for _ in range(folds)]
    for unit in units:
        places = [(seen[name] + count / 2) / totals[name] for name, count in unit.classes.items()]
        seen.update(unit.classes)
        members[int(folds * sum(places) / len(places))].append(unit)
    for number, some in enumerate(members):
        if missing := sorted(totals.keys() - {name for unit in some for name in unit.classes}):
            raise StageError(
                f"split.folds: fold {number} of {folds} has no image of {missing[0]!r}, whose groups are too large; "
                "take fewer folds, or form smaller groups"
            )
    return {entry.sha256 for unit in members[fold] for entry in unit.entries}
