"""Whether git would take in the pictures."""

import subprocess
from pathlib import Path


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
