"""A result against the last committed one."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.scores.predictions import Predictions, compare_with_committed, write_predictions


def commit(folder: Path) -> None:
    for command in (["add", "-A"], ["commit", "-m", "run"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("classes", [2, 3, 25])
def test_two_results_are_compared_on_the_test_images_of_both(tmp_path: Path, classes: int) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    table, names = tmp_path / "predictions.csv", [f"class {number}" for number in range(classes)]
    labels = np.arange(10) % 2

    def predicted(right: str, first: int) -> Predictions:
        given = np.where([letter == "1" for letter in right], labels, 1 - labels)
        values = np.full((10, classes), 0.1 / classes)
        values[np.arange(10), given] = 1 - values[:, 1:].sum(axis=1)
        return Predictions([f"{first + place}.png" for place in range(10)], labels, names, values, values)

    before = predicted("1110000011", 0)
    write_predictions(table, before)
    assert compare_with_committed(table, before) is None
    commit(tmp_path)
    assert compare_with_committed(table, before) is None
    # Of images 4 to 9: 0, 0, 0, 0, 1, 1 before, and now 1, 1, 1, 0, 0, 1.
    after = predicted("1110010000", 4)
    expected = (
        "On 6 test images of both this result and the last committed one: fine-tuned 33.33% -> 66.67%, 3 fixed, 1"
    )
    assert str(compare_with_committed(table, after)).startswith(expected)
    # Two labels are corrected: what was predicted counts by them, before and now.
    corrected = replace(after, labels=np.where(np.arange(10) < 2, 1 - labels, labels))
    expected = "last committed one, by the labels of now (2 changed): fine-tuned 66.67% -> 33.33%, 1 fixed, 3 broken."
    assert str(compare_with_committed(table, corrected)).endswith(expected)
    write_predictions(table, after)
    commit(tmp_path)
    assert compare_with_committed(table, after) is None
    elsewhere = replace(after, paths=[f"other {path}" for path in after.paths])
    assert compare_with_committed(table, elsewhere) is None
