"""Data as people have it: what is taken for a class, a split or an image, and what is said of it.

In the order of the table in docs/pictures.md.
"""

import csv
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Project
from PIL import Image

Refusal = Callable[[Project, str], str]
TWO = ("cat", "dog")


def build(project: Project, *folders: str, names: tuple[str, ...] = ()) -> None:
    """Put images, all different, into folders in place of the project's own."""
    root = project.path("images")
    shutil.rmtree(root, ignore_errors=True)
    drawn = np.random.default_rng(0)
    for folder in folders:
        for name in names or [f"{number}.png" for number in range(6)]:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)


def each(*levels: tuple[str, ...]) -> list[str]:
    return ["/".join(path) for path in itertools.product(*levels)]


def said(project: Project, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert project.run("split") == 0
    return capsys.readouterr().out.splitlines()[-1]


def classes_of(project: Project) -> set[str]:
    return set(project.split_report()["classes"])


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("seg_train/seg_train", "seg_test/seg_test"), ("train_images", "test_images"), ("Training", "Testing")),
        *(("images_train", "images_test"), ("TRAIN", "TEST1"), ("trainset", "testset"), ("train2017", "val2017")),
        *(("Training Set", "Eval Set"), ("trn", "tst"), ("trainImages", "testImages"), ("my train", "my validation")),
        *(("x/x_train", "x/x_test"), ("a_train/a_train/data", "a_test/a_test/data"), ("train-1", "dev-1")),
        *(("labeled", "validation"), ("trains", "tests"), ("train/images", "test/images")),
    ],
)
def test_parts_are_known_by_their_names_however_they_are_written(
    project: Project, capsys: pytest.CaptureFixture[str], train: str, test: str
) -> None:
    build(project, *each((train, test), TWO))
    if train.startswith("x/"):
        project.set("data.path", "images/x")
    line = said(project, capsys)
    assert "split as given (train, " in line
    assert classes_of(project) == set(TWO)
    inside = Path(train).name
    if inside != "train":
        assert f"train is {train.removeprefix('x/')}" in line
    assert all(f"{train.removeprefix('x/')}/" in entry.path for entry in project.parts()["train"])


def test_of_test_and_eval_the_second_is_for_validation(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    build(project, *each(("train", "eval", "test"), TWO))
    assert "val is eval; split as given (train, val, test)" in said(project, capsys)


@pytest.mark.parametrize("test", ["test1", "test/images", "unlabeled", "seg_pred/seg_pred", "test/unknown"])
def test_test_folders_without_labels_are_left_out_counted_and_offered_to_predict(
    project: Project, capsys: pytest.CaptureFixture[str], test: str
) -> None:
    build(project, *each(("train",), TWO), test)
    line = said(project, capsys)
    assert "6 images of folders without labels left out" in line
    assert f"`python -m stages.predict images/{test.split('/')[0]}` answers for those" in line
    assert classes_of(project) == set(TWO)


def test_a_folder_without_labels_beside_classes_is_left_out(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    build(project, *TWO, "unlabeled")
    assert "6 images of folders without labels left out" in said(project, capsys)
    assert classes_of(project) == set(TWO)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat", "dog", "test1"], "images/test1 is named for a part of a split, not for a class; move it away, or"),
        (["dataset/cat", "dataset/dog", "test"], "images/test is named for a part of a split, not for a class"),
        (["train", "test1"], "has train and test1, which look like a split, but they hold no class folders"),
        (["train_images", "val_images"], "has train_images and val_images, which look like a split"),
        (["trainA", "trainB", "testA", "testB"], "which look like a split, but they hold no class folders"),
        (["train/cat", "train/dog", "val"], "images/val holds no folders, so its images have no class"),
        (["train/cat", "train/dog", "misc"], "has train, which looks like a part of a split, but also misc; move"),
        (each(("fold1", "fold2"), TWO), "has fold1 and fold2, which look like pieces of one set; set split.given=ig"),
        (["fold_0", "fold_1", "fold_2"], "look like pieces of one set, but they hold no class folders"),
        (["x_images_part_1", "x_images_part_2"], "look like pieces of one set, but they hold no class folders"),
        (each(("fold1", "fold2"), ("train", "test"), TWO), "each with a split of its own; give one of them as data.pa"),
        (each(("berlin", "bonn"), ("train", "test"), TWO), "each hold test and train, with cat, dog inside; give one"),
        (
            each(("train", "validation", "all"), TWO),
            "has train and validation, which look like a split, but beside",
        ),
    ],
)
def test_what_looks_like_parts_but_cannot_be_used_is_refused(
    project: Project, refusal: Refusal, folders: list[str], message: str
) -> None:
    build(project, *folders)
    line = refusal(project, "split")
    assert message in line
    assert any(way in line for way in ("data.labels", "split.given=ignore", "data.path=", "move", "as data.path"))


