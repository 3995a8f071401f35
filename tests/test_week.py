"""A week in the life of a data set: trained, grown, corrected, met by strangers, labelled further, looked back on."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STAGES, Project, call_script, make_images
from PIL import Image

from stages import compare, predict, suggest

Call = Callable[..., str]


@pytest.fixture
def call(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call what one does beside the pipeline, in the project; what it prints."""
    monkeypatch.chdir(project.folder)

    def called(module: object, *arguments: object) -> str:
        capsys.readouterr()
        assert call_script(module, *arguments) == 0
        return capsys.readouterr().out

    return called


def git(project: Project, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *arguments]
    subprocess.run(command, cwd=project.folder, check=True, capture_output=True)


def train(project: Project, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the pipeline up to the scores, and commit; what it printed."""
    capsys.readouterr()
    assert project.run(*STAGES[:5]) == 0
    git(project, "add", "params.yaml", "dvc.yaml", "data/index", "metrics")
    git(project, "commit", "-m", "run")
    return capsys.readouterr().out


def draw_noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def test_a_week_with_a_growing_data_set(project: Project, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"arch": "mobilenet_v3_large", "weights": str(ROOT / "data" / "glyphs" / "backbone.safetensors")}
    for key, value in {**weights, "head": "pooled", "image_size": 64}.items():
        project.set(f"model.{key}", value)
    project.set("split.near_duplicates", "report")
    project.set("finetune.epochs", 1)
    images = project.path("images")
    # One label is wrong, and one image is of no class.
    (images / "dog" / "003.png").rename(images / "cat" / "really a dog.png")
    draw_noise(0).save(images / "cat" / "nothing.png")
    make_images(project.path("more"), count=26)
    git(project, "init", "-q", "-b", "main")
    shutil.copy(ROOT / "dvc.yaml", project.folder)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=project.folder, check=True)

    # Monday: the first result.
    train(project, capsys)
    tested = {entry.sha256 for entry in project.parts()["test"]}
    assert len(tested) == 8

    # Tuesday: six images more.
    for number in range(20, 23):
        for name in ("cat", "dog"):
            shutil.copy(project.path(f"more/{name}/{number:03d}.png"), images / name)
    said = train(project, capsys)
    assert "since the last committed index 6 images added, 0 gone, 0 relabelled" in said
    assert "test images of both this result and the last committed one: fine-tuned" in said
    parts = project.parts()
    assert tested <= {entry.sha256 for entry in parts["test"]}
    assert not tested & {entry.sha256 for part in ("train", "val") for entry in parts[part]}

    # Wednesday: the label is corrected, and what belongs to no class dropped.
    with project.path("metrics/suspects.csv").open() as file:
        suspects = list(csv.DictReader(file))
    assert (suspects[0]["path"], suspects[0]["suggestion"]) == ("cat/really a dog.png", "dog")
    with project.path("corrections.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "correction"), ("cat/really a dog.png", "dog"), ("cat/nothing.png", "drop")])
    project.set("data.corrections", "corrections.csv")
    said = train(project, capsys)
    assert "0 images added, 1 gone, 1 relabelled" in said
    assert "1 label corrected, 1 image dropped by corrections.csv" in json.dumps(project.split_report())
    assert (images / "cat" / "really a dog.png").exists()

    # Thursday: what the network has never seen is told from what it has.
    strangers, known = project.path("strangers"), project.path("known")
    strangers.mkdir()
    for width in (2, 4, 5, 8):
        stripes = 255 * (np.arange(40) // width % 2).astype(np.uint8)
        Image.fromarray(np.tile(stripes, (40, 1))).save(strangers / f"{width}.png")
    for name in ("cat", "dog"):
        (known / name).mkdir(parents=True)
        shutil.copy(project.path(f"more/{name}/025.png"), known / name)
    call(predict, strangers, known, "--device", "cpu", "--workers", 0)
    with project.path("predictions.csv").open() as file:
        unlike = {row["path"]: float(row["unlike"]) for row in csv.DictReader(file)}
    assert min(value for path, value in unlike.items() if "strangers" in path) > 1
    assert min(unlike, key=lambda path: unlike[path]).startswith(str(known))

    # Friday: which of the new ones are worth a label; filled in, they are part of the data set.
    (project.path("more") / "cat" / "000.png").unlink()
    project.path("more").rename(images / "unlabelled")
    said = call(suggest, "images/unlabelled", "--count", 4)
    assert "4 images of 51 suggested; left out: 42 copies" in said
    with project.path("suggestions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = row["label"] or Path(row["path"]).parts[1]
    with project.path("labels.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    project.set("data.labels", "labels.csv")
    assert "4 images added, 0 gone, 0 relabelled" in train(project, capsys)
    parts = project.parts()
    assert sum(map(len, parts.values())) == 20 + 20 + 6 + 4
    assert not tested & {entry.sha256 for part in ("train", "val") for entry in parts[part]}

    # Saturday: all results of the week.
    assert len([line for line in call(compare).splitlines() if "%" in line]) == 4
