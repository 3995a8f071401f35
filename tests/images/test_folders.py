"""Anyone's folder: what is a class, what is a split that is given, and what is neither."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project, make_images

from stages.images.index import PARTS

Refusal = Callable[[Project, str], str]


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Callable[[Project], str]:
    """Run `split`, which has to succeed; its last line."""

    def split(project: Project) -> str:
        capsys.readouterr()
        assert project.run("split") == 0
        return capsys.readouterr().out.splitlines()[-1]

    return split


Line = Callable[[Project], str]


def give_split(project: Project, *parts: str, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Put images into folders of these names, all different; returns the data set's folder."""
    images = project.path("images")
    shutil.rmtree(images)
    make_images(project.path("all"), classes, count=8 * len(parts))
    for name in classes:
        for number, path in enumerate(
            sorted(
                project.path(
                    "all",
                )
                .joinpath(name)
                .iterdir()
            )
        ):
            target = images / parts[number % len(parts)] / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return images


@pytest.mark.parametrize(
    "name",
    [".thumbnails", ".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"],
)
@pytest.mark.parametrize("where", [".", "cat/deeper"])
def test_folders_that_systems_make_are_left_out_and_counted(
    project: Project, line: Line, name: str, where: str
) -> None:
    project.path("images/cat/deeper").mkdir()
    project.path("images/cat/000.png").rename(project.path("images/cat/deeper/000.png"))
    assert project.run("split") == 0
    before = project.parts()
    shutil.copytree(project.path("images/dog"), project.path("images") / where / name)
    assert "1 file or folder hidden or made by a system left out" in line(project)
    assert project.parts() == before
    assert project.split_report()["left_out"] == {"system": 1}


def test_hidden_files_are_left_out_and_counted(project: Project, line: Line) -> None:
    shutil.copy(project.path("images/cat/000.png"), project.path("images/dog/._000.png"))
    project.path("images/.DS_Store").write_bytes(b"\0")
    project.path("images/cat/Thumbs.db").write_bytes(b"\0")
    assert "0 rejected, 0 groups of copies; 3 files and folders hidden" in line(project)
    assert project.split_report()["ignored"] == {}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_around_the_class_folders_is_named(project: Project, refusal: Refusal, depth: int) -> None:
    for _ in range(depth):
        project.path("images").rename(project.path("inner"))
        project.path("images").mkdir()
        project.path("inner").rename(project.path("images/PetImages"))
    project.path("images/__MACOSX").mkdir()
    inner = "/".join(["images", *["PetImages"] * depth])
    assert f"whose folders are cat, dog: did you mean data.path={inner}?" in refusal(project, "split")


def test_images_and_files_beside_the_class_folders_are_counted(project: Project, line: Line) -> None:
    for number in range(3):
        shutil.copy(project.path(f"images/cat/00{number}.png"), project.path(f"images/{number}.png"))
    project.path("images/README.txt").write_text("")
    said = line(project)
    assert "; 1 file of other kinds ignored (1 .txt); 3 images beside the class folders left out: see" in said
    assert project.split_report()["left_out"] == {"loose": 3}


def test_loose_images_alone_are_told_how_to_get_labels(project: Project, refusal: Refusal) -> None:
    project.path("images/cat").rename(project.path("images2"))
    project.set("data.path", "images2")
    assert "holds no folders but 20 images; put the images of each class" in (said := refusal(project, "split"))
    assert "data.labels" in said


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hund", "hund"),
        (unicodedata.normalize("NFC", "Löwe"), unicodedata.normalize("NFD", "Löwe")),
        (unicodedata.normalize("NFC", "LÖWE"), unicodedata.normalize("NFD", "löwe")),
        ("owl", "owl "),
        ("Straße", "STRASSE"),
        ("ﬁsh", "fish"),
    ],
)
def test_names_that_a_reader_takes_for_one_class_are_refused(
    project: Project, refusal: Refusal, first: str, second: str
) -> None:
    make_images(project.path("images"), ("cat", first, second), count=5)
    said = refusal(project, "split")
    for name in (first, second):
        assert (repr(name) if name.isascii() else ascii(name)) in said
    assert "rename one, or merge them" in said


