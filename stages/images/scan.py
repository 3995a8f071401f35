"""Walking through a folder: which files are images by their names, and which are left out."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from stages.images.collection import Collection

# Those of torchvision.datasets.folder.IMG_EXTENSIONS and more that Pillow reads; importing torchvision costs three
# seconds. A test holds the two together.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".gif", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
)

# What systems and tools put beside images: Synology, QNAP, macOS, Windows, Linux, Python. In lower case.
_SYSTEM_NAMES = {
    "@eadir",
    "@tmp",
    "@__thumb",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "__macosx",
    "network trash folder",
    "temporary items",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "lost+found",
    "__pycache__",
}

_REASONS = {
    errno.ELOOP: "a link that loops",
    errno.ENOENT: "a broken link",
    errno.EACCES: "permission denied",
}


def made_by_system(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems and tools make: thumbnails, waste, caches."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension, in any case."""
    return name.lower().endswith(EXTENSIONS)


def extension(name: str) -> str:
    """Return a name's extension, in lower case; empty where it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a name, not a path)


def walk(root: Path, folder: str, found: Collection, ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the images at any depth below a folder, sorted within each; links are followed.

    Args:
        root: `data.path`.
        folder: relative to `root`, with `/`; empty: `root` itself.
        found: takes what is not an image: folders that cannot be listed and links that loop (`rejected`), files with
            other extensions (`ignored`) and what systems make (`left_out`).
        ancestors: device and number of the folders above.
    """
    try:
        identity = identify(root / folder)
        if identity in ancestors:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        names = list_names(root / folder, found)
    except OSError as error:
        found.rejected[folder] = reason(error)
        return
    for name in names:
        path = f"{folder}/{name}" if folder else name
        if os.path.isdir(root / path):  # noqa: PTH112 (Path.is_dir fails where permission is denied)
            yield from walk(root, path, found, (*ancestors, identity))
        elif is_image(name):
            yield path
        else:
            found.ignored[extension(name)] += 1


def list_names(folder: Path, found: Collection) -> list[str]:
    """Return the sorted names of a folder's files and folders, without those that systems make, which are counted.

    Raises:
        OSError: it cannot be listed.
    """
    names = sorted(os.listdir(folder))  # noqa: PTH208 (names, not paths)
    kept = [name for name in names if not made_by_system(name)]
    found.left_out["system"] += len(names) - len(kept)
    return kept


def identify(folder: Path) -> tuple[int, int]:
    """Return what identifies a folder, whichever path leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def reason(error: OSError) -> str:
    """Say in a few words why a file or folder cannot be read."""
    return _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__


def is_untracked(folder: Path) -> bool:
    """Whether a folder is in the repository of the current one, and has files that git neither has nor ignores.

    `dvc exp run` commits such files with the experiment. What `dvc add` tracks is ignored by git. Without git, no.
    """
    question = ["git", "ls-files", "--others", "--exclude-standard", "--directory", "--no-empty-directory", "--"]
    try:
        answer = subprocess.run([*question, folder.absolute()], capture_output=True, check=False)
    except OSError:
        return False
    return answer.returncode == 0 and bool(answer.stdout)
