"""What measurements share: a Python command run to its end, and a folder in which the stages and their peers run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.scores.metrics import Labels, Probabilities, score

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tests" / "bench"
PROC = Path("/proc")
MEASURES = ("accuracy", "loss", "ece")


@dataclass(frozen=True)
class Run:
    """A process that has ended: its wall time, its peak memory in GiB, and what it printed."""

    seconds: float
    memory: float
    output: str

    def json(self) -> Any:
        """Return the last line of what it printed, which is JSON."""
        return json.loads(self.output.splitlines()[-1])


def run(folder: Path, *command: str | Path) -> Run:
    """Run a Python command to its end, in `folder`.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_FINETUNE_CACHE": str(folder / "cache")}
    peak = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            # Not Popen.wait: it does not tell what the process used.
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                peak = max(peak, anonymous_memory(process.pid))
                time.sleep(0.05)
        except BaseException:
            # With its decoding processes; what it was writing goes with the folder.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.perf_counter() - started
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"error: {shlex.join(map(str, command))} failed:\n{errors.read()[-2000:]}")
        if not PROC.is_dir():
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"{seconds:7.1f} s  {' '.join(map(str, command[:2]))}", file=sys.stderr, flush=True)
        return Run(seconds, peak / 2**30, output.read())


def anonymous_memory(pid: int) -> int:
    """Return the anonymous memory of a process and its descendants, bytes: what is not page cache.

    What a forked process still shares with its parent counts twice, so this is never too little.
    """
    total = 0
    with suppress(OSError):  # it has ended
        found = re.search(r"^RssAnon:\s+(\d+) kB", (PROC / str(pid) / "status").read_text(), re.MULTILINE)
        total = int(found[1]) * 1024 if found else 0
        for children in (PROC / str(pid) / "task").glob("*/children"):
            total += sum(anonymous_memory(int(child)) for child in children.read_text().split())
    return total


def class_folders(data: Path) -> list[Path]:
    """Return the folders of the classes."""
    return sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))


class Project:
    """A folder in which the stages run as `dvc.yaml` says, from a cold cache; its parameters are the defaults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())

    def set(self, key: str, value: object = None, **values: object) -> None:
        """Set a parameter, or some of a section."""
        self.params[key] = {**self.params[key], **values} if values else value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))

    def run(self, stage: str) -> Run:
        """Run a stage."""
        cmd = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["cmd"]
        return run(self.folder, *shlex.split(cmd)[1:])

    def run_tutorial(self, epochs: int) -> Run:
        """Run the tutorial's loop with this project's images, network and seed."""
        model, index = self.params["model"], self.folder / "data" / "index"
        command: list[str | Path] = [BENCH / "tutorial.py", "--data", self.params["data"]["path"]]
        command += ["--train", index / "train.csv", "--test", index / "test.csv", "--seed", str(self.params["seed"])]
        command += ["--arch", model["arch"], "--image-size", str(model["image_size"]), "--epochs", str(epochs)]
        command += [] if model["weights"] is None else ["--weights", model["weights"]]
        return run(self.folder, *command)

    def read(self, name: str) -> Any:
        """Read a JSON file that a stage wrote."""
        return json.loads((self.folder / name).read_text())


def measure_scores(labels: Labels, probabilities: Probabilities) -> dict[str, float]:
    """Return the scores that methods are compared by, as `evaluate` computes them."""
    scores = score(labels, probabilities)
    return {name: getattr(scores, name) for name in MEASURES}
