"""The split: what is taken in, what is left out, and who lands where."""

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, make_images
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from stages.images import collection, decode
from stages.images.division import assign, find_copies
from stages.images.index import PARTS, Entry, class_counts, count, read_index, write_index


def part_by(project: Project, column: str) -> dict[str, str]:
    return {getattr(entry, column): part for part, entries in project.parts().items() for entry in entries}


def rejected_of(project: Project) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in project.split_report()["rejected"]}


def test_the_extensions_include_torchvisions() -> None:
    assert set(IMG_EXTENSIONS) <= set(collection.EXTENSIONS)


def test_parts_are_disjoint_complete_and_stratified(project: Project) -> None:
    make_images(project.path("images"), ("cat", "dog", "owl"), count=30)
    assert project.run("split") == 0
    parts = project.parts()
    everything = [entry.path for entries in parts.values() for entry in entries]
    files = [path.relative_to(project.path("images")).as_posix() for path in project.path("images").glob("*/*")]
    assert sorted(everything) == sorted(files)
    assert len(set(everything)) == len(everything)
    for part, size in (("train", 21), ("val", 3), ("test", 6)):
        assert Counter(entry.class_name for entry in parts[part]) == {"cat": size, "dog": size, "owl": size}
    assert project.split_report()["classes"] == {
        name: {"train": 21, "val": 3, "test": 6} for name in ("cat", "dog", "owl")
    }
    assert {(entry.label, entry.class_name) for entry in parts["train"]} == {(0, "cat"), (1, "dog"), (2, "owl")}


def test_the_order_of_the_file_system_does_not_matter(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.run("split") == 0
    first = {part: project.path(f"data/index/{part}.csv").read_bytes() for part in PARTS}
    listdir, iterdir = os.listdir, Path.iterdir
    shuffled = random.Random(1)
    monkeypatch.setattr(os, "listdir", lambda path: shuffled.sample(names := listdir(path), len(names)))
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(iterdir(path))))
    assert project.run("split") == 0
    assert {part: project.path(f"data/index/{part}.csv").read_bytes() for part in PARTS} == first


