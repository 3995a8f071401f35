"""Anyone's folder: what is a class, what is a split that is given, and what is neither; as docs/pictures.md has it."""

import itertools
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Project, make_images
from making import Refusal, said
from PIL import Image

from stages.images.index import PARTS

TWO = ("cat", "dog")


def build(project: Project, *folders: str, names: tuple[str, ...] = ()) -> Path:
    """Put images, all different, into folders in place of the project's own; returns the data set's folder."""
    root = project.path("images")
    shutil.rmtree(root, ignore_errors=True)
    drawn = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in names or [f"{number}.png" for number in range(6)]:
            Image.fromarray(drawn.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / folder / name)
    return root


def each(*levels: tuple[str, ...]) -> list[str]:
    return ["/".join(path) for path in itertools.product(*levels)]


def classes_of(project: Project) -> set[str]:
    return set(project.split_report()["classes"])


@pytest.mark.parametrize("name", [".git", "@eaDir", "__MACOSX", "$RECYCLE.BIN"])
def test_files_of_operating_systems_are_left_out_and_counted(project: Project, name: str) -> None:
    project.path("images/cat/deeper").mkdir()
    project.path("images/cat/000.png").rename(project.path("images/cat/deeper/000.png"))
    assert project.run("split") == 0
    before = project.parts()
    for where in (".", "cat/deeper"):
        shutil.copytree(project.path("images/dog"), project.path("images") / where / name)
    shutil.copy(project.path("images/cat/001.png"), project.path("images/dog/._000.png"))
    project.path("images/cat/Thumbs.db").write_bytes(b"\0")
    assert "4 files and folders hidden or made by a system left out" in said(project)
    assert project.parts() == before
    assert project.split_report()["left_out"] == {"system": 4}
    assert project.split_report()["ignored"] == {}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_around_the_class_folders_is_named(project: Project, refusal: Refusal, depth: int) -> None:
    inner = "/".join(["images", *["PetImages"] * depth])
    build(project, *(f"{'PetImages/' * depth}{name}" for name in TWO))
    project.path("images/__MACOSX").mkdir()
    assert f"whose folders are cat, dog: did you mean data.path={inner}?" in refusal(project, "split")


def test_images_and_files_beside_the_images_are_counted(project: Project) -> None:
    for number in range(3):
        shutil.copy(project.path(f"images/cat/00{number}.png"), project.path(f"images/{number}.png"))
        project.path(f"images/cat/{number}.CR2").write_bytes(b"raw")
    project.path("images/dog/notes").write_text("")
    line = said(project)
    assert "; 4 files of other kinds ignored (3 .cr2, 1 without extension); 3 images beside the class folders" in line
    assert project.split_report()["left_out"] == {"loose": 3}


def test_loose_images_are_refused_with_how_to_get_labels(project: Project, refusal: Refusal) -> None:
    build(project, ".")
    line = refusal(project, "split")
    assert "holds no folders but 6 images; put the images of each class into a folder, or name a table of" in line


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hund", "hund"),
        (unicodedata.normalize("NFC", "LÖWE"), unicodedata.normalize("NFD", "löwe")),
        *(("owl", "owl "), ("Straße", "STRASSE"), ("ﬁsh", "fish")),
    ],
)
def test_class_names_that_look_the_same_are_refused(
    project: Project, refusal: Refusal, first: str, second: str
) -> None:
    make_images(project.path("images"), ("cat", first, second), count=5)
    line = refusal(project, "split")
    for name in (first, second):
        assert (repr(name) if name.isascii() else ascii(name)) in line
    assert "rename one, or merge them, or name a table as data.labels, in which case counts" in line


def test_a_class_folder_that_is_a_broken_link_is_refused(project: Project, refusal: Refusal) -> None:
    project.path("images/owl").symlink_to("nowhere")
    assert "images/owl is a broken link" in refusal(project, "split")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_pipe_or_a_device_is_left_out_with_its_reason(project: Project, make: Callable[[Path], None]) -> None:
    make(project.path("images/cat/odd.jpg"))
    make(project.path("images/loose.jpg"))
    assert project.run("split") == 0
    assert project.split_report()["rejected"] == [{"path": "cat/odd.jpg", "reason": "not a regular file"}]


