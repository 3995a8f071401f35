"""`python -m stages.suggest`: which unlabelled images to label next."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Project, call_script, make_images
from PIL import Image
from small import save_random

from stages import suggest
from stages.common.files import write_csv
from stages.deploy import suggestions
from stages.deploy.classifier import Loaded
from stages.deploy.suggestions import Pool, choose, collect_pool, uncertainty
from stages.images.index import PARTS, read_index


def pool_of(features: list[list[float]], surety: list[float]) -> Pool:
    """Images of two classes with such a probability of the first."""
    first = np.array(surety, np.float32)
    vectors = np.array(features, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    paths = np.array([str(number) for number in range(len(first))], dtype=object)
    return Pool(paths, np.stack([first, 1 - first], axis=1), vectors, np.zeros_like(first))


def test_images_are_chosen_greedily_by_the_documented_sum() -> None:
    random = np.random.default_rng(0)
    pool = pool_of(random.random((60, 5)).tolist(), random.random(60).tolist())
    labelled = np.eye(5, dtype=np.float32)[:2]
    cosines, weights = np.clip(pool.features @ pool.features.T, 0, 1), uncertainty(pool.probabilities)
    covered = (pool.features @ labelled.T).max(axis=1)
    for best in choose(pool, labelled, 12):
        sums = [float(weights @ np.maximum(covered, row)) for row in cosines]
        assert sums[best] == pytest.approx(max(sums))
        covered = np.maximum(covered, cosines[best])


def test_of_a_large_pool_only_the_most_uncertain_images_are_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggestions, "MOST", 10)
    surety = np.linspace(0.5, 1.0, 200, dtype=np.float32)
    order = np.random.default_rng(0).permutation(200)
    parts = [Loaded([str(n) for n in rows], [None] * 8, torch.tensor(surety[rows])) for rows in order.reshape(-1, 8)]

    def look(some: Loaded) -> tuple[suggestions.Floats, suggestions.Floats, suggestions.Floats]:
        first = some.images.numpy()
        return np.stack([first, 1 - first], axis=1), np.ones((len(first), 1), np.float32), first

    pool, unreadable = collect_pool(parts, look)
    assert list(pool.paths) == [str(n) for n in range(10)]
    assert unreadable == 0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Labelled images, unlabelled ones in another folder, and a network that knows the classes."""
    make_images(tmp_path / "images", classes=("cat", "dog"), count=12)
    project = Project(tmp_path)
    save_random(project.checkpoint("finetuned"), ("cat", "dog"))
    pool = tmp_path / "images" / "unlabelled" / "deeper"
    pool.mkdir(parents=True)
    for seed in range(5):
        noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 96), Image.Resampling.BILINEAR).save(pool / f"{seed}.png")
    shutil.copy(pool / "3.png", pool / "again.png")
    Image.open(pool / "4.png").save(pool / "4 saved again.jpg", quality=80)
    labelled = sorted((tmp_path / "images" / "cat").iterdir())
    shutil.copy(labelled[0], pool / "labelled already.png")
    (pool / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    return project


def ask(project: Project, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.chdir(project.folder)
    return call_script(suggest, *arguments, "--checkpoint", project.checkpoint("finetuned"))


def test_the_filled_in_table_is_the_grown_data_set(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = project.folder / "suggestions.csv"
    assert ask(project, monkeypatch, "images/unlabelled", "--count", 9) == 0
    said = capsys.readouterr().out
    assert "5 images of 9 suggested; left out: 3 copies or near-duplicates, 1 unreadable" in said
    assert "then: dvc exp run -S data.labels=suggestions.csv\n" in said
    rows = list(csv.DictReader(table.open()))
    suggested = [row for row in rows if not row["label"]]
    kinds = [{"again", "3"}, {"4 saved again", "4"}]
    names = {Path(row["path"]).stem for row in suggested}
    assert {"0", "1", "2"} < names
    assert all(len(names & kind) == 1 for kind in kinds)
    assert {row["path"].split("/")[0] for row in rows[5:]} == {"cat", "dog"}
    assert Image.open(table.with_suffix(".png")).size[0] > 500

    filled = [row | {"label": row["label"] or "dog"} for row in rows]
    write_csv(table, rows[0], [row.values() for row in filled])
    project.set("data.labels", str(table))
    assert project.run("split") == 0
    assert "may be a split" not in capsys.readouterr().out
    entries = [entry for part in PARTS for entry in read_index(project.folder / "data" / "index" / f"{part}.csv")]
    assert len(entries) == 24 + 5
    assert {entry.class_name for entry in entries if entry.path.startswith("unlabelled")} == {"dog"}


def test_images_outside_the_data_set_get_a_list_of_their_own(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.path("images/unlabelled").rename(project.path("elsewhere"))
    assert ask(project, monkeypatch, "elsewhere", "--count", 2) == 0
    assert "sort them into the folders of their classes" in capsys.readouterr().out
    with project.path("suggestions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).is_file() for row in rows] == [True, True]


def test_bad_arguments_are_refused_in_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, problem in (
        (["images", "--count", "0"], "--count: should be 1 or more, is 0"),
        (["images", "--output", "list.txt"], "--output: list.txt should end in .csv"),
        (["images/cat"], "no image here is new: 12 files"),
        (["nowhere"], "nowhere: no such file or folder"),
    ):
        assert ask(project, monkeypatch, *arguments) == 1
        assert problem in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_simulation_labels_both_ways_and_draws_what_it_measured(project: Project) -> None:
    project.set("model.head", "pooled")
    assert project.run("split", "build_model") == 0
    command = [sys.executable, ROOT / "tests" / "bench" / "labelling.py", project.folder, "--numbers", "6", "10"]
    command += ["--seeds", "1", "--output", project.folder / "drawn.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = project.folder.name
    for ranking in ("suggested", "random"):
        (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name}, {ranking}: ")]
        assert f"{name}, seed 1, {ranking}: 10 labelled, {row.split()[-1]}" in done.stdout
    assert Image.open(project.folder / "drawn.png").size[0] > 400