def test_renamed_images_stay_in_their_part(project: Project) -> None:
    assert project.run("split") == 0
    before = part_by(project, "sha256")
    for number, path in enumerate(sorted(project.path("images/cat").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed {number:03d}.png"))
    assert project.run("split") == 0
    assert part_by(project, "sha256") == before


def test_the_seed_decides_the_split_which_may_have_its_own_seed(project: Project) -> None:
    def split(seed: int, own: int | None = None) -> dict[str, str]:
        project.set("seed", seed)
        project.set("split.seed", own)
        assert project.run("split") == 0
        return part_by(project, "path")

    first = split(42)
    assert split(7) != first
    assert split(42) == split(7, own=42) == first


def test_an_added_image_moves_at_most_a_few_others(project: Project) -> None:
    make_images(project.path("images"), count=100)
    assert project.run("split") == 0
    before = part_by(project, "path")
    Image.new("RGB", (40, 40), "red").save(project.path("images/cat/new.png"))
    assert project.run("split") == 0
    after = part_by(project, "path")
    assert sum(after[path] != part for path, part in before.items()) <= 2


def test_copies_share_a_part_and_those_in_two_classes_are_rejected(project: Project) -> None:
    project.set("split.rejected_limit", 0.1)
    shutil.copy(project.path("images/cat/000.png"), project.path("images/dog/stray.png"))
    for number in range(1, 13):
        shutil.copy(project.path(f"images/cat/{number:03d}.png"), project.path(f"images/cat/copy {number}.png"))
    assert project.run("split") == 0
    part = part_by(project, "path")
    for number in range(1, 13):
        assert part[f"cat/copy {number}.png"] == part[f"cat/{number:03d}.png"]
    assert project.split_report()["duplicates"][0] == ["cat/001.png", "cat/copy 1.png"]
    assert len(project.split_report()["duplicates"]) == 12
    assert project.split_report()["near_duplicates"] == []  # those of equal bytes are none
    assert rejected_of(project) == {
        "cat/000.png": "same bytes as dog/stray.png, which is in another class",
        "dog/stray.png": "same bytes as cat/000.png, which is in another class",
    }
    assert not {"cat/000.png", "dog/stray.png"} & part.keys()


def test_unreadable_files_huge_files_and_circular_links_are_left_out(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read everything, so the refusal is the file system's in name only.
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "000.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(decode, "MAX_BYTES", 10_000)
    Image.effect_noise((200, 200), 90).save(project.path("images/cat/huge.png"))
    project.path("images/cat/up").symlink_to("..")
    project.set("split.rejected_limit", 0.1)
    assert project.run("split") == 0
    assert rejected_of(project) == {
        "cat/000.png": "permission denied",
        "cat/huge.png": "larger than 10000 bytes",
        "cat/up": "a link that loops",
        "dog/000.png": "permission denied",
    }
    assert len(part_by(project, "path")) == 38


def test_worker_processes_report_the_same(project: Project) -> None:
    project.path("images/cat/text.jpg").write_text("no image")
    assert project.run("split") == 0
    outputs = [*project.path("data/index").iterdir(), project.path("metrics/split.json")]
    first = [path.read_bytes() for path in outputs]
    project.set("workers", 2)
    assert project.run("split") == 0
    assert [path.read_bytes() for path in outputs] == first


def entries(count: int, copies: int = 1) -> list[Entry]:
    return [
        Entry(f"{name}/{number}-{copy}.png", label, name, f"{name}{number}")
        for label, name in enumerate(("a", "b"))
        for number in range(count)
        for copy in range(copies)
    ]


@pytest.mark.parametrize("count", [3, 4, 5, 7, 10, 19, 39])
@pytest.mark.parametrize(("test_size", "val_size"), [(0.2, 0.1), (0.01, 0.01), (0.5, 0.49), (0.98, 0.01), (0.01, 0.98)])
def test_every_class_is_in_every_part(count: int, test_size: float, val_size: float) -> None:
    for copies in (1, 5):
        parts = assign(entries(count, copies), test_size, val_size, seed=1)
        for part in PARTS:
            assert {entry.class_name for entry in parts[part]} == {"a", "b"}


def test_fractions_are_kept_to_the_nearest_image() -> None:
    parts = assign(entries(1000), 0.2, 0.1, seed=0)
    assert {part: len(chosen) for part, chosen in parts.items()} == {"train": 1400, "val": 200, "test": 400}


@pytest.mark.parametrize("copies", [90, 400])
def test_a_large_group_of_copies_goes_to_train(copies: int) -> None:
    images = [Entry(f"a/{number}.png", 0, "a", f"a{number}") for number in range(600)]
    images += [Entry(f"a/copy {number}.png", 0, "a", "same") for number in range(copies)]
    for seed in range(20):
        parts = assign(images, 0.2, 0.1, seed)
        for part, wanted in (("test", 0.2), ("val", 0.1)):
            assert wanted * len(images) - 1 <= len(parts[part]) <= 1.1 * wanted * len(images)


@pytest.mark.parametrize("sizes", [(400, 1, 1), (400, 300, 1), (400, 300, 200)])
def test_large_groups_of_copies_fill_each_part_if_a_class_has_nothing_else(sizes: tuple[int, ...]) -> None:
    images = [
        Entry(f"{name}/{group} {number}.png", label, name, f"{name}{group}")
        for label, name in enumerate(("a", "b"))
        for group, size in enumerate(sizes)
        for number in range(size)
    ]
    for seed in range(20):
        parts = assign(images, 0.2, 0.1, seed)
        assert all({entry.class_name for entry in parts[part]} == {"a", "b"} for part in PARTS)
        assert len(parts["train"]) == 2 * sizes[0]


def test_the_time_it_takes_is_proportional_to_the_number_of_images() -> None:
    classes, size = 500, 40
    images = [Entry(f"{n % classes}/{n}", n % classes, f"{n % classes:03d}", f"{n}") for n in range(classes * size)]
    started = time.process_time()
    counts = count(assign(images, 0.2, 0.1, seed=1))
    assert counts["000"] == {"train": 28, "val": 4, "test": 8}
    same = {f"{name}/{number}.png": "same bytes" for name in ("a", "b") for number in range(20_000)}
    _, contradictions = find_copies(same, {path: path[0] for path in same})
    assert len(contradictions) == 40_000
    assert time.process_time() - started < 4  # one look at all for each would take 20 s and more


def test_counts_of_many_classes_are_a_list_which_dvc_does_not_read_as_metrics(project: Project) -> None:
    names = tuple(f"class {number:02d}" for number in range(21))
    shutil.rmtree(project.path("images"))
    make_images(project.path("images"), names, count=4)
    assert project.run("split") == 0
    report = project.split_report()
    assert report["parts"] == {"train": 42, "val": 21, "test": 21}
    assert "classes" not in report
    assert report["class_counts"][20] == {"class": "class 20", "train": 2, "val": 1, "test": 1}
    assert class_counts(report) == {name: {"train": 2, "val": 1, "test": 1} for name in names}


def test_an_index_reads_back_as_written(tmp_path: Path) -> None:
    rows = [Entry('x,"\r\n y.png', 3, "ü,\n", "0" * 64), Entry(os.fsdecode(b"\xff.png"), 0, "a", "1" * 64)]
    write_index(tmp_path / "index.csv", rows)
    assert read_index(tmp_path / "index.csv") == rows
    assert (tmp_path / "index.csv").read_bytes().startswith(b"path,label,class,sha256\n")


WARNING = "warning: data.path: {} is in the repository, but neither ignored by git nor tracked by DVC"


def warning_of(project: Project, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert project.run("split") == 0
    return capsys.readouterr().err


def test_a_folder_of_images_that_git_would_commit_is_reported(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    assert warning_of(project, capsys) == ""  # no repository
    subprocess.run(["git", "init", "--quiet"], cwd=project.folder, check=True)
    assert WARNING.format("images") in warning_of(project, capsys)
    project.set("data.path", str(project.path("images")))
    assert WARNING.format(project.path("images")) in warning_of(project, capsys)
    subprocess.run(["git", "add", "--all"], cwd=project.folder, check=True)
    assert warning_of(project, capsys) == ""
    Image.new("RGB", (40, 40), "red").save(project.path("images/cat/new.png"))
    assert WARNING.format(project.path("images")) in warning_of(project, capsys)
    project.path(".gitignore").write_text("/images\n")  # as `dvc add` does
    assert warning_of(project, capsys) == ""
    project.path(".gitignore").unlink()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert warning_of(project, capsys) == ""
    project.set("data.path", str(make_images(tmp_path_factory.mktemp("elsewhere"))))
    assert warning_of(project, capsys) == ""
