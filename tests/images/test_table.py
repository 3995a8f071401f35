"""Labels from a table, and images that must not be parted."""

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project
from PIL import Image

from stages.images.division import assign
from stages.images.index import PARTS, Entry

Refusal = Callable[[Project, str], str]


def write_table(project: Project, rows: list[list[str]], delimiter: str = ",", name: str = "labels.csv") -> Path:
    path = project.path(name)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    project.set("data.labels", name)
    return path


def flatten(project: Project) -> list[list[str]]:
    """Put all images into one folder; returns the rows of a table with their labels."""
    rows = [["path", "label"]]
    for path in sorted(project.path("images").glob("*/*.png")):
        name = f"img/{path.parent.name[0]}{path.name}"
        project.path("images/img").mkdir(exist_ok=True)
        path.rename(project.path("images") / name)
        rows.append([name, path.parent.name])
    for name in ("cat", "dog"):
        project.path(f"images/{name}").rmdir()
    return rows


def contents(project: Project) -> dict[str, set[tuple[str, int, str]]]:
    return {part: {(one.sha256, one.label, one.class_name) for one in rows} for part, rows in project.parts().items()}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("delimiter", "name"), [(",", "labels.csv"), ("\t", "labels.tsv"), (";", "labels.csv")])
def test_a_table_gives_the_same_split_as_class_folders(project: Project, delimiter: str, name: str) -> None:
    assert project.run("split") == 0
    before = contents(project)
    write_table(project, flatten(project), delimiter, name)
    assert project.run("split") == 0
    assert contents(project) == before


def test_a_split_in_a_table_in_folders_and_by_the_seed_give_the_same_index(project: Project) -> None:
    assert project.run("split") == 0
    before = contents(project)
    rows = [["path", "label", "split"]]
    rows += [[one.path, one.class_name, part] for part, entries in project.parts().items() for one in entries]
    write_table(project, rows)
    assert project.run("split") == 0
    assert contents(project) == before
    for path, name, part in rows[1:]:
        target = project.path("parted") / part / name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(project.path("images") / path, target)
    project.set("data.labels", None)
    project.set("data.path", "parted")
    assert project.run("split") == 0
    assert contents(project) == before


def test_what_spreadsheets_make_of_a_table_is_understood(project: Project) -> None:
    rows = flatten(project)
    text = "\ufeffLabel ; Path\r\n" + "".join(f" {label} ; {path} \r\n" for path, label in rows[1:]) + ";\r\n\r\n"
    project.path("labels.csv").write_text(text, encoding="utf-8")
    project.set("data.labels", "labels.csv")
    assert project.run("split") == 0
    assert project.split_report()["pictures"] == 40


def test_a_path_may_be_spelt_in_other_ways(project: Project) -> None:
    rows = flatten(project)
    image = project.path("images/img")
    (image / "c000.png").rename(image / "cä.png")  # decomposed on the disk, composed in the table
    rows[1][0] = "img/cä.png"
    rows[2][0] = "img\\c001.png"
    rows[3][0] = "./img//c002.png"
    rows[4][0] = str(image.resolve() / "c003.png")
    rows[5][0] = "images/img/c004.png"
    write_table(project, rows)
    assert project.run("split") == 0
    paths = {one.path for entries in project.parts().values() for one in entries}
    assert {"img/cä.png", "img/c001.png", "img/c002.png", "img/c003.png", "img/c004.png"} <= paths


def test_a_listed_file_needs_no_extension(project: Project) -> None:
    rows = flatten(project)
    image = project.path("images/img")
    (image / "c000.png").rename(image / "c000")
    rows[1][0] = "img/c000"
    write_table(project, rows)
    assert project.run("split") == 0
    assert project.split_report()["pictures"] == 40


