"""`python -m stages.export`, as its users call it, and what they do with the result."""

import ast
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import STAGES, Project, call_script, families, image_size_of, make_images, randomize_batchnorm
from PIL import Image

from stages import export, predict
from stages.common.cli import StageError
from stages.common.files import replaced_files
from stages.common.params import Head
from stages.deploy.card import onnx_program, torchvision_program
from stages.deploy.classifier import TOLERANCE, TorchNetwork, compare
from stages.deploy.onnx import Answer, OnnxNetwork, write_onnx
from stages.images.decode import decode
from stages.images.preprocessing import Preprocessing, make_framing, make_transform
from stages.network.backbones import cut_into_blocks, names_in_torchvision, stock_model, stock_shapes
from stages.network.checkpoint import Description, load_checkpoint, save_checkpoint
from stages.network.network import build_network
from stages.network.objective import outputs_for, probabilities
from stages.scores.evaluation import read_evaluation, write_evaluation
from stages.scores.verdict import describe_gain
from stages.training.reference import Features, read_reference

Export = Callable[..., int]
NAMES = ("cat", "dog", "owl")
WRITTEN: list[bytes] = []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("finished")
    make_images(folder / "images", count=10)
    project = Project(folder)
    # The head is found, with a layer that torch does not have.
    project.set("model.head", "pooled")
    assert project.run(*STAGES[:5]) == 0
    return project


@pytest.fixture
def call(finished: Project, monkeypatch: pytest.MonkeyPatch) -> Export:
    monkeypatch.chdir(finished.folder)
    return partial(call_script, export)


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's exporter runs in one test; the others copy the file that it wrote, of the same checkpoint."""

    def copy(path: Path, *arguments: Any) -> None:
        if not WRITTEN:
            write_onnx(path, *arguments)
            WRITTEN.append(path.read_bytes())
        path.write_bytes(WRITTEN[0])

    monkeypatch.setattr(export, "write_onnx", copy)


@contextmanager
def restored(file: Path) -> Iterator[Path]:
    """Put a file of the finished project back as it was."""
    content = file.read_bytes()
    try:
        yield file
    finally:
        file.write_bytes(content)


