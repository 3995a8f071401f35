"""Labels from a table, and images that must not be parted."""

import csv
import io
import random
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import Project, make_images
from making import Refusal, said
from PIL import Image

from stages.images.division import assign
from stages.images.index import PARTS, Entry


def write_table(project: Project, rows: list[list[str]], name: str = "labels.csv") -> None:
    with project.path(name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    project.set("data.labels", name)


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


def test_folders_and_a_table_with_the_same_split_give_the_same_index(project: Project) -> None:
    assert project.run("split") == 0
    before = contents(project)
    write_table(project, flatten(project))
    assert project.run("split") == 0
    assert contents(project) == before
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


def test_paths_may_be_spelt_differently_and_data_path_may_be_a_link(project: Project) -> None:
    rows = flatten(project)
    image = project.path("images/img")
    (image / "c000.png").rename(image / "ca\u0308.png")  # decomposed on the disk, composed in the table
    (image / "c002.png").rename(image / "c002")
    project.path("link").symlink_to("images")
    rows[1][0], rows[2][0], rows[3][0] = "img/c\u00e4.png", str(project.path("link/img/c001.png")), "img/c002"
    project.set("data.path", "link")
    write_table(project, rows, "images/labels.csv")
    assert project.run("split") == 0
    paths = {one.path for entries in project.parts().values() for one in entries}
    assert {"img/ca\u0308.png", "img/c001.png", "img/c002"} <= paths
    assert (project.split_report()["left_out"], project.split_report()["ignored"]) == ({}, {})


def test_names_with_another_case_or_extension_are_found_or_suggested(project: Project) -> None:
    (project.path("images/dog/004.png")).rename(project.path("images/dog/only.png"))
    changes = {"cat/000.png": "CAT/000.PNG", "cat/001.png": "cat/001", "cat/002.png": "cat/002.jpg"}
    changes |= {"dog/003.png": "https://host/a//b.jpg", "dog/019.png": "pics/unheard of.png"}
    changes |= {"dog/only.png": "elsewhere/only.png"}
    paths = [path.relative_to(project.path("images")).as_posix() for path in project.path("images").glob("*/*")]
    write_table(project, [["path", "label"], *([changes.get(path, path), path[:3]] for path in paths)])
    project.set("split.rejected_limit", 0.5)
    assert "3 paths of labels.csv found by another case or extension" in said(project)
    assert {one["path"]: one["reason"] for one in project.split_report()["rejected"]} == {
        "elsewhere/only.png": "not there, but listed in labels.csv; did you mean dog/only.png?",
        "https://host/a//b.jpg": "a URL, and no file below data.path, in labels.csv",
        "pics/unheard of.png": "not there, but listed in labels.csv",
    }


PATHS = [f"{name}/{number:03d}.png" for name in "xy" for number in range(12)]


def table(**cells: Sequence[object]) -> str:
    """A table with a row for each image of two classes: its path, its class, and further cells in turn."""
    values = {"path": PATHS, "label": [path[0] for path in PATHS], **cells}
    names = [name for name in values if values[name]]
    lines = [",".join(f'"{values[name][n % len(values[name])]}"' for name in names) for n in range(len(PATHS))]
    return "\n".join([",".join(names), *lines])


PLAIN = "\n".join(["path,label", *(f"{path},{path[0]}" for path in PATHS)])
BOTH = "classes: x 12, y 12"
TABLES = {
    "as it should be": (PLAIN, BOTH),
    "semicolons": (PLAIN.replace(",", ";"), BOTH),
    "tabs": (PLAIN.replace(",", "\t"), BOTH),
    "a byte order mark": ("\ufeff" + PLAIN, BOTH),
    "lines of Windows": (PLAIN.replace("\n", "\r\n"), BOTH),
    "lines of an old Mac": (PLAIN.replace("\n", "\r"), BOTH),
    "all quoted": (table(split=[]), BOTH),
    "spaces around": (PLAIN.replace(",", " , "), BOTH),
    "capitals in the first line": (PLAIN.replace("path,label", "Path,LABEL"), BOTH),
    "backslashes": (PLAIN.replace("/", "\\"), BOTH),
    "dots in front": (PLAIN.replace("\n", "\n.//"), BOTH),
    "the folder in front": (PLAIN.replace("\n", "\nimages/"), BOTH),
    "the folder in front, with dots and two slashes": (PLAIN.replace("\n", "\n./images//"), BOTH),
    "other extensions": (PLAIN.replace(".png", ".JPG"), "24 paths of labels.csv found by another case or extension"),
    "no extensions": (PLAIN.replace(".png", ""), "24 paths of labels.csv found by another case or extension"),
    "empty lines": (PLAIN.replace("\n", "\n\n") + "\n,", BOTH),
    "every row twice": (PLAIN + PLAIN[PLAIN.index("\n") :], "24 rows of labels.csv repeated"),
    "two labels for an image": (PLAIN + "\nx/000.png,y", "1 rejected"),
    "an image that is not there": (PLAIN + "\nx/999.png,x", "1 rejected"),
    **{
        f"a label {label!r}": (PLAIN.replace("x/000.png,x", f"x/000.png,{label}"), "classes: x 11, y 12; 1 rejected")
        for label in ("", "NaN", "nan", "<NA>", "null")
    },
    "half of the images": ("\n".join(PLAIN.split("\n")[:20]), "5 images that the table does not list left out"),
    "numbers": (table(label=["0", "1", "0.0", "1.0"]), "are the same number taken for one class (0.0 as 0, 1.0 as 1)"),
    "a difference in case": (table(label="Dd"), "D and d taken for two classes, though they differ only in case"),
    "one label in another case": (PLAIN.replace("x/000.png,x", "x/000.png,X"), "class 'X' is too small to split"),
    "names with commas": (table(label=["tench, Tinca", "crane, Grus"]), "crane, Grus 12, tench, Tinca 12"),
    "a column age": (table(age="12345"), "columns of labels.csv not used: age: see"),
    "a column is_train": (table(is_train="01"), "is_train may be a split: if so, rename it to split"),
    "a column Fold": (table(Fold="01234"), "not used: fold; fold may be a split"),
    "a column usage": (table(usage=["Training", "test"]), "usage may be a split"),
    "a column which": (table(which=["train", "val"]), "which may be a split"),
    "a column patient_id": (table(patient_id=range(24)), "patient_id may say what belongs together"),
    "a column SceneID": (table(SceneID=range(24)), "sceneid may say"),
    "a split by other words": (table(split=["Training", "dev", "TEST"]), "split as given (train, val, test)"),
    "a split that is none": (table(split=["maybe"]), "labels.csv, line 2: split is 'maybe', should be train, val"),
    "a split in half of the rows": (table(split=["", "train"]), "has no split in 12 rows and one in the others"),
    "a split without train": (table(split=["val", "test"]), "has no row whose split is train"),
    **{
        f"several labels, {names[0]}": (table(label=names), "labels.csv has multi-label rows, such as")
        for names in (
            ["Cardiomegaly", "Emphysema", "Cardiomegaly|Emphysema", "Mass"],
            *(["a;b", "b;c", "a;c"], ["a, b", "b, c", "a", "c"], ["a;b", "a"], ["['a', 'b']", "['a']", "['b']"]),
        )
    },
    "one-hot columns": (
        table(label=[], x=["1.0", "0"], y=["0", "1"]),
        "its columns x, y are one-hot: put the name of the one that is 1 into a column label",
    ),
    "one class": (table(label="x"), "images holds one class only (x); add another"),
    "no first line": (PLAIN.partition("\n")[2], "should have one column path"),
    "no labels": (PLAIN.replace("label", "class"), "should have one column label in its first line, has path, class"),
    "a cell too many": (PLAIN + "\nx/001.png,x,more", "line 26: has 3 cells, the first line 2"),
    "a row without a path": (PLAIN + "\n,x", "line 26: has no path"),
    "a quote left open": (PLAIN.replace("y/005", '"y/005'), "error: data.labels: labels.csv, line"),
    "nothing": ("", "should have one column path in its first line, has nothing"),
    "a first line alone": ("path,label\n", "gives no image a label"),
    "no UTF-8": (PLAIN.replace(",x", ",\udce9"), "data.labels: labels.csv is not UTF-8"),
    "a way out of the folder": (PLAIN + "\n../x.png,x", "line 26: ../x.png is not below data.path, images"),
    "addresses": (PLAIN.replace("\n", "\nhttps://example.com/"), "all 12 images of class 'x' are bad"),
}


def split_by(folder: Path, text: str, given: str = "auto") -> str:
    """Split twelve images a class by a table; the line that it ends with, or that it is refused with."""
    project = Project(folder)
    make_images(project.path("images"), classes=("x", "y"), count=12, size=16)
    project.path("labels.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    project.set("data.labels", "labels.csv")
    project.set("split.given", given)
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        project.run("split")
    return output.getvalue().strip().splitlines()[-1]


@pytest.mark.parametrize("kind", TABLES)
def test_an_odd_table_is_understood_or_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    text, wanted = TABLES[kind]
    assert wanted in split_by(tmp_path, text)


@pytest.mark.parametrize("kind", [kind for kind in TABLES if kind.startswith("a split")])
def test_a_split_in_a_table_may_be_ignored(kind: str, tmp_path: Path) -> None:
    line = split_by(tmp_path, TABLES[kind][0], given="ignore")
    assert "the column split of labels.csv not used (split.given)" in line


def test_rows_and_images_that_a_table_leaves_out_are_counted(project: Project) -> None:
    rows = flatten(project)
    rows += [["img/gone.png", "cat"], rows[5]]
    rows[6][1] = ""
    rows += [[rows[7][0], "dog"]]
    del rows[8]
    project.set("split.rejected_limit", 0.1)
    project.path("images/labels.csv").write_text("")
    write_table(project, rows, name="images/labels.csv")
    line = said(project)
    assert "3 rejected, 0 groups of copies; 1 image that the table does not list left out; 1 row" in line
    report = project.split_report()
    assert report["rejected"] == [
        {"path": "img/c005.png", "reason": "listed without a label in labels.csv"},
        {"path": "img/c006.png", "reason": "listed with two labels, 'cat' and 'dog', in labels.csv"},
        {"path": "img/gone.png", "reason": "not there, but listed in labels.csv"},
    ]
    assert report["left_out"] == {"unlisted": 1}
    assert report["ignored"] == {}


def test_a_missing_table_is_refused(project: Project, refusal: Refusal) -> None:
    project.set("data.labels", "labels.csv")
    assert "data.labels: labels.csv does not exist; give a CSV file or null" in refusal(project, "split")
    project.path("images/labels.csv").write_text("")
    assert "did you mean data.labels=images/labels.csv?" in refusal(project, "split")
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
def test_groups_joined_by_copies_stay_in_one_part_and_classes_keep_their_fractions(project: Project, rule: str) -> None:
    make_scenes(project)
    project.set("split.group", rule)
    line = said(project)
    assert all(len(parts) == 1 for parts in parts_of_scenes(project).values())
    report = project.split_report()
    for name in ("cat", "dog"):
        assert report["classes"][name] == {"train": 84, "val": 12, "test": 24}
    assert report["groups"] == {"train": 21, "val": 3, "test": 6}
    assert "; groups: train 21, val 3, test 6; " in line
    header, *rows = project.path("data/index/test.csv").read_text().splitlines()
    assert header == "path,label,class,sha256,group"
    assert len({row.split(",")[-1] for row in rows}) == 6
    for scene in range(0, 10, 2):
        source = project.path(f"images/cat/scene {scene:02d}/s{scene:02d} 0.png")
        shutil.copy(source, project.path(f"images/cat/scene {scene + 1:02d}/s{scene + 1:02d} copy.png"))
    assert project.run("split") == 0
    parts = parts_of_scenes(project)
    assert all(len(parts[f"scene {n:02d}"] | parts[f"scene {n + 1:02d}"]) == 1 for n in range(0, 10, 2))


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


def test_a_column_of_the_table_can_name_the_groups(project: Project) -> None:
    header, *rows = flatten(project)
    table = [[*header, "group"], *([*row, f"patient {n % 20 // 2}"] for n, row in enumerate(rows))]
    table[1][2] = ""
    write_table(project, table)
    assert "the column group not used (split.group=column does)" in said(project)
    project.set("split.group", "column")
    assert "1 image in no group; groups: train 7, val 1, test 2" in said(project)
    patients = {row[0]: row[2] for row in table[1:] if row[2]}
    places = {(patients.get(one.path), part) for part, entries in project.parts().items() for one in entries}
    assert len([patient for patient, _ in places if patient]) == len({*patients.values()})


def test_groups_that_a_given_split_separates_are_counted(project: Project) -> None:
    make_scenes(project, scenes=6)
    for scene in range(6):
        for number, part in enumerate(PARTS[: 2 + scene % 2]):
            for name in ("cat", "dog"):
                target = project.path(f"parted/{part}/{name}/scene {scene}")
                target.mkdir(parents=True)
                shutil.move(project.path(f"images/{name}/scene {scene:02d}/s{scene:02d} {number}.png"), target)
    project.set("data.path", "parted")
    project.set("split.group", "folder")
    assert "6 groups in more than one part of the split that is given" in said(project)


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
def test_groups_that_cannot_be_formed_are_refused(project: Project, refusal: Refusal, rule: str, message: str) -> None:
    project.set("split.group", rule)
    assert message in refusal(project, "split")
