"""Pieces of Markdown for a git host."""

from collections.abc import Callable

Write = Callable[[float], str]
_MOST_LISTED = 20


def bullets(lines: list[str]) -> str:
    """Return a list, one item per line."""
    return "\n".join(f"- {line}" for line in lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table; the first column is left-aligned, columns of numbers right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def first(rows: list[list[str]], file: str) -> list[list[str]]:
    """Return the first 20 rows of a table, and a row with the number of further ones in a file."""
    if len(rows) <= _MOST_LISTED:
        return rows
    return [*rows[:_MOST_LISTED], [f"... {len(rows) - _MOST_LISTED:,} more in `{file}`", *[""] * (len(rows[0]) - 1)]]


def cell(text: str) -> str:
    """Escape a class or file name for a table's cell."""
    escaped = "".join(f"\\{character}" if character in r"\`*_{}[]<>#|~$&" else character for character in text)
    return " ".join(escaped.split())


def code(value: object) -> str:
    """Write a parameter's value as code; within a table's cell a bar has to be escaped even there."""
    text = "null" if value is None else str(value)
    return f"`` {text} ``".replace("|", "\\|") if "`" in text else f"`{text}`".replace("|", "\\|")


def or_undefined(value: float | None, write: Write) -> str:
    """Write a number that may be undefined."""
    return "undefined" if value is None else write(value)