def test_a_class_that_is_a_link_to_nothing_is_not_passed_by(project: Project, refusal: Refusal) -> None:
    project.path("images/owl").symlink_to("nowhere")
    assert "images/owl is a broken link" in refusal(project, "split")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_pipe_or_a_device_is_left_out_with_its_reason(project: Project, make: Callable[[Path], None]) -> None:
    make(project.path("images/cat/odd.jpg"))
    make(project.path("images/loose.jpg"))
    assert project.run("split") == 0
    assert project.split_report()["rejected"] == [{"path": "cat/odd.jpg", "reason": "not a regular file"}]


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "TEST"), ("train_set", "valid", "test set")]
)
def test_a_split_in_folders_is_used_as_it_is(project: Project, line: Line, names: tuple[str, str, str]) -> None:
    images = give_split(project, *names)
    said = line(project)
    assert said.startswith("train 16, val 16, test 16; classes: cat 24, dog 24; 0 rejected, 0 groups of copies; ")
    assert "; split as given (train, val, test)" in said
    assert (f"; train is {names[0]}, val is {names[1]}, test is {names[2]};" in said) == (names[0] != "train")
    for part, entries in project.parts().items():
        folder = names[PARTS.index(part)]
        files = sorted(path.relative_to(images).as_posix() for path in (images / folder).rglob("*.png"))
        assert [entry.path for entry in entries] == files
        assert {(entry.label, entry.class_name) for entry in entries} == {(0, "cat"), (1, "dog")}
    assert project.split_report()["classes"]["cat"] == {"train": 8, "val": 8, "test": 8}


def test_parts_in_a_wrapper_of_their_own_are_seen_through(project: Project, line: Line) -> None:
    images = give_split(project, "training_set", "test_set")
    for part in ("training_set", "test_set"):
        (images / part).rename(project.path("inner"))
        (images / part).mkdir()
        project.path("inner").rename(images / part / part)
    said = line(project)
    assert said.startswith("train 14, val 2, test 16; classes: cat 16, dog 16; 0 rejected")
    assert "train is training_set/training_set, test is test_set/test_set; split as given (train, test)" in said
    assert set(project.split_report()["classes"]) == {"cat", "dog"}


@pytest.mark.parametrize(
    ("names", "counts", "cut"),
    [
        (("train", "test"), "train 14, val 2, test 16", "val cut from train"),
        (("train", "valid"), "train 12, val 16, test 4", "test cut from train"),
        (("train",), "train 10, val 2, test 4", "val cut from train; test cut from train"),
    ],
)
def test_what_a_given_split_lacks_is_cut_from_train(
    project: Project, line: Line, names: tuple[str, ...], counts: str, cut: str
) -> None:
    give_split(project, *names)
    said = line(project)
    assert said.startswith(counts)
    assert f"; split as given ({', '.join('val' if name == 'valid' else name for name in names)}); {cut}" in said


def test_a_given_split_that_is_ignored_is_divided_as_if_there_were_none(project: Project, line: Line) -> None:
    assert project.run("split") == 0
    before = {part: {entry.sha256 for entry in entries} for part, entries in project.parts().items()}
    images = project.path("images")
    for part, entries in project.parts().items():
        for entry in entries:
            target = images / ("train" if part == "test" else "test") / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (images / entry.path).rename(target)
    for name in ("cat", "dog"):
        (images / name).rmdir()
    project.set("split.given", "ignore")
    assert "the images of train and test put together and divided again (split.given)" in line(project)
    assert {part: {entry.sha256 for entry in entries} for part, entries in project.parts().items()} == before


def test_of_bytes_in_two_parts_the_copy_for_the_later_part_is_kept(project: Project, line: Line) -> None:
    images = give_split(project, "train", "val", "test")
    kept = sorted((images / "test/cat").iterdir())[0]
    shutil.copy(kept, images / "train/cat/copy.png")
    shutil.copy(kept, images / "val/cat/copy.png")
    shutil.copy(sorted((images / "val/dog").iterdir())[0], images / "train/dog/copy.png")
    assert "train 16, val 16, test 16" in (said := line(project))
    assert "3 copies of images of another part left out" in said
    assert project.split_report()["overlap"] == ["train/cat/copy.png", "train/dog/copy.png", "val/cat/copy.png"]


