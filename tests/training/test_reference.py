"""How unlike the training images an image is: what it is measured by."""

from pathlib import Path

import pytest
import torch
from conftest import Project
from torch.nn import functional

from stages.common.cli import StageError
from stages.images.batches import Batches
from stages.network.checkpoint import load_checkpoint
from stages.training import reference
from stages.training.reference import Features, Unlike, read_reference, write_reference


def features_of(project: Project, part: str) -> torch.Tensor:
    """Computed block by block from the checkpoint, without what training shares."""
    network, description = load_checkpoint(project.checkpoint("finetuned"))
    entries = project.parts()[part]
    batches = Batches(project.path("images"), entries, description.preprocessing, len(entries), 0)
    with torch.inference_mode():
        maps = network.eval().backbone(torch.cat([images for images, _ in batches]))
    return functional.normalize(maps.mean((2, 3)))


def measure(project: Project) -> Unlike:
    assert project.run("finetune") == 0
    unlike = read_reference(project.checkpoint("finetuned"))
    assert unlike is not None
    return unlike


def test_the_number_is_1_at_the_distance_that_flags_a_hundredth_of_the_validation_images(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.build()
    assert project.run("train_head") == 0
    unlike = measure(project)
    train, val = features_of(project, "train"), features_of(project, "val")
    assert torch.allclose(unlike.nearest, train, atol=1e-4)
    distances = (1 - val @ train.T).min(1).values
    assert unlike.threshold == pytest.approx(float(distances.max()), rel=1e-2)  # of so few, the largest
    assert float(unlike(val).max()) == pytest.approx(1.0, rel=1e-2)
    before = project.path("data/checkpoints/reference.safetensors").read_bytes()
    measure(project)
    assert project.path("data/checkpoints/reference.safetensors").read_bytes() == before
    # Of many images, a sample is kept.
    monkeypatch.setattr(reference, "MOST", 5)
    assert len(measure(project).nearest) == 5


def test_without_validation_images_each_training_image_is_measured_against_the_others(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set("split.val_size", 0)
    project.build()
    assert project.run("train_head") == 0
    unlike = measure(project)
    assert "1.0 from each of them against the others, as none are validation" in capsys.readouterr().out
    train = features_of(project, "train")
    distances = (1 - train @ train.T).fill_diagonal_(2).min(1).values
    assert unlike.threshold == pytest.approx(float(distances.max()), rel=1e-2)


def test_features_are_normalized_to_length_1() -> None:
    vector = torch.tensor([[3.0, 4.0]])
    expected = torch.tensor([[0.6, 0.8]])
    maps, tokens = vector[:, :, None, None].expand(1, 2, 5, 5), torch.stack([vector, 7 * vector], 1)
    for activations in (vector, maps, tokens):
        assert torch.allclose(Features()(activations), expected)


def test_a_missing_or_foreign_reference_is_reported_and_a_damaged_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, path = tmp_path / "finetuned.safetensors", tmp_path / "reference.safetensors"
    checkpoint.write_bytes(b"one")
    assert read_reference(checkpoint) is None
    assert f"without `unlike`: there is no {path}; `dvc repro finetune` writes it" in capsys.readouterr().err
    write_reference(path, Unlike(torch.eye(2), 0.25), checkpoint)
    unlike = read_reference(checkpoint)
    assert unlike is not None
    assert unlike(torch.tensor([[1.0, 0.0], [0.0, -1.0]])).tolist() == [0.0, 4.0]
    checkpoint.write_bytes(b"other")
    assert read_reference(checkpoint) is None
    assert f"{path} is of another checkpoint" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StageError, match=r"damaged .*; `dvc repro finetune` writes it again"):
        read_reference(checkpoint)
