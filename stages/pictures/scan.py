"""Finding the pictures of a class-per-folder data set, and checking each of them once."""

import errno
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from stages.common.stage import StageError
from stages.pictures.decode import PictureError, decode, read_picture

# torchvision.datasets.folder.IMG_EXTENSIONS; importing it costs three seconds. A test holds the two together.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_REASONS = {
    errno.ELOOP: "a link that loops",
    errno.ENOENT: "a link to nothing",
    errno.EACCES: "permission denied",
}


@dataclass
class Scan:
    """What a data folder holds. Paths are relative to it, with `/`."""

    pictures: dict[str, list[str]] = field(default_factory=dict)  # class name -> sorted paths
    rejected: dict[str, str] = field(default_factory=dict)  # path -> reason
    ignored: Counter[str] = field(default_factory=Counter)  # extension -> number of files that are not pictures by name


def find_pictures(root: Path) -> Scan:
    """List the picture files under each class folder, by `torchvision.datasets.ImageFolder`'s rules.

    Each folder in `root` is a class; its pictures lie at any depth, known by their extension in any case; links are
    followed. Folders that cannot be listed and links that loop go to `rejected`.

    Raises:
        StageError: `root` is missing, not a folder, or holds fewer than two class folders or one without pictures.
    """
    if not root.exists():
        raise StageError(f"data.path: {root} does not exist; give a folder that holds one folder of pictures per class")
    if not root.is_dir():
        raise StageError(f"data.path: {root} is not a folder; give one that holds one folder of pictures per class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise StageError(f"data.path: {root} holds no folders; put the pictures of each class into one of its own")
    if len(classes) == 1:
        raise StageError(f"data.path: {root} holds one class only ({classes[0]}); add a folder for each other class")
    scan = Scan()
    for name in classes:
        scan.pictures[name] = sorted(_walk(root, name, scan, ancestors=(_identify(root),)))
        if name in scan.rejected:
            raise StageError(f"data.path: {root / name}: {scan.rejected[name]}; make it readable or remove it")
        if not scan.pictures[name]:
            raise StageError(f"data.path: no pictures in {root / name}; add some or remove the folder")
    return scan


def _walk(root: Path, folder: str, scan: Scan, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        identity = _identify(root / folder)
        if identity in ancestors:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        names = sorted(os.listdir(root / folder))  # noqa: PTH208 (names, not paths)
    except OSError as error:
        scan.rejected[folder] = _reason(error)
        return
    for name in names:
        path = f"{folder}/{name}"
        if os.path.isdir(root / path):  # noqa: PTH112 (Path.is_dir fails where permission is denied)
            yield from _walk(root, path, scan, (*ancestors, identity))
        elif name.lower().endswith(EXTENSIONS):
            yield path
        else:
            scan.ignored[os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122 (a name, not a path)


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def check_pictures(root: Path, paths: list[str], workers: int) -> tuple[dict[str, str], dict[str, str]]:
    """Read, hash and fully decode every picture, in `workers` processes (0: in this one).

    Returns:
        path -> SHA-256 (hex) of the good ones, and path -> reason of the bad ones, in the order of `paths`.
    """
    hashes: dict[str, str] = {}
    rejected: dict[str, str] = {}
    for path, (digest, reason) in zip(paths, _check_all(root, paths, workers), strict=True):
        if reason is None:
            hashes[path] = digest
        else:
            rejected[path] = reason
    return hashes, rejected


def _check_all(root: Path, paths: list[str], workers: int) -> Iterator[tuple[str, str | None]]:
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


def _check(root: Path, path: str) -> tuple[str, str | None]:
    try:
        content = read_picture(root / path)
        decode(content)
    except OSError as error:
        return "", _reason(error)
    except PictureError as error:
        return "", str(error)
    return hashlib.sha256(content).hexdigest(), None


def require_usable(scan: Scan, rejected: dict[str, str], limit: float) -> None:
    """Refuse a data set of which too much is bad.

    Args:
        scan: the data set.
        rejected: path -> reason of all its bad files.
        limit: the greatest fraction of files that may be bad.

    Raises:
        StageError: all pictures of a class are bad, or more than `limit` of all files.
    """
    for name, paths in scan.pictures.items():
        if all(path in rejected for path in paths):
            raise StageError(
                f"data.path: all {len(paths)} pictures of class {name!r} are bad, "
                f"{_examples({path: rejected[path] for path in paths})}; replace them"
            )
    files = len(rejected) + sum(path not in rejected for paths in scan.pictures.values() for path in paths)
    if len(rejected) > limit * files:
        raise StageError(
            f"split.rejected_limit: {len(rejected)} of {files} files are bad ({len(rejected) / files:.1%}, the "
            f"limit is {limit:.1%}), {_examples(rejected)}; mend or remove them, or raise the limit"
        )


def _examples(rejected: dict[str, str]) -> str:
    shown = [f"{path!r} ({reason})" for path, reason in list(rejected.items())[:3]]
    return f"such as {', '.join(shown)}"


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
