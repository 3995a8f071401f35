"""Reading each picture of a data set once: what it is, or why it cannot be used."""

import hashlib
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from stages.common.stage import StageError
from stages.pictures.collection import Collection
from stages.pictures.decode import PictureError, decode, read_picture
from stages.pictures.scan import reason


@dataclass(frozen=True)
class Checked:
    """What a picture is: the SHA-256 of its file in hex, its upright size in pixels; or `problem`, why it is none."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    problem: str | None = None


def check_pictures(root: Path, paths: list[str], workers: int) -> dict[str, Checked]:
    """Read, hash and fully decode every picture, in `workers` processes (0: in this one); by path, in their order."""
    return dict(zip(paths, _check_all(root, paths, workers), strict=True))


def _check_all(root: Path, paths: list[str], workers: int) -> Iterator[Checked]:
    check = partial(_check, root)
    progress = partial(tqdm, total=len(paths), desc="checking pictures", unit="picture", disable=None)
    if workers == 0:
        yield from progress(map(check, paths))
        return
    # Only the main process answers Ctrl-C: it ends the others.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from progress(pool.map(check, paths, chunksize=16))
        except BrokenProcessPool as error:
            raise StageError("workers: a process was killed, for want of memory most likely; use fewer") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check(root: Path, path: str) -> Checked:
    try:
        content = read_picture(root / path)
        picture = decode(content)
    except OSError as error:
        return Checked(problem=reason(error))
    except PictureError as error:
        return Checked(problem=str(error))
    return Checked(hashlib.sha256(content).hexdigest(), *picture.size)


def require_usable(found: Collection, rejected: dict[str, str], limit: float) -> None:
    """Refuse a data set of which too much is bad.

    Args:
        found: the data set.
        rejected: path -> reason of all its bad files.
        limit: the greatest fraction of files that may be bad.

    Raises:
        StageError: all pictures of a class are bad, or more than `limit` of all files.
    """
    for name, pictures in found.by_class().items():
        bad = {picture.path: rejected[picture.path] for picture in pictures if picture.path in rejected}
        if len(bad) == len(pictures):
            raise StageError(
                f"data.path: all {len(bad)} pictures of class {name!r} are bad, {_examples(bad)}; replace them"
            )
    files = len(rejected) + sum(picture.path not in rejected for picture in found.pictures)
    if len(rejected) > limit * files:
        raise StageError(
            f"split.rejected_limit: {len(rejected)} of {files} files are bad ({len(rejected) / files:.1%}, the "
            f"limit is {limit:.1%}), {_examples(rejected)}; mend or remove them, or raise the limit"
        )


def _examples(rejected: dict[str, str]) -> str:
    shown = [f"{path!r} ({why})" for path, why in list(rejected.items())[:3]]
    return f"such as {', '.join(shown)}"
