"""Format numbers, counts and Markdown for messages and reports."""

from collections.abc import Callable, Sequence

Write = Callable[[float], str]
_MOST_LISTED = 20


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Return `1 mistake` or `1,200 mistakes`."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def enumerate_names(names: Sequence[str], most: int = 10) -> str:
    """Return `cat, dog`; of more than `most` names the first ones and the count."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} ... ({len(names):,} in all)"


def percent(fraction: float) -> str:
    """Return a fraction as `95.26%`."""
    return f"{fraction:.2%}"


def percent_range(low: float, high: float) -> str:
    """Return an interval of fractions as `92.55% to 97.02%`."""
    return f"{percent(low)} to {percent(high)}"


def probability(value: float) -> str:
    """Return a probability or a share as `21.7%`, such that only certainty reads 100%."""
    if 0.9995 <= value < 1:
        return ">99.9%"
    return "<0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def number(value: float) -> str:
    """Return `0.1085`."""
    return f"{value:.4f}"


def signed(difference: float) -> str:
    """Return a difference of two numbers as `-0.0704`; never `-0.0000`."""
    return f"{difference:+z.4f}"


def points(difference: float) -> str:
    """Return a difference of two fractions in percentage points, as `+3.34 points`; never `-0.00 points`."""
    return f"{_signed_hundredths(difference)} points"


def points_range(low: float, high: float) -> str:
    """Return an interval of differences as `+1.32 to +5.88`, in percentage points."""
    return f"{_signed_hundredths(low)} to {_signed_hundredths(high)}"


def p_value(value: float) -> str:
    """Return `p = 0.021` or `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _signed_hundredths(fraction: float) -> str:
    return f"{100 * fraction:+z.2f}"


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
