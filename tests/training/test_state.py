"""The key of a stopped run's state: the code that training uses, by its place, and what the stage depends on."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import stages
from stages.training.resume import StateFile

pytestmark = pytest.mark.usefixtures("cold_cache")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, which the state is keyed by."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stages, "__path__", [str(tmp_path / "stages")])
    return tmp_path / "stages"


def key(*depends_on: object) -> str:
    return StateFile(torch.device("cpu"), 1.0, list(depends_on)).path.name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("report/page.py", False),
        ("scores/metrics.py", False),
        ("plot.py", False),
        ("common/files.py", True),
        ("images/decode.py", True),
        ("network/objective.py", True),
        ("training/loop.py", True),
        ("training/__init__.py", True),
        ("common/__init__.py", True),
    ],
)
def test_only_code_that_training_uses_changes_the_key(code: Path, name: str, changes: bool) -> None:
    before = key()
    (code / name).write_text(f"{(code / name).read_text()}# changed\n")
    assert (key() != before) == changes


def test_two_files_with_the_same_name_do_not_share_an_entry(code: Path) -> None:
    first, second = code / "common" / "__init__.py", code / "training" / "__init__.py"
    before, texts = key(), (first.read_text(), second.read_text())
    first.write_text(texts[1])
    second.write_text(texts[0])
    assert key() != before


def test_values_and_the_bytes_of_files_change_the_key(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = key(tmp_path / "a", {"lr": 0.1})
    assert key(tmp_path / "a", {"lr": 0.2}) != before
    (tmp_path / "a").write_text("2")
    assert key(tmp_path / "a", {"lr": 0.1}) != before
