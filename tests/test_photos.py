"""Real photos and real ImageNet features, where they lie beside the checkout; skipped elsewhere."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, Project

from stages.pictures.index import read_index

PHOTOS = ROOT.parent / "shared" / "data" / "cats_dogs"
WEIGHTS = ROOT.parent / "shared" / "weights" / "mobilenet_v3_large_imagenet.pth"


@pytest.mark.skipif(not (PHOTOS.is_dir() and WEIGHTS.is_file()), reason="no photos beside the checkout")
def test_a_few_photos_are_enough_with_pretrained_features_and_a_copy_is_found(tmp_path: Path) -> None:
    for folder in sorted(PHOTOS.iterdir()):
        (tmp_path / "photos" / folder.name).mkdir(parents=True)
        for picture in sorted(folder.iterdir())[:60]:
            (tmp_path / "photos" / folder.name / picture.name).symlink_to(picture)
    project = Project(tmp_path)
    project.set("data.path", "photos")
    project.set("model", {"arch": "mobilenet_v3_large", "weights": str(WEIGHTS), "head": "pooled", "hidden": 50,
                          "image_size": 160})  # fmt: skip
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.epochs", 4)
    project.set("workers", 2)
    assert project.run(*STAGES) == 0
    evaluation = json.loads(project.path("metrics/evaluation.json").read_text())
    assert evaluation["head"]["accuracy"] > 0.85
    assert evaluation["finetuned"]["accuracy"] > 0.85

    original = read_index(project.path("data/index/train.csv"))[0]
    project.plant(original, "cat/again.jpg", quality=70)
    assert project.run("evaluate") == 0
    rows = project.path("metrics/near_duplicates.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["cat/again.jpg", original.path]]
