"""Anyone's folder: what is a class, what is a split that is given, and what is neither."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project, make_pictures

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
    """Put pictures into folders of these names, all different; returns the data set's folder."""
    pictures = project.path("pictures")
    shutil.rmtree(pictures)
    make_pictures(project.path("all"), classes, count=8 * len(parts))
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
            target = pictures / parts[number % len(parts)] / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return pictures


@pytest.mark.parametrize(
    "name",
    [".thumbnails", ".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"],
)
@pytest.mark.parametrize("where", [".", "cat/deeper"])
def test_folders_that_systems_make_are_left_out_and_counted(
    project: Project, line: Line, name: str, where: str
) -> None:
    project.path("pictures/cat/deeper").mkdir()
    project.path("pictures/cat/000.png").rename(project.path("pictures/cat/deeper/000.png"))
    assert project.run("split") == 0
    before = project.parts()
    shutil.copytree(project.path("pictures/dog"), project.path("pictures") / where / name)
    assert "1 file or folder that is hidden or made by a system left out" in line(project)
    assert project.parts() == before
    assert project.split_report()["left_out"] == {"system": 1}


def test_hidden_files_are_left_out_and_counted(project: Project, line: Line) -> None:
    shutil.copy(project.path("pictures/cat/000.png"), project.path("pictures/dog/._000.png"))
    project.path("pictures/.DS_Store").write_bytes(b"\0")
    project.path("pictures/cat/Thumbs.db").write_bytes(b"\0")
    assert "0 rejected, 0 groups of copies; 3 files and folders that are hidden" in line(project)
    assert project.split_report()["ignored"] == {}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_around_the_class_folders_is_named(project: Project, refusal: Refusal, depth: int) -> None:
    for _ in range(depth):
        project.path("pictures").rename(project.path("inner"))
        project.path("pictures").mkdir()
        project.path("inner").rename(project.path("pictures/PetImages"))
    project.path("pictures/__MACOSX").mkdir()
    inner = "/".join(["pictures", *["PetImages"] * depth])
    assert f"whose folders are cat, dog: did you mean data.path={inner}?" in refusal(project, "split")


def test_pictures_and_files_beside_the_class_folders_are_counted(project: Project, line: Line) -> None:
    for number in range(3):
        shutil.copy(project.path(f"pictures/cat/00{number}.png"), project.path(f"pictures/{number}.png"))
    project.path("pictures/README.txt").write_text("")
    said = line(project)
    assert "; 1 file of other kinds ignored (1 .txt); 3 pictures beside the class folders left out: see" in said
    assert project.split_report()["left_out"] == {"loose": 3}


def test_loose_pictures_alone_are_told_how_to_get_labels(project: Project, refusal: Refusal) -> None:
    project.path("pictures/cat").rename(project.path("pictures2"))
    project.set("data.path", "pictures2")
    assert "holds no folders but 20 pictures; put the pictures of each class" in (said := refusal(project, "split"))
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
    make_pictures(project.path("pictures"), ("cat", first, second), count=5)
    said = refusal(project, "split")
    for name in (first, second):
        assert (repr(name) if name.isascii() else ascii(name)) in said
    assert "rename one, or merge them" in said


def test_a_class_that_is_a_link_to_nothing_is_not_passed_by(project: Project, refusal: Refusal) -> None:
    project.path("pictures/owl").symlink_to("nowhere")
    assert "pictures/owl is a broken link" in refusal(project, "split")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_pipe_or_a_device_is_left_out_with_its_reason(project: Project, make: Callable[[Path], None]) -> None:
    make(project.path("pictures/cat/odd.jpg"))
    make(project.path("pictures/loose.jpg"))
    assert project.run("split") == 0
    assert project.split_report()["rejected"] == [{"path": "cat/odd.jpg", "reason": "not a regular file"}]


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "TEST"), ("train_set", "valid", "test set")]
)
def test_a_split_in_folders_is_used_as_it_is(project: Project, line: Line, names: tuple[str, str, str]) -> None:
    pictures = give_split(project, *names)
    said = line(project)
    assert said.startswith("train 16, val 16, test 16; classes: cat 24, dog 24; 0 rejected, 0 groups of copies; ")
    assert "; split as given (train, val, test)" in said
    assert (f"; train is {names[0]}, val is {names[1]}, test is {names[2]};" in said) == (names[0] != "train")
    for part, entries in project.parts().items():
        folder = names[PARTS.index(part)]
        files = sorted(path.relative_to(pictures).as_posix() for path in (pictures / folder).rglob("*.png"))
        assert [entry.path for entry in entries] == files
        assert {(entry.label, entry.class_name) for entry in entries} == {(0, "cat"), (1, "dog")}
    assert project.split_report()["classes"]["cat"] == {"train": 8, "val": 8, "test": 8}


def test_parts_in_a_wrapper_of_their_own_are_seen_through(project: Project, line: Line) -> None:
    pictures = give_split(project, "training_set", "test_set")
    for part in ("training_set", "test_set"):
        (pictures / part).rename(project.path("inner"))
        (pictures / part).mkdir()
        project.path("inner").rename(pictures / part / part)
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
    pictures = project.path("pictures")
    for part, entries in project.parts().items():
        for entry in entries:
            target = pictures / ("train" if part == "test" else "test") / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (pictures / entry.path).rename(target)
    for name in ("cat", "dog"):
        (pictures / name).rmdir()
    project.set("split.given", "ignore")
    assert "the pictures of train and test put together and divided again (split.given)" in line(project)
    assert {part: {entry.sha256 for entry in entries} for part, entries in project.parts().items()} == before


