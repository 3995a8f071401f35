"""`make bench`, from end to end on a few small images."""

import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Project, make_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from stages.common.cli import StageError
from stages.common.files import read_table
from stages.images.batches import Batches
from stages.network.checkpoint import load_checkpoint
from stages.training import cache
from tests.bench import logistic, sets
from tests.bench import project as shared
from tests.bench.bench import gather
from tests.bench.project import Run
from tests.bench.sets_report import LOOKS, Result, tabulate
from tests.bench.simulate import MEASUREMENTS

BENCH = [sys.executable, str(ROOT / "tests" / "bench" / "bench.py")]
TINY = ["--weights", "null", "--epochs", "1", "--image-size", "32"]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path, for temporary files: the sockets of decoding processes lie there."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def environment_for(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def cells(output: str) -> dict[str, list[str]]:
    """The rows of the tables, by their first cell."""
    rows = (line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| "))
    return {title: values for title, *values in rows}


@pytest.mark.slow
def test_the_bench_compares_every_phase_and_leaves_nothing_behind(tmp_path: Path, scratch: Path) -> None:
    images = make_images(tmp_path / "images", count=12)
    command = [*BENCH, "--data", str(images), *TINY, "--limit", "12", "--scale"]
    bench = subprocess.run(command, env=environment_for(scratch), capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    rows = cells(bench.stdout)
    for title in (
        "first run: head phase",
        "first run: fine-tuning",
        "first run: both phases",
        "the defaults, first run: both phases",
        "another train_head.lr: both phases",
        "another finetune.lr: fine-tuning",
    ):
        tutorial, pipeline, ratio = rows[title]
        seconds = [float(cell.removesuffix(" s")) for cell in (tutorial, pipeline)]
        assert float(ratio.removesuffix(" x")) == pytest.approx(seconds[0] / seconds[1], abs=0.1)
    for title in ("test accuracy after the head phase, seed 42", "test accuracy, fine-tuned, seed 42"):
        assert all(0 <= float(accuracy.removesuffix("%")) <= 100 for accuracy in rows[title][:2])
        assert 0 <= float(rows[f"the defaults: {title}"][1].removesuffix("%")) <= 100
    for title in ("peak memory, head phase", "peak memory, fine-tuning"):
        # A process that has loaded torch holds more than this.
        assert all(float(memory.removesuffix(" GiB")) > 0.05 for memory in rows[title][:2])
    assert {"split", "build_model", "evaluate"} < rows.keys()
    train, test = re.findall(r"(\d+) (?:train|test)\b", bench.stdout.splitlines()[0])
    assert int(train) + int(test) == 24
    assert not list(scratch.glob("bench-*"))


@pytest.mark.slow
def test_the_simulation_measures_every_rule_without_images_and_leaves_nothing_behind(scratch: Path) -> None:
    command = [*BENCH, "--simulate", "500"]
    bench = subprocess.run(command, env=environment_for(scratch), capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    rows = cells(bench.stdout)
    assert bench.stdout.startswith("| | 500 images |\n")
    titles = list(rows)
    measurements = [title for title, *_ in MEASUREMENTS.values()]
    assert titles[1 : 1 + len(measurements)] == measurements
    # Of MobileNetV3-Large: 960 values, and 160 x 7 x 7 or 80 x 14 x 14 of them; one file a phase has few more bytes.
    for title, values in zip(titles[1 + len(measurements) :], (960 + 160 * 49, 960 + 80 * 196), strict=True):
        assert float(rows[title][0].removesuffix(" GB")) == pytest.approx(500 * 4 * values / 1e9, rel=0.02, abs=5e-3)
    for measured in list(rows.values())[1 : 1 + len(measurements)]:
        for cell in measured:
            seconds, memory = re.fullmatch(r"([\d.]+) s, ([\d.]+) GiB", cell).groups()
            assert float(seconds) < 60
            assert 0.01 < float(memory) < 4
    # A process that does not load torch is a small one, and none counts the memory of what started it.
    assert float(rows["writing an index file"][0].split()[2]) < 0.1
    assert not list(scratch.iterdir())


def test_copies_of_images_for_the_bench_all_differ(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images", count=5)
    assert gather(data, tmp_path / "enough", limit=2, factor=2) == 0
    assert gather(data, tmp_path / "more", limit=2, factor=6) == 2 * (12 - 5)
    for folder, count in (("enough", 8), ("more", 24)):
        contents = {path.read_bytes() for path in (tmp_path / folder).glob("*/*.png")}
        assert len(contents) == count


def test_ctrl_c_ends_what_the_bench_started_and_removes_its_folder(tmp_path: Path, scratch: Path) -> None:
    images = make_images(tmp_path / "images", count=6)
    command = [*BENCH, "--data", str(images), *TINY]
    bench = subprocess.Popen(command, env=environment_for(scratch), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(scratch.glob("*/project/data/index/test.csv")):
        assert time.monotonic() < deadline
        assert bench.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # the next stage has started, and takes seconds to import
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    started = children.read_text().split() if children.is_file() else []
    bench.send_signal(signal.SIGINT)
    _, errors = bench.communicate(timeout=30)
    assert errors.endswith("error: interrupted\n")
    assert not list(scratch.glob("bench-*"))
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_sets_are_compared_with_peers_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "sets" / "three", ("cat", "dog", "fox"), count=12)
    make_images(tmp_path / "sets" / "two", count=12)
    (tmp_path / "sets" / "none").mkdir()
    command = ["sets.py", "--sets", str(tmp_path / "sets"), "--arch", "mobilenet_v3_small", "--weights", "null"]
    command += ["--image-size", "32", "--seeds", "1", "--output", str(tmp_path / "out")]
    command += ["--methods", "pipeline", "sklearn", "tutorial"]
    monkeypatch.setattr(sys, "argv", command)
    written, ran, stops = tmp_path / "out" / "sets.csv", [], [True]

    def run_here(folder: Path, *command: str | Path) -> Run:
        """As a process of its own would, but for the seconds that this takes."""
        script, rest = (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])
        ran.append(Path(script).name)
        if ran[-1] == "logistic.py" and stops:
            stops.clear()
            raise KeyboardInterrupt
        started = time.perf_counter()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
            patch.chdir(folder)
            patch.setenv(cache.VARIABLE, str(folder / "cache"))
            patch.setattr(sys, "argv", ["", *map(str, rest)])
            if command[0] == "-m":
                importlib.import_module(str(script)).main()
            else:
                runpy.run_path(str(script), run_name="__main__")
        return Run(time.perf_counter() - started, 0.0, output.getvalue())

    for module in (sets, shared):
        monkeypatch.setattr(module, "run", run_here)
    with pytest.raises(KeyboardInterrupt):
        sets.main()
    finished = written.read_text()
    assert len(finished.splitlines()) == 3
    ran.clear()
    sets.main()
    assert written.read_text().startswith(finished)
    prepare, phases = (
        ["stages.split", "stages.build_model"],
        ["stages.train_head", "stages.finetune", "stages.evaluate"],
    )
    assert ran == [*prepare, "logistic.py", "tutorial.py", *prepare, *phases, "logistic.py", "tutorial.py"]

    results = read_table(written, Result, "")
    columns = [method for method in LOOKS if method != "fastai"]
    assert sorted((one.set, one.method) for one in results) == sorted(product(("three", "two"), columns))
    assert all(0 <= result.accuracy <= 1 and 0 <= result.ece <= 1 and result.loss >= 0 for result in results)
    assert {result.verdict for result in results if result.method == "finetuned"} <= {"better", "worse", "no evidence"}
    seconds = {(result.set, result.method): result.seconds for result in results}
    assert seconds["two", "head"] < seconds["two", "finetuned"]
    printed = cells(capsys.readouterr().out)  # the last of the tables
    for (name, method), own in seconds.items():
        row = next(values for title, values in printed.items() if title.startswith(f"{name} ("))
        assert row[columns.index(method)] == f"{own:.1f}"
    assert (tmp_path / "out" / "sets.png").stat().st_size > 5000

    some = [one for one in results if (one.set, one.method) != ("two", "tutorial")]
    partly = cells("\n".join(tabulate(some)))  # the last of the tables
    assert next(values for title, values in partly.items() if title.startswith("two ("))[0] == ""
    assert partly["mean of the sets"][0] == ""

    ran.clear()
    sets.main()
    assert ran == []
    monkeypatch.setattr(sys, "argv", [*command, "--image-size", "64"])
    with pytest.raises(StageError, match=r"sets\.csv: made with image_size 32, not 64; give another --output"):
        sets.main()


def test_the_bench_hands_sets_on_and_refuses_what_it_cannot_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").mkdir()
    command = [*BENCH, "--sets", str(tmp_path), "--weights", "null", "--arch"]
    bench = subprocess.run([*command, "mobilenet_v2"], capture_output=True, text=True)
    assert (bench.returncode, bench.stderr) == (1, f"error: --sets: {tmp_path}: no folder in it has images\n")
    monkeypatch.setattr(sys, "argv", [*command[1:], "resnet18"])
    with pytest.raises(StageError, match="--arch: resnet18: torchvision's has no `features`"):
        sets.main()


def test_the_regression_sees_the_pooled_features_of_the_initial_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set("model.head", "pooled")
    project.build()
    seen: list[object] = []
    monkeypatch.setattr(logistic, "compare", lambda *arguments: seen.extend(arguments))
    monkeypatch.chdir(project.folder)
    logistic.main()
    network, description = load_checkpoint(project.checkpoint("initial"))
    parts = project.parts()
    entries = [entry for part in parts.values() for entry in part]
    (images, labels), *_ = Batches(Path("images"), entries, description.preprocessing, len(entries), 0)
    features, own_labels, count, folds = seen
    expected = network.eval().backbone(images).mean((2, 3)).detach()
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert own_labels.tolist() == labels.tolist()
    assert (count, len(folds)) == (len(parts["train"]), len(parts["train"]) + len(parts["val"]))


def test_the_regression_is_scikit_learns_on_these_features() -> None:
    random = np.random.default_rng(0)
    labels, folds = np.arange(150) % 3, np.arange(120) // 3 % 5
    features = 5 + 3 * random.normal(size=(150, 8)) + labels[:, None] * random.normal(size=8)
    report = logistic.compare(features, labels, 90, folds)
    scaled = (features - features[:90].mean(0)) / features[:90].std(0)
    search = GridSearchCV(
        LogisticRegression(max_iter=1000), {"C": logistic.STRENGTHS}, scoring="neg_log_loss", cv=PredefinedSplit(folds)
    )
    strength = search.fit(scaled[:120], labels[:120]).best_params_["C"]
    assert min(logistic.STRENGTHS) < strength < max(logistic.STRENGTHS)
    for name, count in (("sklearn", 90), ("sklearn, train+val", 120)):
        probabilities = (
            LogisticRegression(C=strength, max_iter=1000)
            .fit(scaled[:count], labels[:count])
            .predict_proba(scaled[120:])
        )
        assert report[name]["loss"] == pytest.approx(log_loss(labels[120:], probabilities))
        assert report[name]["accuracy"] == np.mean(probabilities.argmax(1) == labels[120:])


@pytest.mark.slow
def test_fastai_fine_tunes_on_the_same_images(project: Project) -> None:
    pytest.importorskip("fastai")
    project.set("model.image_size", 32)
    project.build()
    tuned = shared.run(project.folder, ROOT / "tests" / "bench" / "fastai_tune.py", "--epochs", "1").json()["fastai"]
    assert 0 <= tuned["accuracy"] <= 1
    assert tuned["loss"] > 0
