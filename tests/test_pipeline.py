"""Whole runs of the six stages on small images."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import mcnemar, newcombe, wilson
from conftest import STAGES, Project, make_images
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    classification_report,
    f1_score,
    log_loss,
    roc_auc_score,
)
from torch.nn.modules.batchnorm import _BatchNorm

from stages.images.index import class_names, read_index, write_index
from stages.images.near_duplicates import THRESHOLD
from stages.network.checkpoint import load_checkpoint
from stages.report.page import FIGURES
from stages.scores import predictions
from stages.scores.evaluation import read_evaluation
from stages.scores.verdict import describe_gain
from stages.training.history import read_history


def run_all(folder: Path, classes: tuple[str, ...]) -> Project:
    make_images(folder / "images", classes)
    project = Project(folder)
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.weight_decay", 0.01)
    project.set("train_head.lr", 3e-3)
    project.set("train_head.epochs", 8)
    project.set("finetune.lr", 1e-4)
    project.set("finetune.select", "last")
    assert project.run(*STAGES) == 0
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return run_all(tmp_path_factory.mktemp("project"), ("cat", "dog"))


@pytest.fixture(scope="module", params=["two classes", "three classes"])
def either(request: pytest.FixtureRequest, finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Of two classes, and of three, for what depends on their number."""
    if request.param == "two classes":
        return finished
    return run_all(tmp_path_factory.mktemp("project"), ("ant", "bee", "cat"))


@contextmanager
def put_back(project: Project) -> Iterator[None]:
    """Leave every file of a run as it was, for the tests that follow."""
    kept = {path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
    try:
        yield
    finally:
        for path in [path for path in project.folder.rglob("*") if path.is_file() and path not in kept]:
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)


def test_every_file_of_the_contract_is_written(finished: Project) -> None:
    for name in (
        *(f"data/index/{part}.csv" for part in ("train", "val", "test")),
        *(f"data/checkpoints/{name}.safetensors" for name in ("initial", "head", "finetuned")),
        *(f"metrics/layers/{phase}.{kind}" for phase in ("head", "finetune") for kind in ("json", "txt")),
        *(
            f"metrics/{phase}/plots/metrics/{series}.tsv"
            for phase in ("train_head", "finetune")
            for series in ("train_loss", "train_accuracy", "val_loss", "accuracy")
        ),
        "metrics/split.json",
        "metrics/evaluation.json",
        "metrics/scores.json",
        "metrics/classes.csv",
        "metrics/predictions.csv",
        "data/predictions.npz",
        "metrics/near_duplicates.csv",
        "metrics/report.md",
        *(f"metrics/curves/{name}.csv" for name in ("roc", "precision_recall", "confusion")),
    ):
        assert finished.path(name).is_file(), name
    assert not list(finished.folder.rglob("*.tmp"))


def test_easy_images_are_learned(either: Project) -> None:
    evaluation = json.loads(either.path("metrics/scores.json").read_text())
    assert evaluation["head"]["accuracy"] > 0.7
    assert evaluation["finetuned"]["accuracy"] > 0.7


def test_frozen_tensors_and_batchnorm_are_bit_identical_in_all_checkpoints(either: Project) -> None:
    assert_only_what_is_trained_changes(either)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_frozen_tensors_and_batchnorm_are_bit_identical_with_any_optimizer(project: Project, optimizer: str) -> None:
    project.use_every_training_key(optimizer)
    project.set("finetune.select", "last")
    assert project.run("split", "build_model", "train_head", "finetune") == 0
    assert_only_what_is_trained_changes(project)


def assert_only_what_is_trained_changes(finished: Project) -> None:
    initial, head, finetuned = (load_file(finished.checkpoint(name)) for name in ("initial", "head", "finetuned"))
    network, _ = load_checkpoint(finished.checkpoint("initial"))
    batchnorm = {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for key in module.state_dict()
    }
    last_blocks = tuple(f"backbone.{len(network.backbone) - back}." for back in (1, 2, 3))
    assert len(batchnorm) > 100
    for key, tensor in initial.items():
        in_head, in_last_blocks = key.startswith("classifier."), key.startswith(last_blocks)
        assert torch.equal(tensor, head[key]) != in_head, key
        changes = in_head or (in_last_blocks and key not in batchnorm)
        assert torch.equal(head[key], finetuned[key]) != changes, key


