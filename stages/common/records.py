"""Dataclasses as files: a table with a row for each, or JSON. Each is written whole or not at all."""

from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from stages.common.cli import StageError
from stages.common.files import read_csv, write_csv, write_json

Record = TypeVar("Record")


def write_table(path: Path, kind: type[Any], records: Iterable[Any]) -> None:
    """Write a CSV table with a column for each field of a dataclass; `None` is an empty cell."""
    write_csv(path, _columns(kind), map(astuple, records))


def read_table(path: Path, kind: type[Record], stage: str) -> list[Record]:
    """Read what `write_table` wrote.

    Raises:
        StageError: it is no such table; `stage` writes it again.
        OSError: it is not there.
    """
    try:
        header, rows = read_csv(path)
        if header != _columns(kind):
            raise ValueError("unexpected columns")
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        values = [dict(zip(names, (cell or None for cell in row), strict=True)) for row in rows]
        return TypeAdapter(list[kind]).validate_python(values)  # type: ignore[valid-type]
    except ValueError as error:
        raise _unreadable(path, error, stage) from error


def write_record(path: Path, record: Any) -> None:  # noqa: ANN401 (any dataclass)
    """Write a dataclass, and those in it, as JSON."""
    write_json(path, asdict(record))


def read_record(path: Path, kind: type[Record], stage: str) -> Record:
    """Read what `write_record` wrote; raises what `read_table` does."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValueError as error:
        raise _unreadable(path, error, stage) from error


def _columns(kind: type[Any]) -> list[str]:
    return [field.name.replace("class_name", "class") for field in fields(kind)]


def _unreadable(path: Path, error: ValueError, stage: str) -> StageError:
    why = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return StageError(f"{path}: not what `{stage}` of this version writes ({why}); `dvc repro {stage}` writes it again")
