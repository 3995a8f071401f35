"""Packages that only some commands need."""

from stages.common.cli import StageError


def require_packages(extra: str, *names: str) -> None:
    """Refuse to go on without packages of an extra of `pyproject.toml`."""
    missing = []
    for name in names:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise StageError(
            f"{extra} needs {' and '.join(missing)}: pip install --constraint constraints.txt --editable '.[{extra}]'"
        )