def test_folds_are_put_together_where_that_is_asked_for(project: Project) -> None:
    build(project, *each(("fold1", "fold2"), TWO))
    project.set("split.given", "ignore")
    assert project.run("split") == 0
    assert classes_of(project) == set(TWO)


@pytest.mark.parametrize("folder", ["train", "."])
def test_file_names_that_begin_with_classes_become_a_table_by_the_documented_command(
    project: Project, refusal: Refusal, folder: str
) -> None:
    names = ("cat.0.png", "cat.1.png", "cat.2.png", "cat.3.png", "big dog_1.png", "big dog_2.png", "big dog_30.png")
    build(project, folder, names=names)
    if folder == "train":
        build_more = project.path("images/test1")
        shutil.copytree(project.path("images/train"), build_more)
        for number, path in enumerate(sorted(build_more.iterdir())):
            path.rename(build_more / f"{number}.png")
    line = refusal(project, "split")
    assert "begin with big dog, cat: docs/pictures.md has a command that writes a table of such labels" in line
    text = (ROOT / "docs/pictures.md").read_text()
    (command,) = re.findall(r"^\(echo path,label.*?labels\.csv$", text, re.MULTILINE | re.DOTALL)
    command = command.replace("/data/photos", str(project.path("images"))).replace("train", folder)
    subprocess.run(["sh", "-c", command], check=True, cwd=project.folder)
    project.set("data.labels", "labels.csv")
    project.set("split.test_size", 0.3)
    project.set("split.val_size", 0.3)
    assert project.run("split") == 0
    report = project.split_report()["classes"]
    assert {name: sum(of.values()) for name, of in report.items()} == {"big dog": 3, "cat": 4}


@pytest.mark.parametrize(
    "names",
    [
        *(("trainers", "test tubes", "cat"), ("train", "bus", "car"), ("train station", "test tube")),
        *(("with_mask", "without_mask"), ("mask", "no_mask"), ("face", "face_mask"), ("hats", "masks", "gloves")),
        *(("valid", "invalid"), ("positive_test", "negative_test"), ("part 3001", "part 3020"), ("0", "1", "2")),
        *(("photo", "sketch"), ("red", "grey"), ("normal", "depth"), ("evaluated", "devices"), ("boxes", "labels")),
    ],
)
def test_class_folders_whose_names_only_resemble_parts_or_kinds_are_classes(
    project: Project, names: tuple[str, ...]
) -> None:
    build(project, *names)
    assert project.run("split") == 0
    assert classes_of(project) == set(names)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["images", "annotations/trimaps"], "annotations and images in images are no classes, but images and what"),
        (["images", "masks"], "(masks); move the others away, or name a table as data.labels"),
        (each(("images", "labels"), TWO), "(labels); set data.path=images/images"),
        (each(("train", "valid"), ("images", "labels")), "images and labels in images/train are no classes"),
        (each(("Original Images", "Augmented Images"), TWO), "(Augmented Images); set data.path=images/Original"),
        (each(("color", "grayscale", "segmented"), TWO), "(grayscale and segmented); set data.path=images/color"),
        (["JPEGImages", "SegmentationClass", "Annotations"], "(Annotations); move the others away"),
        (["train", "train_labels", "test", "test_labels"], "(test_labels and train_labels)"),
        (["cat", "cat_masks", "dog", "dog_masks"], "(cat_masks and dog_masks)"),
        (["cat", "dog", "thumbs"], "images/thumbs is named for what belongs to images, not for a class"),
        (
            ["cat", "dog", "masks/cat", "masks/dog"],
            "images/masks holds folders that are named as its neighbours",
        ),
        (["cat", "dog", "PetImages/cat", "PetImages/dog"], "PetImages holds folders that are named as its neighbours"),
    ],
)
def test_folders_of_different_kinds_of_file_are_no_classes(
    project: Project, refusal: Refusal, folders: list[str], message: str
) -> None:
    build(project, *folders)
    assert message in refusal(project, "split")


