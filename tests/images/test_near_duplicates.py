"""Images that are nearly the same are found by `split`, kept in one part, or reported."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Project, make_images
from making import Refusal, encode, said
from PIL import Image, ImageDraw, ImageEnhance

from stages.common.files import write_table
from stages.images import near_duplicates
from stages.images.decode import decode_with_facts
from stages.images.index import Entry
from stages.images.near_duplicates import SIDE, THRESHOLD, Pair, find_leaks, find_pairs, form_groups, shrink
from stages.scores.evaluation import NearDuplicates, describe_near_duplicates


def scene(seed: int, width: int = 181, height: int = 243) -> Image.Image:
    """Discs and boxes on a soft ground: no two alike."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number in range(6):
        x, y, size = random.uniform(0, 0.7, 3) * min(width, height)
        colour = tuple(random.integers(0, 256, 3).tolist())
        (draw.rectangle if number % 2 else draw.ellipse)((x, y, x + size, y + size), fill=colour)
    return image


def small(content: bytes) -> bytes:
    decoded = decode_with_facts(content, least=SIDE)
    return shrink(decoded.image, *decoded.size)


COPIES: dict[str, Any] = {
    "PNG": lambda image: encode(image, "PNG"),
    "quality 40": lambda image: encode(image, quality=40),
    "three quarters": lambda image: encode(image.resize((136, 182))),
    "half": lambda image: encode(image.resize((90, 121))),
    "quarter": lambda image: encode(image.resize((45, 61))),
    "darker": lambda image: encode(ImageEnhance.Brightness(image).enhance(0.7)),
    "grey": lambda image: encode(image.convert("L")),
    "more contrast": lambda image: encode(ImageEnhance.Contrast(image).enhance(1.2)),
    **{turn.name: lambda image, turn=turn: encode(image.transpose(turn)) for turn in Image.Transpose},
}


@pytest.mark.parametrize("name", COPIES)
def test_a_near_copy_is_found_and_no_other_pair(name: str) -> None:
    scenes = [scene(seed) for seed in range(60)]
    files = [encode(image) for image in scenes] + [COPIES[name](image) for image in scenes[:20]]
    pairs = find_pairs([small(content) for content in files])
    assert sorted(pair[:2] for pair in pairs) == [(number, 60 + number) for number in range(20)]
    assert all(THRESHOLD <= pair.cosine <= 1.0001 for pair in pairs)
    assert [pair.cosine for pair in pairs] == sorted((pair.cosine for pair in pairs), reverse=True)


def test_the_search_finds_the_pairs_of_an_exhaustive_comparison() -> None:
    noise = np.random.default_rng(0)
    scenes = [np.asarray(scene(seed).convert("L").resize((SIDE, SIDE))).astype(float) for seed in range(500)]
    scenes += [np.rot90(image, number % 4) + noise.normal(0, 1 + number % 3, image.shape)
               for number, image in enumerate(scenes)]  # fmt: skip
    kept = [image.clip(0, 255).astype(np.uint8).tobytes() for image in scenes]
    vectors, _ = near_duplicates._weigh(kept)
    every = np.max([vectors @ turned.T for turned in near_duplicates._orientations(vectors)], axis=0)
    wanted = {(one, other) for one, other in np.argwhere(every >= THRESHOLD).tolist() if one < other}
    found = {pair[:2] for pair in find_pairs(kept)}
    assert len(wanted) > 300
    assert found <= wanted
    assert len(found) >= 0.99 * len(wanted)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_blank_images_have_no_near_duplicates(count: int) -> None:
    assert find_pairs([bytes([value]) * SIDE**2 for value in range(count)]) == []


def test_a_group_takes_the_most_similar_first_and_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", 3)
    pairs = [Pair(3, 4, 0.999), Pair(0, 1, 0.99), Pair(1, 2, 0.98), Pair(2, 3, 0.97)]
    groups = form_groups(list("edcba"), pairs)
    assert groups == {"e": "near c", "d": "near c", "c": "near c", "b": "near a", "a": "near a"}


def test_pairs_across_parts_name_the_test_image_first_and_the_most_similar_pair_first() -> None:
    images = [Entry(f"{name}.jpg", 0, "cat", name) for name in "abcd"]
    part_of = {"a.jpg": "train", "b.jpg": "test", "c.jpg": "val", "d.jpg": "test"}
    pairs = [Pair(0, 1, 0.97), Pair(1, 3, 0.99), Pair(0, 2, 0.99), Pair(2, 3, 0.98)]
    assert [(leak.test, leak.train) for leak in find_leaks(pairs, images, part_of)] == [
        ("d.jpg", "c.jpg"), ("b.jpg", "a.jpg")
    ]  # fmt: skip


@pytest.fixture
def scenes(tmp_path: Path) -> Project:
    """Forty scenes in two classes, each there twice: in another size and mirrored."""
    for number in range(40):
        folder = tmp_path / "images" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / f"{number:02d}.jpg")
        scene(number).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((90, 121)).save(folder / f"{number:02d}b.png")
    return Project(tmp_path)


