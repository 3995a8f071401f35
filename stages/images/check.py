"""Reading each image of a dataset once: its properties or why it cannot be used, and checks over all images."""

import hashlib
import posixpath
import signal
import zlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stages.common.cli import StageError
from stages.common.format import percent, plural
from stages.images.collection import Collection, extension, reason
from stages.images.colour import GREY_RANGE
from stages.images.decode import NEEDS_HEIF, ImageError, decode_with_facts, read_image
from stages.images.near_duplicates import SIDE, shrink

# Masks have at most this many colours.
_FEW = 16
_REMARKS = {
    "pages": ("image has", "images have", "more pages or frames than the first, which is taken"),
    "clear": ("image is", "images are", "transparent everywhere, and taken without that"),
    "band": ("image has", "images have", "a band of its own in place of transparency, which is left out"),
    "dim": ("image of 16 bits a colour is", "images of 16 bits a colour are", "dark: at most 14 bits are used"),
    "blank": ("image is", "images are", "of one colour"),
}
# Shortcuts: numbers of folds, and of bins for values.
_FOLDS, _BINS = 5, 10
# A shortcut gets this fraction right of the images that always guessing the most common class gets wrong.
_SKILL = 0.5
_SKILL_BY_LOOK = 0.8  # for brightness, which may well belong to what an image shows
_F1 = 0.9  # or tells one class from the others this well
# Ten unrelated pairs of images have a correlation of brightness above 0.97 twice in a million.
_LEAST_PAIRS, _ALIKE, _MOST_COMPARED = 10, 0.97, 50


class Checked(NamedTuple):
    """Properties of an image, or `problem`: why it cannot be used.

    `sha256` of its file, in hex; its upright size in pixels; the `highest_grey` value, `None` unless it is 16-bit grey;
    `storage` as in `Decoded`; its mean `brightness`, 0 to 255; `remarks` of decoding, and `blank` or `few` for one
    colour or hardly any; a checksum of its `pixels`, those of a smaller version of a JPEG; its `small` grey version.
    """

    sha256: str = ""
    width: int = 0
    height: int = 0
    highest_grey: int | None = None
    storage: tuple[str, str, str] = ("", "", "")
    brightness: float = 0
    remarks: tuple[str, ...] = ()
    pixels: int = 0
    small: bytes = b""
    problem: str | None = None


def check_images(root: Path, paths: list[str], grey_max: int | None, workers: int) -> dict[str, Checked]:
    """Read, hash and decode every image in `workers` processes (0: in this one); by path, in their order."""
    return dict(zip(paths, _check_all(partial(_check, root, grey_max), paths, workers), strict=True))


