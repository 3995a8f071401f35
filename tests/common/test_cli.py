"""How a script ends: one line for what the user can put right, a traceback for a bug."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from stages.common.cli import StageError, is_out_of_memory, run
from stages.common.experiments import find_commit

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free."
LOADER = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
  ...
RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to \
allocate 1207959552 bytes. Error code 12 (Cannot allocate memory)"""


def raise_(error: BaseException) -> None:
    raise error


OUT_OF_MEMORY: dict[str, tuple[Callable[[], object], str]] = {
    "Python": (lambda: raise_(MemoryError()), ""),
    "numpy": (lambda: np.empty(2**60, dtype=np.uint8), ""),
    "torch": (lambda: torch.empty(2**60, dtype=torch.uint8), " for 1,152,921,504.6 GB at once"),
    "more than 64 bits count": (lambda: torch.empty(2**40, 2**40), ""),
    "CUDA": (lambda: raise_(torch.OutOfMemoryError(CUDA)), " for 2.00 GiB at once"),
    "a loader's process": (lambda: raise_(RuntimeError(LOADER)), " for 1.2 GB at once"),
    "the system": (lambda: raise_(OSError(12, "Cannot allocate memory")), ""),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_running_out_of_memory_is_one_line_that_names_the_keys(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    cause, asked_for = OUT_OF_MEMORY[kind]
    with pytest.raises(SystemExit) as exit_info:
        run(cause)  # type: ignore[arg-type]
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == (
        f"error: not enough memory{asked_for}; lower batch_size, model.image_size or model.hidden, use fewer workers, "
        "or end other programs\n"
    )


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("overflow")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error)):
        run(lambda: raise_(error))


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
    ids=["nothing set", "a count of the user's", "a policy of the user's"],
)
def test_threads_hardly_spin_unless_the_user_asks_for_it(own: dict[str, str], expected: str) -> None:
    program = "import os, sys, stages; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == f"False {expected}\n"


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_names_that_the_output_cannot_encode_are_escaped(encoding: str, stream: str) -> None:
    program = f"import sys; from stages.common.cli import run; run(lambda: print('\u72ac', file=sys.{stream}))"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert getattr(process, stream) == b"\\u72ac\n"


def test_a_failure_of_git_gives_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StageError, match=r"git rev-parse failed: .* \(fatal: detected dubious ownership"):
        find_commit()


@pytest.mark.parametrize("stage", ["split", "train_head", "compare"])
def test_missing_packages_are_one_line_that_names_the_environment(stage: str) -> None:
    command = [sys.executable, "-S", "-m", f"stages.{stage}"]  # -S: as a Python in which nothing is installed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("has no torch; activate the environment: source .venv/bin/activate\n")
