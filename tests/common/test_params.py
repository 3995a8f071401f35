"""`params.yaml`: what is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Project

from stages.common.cli import StageError
from stages.common.params import Params, load_params


def test_the_defaults_are_valid() -> None:
    assert isinstance(load_params(ROOT / "params.yaml"), Params)


@pytest.mark.parametrize("text", ["1e-05", "1E-05", "1e-5", "1.0e-05", "0.00001", "1.e-05"])
def test_a_small_number_may_be_written_in_any_way(tmp_path: Path, text: str) -> None:
    content = (ROOT / "params.yaml").read_text()
    assert "lr: 2.0e-4" in content
    (tmp_path / "params.yaml").write_text(content.replace("lr: 2.0e-4", f"lr: {text}"))
    assert load_params(tmp_path / "params.yaml").finetune.lr == 1e-5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_head.lr", 0, "train_head.lr: should be greater than 0, is 0"),
        ("train_head.lr", -1, "train_head.lr: should be greater than 0, is -1"),
        ("train_head.lr", 1e38, "train_head.lr: should be less than or equal to 1, is 1e+38"),
        ("train_head.lr", float("nan"), "train_head.lr: should be a finite number, is nan"),
        ("train_head.lr", float("inf"), "train_head.lr: should be a finite number, is inf"),
        ("train_head.lr", "fast", "train_head.lr: should be a valid number, is 'fast'"),
        ("train_head.lr", True, "train_head.lr: should be a valid number, is True"),
        ("train_head.lr", None, "train_head.lr: should be a valid number, is None"),
        ("finetune.lr", [1e-5], "finetune.lr: should be a valid number, is [1e-05]"),
        ("split.test_size", 1.5, "split.test_size: should be less than 1, is 1.5"),
        ("split.test_size", 0, "split.test_size: should be greater than 0, is 0"),
        ("split.test_size", 0.9, "split: test_size + val_size should be less than 1, is 1"),
        ("split.given", "never", "split.given: should be 'auto' or 'ignore', is 'never'"),
        ("data.grey_max", 0, "data.grey_max: should be greater than or equal to 1, is 0"),
        ("data.grey_max", 65536, "data.grey_max: should be less than or equal to 65535, is 65536"),
        ("data.labels", "", "data.labels: String should have at least 1 character"),
        ("model.framing", "fit", "model.framing: should be 'crop', 'squash' or 'pad', is 'fit'"),
        ("split.rejected_limit", 2, "split.rejected_limit: should be less than or equal to 1, is 2"),
        ("train_head.epochs", 0, "train_head.epochs: should be greater than or equal to 1, is 0"),
        ("train_head.epochs", 2.5, "train_head.epochs: should be a valid integer, is 2.5"),
        ("finetune.batch_size", 0, "finetune.batch_size: should be greater than or equal to 1, is 0"),
        ("evaluate.batch_size", 0, "evaluate.batch_size: should be greater than or equal to 1, is 0"),
        ("finetune.unfreeze", -1, "finetune.unfreeze: should be greater than or equal to 0, is -1"),
        ("finetune.patience", 0, "finetune.patience: should be greater than or equal to 1, is 0"),
        ("finetune.weight_decay", -0.1, "finetune.weight_decay: should be greater than or equal to 0, is -0.1"),
        ("train_head.augment", "some", "train_head.augment: should be 'none', 'light' or 'strong', is 'some'"),
        ("train_head.select", "first", "train_head.select: should be 'best' or 'last', is 'first'"),
        ("train_head.schedule", "linear", "train_head.schedule: should be 'constant' or 'cosine', is 'linear'"),
        ("finetune.warmup", 1, "finetune.warmup: should be less than 1, is 1"),
        ("finetune.warmup", -0.1, "finetune.warmup: should be greater than or equal to 0, is -0.1"),
        ("finetune.clip_norm", 0, "finetune.clip_norm: should be greater than 0, is 0"),
        ("finetune.layer_decay", 0, "finetune.layer_decay: should be greater than 0, is 0"),
        ("finetune.layer_decay", 1.1, "finetune.layer_decay: should be less than or equal to 1, is 1.1"),
        ("train_head.layer_decay", 0.7, "train_head.layer_decay: unknown key"),
        ("train_head.optimizer", "lamb", "train_head.optimizer: should be 'adam', 'adamw' or 'sgd', is 'lamb'"),
        ("train_head.label_smoothing", 1, "train_head.label_smoothing: should be less than 1, is 1"),
        ("class_weights", "even", "class_weights: should be null, balanced, or a mapping of each class to a number"),
        (
            "class_weights",
            {"cat": 0},
            "class_weights: should be null, balanced, or a mapping of each class to a number",
        ),
        ("class_weights", ["cat=2", "cat=3"], "or a list of such as 'cat=2'"),
        ("class_weights", ["cat"], "or a list of such as 'cat=2'"),
        ("class_weights", {"cat": float("nan")}, "class_weights: should be null, balanced, or a mapping"),
        ("class_weights", {False: 1.0}, "quote a name that YAML reads as something else, such as no"),
        ("model.head", "flat", "model.head: should be 'flatten', 'pooled' or 'original', is 'flat'"),
        ("model.image_size", 8, "model.image_size: should be greater than or equal to 32, is 8"),
        ("model.weights", 1, "model.weights: should be a valid string, is 1"),
        ("data.path", "", "data.path: String should have at least 1 character, is ''"),
        ("device", "gpu", "device: String should match pattern '^(auto|cpu|mps|cuda(:\\d+)?)$', is 'gpu'"),
        ("workers", "many", "workers: should be a valid integer, is 'many'"),
        ("workers", -1, "workers: should be greater than or equal to 0, is -1"),
        ("seed", -1, "seed: should be greater than or equal to 0, is -1"),
        ("train_head.learning_rate", 1, "train_head.learning_rate: unknown key; there are epochs, batch_size, lr"),
        ("finetune.unfreez", 3, "finetune.unfreez: unknown key; did you mean unfreeze?"),
        ("sede", 1, "sede: unknown key; did you mean seed?"),
        ("train_head", 3, "train_head: should be a valid dictionary or instance of TrainHead, is 3"),
    ],
)
def test_a_bad_value_is_refused_by_every_stage_before_any_work(
    project: Project, refusal: Callable[[Project, str], str], key: str, value: object, message: str
) -> None:
    project.set(key, value)
    for stage in ("split", "evaluate"):
        assert message in refusal(project, stage)
    assert not project.path("data").exists()
    assert not project.path("metrics").exists()


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    content = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(
        "\n".join(line for line in content.splitlines() if "rejected_limit" not in line)
    )
    with pytest.raises(StageError, match=r"split\.rejected_limit: is missing"):
        load_params(tmp_path / "params.yaml")


def test_all_problems_are_reported_at_once(project: Project) -> None:
    project.set("finetune.lr", 0)
    project.set("train_head.epochs", 0)
    with pytest.raises(StageError, match=r"train_head\.epochs.*; finetune\.lr"):
        load_params(project.path("params.yaml"))


@pytest.mark.parametrize("content", ["", "seed: [", "- 1", "seed: 1\n\tdevice: cpu", "\xff"])
def test_a_params_file_that_is_not_a_mapping_is_refused_in_one_line(
    project: Project, refusal: Callable[[Project, str], str], content: str
) -> None:
    project.path("params.yaml").write_bytes(content.encode("latin-1"))
    assert "params.yaml: " in refusal(project, "split")


def test_a_missing_params_file_is_refused(project: Project, refusal: Callable[[Project, str], str]) -> None:
    project.path("params.yaml").unlink()
    assert "params.yaml: No such file" in refusal(project, "split")