@pytest.mark.parametrize("names", [PARTS, ("Training", "Validation", "TEST"), ("train_set", "valid", "test set")])
def test_a_split_in_folders_is_used_as_given(project: Project, names: tuple[str, str, str]) -> None:
    images = build(project, *each(names, TWO))
    line = said(project)
    assert line.startswith("train 12, val 12, test 12; classes: cat 18, dog 18; 0 rejected, 0 groups of copies; ")
    assert "; split as given (train, val, test)" in line
    assert (f"; train is {names[0]}, val is {names[1]}, test is {names[2]};" in line) == (names[0] != "train")
    for part, entries in project.parts().items():
        folder = names[PARTS.index(part)]
        files = sorted(path.relative_to(images).as_posix() for path in (images / folder).rglob("*.png"))
        assert [entry.path for entry in entries] == files
        assert {(entry.label, entry.class_name) for entry in entries} == {(0, "cat"), (1, "dog")}
    assert project.split_report()["classes"]["cat"] == {"train": 6, "val": 6, "test": 6}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("seg_train/seg_train", "seg_test/seg_test"), ("train_images", "test_images"), ("Training", "Testing")),
        *(("images_train", "images_test"), ("TRAIN", "TEST1"), ("trainset", "testset"), ("train2017", "val2017")),
        *(("Training Set", "Eval Set"), ("trn", "tst"), ("trainImages", "testImages"), ("my train", "my validation")),
        *(("x_train", "x_test"), ("a_train/a_train/data", "a_test/a_test/data"), ("train-1", "dev-1")),
        *(("labeled", "validation"), ("trains", "tests"), ("train/images", "test/images")),
    ],
)
def test_parts_are_recognized_however_their_names_are_written(project: Project, train: str, test: str) -> None:
    build(project, *each((train, test), TWO))
    line = said(project)
    assert "split as given (train, " in line
    assert f"train is {train}" in line
    assert classes_of(project) == set(TWO)
    assert all(entry.path.startswith(f"{train}/") for entry in project.parts()["train"])


def test_of_test_and_eval_the_second_is_for_validation(project: Project) -> None:
    build(project, *each(("train", "eval", "test"), TWO))
    assert "val is eval; split as given (train, val, test)" in said(project)


@pytest.mark.parametrize(
    ("names", "counts", "cut"),
    [
        (("train", "test"), "train 10, val 2, test 12", "(train, test); val cut from train"),
        (("train", "valid"), "train 10, val 12, test 2", "(train, val); test cut from train"),
        (("train",), "train 8, val 2, test 2", "(train); val cut from train; test cut from train"),
    ],
)
def test_what_a_given_split_lacks_is_cut_from_train(
    project: Project, names: tuple[str, ...], counts: str, cut: str
) -> None:
    build(project, *each(names, TWO))
    line = said(project)
    assert line.startswith(counts)
    assert f"; split as given {cut}" in line


def test_a_given_split_that_is_ignored_is_divided_as_if_there_were_none(project: Project) -> None:
    def hashes() -> dict[str, set[str]]:
        return {part: {entry.sha256 for entry in entries} for part, entries in project.parts().items()}

    assert project.run("split") == 0
    before, images = hashes(), project.path("images")
    for part, entries in project.parts().items():
        for entry in entries:
            target = images / ("train" if part == "test" else "test") / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (images / entry.path).rename(target)
    for name in TWO:
        (images / name).rmdir()
    project.set("split.given", "ignore")
    assert "the images of train and test put together and divided again (split.given)" in said(project)
    assert hashes() == before
    build(project, *each(("fold1", "fold2"), TWO))
    assert "the images of fold1 and fold2 put together" in said(project)
    assert classes_of(project) == set(TWO)


def test_of_copies_in_two_parts_the_one_in_the_later_part_is_kept(project: Project) -> None:
    images = build(project, *each(PARTS, TWO))
    shutil.copy(images / "test/cat/0.png", images / "train/cat/copy.png")
    shutil.copy(images / "test/cat/0.png", images / "val/cat/copy.png")
    shutil.copy(images / "val/dog/0.png", images / "train/dog/copy.png")
    assert "train 12, val 12, test 12" in (line := said(project))
    assert "3 copies of images of another part left out" in line
    assert project.split_report()["overlap"] == ["train/cat/copy.png", "train/dog/copy.png", "val/cat/copy.png"]


def test_a_class_without_training_images_of_its_own_is_refused(project: Project, refusal: Refusal) -> None:
    images = build(project, *each(("train",), TWO), "test/dog", "test/owl")
    assert "class 'owl' has no training images, but test/owl/0.png for test" in refusal(project, "split")
    shutil.copytree(images / "test/owl", images / "train/owl")
    assert "class 'owl' has no training images" in refusal(project, "split")