def test_what_a_table_leaves_open_is_said_with_its_number(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    rows = flatten(project)
    rows += [["img/gone.png", "cat"], rows[5]]
    rows[6][1] = ""
    rows += [[rows[7][0], "dog"]]
    del rows[8]
    project.set("split.rejected_limit", 0.1)
    project.path("images/labels.csv").write_text("")
    write_table(project, rows, name="images/labels.csv")
    assert project.run("split") == 0
    said = last_line(capsys)
    assert "3 rejected, 0 groups of copies; 1 image that the table does not list left out; 1 row" in said
    report = project.split_report()
    assert report["rejected"] == [
        {"path": "img/c005.png", "reason": "listed without a label in labels.csv"},
        {"path": "img/c006.png", "reason": "listed with two labels, 'cat' and 'dog', in labels.csv"},
        {"path": "img/gone.png", "reason": "not there, but listed in labels.csv"},
    ]
    assert report["left_out"] == {"unlisted": 1}
    assert report["ignored"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[0].__setitem__(1, "class"),
            "should have one column label in its first line, has path, class",
        ),
        (lambda rows: rows.clear(), "should have one column path in its first line, has nothing"),
        (lambda rows: rows[3].append("more"), "line 4: has 3 cells, the first line 2"),
        (lambda rows: rows[3].__setitem__(0, ""), "line 4: has no path"),
        (lambda rows: rows[3].__setitem__(0, "../x.png"), "line 4: ../x.png is not below data.path, images"),
        (lambda rows: [row.__setitem__(1, "") for row in rows[1:]], "labels.csv gives no image a label"),
        (lambda rows: [row.__setitem__(1, "cat") for row in rows[1:]], "images holds one class only (cat)"),
        (lambda rows: rows[3].__setitem__(1, "CAT"), "class 'CAT' is too small to split"),
        (
            lambda rows: [
                row.__setitem__(slice(1, None), new)
                for row, new in zip(
                    rows,
                    [["cat", "dog"], *(["1.0", "0"] if row[1] == "cat" else ["0", "1"] for row in rows[1:])],
                    strict=True,
                )
            ],
            "its columns cat, dog are one-hot: put the name of the one that is 1 into a column label",
        ),
        (lambda rows: [row.__setitem__(0, f"x{row[0]}") for row in rows[1:]], "not there, but listed in labels.csv"),
    ],
)
def test_a_table_that_cannot_be_used(
    project: Project, refusal: Refusal, change: Callable[[list[list[str]]], object], message: str
) -> None:
    rows = flatten(project)
    change(rows)
    write_table(project, rows)
    assert message in refusal(project, "split")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train", "spare"], "line 3: split is 'spare', should be train, val or test"),
        (["train", ""], "has no split in 20 rows and one in the others"),
        (["val", "test"], "has no row whose split is train"),
    ],
)
def test_a_split_in_a_table_that_cannot_be_used(
    project: Project, refusal: Refusal, splits: list[str], message: str
) -> None:
    header, *rows = flatten(project)
    write_table(project, [[*header, "split"], *([*row, splits[n % 2]] for n, row in enumerate(rows))])
    assert message in refusal(project, "split")
    project.set("split.given", "ignore")
    assert project.run("split") == 0


