"""Folds: each image is tested in one of them."""

import hashlib
from collections import Counter

import pytest
from conftest import Project, make_images
from making import Refusal

from stages.common.cli import StageError
from stages.common.params import Split
from stages.images.division import divide
from stages.images.index import Entry, read_index


def entry(number: int, name: str, group: str = "", content: str | None = None) -> Entry:
    digest = hashlib.sha256((content or f"{name} {number}").encode()).hexdigest()
    return Entry(f"{name}/{number:04}.jpg", ["cat", "dog", "owl"].index(name), name, digest, group)


def images(counts: dict[str, int]) -> list[Entry]:
    return [entry(number, name) for name, count in counts.items() for number in range(count)]


def cut(entries: list[Entry], folds: int, val_size: float = 0.1, seed: int = 1) -> list[dict[str, list[Entry]]]:
    nowhere = dict.fromkeys((one.path for one in entries), "")
    settings = {"test_size": 0.2, "val_size": val_size, "rejected_limit": 0.05, "folds": folds}
    return [divide(entries, nowhere, Split(**settings, fold=fold), seed) for fold in range(folds)]


@pytest.mark.parametrize(("folds", "val_size"), [(5, 0.1), (2, 0.3), (3, 0.0), (10, 0.1)])
def test_each_image_is_tested_once_and_the_parts_have_their_sizes(folds: int, val_size: float) -> None:
    entries = images({"cat": 203, "dog": 97, "owl": 40})
    cuts = cut(entries, folds, val_size)
    tested = [one.path for parts in cuts for one in parts["test"]]
    assert sorted(tested) == sorted(one.path for one in entries)
    for parts in cuts:
        assert sorted(one.path for part in parts.values() for one in part) == sorted(one.path for one in entries)
        for name, count in Counter(one.class_name for one in entries).items():
            sizes = {part: sum(one.class_name == name for one in chosen) for part, chosen in parts.items()}
            assert abs(sizes["test"] - count / folds) <= 1
            assert abs(sizes["val"] - val_size * count) <= 1


def test_copies_and_groups_are_in_one_fold() -> None:
    entries = images({"cat": 60, "dog": 60})
    entries += [entry(100 + number, "cat", content="the same") for number in range(5)]
    entries += [entry(200 + number, name, f"scene {number % 8}") for name in ("cat", "dog") for number in range(40)]
    homes: dict[str, set[int]] = {}
    for fold, parts in enumerate(cut(entries, 5)):
        for one in parts["test"]:
            homes.setdefault(one.group or one.sha256, set()).add(fold)
        for key in ("train", "val"):
            held = {one.group for one in parts["test"] if one.group}
            assert not held & {one.group for one in parts[key]}
    assert {len(folds) for folds in homes.values()} == {1}


def test_a_few_added_images_move_hardly_any_other() -> None:
    entries = images({"cat": 500, "dog": 500})

    def fold_of(entries: list[Entry]) -> dict[str, int]:
        return {one.path: fold for fold, parts in enumerate(cut(entries, 5)) for one in parts["test"]}

    before, after = fold_of(entries), fold_of([*entries, *(entry(9000 + number, "cat") for number in range(10))])
    assert sum(before[path] != after[path] for path in before) < 20
    other = [{one.path for one in parts["test"]} for parts in cut(entries, 5, seed=2)]
    assert other != [{one.path for one in parts["test"]} for parts in cut(entries, 5)]


def test_too_few_images_or_groups_for_the_folds_are_refused() -> None:
    with pytest.raises(StageError, match="class 'owl' is too small to split: 4 different images, needs 5"):
        cut(images({"cat": 50, "owl": 4}), 5)
    large = [entry(number, "cat", "large" if number < 80 else f"{number}") for number in range(100)]
    with pytest.raises(StageError, match=r"split.folds: fold \d of 5 has no image of 'cat'"):
        cut([*large, *images({"dog": 50})], 5)


def test_a_fold_is_chosen_in_the_parameters(project: Project) -> None:
    project.set("split.folds", 4)
    tested = []
    for fold in range(4):
        project.set("split.fold", fold)
        assert project.run("split") == 0
        tested += [one.path for one in read_index(project.path("data/index/test.csv"))]
    assert len(tested) == len(set(tested)) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split.folds": 5, "split.fold": 5}, "fold should be less than folds, 5, is 5"),
        ({"split.folds": 1}, "split.folds: "),
        ({"split.folds": 2, "split.val_size": 0.5}, "1 / folds + val_size should be less than 1"),
    ],
)
def test_folds_out_of_range_are_refused(
    project: Project, refusal: Refusal, settings: dict[str, object], message: str
) -> None:
    for key, value in settings.items():
        project.set(key, value)
    assert message in refusal(project, "split")


def test_folds_of_a_given_split_are_refused(project: Project, refusal: Refusal) -> None:
    for part in ("train", "test"):
        make_images(project.path(f"given/{part}"), count=3, size=20 + len(part))  # other images in each
    project.set("data.path", "given")
    project.set("split.folds", 5)
    assert "split.folds: the test part is given" in refusal(project, "split")
