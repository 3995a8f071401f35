"""`python -m stages.predict`, as its users call it."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGES, Project, call_script, make_images
from onnx import TensorProto, helper
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from stages import predict
from stages.images.index import read_index
from stages.training.reference import Unlike, read_reference, write_reference

CHECKPOINT = "data/checkpoints/finetuned.safetensors"
Predict = Callable[..., int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three classes, trained and evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    make_images(folder / "images", classes=("cat", "dog", "owl"), count=12)
    project = Project(folder)
    assert project.run(*STAGES[:5]) == 0
    return project


@pytest.fixture
def call(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Call the script in a folder of its own; its exit code."""
    monkeypatch.chdir(tmp_path)

    def predicted(*arguments: object, checkpoint: Path | None = None) -> int:
        settings = ["--checkpoint", checkpoint or finished.checkpoint("finetuned"), "--device", "cpu", "--workers", 0]
        return call_script(predict, *arguments, *settings)

    return predicted


@pytest.fixture
def cat(finished: Project) -> Path:
    return finished.path("images/cat/000.png")


def rows(path: str = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_test_images_get_the_probabilities_of_the_evaluation(finished: Project, call: Predict) -> None:
    root = finished.path("images")
    entries = read_index(finished.path("data/index/test.csv"))
    assert call(*(root / entry.path for entry in entries), "--all", "--batch-size", 4) == 0
    expected = list(csv.DictReader(finished.path("metrics/predictions.csv").open(newline="")))
    for row, other in zip(rows(), expected, strict=True):
        assert row["path"] == str(root / other["path"])
        values = [float(row[name]) for name in ("cat", "dog", "owl")]
        assert values == pytest.approx([float(other[f"finetuned.{name}"]) for name in ("cat", "dog", "owl")], abs=1e-5)
        assert row["prediction"] == ("cat", "dog", "owl")[int(np.argmax(values))]
        assert float(row["probability"]) == max(values)


def test_a_folder_is_searched_at_any_depth_and_what_cannot_be_read_has_a_row(
    finished: Project, call: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path("images/cat"), tmp_path / "new/deep/er")
    (tmp_path / "new/broken.jpg").write_bytes(b"no image")
    (tmp_path / "new/notes.txt").write_text("not an image by its name")
    assert call(tmp_path / "new", "--batch-size", 5) == 1
    assert "error: 1 of 13 images cannot be read; `problem` in predictions.csv says why" in capsys.readouterr().err
    table = rows()
    assert [Path(row["path"]).name for row in table if row["problem"]] == ["broken.jpg"]
    assert len([row for row in table if row["prediction"] in ("cat", "dog", "owl")]) == 12


def test_batches_of_which_nothing_can_be_read_do_not_stop_the_others(call: Predict, cat: Path, tmp_path: Path) -> None:
    bad = [tmp_path / f"{number}.png" for number in range(3)]
    for path in bad:
        path.write_bytes(b"")
    assert call(*bad, cat, "--batch-size", 1) == 1
    assert [row["problem"] for row in rows()] == ["empty file"] * 3 + [""]


def test_top_says_how_many_classes_and_reject_empties_unsure_predictions(call: Predict, cat: Path) -> None:
    assert call(cat, "--top", 2) == 0
    (row,) = rows()
    assert list(row) == ["path", "prediction", "probability", "unlike", "prediction_2", "probability_2", "problem"]
    assert float(row["probability"]) >= float(row["probability_2"])
    assert call(cat, "--top", 9) == 0
    assert sum(float(value) for name, value in rows()[0].items() if "probability" in name) == pytest.approx(1)
    assert call(cat, "--reject", 1.0) == 0
    assert rows()[0]["prediction"] == ""
    assert float(rows()[0]["probability"]) < 1


def test_a_stranger_is_flagged_and_rejected_however_probable_its_class(
    finished: Project, call: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40), "white").save(tmp_path / "stranger.png")
    known = finished.path("images") / read_index(finished.path("data/index/train.csv"))[0].path
    checkpoint = tmp_path / "alone.safetensors"
    shutil.copy(finished.checkpoint("finetuned"), checkpoint)
    assert call(known, checkpoint=checkpoint) == 0
    assert "without `unlike`: there is no" in capsys.readouterr().err
    assert "unlike" not in rows()[0]

    # The features of random weights tell images apart less than noise does.
    unlike = read_reference(finished.checkpoint("finetuned"))
    assert unlike is not None
    write_reference(tmp_path / "reference.safetensors", Unlike(unlike.nearest, unlike.threshold / 2), checkpoint)
    assert call(tmp_path / "stranger.png", known, checkpoint=checkpoint) == 0
    stranger, own = rows()
    assert float(stranger["unlike"]) > 1
    assert float(own["unlike"]) == pytest.approx(0, abs=1e-2)
    assert stranger["prediction"]
    assert call(tmp_path / "stranger.png", known, "--reject", 0.01, checkpoint=checkpoint) == 0
    assert [bool(row["prediction"]) for row in rows()] == [False, True]
    assert call(known, "--output", "p.jsonl", checkpoint=checkpoint) == 0
    assert json.loads(Path("p.jsonl").read_text())["unlike"] == pytest.approx(0, abs=1e-2)