def test_a_class_only_in_train_is_reported_and_the_pipeline_runs_on(project: Project) -> None:
    images = build(project, *each(PARTS, ("cat", "dog", "owl")))
    shutil.rmtree(images / "test/owl")
    shutil.rmtree(images / "val/cat")
    project.set("split.group", "^(train|val|test)/")
    line = said(project)
    assert "1 class without val images (cat); 1 class without test images (owl)" in line
    assert project.run("build_model", "train_head", "finetune", "evaluate", "plot") == 0
    text = project.path("metrics/report.md").read_text()
    assert "1 class without test images" in text
    assert "The test images are of 1 group (`split.group`, near-duplicates)" in text


def test_a_split_inside_the_class_folders_is_used_as_given(project: Project) -> None:
    images = build(project, *each(TWO, ("train", "test1")))
    assert "; split as given (train, test); val cut from train" in said(project)
    assert {entry.path.split("/")[1] for entry in project.parts()["test"]} == {"test1"}
    shutil.copy(images / "cat/train/1.png", images / "cat/beside.png")
    assert "folders test1 and train inside of classes not taken for a split" in said(project)


@pytest.mark.parametrize("test", ["test1", "test/images", "unlabeled", "seg_pred/seg_pred", "test/unknown"])
def test_unlabelled_test_folders_are_left_out_counted_and_offered_to_predict(project: Project, test: str) -> None:
    build(project, *each(("train",), TWO), test)
    line = said(project)
    assert "6 images of folders without labels left out" in line
    assert f"`python -m stages.predict images/{test.split('/')[0]}` answers for those" in line
    assert classes_of(project) == set(TWO)


def test_an_unlabelled_folder_beside_classes_is_left_out(project: Project) -> None:
    build(project, *TWO, "unlabeled")
    assert "6 images of folders without labels left out" in said(project)
    assert classes_of(project) == set(TWO)


KINDS = ("images", "labels")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat", "dog", "test1"], "images/test1 is named for a part of a split, not for a class; move it away, or"),
        (["dataset/cat", "dataset/dog", "test"], "images/test is named for a part of a split, not for a class"),
        (["train", "test1"], "has train and test1, which look like a split, but they hold no class folders"),
        (["train_images", "val_images"], "has train_images and val_images, which look like a split"),
        (["trainA", "trainB", "testA", "testB"], "which look like a split, but they hold no class folders"),
        (["train/cat", "train/dog", "val"], "images/val holds no folders, so its images have no class; move it away"),
        (["train/cat", "train/dog", "misc"], "has train, which looks like a part of a split, but also misc; move"),
        (each(("train", "val", "validation"), TWO), "has val and validation, both for val; merge them"),
        (each(("val", "test"), TWO), "has val and test, but no folder train; add it, or set split.given=ignore"),
        (each(("fold1", "fold2"), TWO), "has fold1 and fold2, which look like pieces of one set; set split.given=ig"),
        (["fold_0", "fold_1", "fold_2"], "look like pieces of one set, but they hold no class folders"),
        (["x_images_part_1", "x_images_part_2"], "look like pieces of one set, but they hold no class folders"),
        (each(("fold1", "fold2"), ("train", "test"), TWO), "each with a split of its own; give one of them as data.pa"),
        (each(("berlin", "bonn"), ("train", "test"), TWO), "each hold test and train, with cat, dog inside; give one"),
        ([*each(("train", "val"), TWO), "all/cat"], "train and val, which look like a split, but beside them is all"),
        (["cat/dog", "cat/owl", "dog", "owl"], "cat holds folders that are named as its neighbours, dog, owl; move it"),
        (["train/cat", "train/dog", "test/cat", "test/Dog"], "two classes 'Dog' and 'dog'"),
        (["images", "annotations/trimaps"], "annotations and images in images are no classes, but images and what"),
        (["images", "masks"], "(masks); move the others away, or name a table as data.labels"),
        (each(KINDS, TWO), "(labels); set data.path=images/images"),
        (each(("train", "valid"), KINDS), "images and labels in images/train are no classes"),
        (each(("Original Images", "Augmented Images"), TWO), "(Augmented Images); set data.path=images/Original"),
        (each(("color", "grayscale", "segmented"), TWO), "(grayscale and segmented); set data.path=images/color"),
        (["JPEGImages", "SegmentationClass", "Annotations"], "(Annotations); move the others away"),
        (["train", "train_labels", "test", "test_labels"], "(test_labels and train_labels)"),
        (["cat", "cat_masks", "dog", "dog_masks"], "(cat_masks and dog_masks)"),
        (["cat", "dog", "thumbs"], "images/thumbs is named for what belongs to images, not for a class"),
        (["cat", "dog", "masks/cat", "masks/dog"], "images/masks holds folders that are named as its neighbours"),
    ],
)
def test_folders_that_are_not_classes_are_refused_with_the_way_out(
    project: Project, refusal: Refusal, folders: list[str], message: str
) -> None:
    build(project, *folders)
    line = refusal(project, "split")
    assert message in line
    assert any(way in line for way in ("data.labels", "given=ignore", "data.path=", "move", "as data.path", "merge"))