def test_labels_of_a_table_may_differ_in_case_and_that_is_said(
    project: Project, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    project.path("images/dog").rename(project.path("images/Cat"))
    assert "or name a table as data.labels, in which case counts" in refusal(project, "split")
    project.path("images/Cat").rename(project.path("images/dog"))
    header, *rows = flatten(project)
    write_table(project, [header, *([path, label.replace("dog", "Cat")] for path, label in rows)])
    assert project.run("split") == 0
    line = last_line(capsys)
    assert "classes: Cat 20, cat 20" in line
    assert "Cat and cat taken for two classes, though they differ only in case" in line


@pytest.mark.parametrize("label", ["NaN", "", "<NA>", "null"])
def test_a_row_without_a_label_is_rejected_and_no_class(project: Project, label: str) -> None:
    rows = flatten(project)
    rows[3][1] = label
    write_table(project, rows)
    assert project.run("split") == 0
    assert list(project.split_report()["classes"]) == ["cat", "dog"]
    assert [one["reason"] for one in project.split_report()["rejected"]] == ["listed without a label in labels.csv"]


def test_a_table_that_is_not_there_or_not_utf8(project: Project, refusal: Refusal) -> None:
    project.set("data.labels", "labels.csv")
    assert "data.labels: labels.csv does not exist; give a CSV file or null" in refusal(project, "split")
    project.path("images/labels.csv").write_text("")
    assert "did you mean data.labels=images/labels.csv?" in refusal(project, "split")
    project.path("labels.csv").write_text("path,label\n", encoding="utf-16")
    assert "data.labels: labels.csv is not UTF-8" in refusal(project, "split")
    project.set("data.labels", "images")
    assert "data.labels: images is not a file" in refusal(project, "split")


def make_scenes(project: Project, scenes: int = 30, size: int = 4) -> None:
    """Each class folder holds folders of scenes, each seen in both classes."""
    shutil.rmtree(project.path("images"))
    for label, name in enumerate(("cat", "dog")):
        for scene in range(scenes):
            folder = project.path(f"images/{name}/scene {scene:02d}")
            folder.mkdir(parents=True)
            for number in range(size):
                colour = (100 * label + number, scene, 50)
                Image.new("RGB", (40, 40), colour).save(folder / f"s{scene:02d} {number}.png")


def parts_of_scenes(project: Project) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for part, entries in project.parts().items():
        for entry in entries:
            found.setdefault(entry.path.split("/")[1], set()).add(part)
    return found


@pytest.mark.parametrize("rule", ["folder", r"/s(\d+) ", r"^[^/]+/([^/]+)/"])
def test_groups_stay_in_one_part_and_classes_keep_their_fractions(
    project: Project, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    make_scenes(project)
    project.set("split.group", rule)
    assert project.run("split") == 0
    assert all(len(parts) == 1 for parts in parts_of_scenes(project).values())
    report = project.split_report()
    for name in ("cat", "dog"):
        assert report["classes"][name] == {"train": 84, "val": 12, "test": 24}
    assert report["groups"] == {"train": 21, "val": 3, "test": 6}
    assert "; groups: train 21, val 3, test 6; " in last_line(capsys)
    header, *rows = project.path("data/index/test.csv").read_text().splitlines()
    assert header == "path,label,class,sha256,group"
    assert len({row.split(",")[-1] for row in rows}) == 6


def test_uneven_groups_of_several_classes_come_near_the_fractions() -> None:
    for seed in range(20):
        drawn = random.Random(seed)
        entries = [
            Entry(f"{name}/{group}/{number}", label, name, f"{name}{group}{number}", f"group {group}")
            for group in range(60)
            for label, (name, most) in enumerate((("common", 20), ("rare", 4)))
            for number in range(drawn.randint(0, most))
        ]
        parts = assign(entries, 0.2, 0.1, seed)
        for name in ("common", "rare"):
            sizes = {part: sum(one.class_name == name for one in chosen) for part, chosen in parts.items()}
            for part, wanted in (("test", 0.2), ("val", 0.1)):
                assert abs(sizes[part] / sum(sizes.values()) - wanted) < 0.03
        groups = [{one.group for one in chosen} for chosen in parts.values()]
        assert sum(map(len, groups)) == len(set().union(*groups))


def test_the_whole_pipeline_runs_with_groups_and_the_report_says_what_they_mean(project: Project) -> None:
    make_scenes(project, scenes=6)
    project.set("split.group", "folder")
    assert project.run("split", "build_model", "train_head", "finetune", "evaluate", "plot") == 0
    text = project.path("metrics/report.md").read_text()
    assert "The test images are of 1 group (`split.group`, near-duplicates)" in text


def test_copies_join_groups(project: Project) -> None:
    make_scenes(project)
    for scene in range(0, 10, 2):
        source = project.path(f"images/cat/scene {scene:02d}/s{scene:02d} 0.png")
        shutil.copy(source, project.path(f"images/cat/scene {scene + 1:02d}/copy.png"))
    project.set("split.group", "folder")
    assert project.run("split") == 0
    parts = parts_of_scenes(project)
    for scene in range(0, 10, 2):
        assert parts[f"scene {scene:02d}"] == parts[f"scene {scene + 1:02d}"]
        assert len(parts[f"scene {scene:02d}"]) == 1


def test_an_added_group_moves_hardly_any_other(project: Project) -> None:
    make_scenes(project, scenes=60)
    project.set("split.group", "folder")
    assert project.run("split") == 0
    before = parts_of_scenes(project)
    shutil.copytree(project.path("images/cat/scene 00"), project.path("images/cat/scene 60"))
    for path in project.path("images/cat/scene 60").iterdir():
        Image.effect_noise((40, 40), 90).save(path)
    assert project.run("split") == 0
    after = parts_of_scenes(project)
    assert sum(after[scene] != part for scene, part in before.items()) <= 3


def test_the_column_of_a_table_can_name_the_groups(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = flatten(project)
    table = [[*header, "group"], *([*row, f"patient {n % 20 // 2}"] for n, row in enumerate(rows))]
    table[1][2] = ""
    write_table(project, table)
    assert project.run("split") == 0
    assert "the column group not used (split.group=column does)" in last_line(capsys)
    project.set("split.group", "column")
    assert project.run("split") == 0
    assert "1 image in no group; groups: train 7, val 1, test 2" in last_line(capsys)
    patients = {row[0]: row[2] for row in table[1:] if row[2]}
    parts: dict[str, set[str]] = {}
    for part, entries in project.parts().items():
        for entry in entries:
            if entry.path in patients:
                parts.setdefault(patients[entry.path], set()).add(part)
    assert all(len(found) == 1 for found in parts.values())


def test_groups_that_a_given_split_parts_are_counted(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    make_scenes(project, scenes=6)
    for part in PARTS:
        for name in ("cat", "dog"):
            shutil.copytree(project.path(f"images/{name}"), project.path(f"parted/{part}/{name}"))
    for number, path in enumerate(sorted(project.path("parted").rglob("*.png"))):
        Image.new("RGB", (40, 40), (number, number, 0)).save(path)
    shutil.rmtree(project.path("parted/test/cat/scene 00"))
    shutil.rmtree(project.path("parted/test/dog/scene 00"))
    project.set("data.path", "parted")
    project.set("split.group", "folder")
    assert project.run("split") == 0
    assert "6 groups in more than one part of the split that is given" in last_line(capsys)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("folder", "split.group: no image lies in a folder below that of its class"),
        ("column", "split.group: no table with a filled column group"),
        (r"patient(\d+)", r"split.group: 'patient(\\d+)' matches no image's path, such as 'cat/000.png'"),
        ("^(cat|dog)/", "split.group: class 'cat' lies in 1 group only, needs 3, one for each part"),
        ("folders", "split.group: should be null, folder, column or a regular expression that has one group in paren"),
        ("(a)(b)", "regular expression that has one group in parentheses, is '(a)(b)'"),
        ("(a", "regular expression that is valid"),
    ],
)
def test_groups_that_cannot_be_formed(project: Project, refusal: Refusal, rule: str, message: str) -> None:
    project.set("split.group", rule)
    assert message in refusal(project, "split")


def test_the_folder_of_a_table_may_be_reached_by_a_link(project: Project) -> None:
    rows = flatten(project)
    project.path("link").symlink_to("images")
    project.set("data.path", "link")
    write_table(project, rows)
    assert project.run("split") == 0
    assert project.split_report()["left_out"] == {}