def test_masks_inside_of_the_classes_are_left_out_and_counted(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    build(project, *each(("covid", "normal"), ("images", "masks")))
    assert "12 images about others (masks, labels) left out" in said(project, capsys)
    assert all("/images/" in entry.path for entries in project.parts().values() for entry in entries)
    build(project, *TWO, names=tuple(f"a ({n}){end}.png" for n in range(6) for end in ("", "_mask", "_mask_1")))
    assert "24 images about others (masks, labels) left out" in said(project, capsys)


def test_the_last_line_has_the_classes_and_their_counts(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(project, capsys).startswith("train 28, val 4, test 8; classes: cat 20, dog 20; 0 rejected")
    build(project, *(f"class {number:02d}" for number in range(25)))
    assert "class 08 6, class 09 6 ... (25 in all), 6 each; " in said(project, capsys)


def write(project: Project, header: list[str], cells: Callable[[str, int], list[str]]) -> None:
    """Write a table with a row for each image: its path, then what `cells` returns for its class and number."""
    rows = [header]
    for number, path in enumerate(sorted(project.path("images").rglob("*.png"))):
        rows.append([path.relative_to(project.path("images")).as_posix(), *cells(path.parent.name, number)])
    with project.path("labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    project.set("data.labels", "labels.csv")


@pytest.mark.parametrize(
    ("column", "value", "hint"),
    [
        ("is_train", lambda number: str(number % 2), "is_train may be a split: if so, rename it to split"),
        ("Fold", lambda number: str(number % 5), "fold may be a split"),
        ("usage", lambda number: ["Training", "test"][number % 2], "usage may be a split"),
        ("which", lambda number: ["train", "val"][number % 2], "which may be a split"),
        (
            "patient_id",
            str,
            "patient_id may say what belongs together: if so, rename it to group, and set",
        ),
        ("SceneID", str, "sceneid may say"),
        ("subject", str, "subject may say"),
        ("age", str, "columns of labels.csv not used: age; "),
    ],
)
def test_columns_that_are_not_used_are_named_and_known_ones_pointed_to(
    project: Project, capsys: pytest.CaptureFixture[str], column: str, value: Callable[[int], str], hint: str
) -> None:
    write(project, ["path", "label", column], lambda name, number: [name, value(number)])
    line = said(project, capsys) + "; "
    assert f"columns of labels.csv not used: {column.lower()}" in line
    assert hint in line.replace(": see", "; see")


def test_labels_that_are_the_same_number_are_one_class(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write(project, ["path", "label"], lambda name, n: [f"{TWO.index(name)}{'.0' if n % 3 else ''}"])
    assert "the same number taken for one class (0.0 as 0, 1.0 as 1)" in said(project, capsys)
    assert classes_of(project) == {"0", "1"}


@pytest.mark.parametrize("nothing", ["NaN", "nan", "<NA>", ""])
def test_a_label_that_says_there_is_none_is_no_class(project: Project, nothing: str) -> None:
    write(project, ["path", "label"], lambda name, n: [name if n else nothing])
    assert project.run("split") == 0
    assert project.split_report()["rejected"] == [
        {"path": "cat/000.png", "reason": "listed without a label in labels.csv"}
    ]


@pytest.mark.parametrize(
    "label",
    [
        lambda n: ["Cardiomegaly", "Emphysema", "Cardiomegaly|Emphysema", "Mass"][n % 4],
        lambda n: ["a;b", "b;c", "a;c"][n % 3],
        lambda n: ["a, b", "b, c", "a", "c"][n % 4],
        lambda n: ["a;b", "a"][n % 2],
        lambda n: ["['a', 'b']", "['a']", "['b']"][n % 3],
    ],
)
def test_labels_of_several_names_are_refused_as_multi_label(
    project: Project, refusal: Refusal, label: Callable[[int], str]
) -> None:
    write(project, ["path", "label"], lambda _, n: [label(n)])
    assert "labels.csv has multi-label rows, such as" in refusal(project, "split")


def test_a_name_with_a_comma_is_a_class(project: Project) -> None:
    write(project, ["path", "label"], lambda name, _: [{"cat": "tench, Tinca tinca", "dog": "crane, Grus"}[name]])
    assert project.run("split") == 0
    assert classes_of(project) == {"tench, Tinca tinca", "crane, Grus"}


def test_names_of_another_case_or_extension_are_found_or_nearly_found(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ["path", "label"], lambda name, _: [name])
    text = project.path("labels.csv").read_text()
    text = (
        text.replace("cat/000.png", "CAT/000.PNG")
        .replace("cat/001.png", "cat/001")
        .replace("cat/002.png,", "cat/002.jpg,")
    )
    text = text.replace("dog/003.png", "https://host/a//b.jpg").replace("dog/019.png", "pics/unheard of.png")
    project.path("images/dog/004.png").rename(project.path("images/dog/only.png"))
    project.path("labels.csv").write_text(text.replace("dog/004.png", "elsewhere/only.png"))
    project.set("split.rejected_limit", 0.5)
    assert "3 paths of labels.csv found by another case or extension" in said(project, capsys)
    rejected = {one["path"]: one["reason"] for one in project.split_report()["rejected"]}
    assert rejected == {
        "elsewhere/only.png": "not there, but listed in labels.csv; did you mean dog/only.png?",
        "https://host/a//b.jpg": "a URL, and no file below data.path, in labels.csv",
        "pics/unheard of.png": "not there, but listed in labels.csv",
    }
