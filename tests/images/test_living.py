"""A data set that grows: what was tested is never trained on, what changed is said, labels are corrected beside it."""

import csv
import subprocess
from pathlib import Path

import pytest
from conftest import Project, make_images
from making import Refusal, said

from stages.images.index import Entry


def git(project: Project, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *arguments]
    subprocess.run(command, cwd=project.folder, check=True, capture_output=True)


def commit(project: Project) -> None:
    git(project, "add", "params.yaml", "data/index", "metrics")
    git(project, "commit", "-m", "run")


def part_of(project: Project) -> dict[str, str]:
    return {entry.sha256: part for part, entries in project.parts().items() for entry in entries}


@pytest.fixture
def growing(tmp_path: Path) -> Project:
    """A repository whose split of 60 images is committed, and 60 others."""
    make_images(tmp_path / "images", count=60)
    project = Project(tmp_path)
    for name in ("cat", "dog"):
        for path in sorted((tmp_path / "images" / name).iterdir())[30:]:
            (tmp_path / "others" / name).mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "others" / name / path.name)
    git(project, "init", "-q")
    project.set("split.near_duplicates", "report")
    assert project.run("split") == 0
    commit(project)
    return project


def change(project: Project) -> None:
    """Add images of one class, remove some of the other, and move some from one to the other."""
    images, others = project.path("images"), project.path("others")
    for path in sorted((others / "cat").iterdir()):
        path.rename(images / "cat" / f"new {path.name}")
    tested = [entry for entry in project.parts()["test"] if entry.class_name == "dog"]
    trained = [entry for entry in project.parts()["train"] if entry.class_name == "dog"]
    for entry in [tested[0], *trained[:9]]:
        (images / entry.path).unlink()
    for entry in [tested[1], trained[-1]]:
        (images / entry.path).rename(images / "cat" / f"moved {Path(entry.path).name}")


def test_a_test_image_never_becomes_a_training_image_and_changes_are_reported(growing: Project) -> None:
    before = part_of(growing)
    change(growing)
    line = said(growing)
    after = part_of(growing)
    for kept in ("test", "val"):
        assert {after[digest] for digest, part in before.items() if part == kept and digest in after} == {kept}
    sizes = {
        name: [sum(entry.class_name == name for entry in entries) for entries in growing.parts().values()]
        for name in ("cat", "dog")
    }
    # Of 62 cats 12 are wanted for the test, of 18 dogs 4.
    assert sizes["cat"][2] in (12, 13)
    assert sizes["dog"][2] == 4
    changes = growing.split_report()["changes"]
    assert {key: changes[key] for key in ("added", "gone", "relabelled")} == {"added": 30, "gone": 10, "relabelled": 2}
    assert changes["test_gone"] == 1
    assert "since the last committed index 30 images added, 10 gone, 2 relabelled; test part +" in line

    # The same once more, and when it is committed.
    first = growing.split_report()
    for committed in (False, True):
        if committed:
            commit(growing)
        assert growing.run("split") == 0
        assert growing.split_report() == first
        assert part_of(growing) == after


def test_other_split_parameters_split_anew(growing: Project) -> None:
    before = part_of(growing)
    assert growing.run("split") == 0
    assert part_of(growing) == before
    assert growing.split_report()["changes"] == {}
    for key, value in (("seed", 1), ("split.test_size", 0.4)):
        growing.set(key, value)
        assert growing.run("split") == 0
        after = part_of(growing)
        assert any(part == "test" and after[digest] == "train" for digest, part in before.items()) or key != "seed"
        assert sum(part == "test" for part in after.values()) == (12 if key == "seed" else 24)


def test_another_data_set_reports_no_changes(growing: Project) -> None:
    growing.set("data.path", "others")
    assert growing.run("split") == 0
    assert growing.split_report()["changes"] == {}
    assert {part: len(entries) for part, entries in growing.parts().items()} == {"train": 42, "val": 6, "test": 12}


def write_corrections(project: Project, *rows: tuple[str, str]) -> None:
    project.set("data.corrections", "corrections.csv")
    with project.path("corrections.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "correction"), *((name, "?", to) for name, to in rows)])


def test_corrected_labels_are_used_and_the_images_stay(project: Project) -> None:
    cats, dogs = (sorted(project.path(f"images/{name}").iterdir()) for name in ("cat", "dog"))
    copy = dogs[3].with_name("copy.png")
    copy.write_bytes(cats[3].read_bytes())
    write_corrections(
        project,
        (f"cat/{cats[0].name}", "dog"), (f"dog/{dogs[0].name}", "drop"), ("dog/copy.png", "drop"),
        (f"cat/{cats[1].name}", ""), ("cat/gone.png", "dog"),
    )  # fmt: skip
    line = said(project)
    entries: dict[str, Entry] = {entry.path: entry for part in project.parts().values() for entry in part}
    assert entries[f"cat/{cats[0].name}"].class_name == "dog"
    assert entries[f"cat/{cats[1].name}"].class_name == "cat"
    assert f"cat/{cats[3].name}" in entries, "no longer in two classes"
    assert not {"dog/copy.png", f"dog/{dogs[0].name}"} & entries.keys()
    assert "1 label corrected, 2 images dropped by corrections.csv" in line
    assert "1 row of corrections.csv without an image" in line
    assert cats[0].exists()
    assert dogs[0].exists()


def test_corrections_that_cannot_be_applied_are_refused(project: Project, refusal: Refusal) -> None:
    name = f"cat/{next(project.path('images/cat').iterdir()).name}"
    write_corrections(project, (name, "horse"))
    assert f"data.corrections: corrections.csv: {name} should be horse, which is no class" in refusal(project, "split")
    write_corrections(project, (name, "dog"), (name, "drop"))
    assert f"data.corrections: corrections.csv, line 3: {name} has another correction above" in refusal(
        project, "split"
    )
    project.path("corrections.csv").write_text("path,label\na,b\n")
    assert "corrections.csv is no CSV with the columns path and correction" in refusal(project, "split")
    project.set("data.corrections", "none.csv")
    assert "data.corrections: none.csv does not exist; give a CSV file or null" in refusal(project, "split")
