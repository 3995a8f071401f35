"""Files written whole or not at all: bytes, text, JSON, CSV, dataclasses as JSON and CSV; SHA-256 of files."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from stages.common.cli import StageError


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_code(folder: Path, names: Iterable[str]) -> str:
    """Return a hash of Python files and of all Python files in folders, given relative to `folder`."""
    digest = hashlib.sha256()
    for name in names:
        for path in sorted((folder / name).rglob("*.py")) or [folder / name]:
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` to write to; at the end, flush it to disk and rename it over `path`.

    Raises OSError naming `path`, which is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def replaced_files(output: Path) -> Iterator[Path]:
    """Make a temporary folder; at the end, move its files into `output`, where all other files stay.

    If anything fails, `output` is unchanged.
    """
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        yield Path(name)
        output.mkdir(exist_ok=True)
        for file in sorted(Path(name).iterdir()):
            file.replace(output / file.name)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file, whole or not at all; raises what `whole_file` does."""
    with whole_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; bytes of file names that are not UTF-8 are kept (PEP 383)."""
    write_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (any JSON value)
    """Write indented JSON in the given order; raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """Write a table; numbers with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table; an empty file has neither. Raises OSError, ValueError."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            header, *rows = list(csv.reader(file)) or [[]]
        except csv.Error as error:
            raise ValueError(str(error)) from error
    return header, rows


Record = TypeVar("Record")


def write_table(path: Path, kind: type[Any], records: Iterable[Any]) -> None:
    """Write a CSV table with a column for each field of a dataclass; `None` is an empty cell."""
    write_csv(path, _columns(kind), map(astuple, records))


def read_table(path: Path, kind: type[Record], stage: str) -> list[Record]:
    """Read what `write_table` wrote; raises StageError, which says that `stage` writes it again, and OSError."""
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