def test_a_class_without_images_is_refused_with_the_extensions_of_its_files(project: Project, refusal: Refusal) -> None:
    project.path("images/cat/notes.txt").write_text("")
    project.path("images/owl").mkdir()
    for number in range(5):
        project.path(f"images/owl/{number}.nef").write_bytes(b"raw")
    assert "no images in images/owl, among whose files are 5 .nef; add some" in refusal(project, "split")


def test_classes_may_be_called_train_and_test(project: Project, refusal: Refusal) -> None:
    build(project, "train", "test")
    assert "they hold no class folders" in refusal(project, "split")
    project.set("split.given", "ignore")
    assert project.run("split") == 0
    assert classes_of(project) == {"train", "test"}


@pytest.mark.parametrize(
    "names",
    [
        *(("trainers", "test tubes", "cat"), ("train", "bus", "car"), ("train station", "test tube")),
        *(("with_mask", "without_mask"), ("mask", "no_mask"), ("face", "face_mask"), ("hats", "masks", "gloves")),
        *(("valid", "invalid"), ("positive_test", "negative_test"), ("part 3001", "part 3020"), ("0", "1", "2")),
        *(("photo", "sketch"), ("red", "grey"), ("normal", "depth"), ("evaluated", "devices"), ("boxes", "labels")),
    ],
)
def test_folders_whose_names_only_resemble_parts_are_classes(project: Project, names: tuple[str, ...]) -> None:
    build(project, *names)
    assert project.run("split") == 0
    assert classes_of(project) == set(names)


def test_masks_inside_the_class_folders_are_left_out_and_counted(project: Project) -> None:
    build(project, *each(("covid", "normal"), ("images", "masks")))
    assert "12 images about others (masks, labels) left out" in said(project)
    assert all("/images/" in entry.path for entries in project.parts().values() for entry in entries)
    build(project, *TWO, names=tuple(f"a ({n}){end}.png" for n in range(6) for end in ("", "_mask", "_mask_1")))
    assert "24 images about others (masks, labels) left out" in said(project)


@pytest.mark.parametrize("folder", ["train", "."])
def test_the_documented_command_makes_a_table_of_file_names_that_begin_with_classes(
    project: Project, refusal: Refusal, folder: str
) -> None:
    names = ("cat.0.png", "cat.1.png", "cat.2.png", "cat.3.png", "big dog_1.png", "big dog_2.png", "big dog_30.png")
    images = build(project, folder, names=names)
    if folder == "train":
        (images / "test1").mkdir()
        for number, path in enumerate(sorted((images / "train").iterdir())):
            shutil.copy(path, images / "test1" / f"{number}.png")
    line = refusal(project, "split")
    assert "begin with big dog, cat: docs/pictures.md has a command that writes a table of such labels" in line
    text = (ROOT / "docs/pictures.md").read_text()
    (command,) = re.findall(r"^\(echo path,label.*?labels\.csv$", text, re.MULTILINE | re.DOTALL)
    command = command.replace("/data/photos", str(images)).replace("train", folder)
    subprocess.run(["sh", "-c", command], check=True, cwd=project.folder)
    for key, value in (("data.labels", "labels.csv"), ("split.test_size", 0.3), ("split.val_size", 0.3)):
        project.set(key, value)
    assert project.run("split") == 0
    report = project.split_report()["classes"]
    assert {name: sum(of.values()) for name, of in report.items()} == {"big dog": 3, "cat": 4}


def test_the_last_line_has_the_classes_and_their_counts(project: Project) -> None:
    assert said(project).startswith("train 28, val 4, test 8; classes: cat 20, dog 20; 0 rejected")
    build(project, *(f"class {number:02d}" for number in range(25)))
    assert "class 08 6, class 09 6 ... (25 in all), 6 each; " in said(project)
