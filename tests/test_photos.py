"""Real photos and real ImageNet features, where environment variables say that there are some; skipped elsewhere."""

import json
import os
from pathlib import Path

import pytest
from conftest import STAGES, Project
from PIL import Image

from stages.images.index import read_index

PHOTOS = os.environ.get("DVC_FINETUNE_PHOTOS")  # a folder of cats and one of dogs, 60 photos or more in each
WEIGHTS = os.environ.get("DVC_FINETUNE_WEIGHTS")  # mobilenet_v3_large, trained on ImageNet


@pytest.mark.skipif(not (PHOTOS and WEIGHTS), reason="DVC_FINETUNE_PHOTOS and DVC_FINETUNE_WEIGHTS are not set")
def test_a_few_photos_are_enough_with_pretrained_features(tmp_path: Path) -> None:
    for folder in sorted(Path(PHOTOS or "").iterdir()):
        (tmp_path / "photos" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:60]:
            (tmp_path / "photos" / folder.name / image.name).symlink_to(image)
    project = Project(tmp_path)
    project.set("data.path", "photos")
    project.set("model", {"arch": "mobilenet_v3_large", "weights": WEIGHTS, "head": "pooled", "hidden": 50,
                          "image_size": 160})  # fmt: skip
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.epochs", 4)
    project.set("workers", 2)
    assert project.run(*STAGES) == 0
    evaluation = json.loads(project.path("metrics/scores.json").read_text())
    assert evaluation["head"]["accuracy"] > 0.85
    assert evaluation["finetuned"]["accuracy"] > 0.85

    original = read_index(project.path("data/index/train.csv"))[0]
    with Image.open(tmp_path / "photos" / original.path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "photos/cat/again.jpg", quality=70)
    assert project.run("split") == 0
    assert [set(pair) for pair in project.split_report()["near_duplicates"]] == [{"cat/again.jpg", original.path}]