def test_scores_can_be_computed_again_from_the_predictions(either: Project) -> None:
    with either.path("metrics/predictions.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    evaluation = json.loads(either.path("metrics/scores.json").read_text())
    with either.path("metrics/classes.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    classes = class_names(read_index(either.path("data/index/test.csv")))
    assert header == ["path", "label", *(f"{model}.{name}" for model in ("head", "finetuned") for name in classes)]
    labels, numbers = np.array([int(row[1]) for row in rows]), list(range(len(classes)))
    right = {}
    for offset, model in ((2, "head"), (2 + len(classes), "finetuned")):
        values = np.array([[float(value) for value in row[offset : offset + len(classes)]] for row in rows])
        predicted, top = values.argmax(axis=1), values.max(axis=1)
        right[model] = predicted == labels
        low, high = wilson(int(right[model].sum()), len(rows))
        one_against_rest = np.eye(len(classes))[labels]
        ranked = [1] if len(classes) == 2 else numbers
        bins = [(top > k / 15) & (top <= (k + 1) / 15) for k in range(15)]
        gaps = [abs(right[model][chosen].sum() - top[chosen].sum()) for chosen in bins]
        recomputed = {
            "accuracy": accuracy_score(labels, predicted),
            "accuracy_low": low,
            "accuracy_high": high,
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "loss": log_loss(labels, values, labels=numbers),
            "auroc": np.mean([roc_auc_score(one_against_rest[:, k], values[:, k]) for k in ranked]),
            "average_precision": np.mean(
                [average_precision_score(one_against_rest[:, k], values[:, k]) for k in ranked]
            ),
            "f1_macro": f1_score(labels, predicted, average="macro"),
            "brier": brier_score_loss(labels, values[:, 1] if len(classes) == 2 else values, labels=numbers),
            "ece": sum(gaps) / len(rows),
        }
        assert set(evaluation[model]) == set(recomputed)
        for name, value in recomputed.items():
            assert evaluation[model][name] == pytest.approx(value, abs=1e-6), (model, name)
        report = classification_report(labels, predicted, target_names=classes, output_dict=True, zero_division=np.nan)
        assert [of_class["class"] for of_class in table] == classes
        for of_class in table:
            expected = report[of_class["class"]]
            assert int(of_class["support"]) == expected["support"]
            for kind in ("precision", "recall"):
                value = of_class[f"{model}_{kind}"]
                assert value == "" if np.isnan(expected[kind]) else float(value) == pytest.approx(expected[kind])
    gain, before, after = evaluation["gain"], right["head"], right["finetuned"]
    fixed, broken = int((~before & after).sum()), int((before & ~after).sum())
    assert (gain["fixed"], gain["broken"]) == (fixed, broken)
    assert gain["mcnemar_p"] == pytest.approx(mcnemar(fixed, broken), abs=1e-6)
    interval = newcombe(int((before & after).sum()), broken, fixed, int((~before & ~after).sum()))
    assert (gain["accuracy_low"], gain["accuracy_high"]) == pytest.approx(interval, abs=1e-6)
    assert (gain["verdict"] == "no evidence") == (gain["mcnemar_p"] >= 0.05)
    for name in ("accuracy", "loss"):
        difference = evaluation["finetuned"][name] - evaluation["head"][name]
        assert gain[name] == pytest.approx(difference, abs=1e-12)


def test_copies_of_a_test_image_change_no_score_and_are_reported(
    finished: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(name: str) -> str:
        return finished.path(f"metrics/{name}").read_text()

    def scores() -> dict[str, object]:
        return {**json.loads(read("scores.json")), "remarks": []}

    test = finished.path("data/index/test.csv")
    entries = read_index(test)
    classes, before = read("classes.csv"), scores()
    assert "more files of the test part" not in read("report.md")
    with put_back(finished):
        copies = [
            replace(entry, path=f"{entry.class_name}/_{number}{Path(entry.path).name}")
            for entry in entries[:2]
            for number in range(5)
        ]
        for original, copy in zip(np.repeat(np.array(entries[:2]), 5), copies, strict=True):
            shutil.copy(finished.path(f"images/{original.path}"), finished.path(f"images/{copy.path}"))
        write_index(test, sorted([*entries, *copies], key=lambda entry: entry.path))
        split = finished.split_report()
        for copy in copies:
            split["classes"][copy.class_name]["test"] += 1
        finished.path("metrics/split.json").write_text(json.dumps(split))
        capsys.readouterr()
        assert finished.run("evaluate", "plot") == 0
        assert "10 test images not counted: the bytes are those of another." in capsys.readouterr().out
        assert (read("classes.csv"), scores()) == (classes, before)
        assert "10 more files of the test part have the same bytes" in read("report.md")
        rows = list(csv.reader(read("predictions.csv").splitlines()))
        digests = {entry.path: entry.sha256 for entry in read_index(test)}
        assert len(rows) - 1 == len({digests[row[0]] for row in rows[1:]}) == len(entries)


def test_with_many_classes_the_committed_table_is_short(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs() -> dict[str, bytes]:
        files = [finished.path("data/predictions.npz"), *finished.path("metrics").rglob("*")]
        return {path.name: path.read_bytes() for path in files if path.is_file()}

    before = outputs()
    with put_back(finished):
        monkeypatch.setattr(predictions, "MOST_CLASSES", 1)
        assert finished.run("evaluate") == 0
        assert {name for name, content in outputs().items() if content != before[name]} == {"predictions.csv"}
        with np.load(finished.path("data/predictions.npz")) as content:
            labels, values = content["labels"], {model: content[model] for model in ("head", "finetuned")}
        with finished.path("metrics/predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["label"]) for row in rows] == labels.tolist()
        for number, row in enumerate(rows):
            for model, probabilities in values.items():
                predicted = int(row[f"{model}_prediction"])
                assert predicted == probabilities[number].argmax()
                assert float(row[f"{model}_probability"]) == probabilities[number, predicted]
                assert float(row[f"{model}_true_probability"]) == probabilities[number, labels[number]]


def test_distinct_images_are_not_near_duplicates(finished: Project) -> None:
    assert finished.path("metrics/near_duplicates.csv").read_text() == "test,train,cosine\n"
    evaluation = json.loads(finished.path("metrics/scores.json").read_text())
    assert evaluation["near_duplicates"] == {
        "threshold": THRESHOLD,
        "pairs": 0,
        "test_images": 0,
        "compared": 1.0,
        **{f"{model}_accuracy": evaluation[model]["accuracy"] for model in ("head", "finetuned")},
    }


def test_identical_checkpoints_are_no_evidence(project: Project) -> None:
    project.set("train_head.epochs", 1)
    assert project.run("split", "build_model", "train_head") == 0
    shutil.copy(project.checkpoint("head"), project.checkpoint("finetuned"))
    assert project.run("evaluate") == 0
    evaluation = json.loads(project.path("metrics/scores.json").read_text())
    assert evaluation["head"] == evaluation["finetuned"]
    gain = evaluation["gain"]
    assert (gain["accuracy"], gain["loss"], gain["fixed"], gain["broken"], gain["mcnemar_p"]) == (0, 0, 0, 0, 1)
    assert gain["verdict"] == gain["loss_verdict"] == "no evidence"
    assert gain["identical"]
    assert (gain["accuracy_low"], gain["accuracy_high"]) == (0, 0)


def test_shuffled_test_labels_score_as_chance(tmp_path: Path) -> None:
    make_images(tmp_path / "images", count=120)
    project = Project(tmp_path)
    project.set("split.test_size", 0.7)
    project.set("train_head.lr", 3e-3)
    project.set("train_head.epochs", 8)
    project.set("finetune.epochs", 1)
    assert project.run(*STAGES[:-1]) == 0
    assert json.loads(project.path("metrics/scores.json").read_text())["head"]["accuracy"] > 0.8
    index = project.path("data/index/test.csv")
    entries = read_index(index)
    shuffled = np.random.default_rng(0).permutation(len(entries))
    relabelled = [
        replace(entry, label=entries[other].label, class_name=entries[other].class_name)
        for entry, other in zip(entries, shuffled, strict=True)
    ]
    write_index(index, relabelled)
    assert project.run("evaluate") == 0
    evaluation = json.loads(project.path("metrics/scores.json").read_text())
    for model in ("head", "finetuned"):
        # Four standard deviations of what chance gives for 84 images of each class.
        assert evaluation[model]["accuracy"] == pytest.approx(0.5, abs=4 * 0.5 / 168**0.5)
        assert evaluation[model]["auroc"] == pytest.approx(0.5, abs=4 / (12 * 42) ** 0.5)
    assert evaluation["gain"]["verdict"] == "no evidence"


def test_torchevals_accuracy_equals_scikit_learns_on_the_same_run(either: Project) -> None:
    # The history is torcheval's, on the watched images; evaluate's is scikit-learn's: let it score those same ones.
    with put_back(either):
        shutil.copy(either.path("data/index/val.csv"), either.path("data/index/test.csv"))
        assert either.run("evaluate") == 0
        scores, calibration = (
            json.loads(either.path(f"metrics/{name}.json").read_text())["finetuned"]
            for name in ("scores", "calibration")
        )
    history = json.loads(either.path("metrics/finetune/metrics.json").read_text())
    last = read_history(either.path("metrics/finetune"))[-1]
    assert scores["accuracy"] == pytest.approx(last.accuracy, abs=1e-6)
    # Both are after the temperature, which was fitted to these very images.
    assert scores["loss"] == pytest.approx(history["val_loss"], abs=1e-5)
    assert scores["loss"] == pytest.approx(calibration["after"]["loss"]["value"])
    assert scores["loss"] <= calibration["before"]["loss"]["value"] + 1e-6


def test_no_tracked_file_contains_the_machine_the_date_or_the_folder(finished: Project) -> None:
    import datetime
    import socket

    words = [socket.gethostname(), str(finished.folder), str(datetime.date.today())]
    for path in [*finished.path("metrics").rglob("*"), *finished.path("data/index").iterdir()]:
        if path.is_file() and path.suffix != ".png":
            assert not [word for word in words if word in path.read_text()], path


def test_figures_are_images_with_something_on_them_and_the_report_shows_each(finished: Project) -> None:
    written = {path.stem for path in finished.path("metrics/figures").glob("*.png")}
    # Where fine-tuning changed no prediction, or no images are alike, a sentence stands in place of that figure.
    assert written | {"changed", "alike"} == {name for name, *_ in FIGURES}
    report = finished.path("metrics/report.md").read_text()
    for name in written:
        assert f"](figures/{name}.png)" in report
        with Image.open(finished.path(f"metrics/figures/{name}.png")) as figure:
            assert figure.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert len(figure.convert("RGB").getcolors(2**22) or []) > 20


def test_the_report_has_the_verdict_and_the_recipe(finished: Project) -> None:
    report = finished.path("metrics/report.md").read_text()
    evaluation = json.loads(finished.path("metrics/scores.json").read_text())
    assert f"**{describe_gain(read_evaluation(finished.path('metrics')).gain)}**" in report
    assert f"| accuracy | {evaluation['head']['accuracy']:.2%} |" in report
    for key, value in finished.params["finetune"].items():
        assert f"| `finetune.{key}` | `{'null' if value is None else value}` |" in report


def test_predictions_of_other_images_are_refused(finished: Project, refusal: Callable[[Project, str], str]) -> None:
    path = finished.path("data/predictions.npz")
    with put_back(finished):
        content = path.read_bytes()
        with np.load(path) as archive:
            np.savez(path, **dict(archive) | {"paths": archive["paths"][::-1]})
        assert "`dvc repro` makes both again" in refusal(finished, "plot")
        path.write_bytes(content[:-100])
        assert "predictions.npz: not predictions" in refusal(finished, "plot")
        path.unlink()
        assert "predictions.npz" in refusal(finished, "plot")


def test_evaluate_ends_with_a_table_and_the_verdict(finished: Project, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert finished.run("evaluate") == 0
    evaluation = json.loads(finished.path("metrics/scores.json").read_text())
    printed = capsys.readouterr()
    assert printed.err == ""
    titles, head, finetuned, gain, sentence, *remarks, duplicates = printed.out.splitlines()
    assert remarks == evaluation["remarks"]
    assert titles.split() == ["95%", "interval", "loss"]
    for line, model in ((head, "head"), (finetuned, "finetuned")):
        scores = evaluation[model]
        assert f"Test accuracy: {scores['accuracy']:.2%}" in line
        assert f"{scores['accuracy_low']:.2%} to {scores['accuracy_high']:.2%}" in line
        assert line.endswith(f"{scores['loss']:.4f}")
    assert f"{100 * evaluation['gain']['accuracy']:+z.2f} points" in gain
    assert sentence == describe_gain(read_evaluation(finished.path("metrics")).gain)
    assert duplicates.startswith("No test image was found to be nearly the same as a training or validation image. ")


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(project: Project) -> None:
    def run(*stages: str) -> dict[str, bytes]:
        assert project.run(*stages) == 0
        outputs = [path for folder in ("data", "metrics") for path in project.path(folder).rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in outputs}

    for phase, augment in (("train_head", "strong"), ("finetune", "light")):
        project.set(f"{phase}.augment", augment)
        project.set(f"{phase}.epochs", 1)
    first = run(*STAGES)
    project.set("workers", 2)
    assert run(*STAGES) == first
    project.set("seed", 43)
    other = run(*STAGES[:3])
    for name in ("initial", "head"):
        assert other[str(project.checkpoint(name))] != first[str(project.checkpoint(name))]


def test_without_a_validation_part_training_watches_the_test_part_and_there_is_no_verdict(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set("split.val_size", 0)
    project.set("finetune.select", "last")
    assert project.run(*STAGES) == 0
    assert read_index(project.path("data/index/val.csv")) == []
    history = json.loads(project.path("metrics/finetune/metrics.json").read_text())
    evaluation = json.loads(project.path("metrics/scores.json").read_text())
    assert evaluation["finetuned"]["loss"] == pytest.approx(history["val_loss"], abs=1e-5)
    assert [evaluation["gain"][key] for key in ("verdict", "loss_verdict", "mcnemar_p")] == [None] * 3
    loud = "NO VERDICT: training watched the test images (split.val_size is 0)"
    assert loud in capsys.readouterr().out
    report = project.path("metrics/report.md").read_text()
    assert report.splitlines()[2].startswith(f"**{loud}")
    assert "p = " not in report


@pytest.mark.parametrize("unfreeze", [0, 1, 13])
def test_unfreeze_may_be_none_one_or_all_blocks(project: Project, unfreeze: int) -> None:
    project.set("finetune.unfreeze", unfreeze)
    project.set("finetune.epochs", 1)
    assert project.run("split", "build_model", "train_head", "finetune") == 0
    head, finetuned = (load_file(project.checkpoint(name)) for name in ("head", "finetuned"))
    blocks = {
        key.split(".")[1] for key in head if key.startswith("backbone.") and not torch.equal(head[key], finetuned[key])
    }
    assert blocks == {str(block) for block in range(13 - unfreeze, 13)}
