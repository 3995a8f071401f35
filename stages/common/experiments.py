"""Running experiments of DVC, one after the other, and reading what they left in git and in DVC's cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from stages.common.cli import StageError
from stages.common.commits import find_commit, git
from stages.common.params import Params

Read = TypeVar("Read")

# What a run writes, and so no sign of another run.
_WRITTEN = (":!metrics", ":!dvc.lock", ":!data/dvc.lock")


def fingerprint(settings: str, inputs: Iterable[Path]) -> str:
    """Return a short hash of what experiments depend on: the commit, changes since, settings, inputs by their dates."""
    digest = hashlib.sha256(
        f"{find_commit()}\n{git('diff', 'HEAD', '--', '.', *_WRITTEN)}\n{settings}\n".encode(errors="surrogateescape")
    )
    for path in inputs:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            status = file.stat()
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:8]


def find_experiment(name: str) -> str | None:
    """Return the commit of an experiment that began from the present commit, `None` if there is none of that name."""
    base = find_commit()
    found = git("for-each-ref", "--format=%(objectname)", f"refs/exps/{base[:2]}/{base[2:]}/{name}")
    return found.strip() or None


def run_experiment(name: str, settings: dict[str, object]) -> str:
    """Run the pipeline up to `evaluate` with other parameters in a copy of the repository; return the new commit.

    Raises:
        StageError: a stage failed; its own line says why.
    """
    options = [option for key, value in settings.items() for option in ("-S", f"{key}={value}")]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--quiet", "--temp", "--name", name, *options, "evaluate"]
    # DVC runs `python`: let that be this one, also where its environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.run(command, check=False, env={**os.environ, "PATH": path})
    commit = find_experiment(name)
    if process.returncode != 0 or commit is None:
        shown = " ".join(options)
        raise StageError(f"`dvc exp run {shown}` failed; see above, and run the same command again to go on")
    return commit


def read_result(commit: str, path: str) -> bytes:
    """Return a file of an experiment, from git or from DVC's cache.

    Raises:
        StageError: it has no such file, or the cache has lost it.
    """
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        content: bytes = dvc.api.read(path, rev=commit, mode="rb")
    except (DvcException, OSError) as error:
        raise StageError(
            f"{path} of experiment {commit[:7]} cannot be read ({error}); remove it: dvc exp remove"
        ) from error
    return content


def run_missing(settings: dict[str, dict[str, int]], params: Params) -> dict[str, str]:
    """Run the experiments that are missing, one after the other; by name, the commits of all.

    Raises:
        StageError: one failed.
    """
    inputs = [Path(params.data.path)]
    inputs += [Path(file) for file in (params.data.labels, params.model.weights) if file and Path(file).is_file()]
    key = fingerprint(str(sorted(next(iter(settings.values())))) + str(len(settings)), inputs)
    commits = {}
    for name, changes in settings.items():
        experiment = f"{name.replace(' ', '-')}-{key}"
        commit = find_experiment(experiment)
        print(f"{name}: {'found' if commit else 'running'} ({experiment})", flush=True)
        commits[name] = commit or run_experiment(experiment, dict(changes))
    return commits


def read_file(commit: str, reader: Callable[[Path], Read], name: str) -> Read:
    """Return what `reader` makes of a file of an experiment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_bytes(read_result(commit, name))
        return reader(file)