def test_a_class_without_training_images_is_refused(project: Project, refusal: Refusal) -> None:
    images = give_split(project, "train", "test")
    shutil.copytree(images / "test/cat", images / "test/owl")
    shutil.rmtree(images / "test/cat")
    assert "class 'owl' has no training images, but test/owl/001.png for test" in refusal(project, "split")


def test_a_class_whose_training_images_are_all_copies_of_test_images_is_refused(
    project: Project, refusal: Refusal
) -> None:
    images = give_split(project, "train", "test")
    shutil.rmtree(images / "train/dog")
    shutil.copytree(images / "test/dog", images / "train/dog")
    assert "class 'dog' has no training images" in refusal(project, "split")


def test_a_class_in_training_alone_is_said_and_the_pipeline_goes_on(project: Project, line: Line) -> None:
    images = give_split(project, "train", "val", "test", classes=("cat", "dog", "owl"))
    shutil.rmtree(images / "test/owl")
    shutil.rmtree(images / "val/cat")
    said = line(project)
    assert "1 class without val images (cat); 1 class without test images (owl)" in said
    assert project.run("build_model", "train_head", "finetune", "evaluate", "plot") == 0
    assert "1 class without test images" in project.path("metrics/report.md").read_text()


def test_class_names_of_the_parts_have_to_agree(project: Project, refusal: Refusal) -> None:
    images = give_split(project, "train", "test")
    (images / "test/dog").rename(images / "test/Dog")
    assert "two classes 'Dog' and 'dog'" in refusal(project, "split")


def test_a_split_inside_of_the_classes_is_used_as_it_is(project: Project, line: Line) -> None:
    for path in list(project.path("images").rglob("*.png")):
        folder = path.parent / ("train" if int(path.stem) % 2 else "test1")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    assert "; split as given (train, test); val cut from train" in line(project)
    assert {entry.path.split("/")[1] for entry in project.parts()["test"]} == {"test1"}
    shutil.copy(project.path("images/cat/train/001.png"), project.path("images/cat/beside.png"))
    assert "folders test1 and train inside of classes not taken for a split" in line(project)


def test_a_class_whose_files_are_all_of_another_kind_is_told_which(project: Project, refusal: Refusal) -> None:
    project.path("images/cat/notes.txt").write_text("")
    project.path("images/owl").mkdir()
    for number in range(5):
        project.path(f"images/owl/{number}.nef").write_bytes(b"raw")
    assert "no images in images/owl, among whose files are 5 .nef; add some" in refusal(project, "split")


def test_two_folders_for_one_part_are_refused(project: Project, refusal: Refusal) -> None:
    give_split(project, "train", "val", "validation")
    assert "has val and validation, both for val; merge them" in refusal(project, "split")


def test_a_part_without_class_folders_is_refused(project: Project, refusal: Refusal) -> None:
    images = give_split(project, "train", "test")
    for path in list((images / "test").glob("*/*.png")):
        path.rename(images / "test" / f"{path.parent.name} {path.name}")
    for name in ("cat", "dog"):
        (images / "test" / name).rmdir()
    assert "images/test holds no folders, so its images have no class; move it away" in refusal(project, "split")


def test_a_part_beside_other_folders_is_refused_if_it_looks_like_a_split(project: Project, refusal: Refusal) -> None:
    images = give_split(project, "train", "test")
    make_images(images, ("annotations",))
    assert "has train and test, which look like a split, but beside them is annotations" in refusal(project, "split")


def test_classes_that_are_called_train_and_test_can_be_had(project: Project, refusal: Refusal) -> None:
    shutil.rmtree(project.path("images"))
    make_images(project.path("images"), ("train", "test"))
    assert "they hold no class folders" in refusal(project, "split")
    project.set("split.given", "ignore")
    assert project.run("split") == 0
    assert set(project.split_report()["classes"]) == {"train", "test"}


def test_a_class_called_train_beside_others_is_a_class(project: Project) -> None:
    make_images(project.path("images"), ("cat", "dog", "train"))
    assert project.run("split") == 0
    assert set(project.split_report()["classes"]) == {"cat", "dog", "train"}
