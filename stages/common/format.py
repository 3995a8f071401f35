"""Format numbers and counts for messages, tables and reports."""

from collections.abc import Sequence


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
