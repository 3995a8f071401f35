"""The memory that is there."""

from pathlib import Path

import pytest

from stages.common import machine as this


def test_the_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, none, absent = tmp_path / "memory.max", tmp_path / "limit_in_bytes", tmp_path / "absent"
    none.write_text("max\n")
    monkeypatch.setattr(this, "_LIMITS", (none, absent))
    machine = this.total_memory()
    assert machine > 2**26
    limit.write_text("1048576\n")
    monkeypatch.setattr(this, "_LIMITS", (limit, none))
    assert this.total_memory() == 2**20
    limit.write_text(f"{2**62}\n")
    assert this.total_memory() == machine