def parted(project: Project) -> int:
    part_of = {entry.path[:6]: part for part, entries in project.parts().items() for entry in entries}
    return sum(part_of[entry.path[:6]] != part for part, entries in project.parts().items() for entry in entries)


def test_near_duplicates_stay_in_one_part_or_are_reported(scenes: Project) -> None:
    line = said(scenes)
    assert "80 images in 40 groups (at most 2) are nearly the same, kept in one part" in line
    assert "split.group" in line
    assert parted(scenes) == 0
    assert {part: len(entries) for part, entries in scenes.parts().items()} == {"train": 56, "val": 8, "test": 16}
    # What folds and bootstraps keep together, they know from the index.
    for entries in scenes.parts().values():
        assert len({entry.group for entry in entries}) == len(entries) / 2
    assert "groups" not in scenes.split_report()
    table = scenes.path("metrics/near_duplicates.csv")
    assert table.read_text() == "test,train,cosine\n"
    assert len(scenes.split_report()["near_duplicates"]) == 40

    scenes.set("split.near_duplicates", "report")
    line = said(scenes)
    assert parted(scenes) > 10
    assert not any(entry.group for entries in scenes.parts().values() for entry in entries)
    rows = list(csv.reader(table.read_text().splitlines()))[1:]
    tested = {entry.path for entry in scenes.parts()["test"]}
    assert rows
    assert all(test in tested and train not in tested and test[:6] == train[:6] for test, train, _ in rows)
    assert f"{len(rows)} test images are nearly the same as one of another part" in line


def test_a_given_split_is_not_changed_and_its_pairs_are_reported(scenes: Project) -> None:
    images = scenes.path("images")
    (images / "train").mkdir()
    for name, file in (("cat", "00b.png"), ("dog", "01b.png")):
        (images / "test" / name).mkdir(parents=True)
        (images / name / file).rename(images / "test" / name / file)
        (images / name).rename(images / "train" / name)
    line = said(scenes)
    assert sorted(entry.path for entry in scenes.parts()["test"]) == ["test/cat/00b.png", "test/dog/01b.png"]
    assert scenes.path("metrics/near_duplicates.csv").read_text().count("\n") == 3
    assert "2 test images are nearly the same as one of another part" in line


def test_near_duplicates_with_different_labels_are_reported_with_an_example(scenes: Project) -> None:
    scene(0).save(scenes.path("images/dog/00.png"))
    assert "2 pairs nearly the same in two classes (cat/00" in said(scenes)
    assert len([part for part, entries in scenes.parts().items() if any("/00" in one.path for one in entries)]) == 1


def test_a_class_of_one_scene_is_refused_with_the_way_out(tmp_path: Path, refusal: Refusal) -> None:
    make_images(tmp_path / "images", count=6)
    for path in tmp_path.glob("images/dog/*.png"):
        ImageEnhance.Brightness(scene(0)).enhance(1 - int(path.stem) / 20).save(path)
    line = refusal(Project(tmp_path), "split")
    assert "class 'dog' is too small to split: 1 different" in line
    assert "split.near_duplicates=report" in line


def test_evaluate_scores_without_the_pairs_that_remain(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.build()
    assert project.run("train_head", "finetune") == 0
    test, train = (project.parts()[part] for part in ("test", "train"))
    leaks = [near_duplicates.Leak(test[0].path, train[0].path, 0.99), near_duplicates.Leak(test[0].path, "b", 0.98)]
    write_table(project.path("metrics/near_duplicates.csv"), near_duplicates.Leak, leaks)
    assert project.run("evaluate") == 0
    summary = json.loads(project.path("metrics/scores.json").read_text())["near_duplicates"]
    assert (summary["pairs"], summary["test_images"]) == (2, 1)
    with project.path("metrics/predictions.csv").open(newline="") as file:
        clean = [row for row in list(csv.reader(file))[1:] if row[0] != test[0].path]
    for model, column in (("head", 3), ("finetuned", 5)):
        right = [(float(row[column]) >= 0.5) == (row[1] == "1") for row in clean]
        assert summary[f"{model}_accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert f"1 of {len(test)} test images is nearly the same as a training" in capsys.readouterr().out


def test_blank_images_are_counted_and_not_called_clean(project: Project) -> None:
    for value in (0, 100, 255):
        Image.new("RGB", (40, 40), (value, value, value)).save(project.path(f"images/cat/{value}.png"))
    assert "3 images with too little contrast to look for near-duplicates" in said(project)
    assert "hardly any contrast" in near_duplicates.LOOKED_FOR
    assert project.split_report()["flat"] == pytest.approx(3 / sum(map(len, project.parts().values())))


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        (1.0, "No test image was found to be nearly the same"),
        (0.9, "10.00% of all images have too little contrast."),
        (0.4, "is not known: 60.00% of all images have too little contrast to be compared"),
    ],
)
def test_a_test_part_with_images_that_could_not_be_compared_is_not_called_clean(compared: float, expected: str) -> None:
    said = describe_near_duplicates(NearDuplicates(THRESHOLD, 0, 0, None, None, compared), 10)
    assert expected in said
    assert ("No test image was found" in said) == (compared > 0.5)


def test_split_loads_no_torch() -> None:
    code = "import sys, stages.split; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
