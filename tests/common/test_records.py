import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.common.cli import StageError
from stages.common.files import read_record, read_table, write_record, write_table
from stages.images.near_duplicates import Leak
from stages.scores import evaluation, metrics
from stages.scores.calibration import Calibrations, measure_calibrations
from stages.scores.evaluation import BalancedGain, ClassScores, NearDuplicates
from stages.scores.predictions import Predictions
from stages.scores.suspects import Suspect
from stages.scores.verdict import compare
from stages.training.line import Point
from stages.training.search import Candidate

TABLES: dict[type[Any], list[Any]] = {
    Point: [Point(0.0, 0.3, 0.9, 1.1), Point(0.1, math.inf, 0.5, 1.0)],
    Candidate: [Candidate(1.0, None, True, 0.3, 0.9), Candidate(None, 2e-3, False, 0.4, 0.8)],
    ClassScores: [ClassScores(0, "a,b", 2, 0.5, 0.5, 2 / 3, 1.0), ClassScores(1, "7", 0, 0.0, None, None, None)],
    Suspect: [Suspect("cat/1,2.jpg", "cat", 0.0123, 'd"og', 0.9877), Suspect("b.jpg", "dog", 0.4, "cat", 0.6, "drop")],
    Leak: [Leak("b\udcff.jpg", "c.jpg", 0.98)],
}


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: str(kind.__name__))
def test_every_table_reads_back_as_written_and_a_different_one_is_refused(kind: type[Any], tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_table(path, kind, TABLES[kind])
    assert read_table(path, kind, "plot") == TABLES[kind]
    header, row, *_ = path.read_text(errors="surrogateescape").splitlines()
    for damaged in ("", "a,b\n", f"{header}\n{row},more\n", f"{header}\n{','.join('x' * len(header.split(',')))}\n"):
        path.write_text(damaged, errors="surrogateescape")
        with pytest.raises(StageError, match=r"table\.csv: not what .*`dvc repro plot` writes it again$"):
            read_table(path, kind, "plot")


def test_scores_and_calibrations_read_back_as_written(tmp_path: Path) -> None:
    labels = np.arange(20) % 2
    values = np.full((20, 2), 0.5) + np.where(np.arange(2) == labels[:, None], 0.3, -0.3)
    scores = metrics.score(labels, values)
    found = evaluation.Evaluation(
        scores, scores, compare(labels, values, values), NearDuplicates(0.9, 0, 0, 0.5, None), None, ["Never: owl."]
    )
    for one in (found, replace(found, balanced=BalancedGain(0.5, 0.6, 0.1, -0.1, 0.3))):
        evaluation.write_evaluation(tmp_path, one)
        assert evaluation.read_evaluation(tmp_path) == one
    path, predictions = tmp_path / "calibration.json", Predictions([""] * 20, labels, ["cat", "dog"], values, values)
    calibrations = measure_calibrations(predictions, (1.0, 1.3), ("a", "b"), (labels, values))
    write_record(path, calibrations)
    assert read_record(path, Calibrations, "evaluate") == calibrations
    content = json.loads(path.read_text())
    for damaged in ("", "[]", json.dumps(content | {"head": 3}), json.dumps(content | {"coverage": {}})):
        path.write_text(damaged)
        with pytest.raises(StageError, match=r"calibration\.json: .*`dvc repro evaluate` writes it again"):
            read_record(path, Calibrations, "evaluate")
