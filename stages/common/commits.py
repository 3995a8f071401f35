"""Questions to git: the current commit, and files of earlier commits."""

import subprocess
from pathlib import Path

from stages.common.cli import StageError


def git(*arguments: str, folder: Path | None = None, why: str = "experiments need a git repository") -> str:
    """Return the output of a git command; bytes that are not UTF-8 become surrogates.

    `why`: what git is needed for, shown in the message. Raises StageError with git's own reason if it fails.
    """
    try:
        process = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None)
        said = (output.decode(errors="replace") if output else str(error)).strip().partition("\n")[0]
        raise StageError(f"git {arguments[0]} failed: {why} ({said})") from error
    return process.stdout.decode(errors="surrogateescape")


def find_commit() -> str:
    """Return the commit that the working tree is based on; raises StageError where there is none."""
    return git("rev-parse", "HEAD", why="experiments need git with a commit").strip()


def read_versions(folder: Path, *names: str) -> list[list[str]]:
    """Return the content of files in the last two commits that changed any, latest first; empty without git."""

    def ask(*arguments: str) -> str:
        try:
            return git(*arguments, folder=folder)
        except StageError:
            return ""

    commits = ask("log", "-n", "2", "--format=%H", "--", *names).split()
    return [[ask("show", f"{commit}:./{name}") for name in names] for commit in commits]