def _check_all(check: Callable[[str], Checked], paths: list[str], workers: int) -> Iterator[Checked]:
    progress = partial(tqdm, total=len(paths), desc="checking images", unit="image", disable=None)
    if workers == 0:
        yield from progress(map(check, paths))
        return
    # Only the main process answers Ctrl-C: it ends the others.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from progress(pool.map(check, paths, chunksize=32))
        except BrokenProcessPool as error:
            raise StageError("workers: a process was killed, probably out of memory; use fewer") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check(root: Path, grey_max: int | None, path: str) -> Checked:
    try:
        content = read_image(root / path)
        # Decoding a JPEG at an eighth of its size also reads it to its end, in half the time.
        decoded = decode_with_facts(content, grey_max, least=SIDE)
    except OSError as error:
        return Checked(problem=reason(error))
    except ImageError as error:
        return Checked(problem=str(error))
    colours = decoded.image.getcolors(_FEW)
    few = () if colours is None else ("blank",) if len(colours) == 1 else ("few",)
    pixels = decoded.image.tobytes()
    some = pixels[:: 3 * (len(pixels) // 1000) + 1]  # of all three colours
    return Checked(
        hashlib.sha256(content).hexdigest(),
        *decoded.size,
        decoded.highest_grey,
        decoded.storage,
        sum(some) / len(some),
        (*decoded.remarks, *few),
        zlib.crc32(pixels),
        shrink(decoded.image, *decoded.size),
    )


def require_no_masks(root: Path, found: Collection, checked: dict[str, Checked]) -> None:
    """Refuse a class of masks: few colours, and the file names of a class with many colours."""
    few = {path for path, fact in checked.items() if not {"few", "blank"}.isdisjoint(fact.remarks)}
    stems = {name: {one.stem: one.path in few for one in images} for name, images in found.by_class().items()}
    masks = [name for name, flat in stems.items() if sum(flat.values()) > 0.9 * len(flat)]
    for mask in masks:
        for name in stems.keys() - set(masks):
            shared = stems[mask].keys() & stems[name].keys()
            if len(shared) > 0.9 * len(stems[mask]) and sum(stems[name].values()) < 0.1 * len(stems[name]):
                raise StageError(
                    f"data.path: {mask} in {root} has the file names of {name}, and at most {_FEW} colours an image: "
                    "masks, not a class; move them away"
                )


def require_usable(root: Path, found: Collection, rejected: dict[str, str], limit: float) -> None:
    """Refuse a dataset if all images of a class are bad, or more than the fraction `limit` of all files.

    `rejected` has the reason of each bad file by its path.
    """
    for name, images in found.by_class().items():
        bad = {image.path: rejected[image.path] for image in images if image.path in rejected}
        if len(bad) == len(images):
            examples = _examples(root, bad)
            raise StageError(f"data.path: all {len(bad)} images of class {name!r} are bad, {examples}; replace them")
    files = len(rejected) + sum(image.path not in rejected for image in found.samples)
    if len(rejected) > limit * files:
        raise StageError(
            f"split.rejected_limit: {len(rejected)} of {files} files are bad ({len(rejected) / files:.1%}, the "
            f"limit is {limit:.1%}), {_examples(root, rejected)}; repair or remove them, or raise the limit"
        )


def _examples(root: Path, rejected: dict[str, str]) -> str:
    """Return a few examples; raises StageError with the remedy if most of them are HEIC that cannot be decoded."""
    paths = [path for path, why in rejected.items() if why == NEEDS_HEIF]
    if 2 * len(paths) > len(rejected):
        kinds = Counter((posixpath.dirname(path), extension(path)) for path in paths)
        (folder, kind), number = kinds.most_common(1)[0]
        raise StageError(
            f"data.path: {root / folder} holds {plural(number, f'{kind} file')} in HEIC, for which a package is "
            f"missing ({len(paths):,} such files in all): pip install pillow-heif"
        )
    return "such as " + ", ".join(f"{path!r} ({why})" for path, why in list(rejected.items())[:3])


def describe_shapes(images: list[Checked]) -> dict[str, float]:
    """Return how wide images are for their height, and the share that a square cut from the middle discards.

    `aspect_low`, `aspect_median`, `aspect_high`: the 5th, 50th and 95th percentile of width / height; `crop_discards`:
    the mean share of pixels outside of the largest square, without the border that torchvision's transforms trim.
    """
    aspects = np.array([image.width / image.height for image in images])
    low, median, high = np.percentile(aspects, [5, 50, 95]).round(4).tolist()
    discarded = float((1 - np.minimum(aspects, 1 / aspects)).mean().round(4))
    return {"aspect_low": low, "aspect_median": median, "aspect_high": high, "crop_discards": discarded}


def describe_grey(images: list[Checked], grey_max: int | None) -> list[str]:
    """Report 16-bit grey that is dark because its values have fewer bits, or white above `data.grey_max`."""
    highest = [image.highest_grey for image in images if image.highest_grey is not None]
    if grey_max is None and highest and max(highest) < GREY_RANGE // 2:
        full = 2 ** max(highest).bit_length() - 1
        return [
            f"{plural(len(highest), 'image')} of 16-bit grey dark, with values up to {max(highest):,} of "
            f"{GREY_RANGE:,} only (data.grey_max={full} uses the whole range)"
        ]
    above = sum(value > grey_max for value in highest) if grey_max is not None else 0
    return [f"{plural(above, 'image')} with values above data.grey_max, which become white"] if above else []


def describe_remarks(images: list[Checked]) -> list[str]:
    """Report how many images were read in part, are blank, or equal others in pixels though not in bytes."""
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
    if same := sum(len(hashes) for hashes in files.values() if len(hashes) > 1):
        notes.append(f"{same:,} images the same as another when decoded (JPEG: small), though their bytes differ")
    return notes


def find_forms(found: Collection, checked: dict[str, Checked]) -> list[str]:
    """Report classes with images of the same names and brightness, pairwise: smaller or edited versions."""
    classes = {
        name: {one.stem: checked[one.path].brightness for one in images if one.path in checked}
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


def find_shortcuts(images: Sequence[Checked], classes: Sequence[str]) -> list[str]:
    """Report properties of the files that tell the classes apart: a network would learn them instead of the content.

    By cross-validation: an image gets the most common class, in other folds, of images with the same format, mode,
    camera, size or brightness.
    """
    areas = _bins([one.width * one.height for one in images])
    shapes = _bins([one.width / one.height for one in images])
    brightness = _bins([one.brightness for one in images])
    facts: dict[str, tuple[float, Sequence[Hashable]]] = {
        "file format": (_SKILL, [one.storage[0] for one in images]),
        "colour mode": (_SKILL, [one.storage[1] for one in images]),
        "camera (EXIF)": (_SKILL, [one.storage[2] for one in images]),
        "size": (_SKILL, list(zip(areas, shapes, strict=True))),
        "mean brightness": (_SKILL_BY_LOOK, brightness),
    }
    folds = [int(one.sha256[:8], 16) % _FOLDS for one in images]
    said = {name: _try_to_tell(values, folds, classes, skill) for name, (skill, values) in facts.items()}
    return [f"{name} alone tells {what}" for name, what in said.items() if what]


def _bins(values: list[float]) -> list[int]:
    """Return the bin of each value, with about the same number of images in each bin."""
    ordered = sorted(values)
    edges = sorted({ordered[len(ordered) * number // _BINS] for number in range(1, _BINS)})
    return [bisect_left(edges, value) for value in values]


def _try_to_tell(values: Sequence[Hashable], folds: list[int], classes: Sequence[str], skill: float) -> str:
    """Return which classes the values tell apart; "" if none."""
    if len(set(values)) < 2:
        return ""
    everywhere: dict[Hashable, Counter[str]] = defaultdict(Counter)
    here: dict[tuple[Hashable, int], Counter[str]] = defaultdict(Counter)
    for (value, fold, label), number in Counter(zip(values, folds, classes, strict=True)).items():
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
        return f"the classes apart ({percent(share)} right, {percent(chance)} by always the same)"
    f1 = {label: 2 * right[label] / (guessed[label] + totals[label]) for label in totals}
    best = max(f1, key=f1.__getitem__)
    return f"{best} from the other classes" if f1[best] >= _F1 and len(totals) > 2 else ""