def test_json_lines_have_an_object_an_image(call: Predict, cat: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    assert call(cat, tmp_path / "bad.png", "--output", "p.jsonl", "--all") == 1
    good, bad = (json.loads(line) for line in Path("p.jsonl").read_text().splitlines())
    assert set(good["probabilities"]) == {"cat", "dog", "owl"}
    assert good["probability"] == good["probabilities"][good["prediction"]]
    assert bad == {"path": str(tmp_path / "bad.png"), "problem": "empty file"}


def test_the_standard_output_gets_the_table_alone_and_who_reads_one_row_meets_no_error(finished: Project) -> None:
    command = f"{sys.executable} -m stages.predict {finished.path('images/cat')} --output - --workers 2 --checkpoint "
    command += f"{finished.checkpoint('finetuned')}"
    for pipe, lines, said in (("", 13, True), ("| head -n 1", 1, False)):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} {pipe}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert len(done.stdout.splitlines()) == lines
        assert "Broken pipe" not in done.stderr
        assert said <= ("12 images predicted" in done.stderr)


def test_a_mistyped_path_leaves_earlier_predictions_alone_and_other_files_are_counted(
    finished: Project, call: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, folder = tmp_path / "predictions.csv", tmp_path / "some"
    table.write_text("earlier")
    assert call(tmp_path / "missing", "--output", table) == 1
    assert table.read_text() == "earlier"
    shutil.copytree(finished.path("images/cat"), folder)
    (folder / "notes.txt").write_text("")
    assert call(folder, "--output", table) == 0
    assert "12 images predicted; 1 other file left out" in capsys.readouterr().err


BAD: dict[str, tuple[list[str], str]] = {
    "no image": (["{tmp}/empty"], "no images in this folder"),
    "no file": (["{tmp}/missing.jpg"], "missing.jpg: no such file or folder"),
    "top": (["{cat}", "--top", "0"], "--top: should be 1 or more, is 0"),
    "batch": (["{cat}", "--batch-size", "0"], "--batch-size: should be 1 or more, is 0"),
    "reject": (["{cat}", "--reject", "1.5"], "--reject: should be a probability from 0 to 1, is 1.5"),
    "ending": (["{cat}", "--output", "p.xlsx"], "p.xlsx should end in .csv or .jsonl"),
    "folder": (["{cat}", "--output", "{tmp}/none/p.csv"], "/none; make it first"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(
    kind: str, call: Predict, cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments, message = BAD[kind]
    assert call(*(argument.format(tmp=tmp_path, cat=cat) for argument in arguments)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def write_another_onnx(path: Path, metadata: dict[str, str]) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", [values[0]], [values[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())


# Of each file its name, its bytes or what its metadata says, and the problem.
UNUSABLE: list[tuple[str, bytes | dict[str, str] | None, str]] = [
    ("none.safetensors", None, "no such checkpoint"),
    ("empty.safetensors", b"", "damaged checkpoint"),
    ("damaged.safetensors", b"PK", "damaged checkpoint"),
    ("other.safetensors", {}, "not a checkpoint of this pipeline"),
    ("cut.safetensors", {"checkpoint": "[1"}, "not a checkpoint of this pipeline, or of another version of it"),
    ("version.safetensors", {"checkpoint": "{}"}, "not a checkpoint of this pipeline, or of another version of it"),
    ("tensors.safetensors", {"checkpoint": "own"}, "its tensors are not those of its mobilenet_v3_small"),
    ("none.onnx", None, "no such file"),
    ("empty.onnx", b"", "damaged, or not an ONNX file"),
    ("damaged.onnx", b"\x08\x0a\x12\x07pytorch", "damaged, or not an ONNX file"),
    ("other.onnx", {}, "not an ONNX file of this project"),
    ("version.onnx", {"project": "dvc-finetune", "classes": "[1"}, "of another version of this project"),
    ("network.pt", b"", "should end in .safetensors (a checkpoint) or .onnx"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNUSABLE, ids=[name for name, *_ in UNUSABLE])
def test_a_network_that_cannot_be_used_is_one_line(
    name: str, content: Any, message: str, finished: Project, call: Predict, cat: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    if content == {"checkpoint": "own"}:
        with safe_open(finished.checkpoint("finetuned"), framework="pt") as file:
            content = file.metadata()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None and path.suffix == ".onnx":
        write_another_onnx(path, content)
    elif content is not None:
        save_file({"weight": torch.zeros(1)}, path, content)
    assert call(cat, checkpoint=path) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert message in line


def test_after_an_interrupt_all_rows_are_whole(finished: Project, tmp_path: Path) -> None:
    output, many = tmp_path / "predictions.csv", [finished.path("images/cat/000.png")] * 5000
    command = [sys.executable, "-m", "stages.predict", *many, "--output", output, "--workers", "1", "--batch-size", "2"]
    process = subprocess.Popen(
        [*map(str, command), "--checkpoint", str(finished.checkpoint("finetuned"))], cwd=ROOT, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while (not output.exists() or output.read_bytes().count(b"\n") < 10) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.decode() == "error: interrupted; run the same command again\n"
    text = output.read_text()
    assert text.endswith("\n")
    assert {len(row) for row in csv.reader(text.splitlines())} == {9}
    assert 10 <= len(text.splitlines()) < 5000
