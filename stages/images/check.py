"""Reading each image of a data set once: what it is, or why it cannot be used."""

import hashlib
import posixpath
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from stages.common.cli import StageError
from stages.common.format import plural
from stages.images.collection import Collection, extension, reason
from stages.images.decode import NEEDS_HEIF, ImageError, decode_with_facts, read_image
from stages.images.near_duplicates import SIDE, shrink

# Masks have no more colours.
_FEW = 16


class Checked(NamedTuple):
    """What an image is, or `problem`: why it cannot be used.

    `sha256` of its file, in hex; its upright size in pixels; the `highest_grey` value, `None` unless it is 16-bit grey;
    `storage` as in `Decoded`; its mean `brightness`, 0 to 255; `remarks` of decoding, and `blank` or `few` for one
    colour or hardly any; a checksum of its `pixels`, those of a smaller version of a JPEG; its
    `small` grey version.
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
    check = partial(_check, root, grey_max)
    return dict(zip(paths, _check_all(check, paths, workers), strict=True))


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
        # At an eighth of its size a JPEG is read to its end, too, in half the time.
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
    """Refuse a class whose images have hardly any colours, and the names of those of a class that have many.

    Raises:
        StageError: such classes are images and their masks.
    """
    few = {path for path, fact in checked.items() if not {"few", "blank"}.isdisjoint(fact.remarks)}
    if not few:
        return
    stems = {
        name: {posixpath.splitext(one.below)[0]: one.path in few for one in images}
        for name, images in found.by_class().items()
    }
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
    """Refuse a data set of which too much is bad.

    Args:
        root: the folder of the data set.
        found: what it holds.
        rejected: path -> reason of all its bad files.
        limit: the greatest fraction of files that may be bad.

    Raises:
        StageError: all images of a class are bad, or more than `limit` of all files.
    """
    for name, images in found.by_class().items():
        bad = {image.path: rejected[image.path] for image in images if image.path in rejected}
        if len(bad) == len(images):
            _require_heif(root, bad)
            raise StageError(
                f"data.path: all {len(bad)} images of class {name!r} are bad, {_examples(bad)}; replace them"
            )
    files = len(rejected) + sum(image.path not in rejected for image in found.samples)
    if len(rejected) > limit * files:
        _require_heif(root, rejected)
        raise StageError(
            f"split.rejected_limit: {len(rejected)} of {files} files are bad ({len(rejected) / files:.1%}, the "
            f"limit is {limit:.1%}), {_examples(rejected)}; repair or remove them, or raise the limit"
        )


def _require_heif(root: Path, rejected: dict[str, str]) -> None:
    """Where most of what is bad is HEIC that cannot be decoded here, say how it can."""
    paths = [path for path, why in rejected.items() if why == NEEDS_HEIF]
    if 2 * len(paths) > len(rejected):
        kinds = Counter((posixpath.dirname(path), extension(path)) for path in paths)
        (folder, kind), number = kinds.most_common(1)[0]
        raise StageError(
            f"data.path: {root / folder} holds {plural(number, f'{kind} file')} in HEIC, for which a package is "
            f"missing ({len(paths):,} such files in all): pip install pillow-heif"
        )


def _examples(rejected: dict[str, str]) -> str:
    shown = [f"{path!r} ({why})" for path, why in list(rejected.items())[:3]]
    return f"such as {', '.join(shown)}"