def run_program(program: str, folder: Path, image: Path) -> dict[str, float]:
    """Run a program of the card where this project cannot be imported."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["program", str(image)])
        for name in [name for name in sys.modules if name.partition(".")[0] == "stages"]:
            patch.setitem(sys.modules, name, None)
        exec(program, {})
    answer = ast.literal_eval(said.getvalue().splitlines()[0])
    assert isinstance(answer, dict)
    return answer


@pytest.mark.usefixtures("exported_once")
def test_an_export_equals_the_checkpoint_and_its_card_explains_its_use(
    finished: Project, call: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    assert call("--output", folder) == 0
    assert "0 predictions changed" in capsys.readouterr().out
    names = ["README.md", "labels.txt", "model.onnx", "model.safetensors", "torchvision_names.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "model.safetensors").read_bytes() == finished.checkpoint("finetuned").read_bytes()
    assert (folder / "labels.txt").read_text() == "cat\ndog\n"

    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    evaluation = json.loads(finished.path("metrics/scores.json").read_text())
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(evaluation["finetuned"]["accuracy"], 4)
    assert {"license", "tags", "metrics"} <= head.keys()
    assert "a new head was trained, then the last blocks with it." in card
    assert describe_gain(read_evaluation(finished.path("metrics")).gain) in card
    assert "true gain" in card
    # So large that it is decoded at a fraction of its size, which matters: it is noise.
    image, noise = tmp_path / "large.jpg", np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(image)
    network, description = load_checkpoint(finished.checkpoint("finetuned"))
    drafted = decode(image.read_bytes(), least=description.preprocessing.least("none"))
    assert drafted.size == (100, 75)
    images = make_transform(description.preprocessing, "none")(drafted)[None]
    with torch.inference_mode():
        expected = probabilities(network.eval()(images), description.temperature)[0].tolist()
    assert description.temperature != 1
    programs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        assert "stages" not in program
        assert run_program(program, folder, image) == pytest.approx(dict(zip(NAMES, expected, strict=False)), abs=1e-5)
    assert "`unlike`, the second output" in card
    unlike = read_reference(finished.checkpoint("finetuned"))
    assert unlike is not None
    exported = OnnxNetwork(folder / "model.onnx")
    _, there = exported.predict(exported.transform(drafted)[None])
    with torch.inference_mode():
        assert there == pytest.approx(unlike(Features()(network.backbone(images))).numpy(), abs=1e-3)
    # Neither this machine's paths nor anything else that another machine would write differently.
    content = (folder / "model.onnx").read_bytes()
    assert str(Path(export.__file__).parent).encode() not in content
    assert sys.prefix.encode() not in content

    # An earlier export may be replaced, and the same checkpoint gives the same bytes; what else is there stays.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "labels.txt").write_text("old")
    (folder / "Dockerfile").write_text("FROM scratch")
    (folder / "deploy").mkdir()
    assert call("--output", folder) == 0
    assert (folder / "deploy").is_dir()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before | {
        "Dockerfile": b"FROM scratch"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "large.jpg"]


@pytest.mark.usefixtures("exported_once")
def test_predict_agrees_with_the_evaluation_for_checkpoint_and_onnx(
    finished: Project, call: Export, tmp_path: Path
) -> None:
    assert call("--output", tmp_path / "exported") == 0
    expected = list(csv.DictReader(finished.path("metrics/predictions.csv").open(newline="")))
    tables = []
    for checkpoint in (finished.checkpoint("finetuned"), tmp_path / "exported" / "model.onnx"):
        more = ["--all", "--batch-size", 4, "--device", "cpu", "--workers", 0, "--output", tmp_path / "table.csv"]
        paths = [finished.path("images") / row["path"] for row in expected]
        assert call_script(predict, *paths, "--checkpoint", checkpoint, *more) == 0
        tables.append(list(csv.DictReader((tmp_path / "table.csv").open())))
    for row, other, told in zip(*tables, expected, strict=True):
        assert list(row) == list(other)
        assert (row["path"], row["prediction"]) == (other["path"], other["prediction"])
        for name in ("cat", "dog"):
            assert float(row[name]) == pytest.approx(float(told[f"finetuned.{name}"]), abs=1e-5)
            # A random network's logits are large (-13): torch alone differs by 1.5e-5 from itself in float64.
            assert float(other[name]) == pytest.approx(float(row[name]), abs=TOLERANCE / 2)
        assert float(row["probability"]) == max(float(row["cat"]), float(row["dog"])) == float(row[row["prediction"]])
        assert float(row["unlike"]) == pytest.approx(float(other["unlike"]), abs=1e-3)


@pytest.mark.usefixtures("exported_once")
def test_an_export_with_other_predictions_is_refused_and_leaves_nothing(
    call: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The checkpoint's own answers and 2e-4, without what onnxruntime rounds.
    real, answers = TorchNetwork.predict, list[Answer]()
    monkeypatch.setattr(TorchNetwork, "predict", lambda *given: answers.append(real(*given)) or answers[-1])
    monkeypatch.setattr(OnnxNetwork, "predict", lambda *_: (answers[0][0] + 2e-4, answers.pop(0)[1]))
    assert call("--output", tmp_path / "exported") == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: not exported, for it would be another network: .* 2.0e-04, .*\n", said)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_prediction_is_accepted_where_two_classes_are_equally_probable() -> None:
    labels = np.array([0, 1])
    original = np.array([[0.50002, 0.49998], [0.1, 0.9]])
    assert "0 predictions changed" in compare(labels, original, original)
    tie = np.array([[0.49998, 0.50002], [0.1, 0.9]])
    assert compare(labels, original, tie).endswith("1 prediction changed (1 tie), accuracy 100.00% and 50.00%")
    for other in (tie[::-1], np.full((2, 2), np.nan)):
        with pytest.raises(StageError, match="another network"):
            compare(labels, original, other)


@pytest.mark.usefixtures("exported_once")
def test_without_the_test_images_nothing_is_compared_and_the_card_describes_the_checkpoint(
    finished: Project, call: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, elsewhere, lr = finished.path("images"), tmp_path / "images", finished.params["finetune"]["lr"]
    evaluation = read_evaluation(finished.path("metrics"))
    same = replace(evaluation, gain=replace(evaluation.gain, identical=True))
    with restored(finished.path("metrics/scores.json")), restored(finished.path("params.yaml")) as params:
        write_evaluation(finished.path("metrics"), same)
        params.write_text(params.read_text().replace(f"lr: {lr}", "lr: 0.5"))
        images.rename(elsewhere)
        try:
            assert call("--output", tmp_path / "exported") == 0
        finally:
            elsewhere.rename(images)
    assert "not compared with the checkpoint: the test images are not on" in capsys.readouterr().out
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "`model.onnx` was not compared with the checkpoint" in card
    assert f"| `finetune.lr` | `{lr}` |" in card
    for name in ("seed", "split.test_size", "model.arch", "class_weights", "train_head.lr", "precision"):
        assert f"| `{name}` |" in card, name
    # And it says that fine-tuning changed nothing.
    assert "a new head was trained, and fine-tuning changed nothing." in card
    assert "| on the test images | both checkpoints |" in card
    assert "true gain" not in card


def test_a_network_that_cannot_be_exported_is_refused_in_one_line(
    finished: Project, call: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    assert call("--output", tmp_path / "mine") == 1
    assert "is no earlier export; choose another name" in capsys.readouterr().err
    assert call("--output", tmp_path / "mine/notes.txt/below") == 1
    assert "below" in capsys.readouterr().err
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(finished.checkpoint("finetuned").read_bytes()[:1000])
    for checkpoint, message in ((tmp_path / "none.safetensors", "no such checkpoint"), (broken, "damaged checkpoint")):
        assert call("--checkpoint", checkpoint, "--output", tmp_path / "exported") == 1
        assert message in capsys.readouterr().err
    for name in ("scores.json", "split.json"):
        with restored(finished.path(f"metrics/{name}")) as file:
            file.write_text("{}")
            assert call("--output", tmp_path / "exported") == 1
        assert capsys.readouterr().err.startswith(f"error: metrics/{name}: not ")
    network, description = load_checkpoint(finished.checkpoint("finetuned"))
    with torch.no_grad():
        network.classifier[-1].bias += 1e-6  # a near relative, whose scores would be the same
    save_checkpoint(broken, network, description)
    assert call("--checkpoint", broken, "--output", tmp_path / "exported") == 1
    assert "the scores are not those of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert call("--output", tmp_path / "exported") == 1
    error = capsys.readouterr().err
    assert "export needs onnxscript: pip install" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors", "mine"]


def test_an_empty_folder_may_be_given_as_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with replaced_files(Path()) as folder:
        (folder / "file").write_text("content")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["here", "here/file"]


def test_an_exported_network_needs_only_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(StageError, match="damaged, or not an ONNX file"):
        OnnxNetwork(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StageError, match="no such file"):
        OnnxNetwork(tmp_path / "none.onnx")
    with pytest.raises(StageError, match="export needs onnxruntime: pip install"):
        OnnxNetwork(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "framing",
    [Preprocessing(crop=48), Preprocessing(55, crop=48, interpolation="bicubic"), Preprocessing(crop=48, pad=True)],
    ids=["squash", "crop", "pad"],
)
def test_the_code_in_the_card_frames_an_image_as_the_network_expects(
    framing: Preprocessing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = onnx_program(framing).partition("probabilities,")[0]
    monkeypatch.setattr(sys, "argv", ["program", str(tmp_path / "image.png")])
    for width, height in ((100, 61), (61, 100), (48, 48), (301, 300)):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "image.png")
        variables: dict[str, np.ndarray] = {}
        exec(program, variables)
        assert np.array_equal(variables["images"][0], make_framing(framing)(Image.fromarray(noise)).numpy())


def check_export(folder: Path, arch: str, head: Head, classes: int) -> None:
    """A network with random values: its ONNX file and torchvision's own model give its probabilities."""
    torch.manual_seed(0)
    size = image_size_of(arch)
    description = Description(arch, head, 8, NAMES[:classes], Preprocessing(crop=size), None, None)
    stock = stock_model(arch, size)
    randomize_batchnorm(stock)
    network = build_network(stock, head, 8, outputs_for(classes), size).eval()
    write_onnx(folder / "model.onnx", network, description, "0" * 64)
    exported = OnnxNetwork(folder / "model.onnx")
    assert exported.classes == description.classes
    assert exported.preprocessing == description.preprocessing
    transform, framing = make_transform(description.preprocessing, "none"), make_framing(description.preprocessing)
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (80, 80, 3), dtype=np.uint8)) for _ in range(3)]
    with torch.inference_mode():
        expected = probabilities(network(torch.stack([transform(image) for image in images]))).numpy()
    for count in (1, 3):  # any size of a batch
        values = exported.predict(torch.stack([framing(image) for image in images[:count]]))[0]
        assert np.abs(values - expected[:count]).max() < 1e-4

    save_checkpoint(folder / "model.safetensors", network, description)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in description.classes))
    shapes = stock_shapes(arch, size)
    (folder / "torchvision_names.json").write_text(json.dumps(names_in_torchvision(cut_into_blocks(shapes), shapes)))
    images[0].save(folder / "image.png")
    answer = run_program(torchvision_program(network, description), folder, folder / "image.png")
    assert list(answer.values()) == pytest.approx(expected[0].tolist(), abs=1e-4)


ARCHS = [parameter.values[0] for parameter in families()]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("head", ["flatten", "pooled", "original"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_head_on_each_family_can_be_exported(arch: str, head: Head, classes: int, tmp_path: Path) -> None:
    check_export(tmp_path, arch, head, classes)
    if head == "pooled" and arch not in ("densenet121", "maxvit_t"):  # whose BatchNorm comes before a convolution
        operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
        assert "BatchNormalization" not in operators


def test_a_class_name_keeps_its_spaces_and_its_line() -> None:
    names = ["old  oak", " fir", "new\nash", "elm\u2028 1"]
    lines = export.name_lines(names).splitlines()
    assert lines == ["old  oak", " fir", "new ash", "elm  1"]


def test_a_network_above_the_limit_of_one_onnx_file_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = build_network(stock_shapes("vit_h_14", 70), "pooled", 8, 1, 70)
    description = Description("vit_h_14", "pooled", 8, NAMES[:2], Preprocessing(crop=70), None, None)
    with pytest.raises(StageError, match=r"the network has 2\.\d GB"):
        write_onnx(tmp_path / "model.onnx", network, description, "")
