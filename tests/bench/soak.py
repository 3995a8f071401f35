"""Many experiments on the sample, in two queues at once, one of which is killed again and again: do they end alike?

Two clones of this repository share a cache of activations. One runs its experiments undisturbed, one after the other;
the other runs the same ones in another order, and is ended by SIGKILL at random moments, the stage with it; the same
command then goes on, after `git checkout` of a file that DVC was killed in writing. At the end all results have to be
equal to the byte, none may be missing in `dvc exp show` and `python -m stages.compare`, no temporary file
may be left, and the cache has to be below its limit.
"""

import argparse
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
GIGABYTES = 0.25  # what is kept of the sample for two seeds does not fit
RESULTS = ("metrics/evaluation.json", "metrics/scores.json", "metrics/predictions.csv", "metrics/finetune/line.csv")


def settings(count: int) -> list[dict[str, object]]:
    """Return `count` different combinations of a rate, a number of blocks and a seed; few of another seed."""
    rates, blocks = (1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3), (0, 1, 2, 3, 4, 6, 9)
    every: list[dict[str, object]] = [
        {"finetune.lr": lr, "finetune.unfreeze": unfreeze, "seed": 42} for lr, unfreeze in product(rates, blocks)
    ]
    random.Random(0).shuffle(every)
    for number in range(0, count, 12):
        every[number] = {**every[number], "seed": 43}
    return sorted(every[:count], key=lambda one: one["seed"] == 43)


class Queue:
    """A clone in which experiments run one after the other."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.results, self.kills, self.restored = folder, dict[str, dict[str, bytes]](), 0, 0
        names = {
            f"GIT_{who}_{what}": "soak@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **names, "PATH": path, "DVC_FINETUNE_CACHE": str(cache)}

    def call(self, *command: str) -> str:
        """Run a command to its end; raises CalledProcessError."""
        process = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        )
        return process.stdout

    def is_whole(self, name: str) -> bool:
        """Whether a file holds a mapping: DVC writes its files in place."""
        try:
            return isinstance(yaml.safe_load((self.folder / name).read_text()), dict)
        except yaml.YAMLError:
            return False

    def run(self, options: dict[str, object], kill_after: list[float]) -> None:
        """Run an experiment, beginning again after each kill, and read its results."""
        changes = [word for key, value in options.items() for word in ("-S", f"{key}={value}")]
        command = ["dvc", "exp", "run", *changes, "-S", f"cache.max_gigabytes={GIGABYTES}", "evaluate"]
        for seconds in [*kill_after, None]:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.kills += 1
                # What DVC writes in place or locks, and may have been killed at just then.
                for name in (".git/index.lock", ".dvc/tmp/rwlock"):
                    (self.folder / name).unlink(missing_ok=True)
                for name in ("params.yaml", "dvc.lock", "data/dvc.lock"):
                    if not self.is_whole(name):
                        self.call("git", "checkout", name)
                        self.restored += 1
                continue
            if process.returncode:
                raise SystemExit(f"{self.folder.name}: {' '.join(command)} failed:\n{output[-3000:]}")
            break
        lock = yaml.safe_load((self.folder / "dvc.lock").read_text())
        self.results[json.dumps(options)] = {
            **{name: (self.folder / name).read_bytes() for name in RESULTS},
            "checkpoint": json.dumps(lock["stages"]["finetune"]["outs"]).encode(),
        }


def soak(folder: Path, count: int, kills: int) -> dict[str, Any]:
    """Run both queues, and return what was found; raises AssertionError where something is not as it should be."""
    cache, chance = folder / "cache", random.Random(1)
    queues = [Queue(folder / name, cache) for name in ("undisturbed", "killed")]
    for queue in queues:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(queue.folder)], check=True)
    every, started = settings(count // 2), time.monotonic()
    disturbed = chance.sample(range(len(every)), min(kills, len(every)))

    def run(queue: Queue, order: list[int], killed: list[int]) -> None:
        for done, position in enumerate(order, start=1):
            queue.run(every[position], [chance.uniform(1, 15)] * (position in killed))
            minutes = (time.monotonic() - started) / 60
            print(
                f"{queue.folder.name}: {done} of {len(order)}, {queue.kills} killed, {minutes:.1f} min", file=sys.stderr
            )

    order = list(range(len(every)))
    half = len(order) // 2
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, queues, [order, order[half:] + order[:half]], [[], disturbed]))

    one, other = queues
    differ = [f"{options}: {name}" for options, files in one.results.items() for name, content in files.items()
              if other.results[options][name] != content]  # fmt: skip
    assert not differ, differ
    for queue in queues:
        shown = json.loads(queue.call("dvc", "exp", "show", "--json"))
        experiments = [revision for base in shown for revision in base["experiments"] or []]
        table = list(csv.DictReader(io.StringIO(queue.call(sys.executable, "-m", "stages.compare", "--csv"))))
        listed = {name for row in table for name in row["experiment"].split(", ")}
        missing = [one["name"] for one in experiments if one["name"] not in listed]
        assert len(experiments) >= len(every) - 1, len(experiments)  # one may be what the commit has already
        assert not missing, missing
        left = [path for path in queue.folder.rglob("*.tmp") if ".venv" not in path.parts]
        assert not left, left
    states = list((cache / "states").glob("*")) if (cache / "states").exists() else []
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert not list(cache.rglob("*.tmp")), list(cache.rglob("*.tmp"))
    assert size <= GIGABYTES * 1e9, size
    results = {str(files) for files in one.results.values()}
    return {
        "experiments": sum(len(queue.results) for queue in queues),
        "different results": len(results),
        "kills": other.kills,
        "files brought back": other.restored,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "cache, GB": round(size / 1e9, 3),
        "states left": len(states),
    }


def main() -> None:
    """Soak, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=100, help="of both queues together")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        print(json.dumps(soak(Path(folder), options.experiments, options.kills)))


if __name__ == "__main__":
    main()
