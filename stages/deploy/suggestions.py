"""Which images to label next: uncertain ones, similar to many others and unlike the labelled ones."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.common.files import write_csv
from stages.common.format import plural, probability
from stages.deploy.classifier import Loaded
from stages.images.check import check_images
from stages.images.collection import Collection
from stages.images.decode import decode, read_image
from stages.images.near_duplicates import find_pairs
from stages.images.preprocessing import Preprocessing, make_transform
from stages.report.galleries import as_pixels, draw_sheet
from stages.report.style import save_figure, shorten, shorten_path

Floats = NDArray[np.float32]

# Images compared with each other: the most uncertain ones.
MOST = 5_000
_MOST_DRAWN = 120


class Pool(NamedTuple):
    """Unlabelled images: probabilities, (n, classes); features, (n, d), of length 1; `unlike`, (n,), as in `Unlike`."""

    paths: NDArray[np.object_]
    probabilities: Floats
    features: Floats
    unlike: Floats

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Pool":
        """Return some of the images, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Pool._make(values[chosen] for values in self)

    def add(self, other: "Pool") -> "Pool":
        """Return at most `MOST` images of both, the most uncertain first."""
        both = Pool._make(np.concatenate(values) for values in zip(self, other, strict=True))
        return both.take(np.argsort(-uncertainty(both.probabilities), kind="stable")[:MOST])


def uncertainty(probabilities: Floats) -> Floats:
    """Return 1 minus the distance between the two highest probabilities of each image, (n, classes) -> (n,)."""
    highest = np.sort(probabilities, axis=1)
    return 1 - (highest[:, -1] - highest[:, -2])


def collect_pool(
    parts: Iterable[Loaded], look: Callable[[Loaded], tuple[Floats, Floats, Floats]]
) -> tuple[Pool | None, int]:
    """Return the most uncertain images, and the number of unreadable ones; `look`: images -> the fields of `Pool`.

    Memory does not grow with their number.
    """
    pool, unreadable = None, 0
    for some in parts:
        readable = [path for path, problem in zip(some.paths, some.problems, strict=True) if problem is None]
        unreadable += len(some.paths) - len(readable)
        if readable:
            new = Pool(np.array(readable, dtype=object), *look(some))
            pool = (pool or new.take([])).add(new)
    return pool, unreadable


def leave_out_copies(pool: Pool, labelled: list[str], root: Path, grey_max: int | None, workers: int) -> Pool:
    """Leave out copies and near-duplicates of labelled images (paths below `root`), and of images before them."""
    checked = check_images(root, [*labelled, *pool.paths], grey_max, workers)
    facts = [fact for fact in checked.values() if fact.problem is None]
    paths = [path for path, fact in checked.items() if fact.problem is None]
    first_of: dict[str, int] = {}
    again = {position for position, fact in enumerate(facts) if first_of.setdefault(fact.sha256, position) != position}
    # The first of each pair stays: a labelled one, or the more uncertain one.
    again |= {max(pair.first, pair.second) for pair in find_pairs([fact.small for fact in facts])}
    known = {paths[position] for position in again} | (checked.keys() - set(paths))
    return pool.take([position for position, path in enumerate(pool.paths) if path not in known])


def choose(pool: Pool, labelled: Floats, count: int) -> list[int]:
    """Return the positions of the images to label, the most useful first.

    Greedy facility location (Wei, Iyer and Bilmes 2015, https://proceedings.mlr.press/v37/wei15.html): each image adds
    the most to the sum, over all images, of uncertainty times the cosine with the nearest labelled or chosen one. So
    neither similar images nor outliers are chosen.
    `labelled`: features of length 1 of labelled images, (m, d).
    """
    cosines = np.clip(pool.features @ pool.features.T, 0, 1)
    covered = np.clip((pool.features @ labelled.T).max(axis=1), 0, 1)
    weights = uncertainty(pool.probabilities)
    gains = np.maximum(cosines - covered, 0) @ weights
    chosen: list[int] = []
    while len(chosen) < min(count, len(covered)):
        # Gains never grow: one that is still the highest when recomputed is the highest of all.
        best = int(gains.argmax())
        gains[best] = np.maximum(cosines[best] - covered, 0) @ weights
        if best == gains.argmax():
            chosen.append(best)
            covered, gains[best] = np.maximum(covered, cosines[best]), -np.inf
    return chosen


def write_suggestions(
    path: Path, found: Collection, root: Path, chosen: Pool, classes: Sequence[str], groups: bool
) -> bool:
    """Write a table for `data.labels`: the suggested images, without a label, and below them the labelled ones.

    Its paths are below `root`, which is `data.path`; if some suggested images are elsewhere, it has only those.
    `groups`: with the groups of the labelled ones. Returns whether all are below `root`.
    """
    files = [Path(file) for file in chosen.paths]
    inside = all(file.is_relative_to(root.absolute()) for file in files)
    parted = inside and any(sample.part for sample in found.samples)
    groups = groups and inside
    columns = ["path", "label", *["split"] * parted, *["group"] * groups, "predicted", "probability", "unlike"]

    def row(file: str, label: str, part: str, group: str, *answer: object) -> list[object]:
        return [file, label, *[part] * parted, *[group] * groups, *answer]

    rows = []
    for file, values, unlike in zip(files, chosen.probabilities, chosen.unlike, strict=True):
        best, name = int(values.argmax()), file.relative_to(root.absolute()) if inside else file
        rows.append(row(name.as_posix(), "", "train", "", classes[best], f"{values[best]:.4f}", f"{unlike:.2f}"))
    for one in found.samples if inside else []:
        if one.path not in found.rejected:
            rows.append(row(one.path, one.class_name, one.part, one.group, "", "", ""))
    write_csv(path, columns, rows)
    return inside


def draw_suggestions(path: Path, chosen: Pool, classes: Sequence[str], preprocessing: Preprocessing) -> None:
    """Draw a contact sheet of the first images to label, with what is predicted."""
    shown, images, captions = chosen.paths[:_MOST_DRAWN], [], []
    transform, least = make_transform(preprocessing, "none"), preprocessing.least("none")
    for number, (file, values) in enumerate(zip(shown, chosen.probabilities, strict=False), start=1):
        image = transform(decode(read_image(Path(file)), preprocessing.grey_max, least))
        images.append(as_pixels(image[None], preprocessing)[0])
        likely = f"{shorten(classes[values.argmax()], 12)} {probability(float(values.max()))}"
        captions.append((f"{number}  {likely}", shorten_path(file, 26)))
    more = "" if len(shown) == len(chosen.paths) else f", the first {len(shown)}"
    title = f"{plural(len(chosen.paths), 'image')} to label next{more}"
    save_figure(path, draw_sheet([(title, "", len(shown))], images, captions, 6))