def test_of_bytes_in_two_parts_the_copy_for_the_later_part_is_kept(project: Project, line: Line) -> None:
    pictures = give_split(project, "train", "val", "test")
    kept = sorted((pictures / "test/cat").iterdir())[0]
    shutil.copy(kept, pictures / "train/cat/copy.png")
    shutil.copy(kept, pictures / "val/cat/copy.png")
    shutil.copy(sorted((pictures / "val/dog").iterdir())[0], pictures / "train/dog/copy.png")
    assert "train 16, val 16, test 16" in (said := line(project))
    assert "3 copies of pictures of another part left out" in said
    assert project.split_report()["overlap"] == ["train/cat/copy.png", "train/dog/copy.png", "val/cat/copy.png"]


def test_a_class_without_training_pictures_is_refused(project: Project, refusal: Refusal) -> None:
    pictures = give_split(project, "train", "test")
    shutil.copytree(pictures / "test/cat", pictures / "test/owl")
    shutil.rmtree(pictures / "test/cat")
    assert "class 'owl' has no training pictures, but test/owl/001.png for test" in refusal(project, "split")


def test_a_class_whose_training_pictures_are_all_copies_of_test_pictures_is_refused(
    project: Project, refusal: Refusal
) -> None:
    pictures = give_split(project, "train", "test")
    shutil.rmtree(pictures / "train/dog")
    shutil.copytree(pictures / "test/dog", pictures / "train/dog")
    assert "class 'dog' has no training pictures" in refusal(project, "split")


def test_a_class_in_training_alone_is_said_and_the_pipeline_goes_on(project: Project, line: Line) -> None:
    pictures = give_split(project, "train", "val", "test", classes=("cat", "dog", "owl"))
    shutil.rmtree(pictures / "test/owl")
    shutil.rmtree(pictures / "val/cat")
    said = line(project)
    assert "1 class without val pictures (cat); 1 class without test pictures (owl)" in said
    assert project.run("build_model", "train_head", "finetune", "evaluate", "plot") == 0
    assert "1 class without test pictures" in project.path("metrics/report.md").read_text()


def test_class_names_of_the_parts_have_to_agree(project: Project, refusal: Refusal) -> None:
    pictures = give_split(project, "train", "test")
    (pictures / "test/dog").rename(pictures / "test/Dog")
    assert "two classes 'Dog' and 'dog'" in refusal(project, "split")


def test_a_split_inside_of_the_classes_is_used_as_it_is(project: Project, line: Line) -> None:
    for path in list(project.path("pictures").rglob("*.png")):
        folder = path.parent / ("train" if int(path.stem) % 2 else "test1")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    assert "; split as given (train, test); val cut from train" in line(project)
    assert {entry.path.split("/")[1] for entry in project.parts()["test"]} == {"test1"}
    shutil.copy(project.path("pictures/cat/train/001.png"), project.path("pictures/cat/beside.png"))
    assert "folders test1 and train inside of classes not taken for a split" in line(project)


def test_a_class_whose_files_are_all_of_another_kind_is_told_which(project: Project, refusal: Refusal) -> None:
    project.path("pictures/cat/notes.txt").write_text("")
    project.path("pictures/owl").mkdir()
    for number in range(5):
        project.path(f"pictures/owl/{number}.nef").write_bytes(b"raw")
    assert "no pictures in pictures/owl, among whose files are 5 .nef; add some" in refusal(project, "split")


def test_two_folders_for_one_part_are_refused(project: Project, refusal: Refusal) -> None:
    give_split(project, "train", "val", "validation")
    assert "has val and validation, both for val; merge them" in refusal(project, "split")


def test_a_part_without_class_folders_is_refused(project: Project, refusal: Refusal) -> None:
    pictures = give_split(project, "train", "test")
    for path in list((pictures / "test").glob("*/*.png")):
        path.rename(pictures / "test" / f"{path.parent.name} {path.name}")
    for name in ("cat", "dog"):
        (pictures / "test" / name).rmdir()
    assert "pictures/test holds no folders, so its pictures have no class; move it away" in refusal(project, "split")


def test_a_part_beside_other_folders_is_refused_if_it_looks_like_a_split(project: Project, refusal: Refusal) -> None:
    pictures = give_split(project, "train", "test")
    make_pictures(pictures, ("annotations",))
    assert "has train and test, which look like a split, but beside them is annotations" in refusal(project, "split")


def test_classes_that_are_called_train_and_test_can_be_had(project: Project, refusal: Refusal) -> None:
    shutil.rmtree(project.path("pictures"))
    make_pictures(project.path("pictures"), ("train", "test"))
    assert "they hold no class folders" in refusal(project, "split")
    project.set("split.given", "ignore")
    assert project.run("split") == 0
    assert set(project.split_report()["classes"]) == {"train", "test"}


def test_a_class_called_train_beside_others_is_a_class(project: Project) -> None:
    make_pictures(project.path("pictures"), ("cat", "dog", "train"))
    assert project.run("split") == 0
    assert set(project.split_report()["classes"]) == {"cat", "dog", "train"}
