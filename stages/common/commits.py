"""Files as the last commits have them."""

import subprocess
from pathlib import Path


def read_versions(folder: Path, *names: str) -> list[list[bytes]]:
    """Return the content of files in the last two commits that changed one of them, the later first; none without git.

    Args:
        folder: where they are.
        names: of the files; the content of one that a commit lacks is empty.
    """
    commits = _git(folder, "log", "-n", "2", "--format=%H", "--", *names).decode().split()
    return [[_git(folder, "show", f"{commit}:./{name}") for name in names] for commit in commits]


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
