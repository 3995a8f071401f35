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

import pytest
import torch
from conftest import ROOT, call_script, make_images
from onnx import TensorProto, helper
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small import save_random

from stages import predict
from stages.deploy.classifier import TorchNetwork
from stages.training.reference import Unlike, write_reference

Predict = Callable[..., int]
NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of three classes, with their images in the folder beside it."""
    folder = tmp_path_factory.mktemp("made")
    make_images(folder / "images", NAMES, count=12)
    return save_random(folder / "finetuned.safetensors", NAMES)


@pytest.fixture(scope="module")
def images(checkpoint: Path) -> Path:
    return checkpoint.with_name("images")


@pytest.fixture
def call(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Call the script in a folder of its own; its exit code."""
    monkeypatch.chdir(tmp_path)

    def predicted(*arguments: object, checkpoint: Path = checkpoint) -> int:
        return call_script(predict, *arguments, "--checkpoint", checkpoint, "--device", "cpu", "--workers", 0)

    return predicted


def rows(path: str = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_searched_at_any_depth_and_unreadable_files_have_a_row(
    images: Path, call: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images / "cat", tmp_path / "new/deep/er")
    bad = [tmp_path / f"{number}.png" for number in range(3)]
    for path in (*bad, tmp_path / "new/broken.jpg"):
        path.write_bytes(b"no image" * (path.suffix == ".jpg"))
    (tmp_path / "new/notes.txt").write_text("not an image by its name")
    # Batches of which nothing can be read do not stop the others.
    assert call(*bad, tmp_path / "new", "--batch-size", 2) == 1
    said = capsys.readouterr().err
    assert "12 images predicted; 1 other file left out" in said
    assert "error: 4 of 16 images cannot be read; `problem` in predictions.csv says why" in said
    table = rows()
    assert [Path(row["path"]).name for row in table if row["problem"]] == ["0.png", "1.png", "2.png", "broken.jpg"]
    assert table[0]["problem"] == "empty file"
    assert len([row for row in table if row["prediction"] in NAMES]) == 12
    # A mistyped path leaves earlier predictions alone.
    assert call(tmp_path / "missing") == 1
    assert rows() == table


def test_top_limits_the_classes_and_reject_empties_unsure_predictions(
    images: Path, call: Predict, tmp_path: Path
) -> None:
    cat = images / "cat/000.png"
    assert call(cat, "--top", 2) == 0
    (row,) = rows()
    assert list(row) == ["path", "prediction", "probability", "unlike", "prediction_2", "probability_2", "problem"]
    assert float(row["probability"]) >= float(row["probability_2"])
    assert call(cat, "--top", 9) == 0
    assert sum(float(value) for name, value in rows()[0].items() if "probability" in name) == pytest.approx(1)
    assert call(cat, "--reject", 1.0) == 0
    assert rows()[0]["prediction"] == ""
    assert float(rows()[0]["probability"]) < 1
    # JSON lines have an object an image.
    (tmp_path / "bad.png").write_bytes(b"")
    assert call(cat, tmp_path / "bad.png", "--output", "p.jsonl", "--all") == 1
    good, bad = (json.loads(line) for line in Path("p.jsonl").read_text().splitlines())
    assert set(good["probabilities"]) == set(NAMES)
    assert good["probability"] == good["probabilities"][good["prediction"]]
    assert bad == {"path": str(tmp_path / "bad.png"), "problem": "empty file"}


def test_an_image_unlike_the_training_images_is_flagged_and_rejected_however_probable_its_class(
    checkpoint: Path, images: Path, call: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, stranger = images / "cat/000.png", tmp_path / "stranger.png"
    Image.new("RGB", (40, 40), "white").save(stranger)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(checkpoint, alone)
    assert call(known, checkpoint=alone) == 0
    assert "without `unlike`: there is no" in capsys.readouterr().err
    assert "unlike" not in rows()[0]

    network = TorchNetwork(checkpoint, torch.device("cpu"), "float32")
    _, features = network.look(torch.stack([network.transform(Image.open(path)) for path in (known, stranger)]))
    # The distance of the stranger counts as 2.
    distance = float(Unlike(features[:1], 1.0)(features[1:]))
    write_reference(tmp_path / "reference.safetensors", Unlike(features[:1], distance / 2), alone)
    assert call(stranger, known, "--reject", 0.01, checkpoint=alone) == 0
    assert [float(row["unlike"]) for row in rows()] == pytest.approx([2, 0], abs=1e-2)
    assert [bool(row["prediction"]) for row in rows()] == [False, True]
    assert call(stranger, known, "--output", "p.jsonl", checkpoint=alone) == 0
    answers = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [answer["unlike"] for answer in answers] == pytest.approx([2, 0], abs=1e-2)
    assert all(answer["prediction"] for answer in answers)


def test_the_standard_output_gets_the_table_alone_and_a_closed_pipe_is_no_error(
    checkpoint: Path, images: Path, call: Predict, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(images / "cat", "--output", "-") == 0
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 13
    assert "12 images predicted" in said.err
    command = f"{sys.executable} -m stages.predict {images}/cat --output - --workers 2 --checkpoint {checkpoint}"
    command = f"set -o pipefail; {command} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Broken pipe" not in done.stderr


def test_bad_input_is_refused_in_one_line(
    images: Path, call: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cat = images / "cat/000.png"
    for arguments, message in (
        ([tmp_path / "empty"], "no images in this folder"),
        ([tmp_path / "missing.jpg"], "missing.jpg: no such file or folder"),
        ([cat, "--top", "0"], "--top: should be 1 or more, is 0"),
        ([cat, "--batch-size", "0"], "--batch-size: should be 1 or more, is 0"),
        ([cat, "--reject", "1.5"], "--reject: should be a probability from 0 to 1, is 1.5"),
        ([cat, "--output", "p.xlsx"], "p.xlsx should end in .csv or .jsonl"),
        ([cat, "--output", tmp_path / "none/p.csv"], "/none; make it first"),
    ):
        assert call(*arguments) == 1
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
    ("damaged.safetensors", b"PK", "damaged checkpoint"),
    ("other.safetensors", {}, "not a checkpoint of this pipeline"),
    ("version.safetensors", {"checkpoint": "{}"}, "not a checkpoint of this pipeline, or of another version of it"),
    ("tensors.safetensors", {"checkpoint": "own"}, "its tensors are not those of its mobilenet_v3_small"),
    ("none.onnx", None, "no such file"),
    ("damaged.onnx", b"\x08\x0a\x12\x07pytorch", "damaged, or not an ONNX file"),
    ("other.onnx", {}, "not an ONNX file of this project"),
    ("version.onnx", {"project": "dvc-finetune", "classes": "[1"}, "of another version of this project"),
    ("network.pt", b"", "should end in .safetensors (a checkpoint) or .onnx"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNUSABLE, ids=[name for name, *_ in UNUSABLE])
def test_a_network_that_cannot_be_used_is_refused_in_one_line(
    name: str, content: Any, message: str, checkpoint: Path, images: Path, call: Predict, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    if content == {"checkpoint": "own"}:
        with safe_open(checkpoint, framework="pt") as file:
            content = file.metadata()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None and path.suffix == ".onnx":
        write_another_onnx(path, content)
    elif content is not None:
        save_file({"weight": torch.zeros(1)}, path, content)
    assert call(images / "cat/000.png", checkpoint=path) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert message in line


def test_after_an_interrupt_all_written_rows_are_complete(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    output, many = tmp_path / "predictions.csv", [images / "cat/000.png"] * 5000
    command = [sys.executable, "-m", "stages.predict", *many, "--output", output, "--workers", "1", "--batch-size", "2"]
    process = subprocess.Popen([*map(str, command), "--checkpoint", str(checkpoint)], cwd=ROOT, stderr=subprocess.PIPE)
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
