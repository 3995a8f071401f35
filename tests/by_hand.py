"""Formulas of statistics, written out from their sources and not from the code that is tested."""

import math
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson 1927: the proportions that a score test would not reject, the roots of a quadratic equation."""
    p = successes / count
    a, b, c = 1 + Z**2 / count, -(2 * p + Z**2 / count), p**2
    root = math.sqrt(max(b**2 - 4 * a * c, 0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def newcombe(e: int, f: int, g: int, h: int) -> tuple[float, float]:
    """Newcombe 1998 (Statistics in Medicine 17:2635), method 10, in its letters: e both, f first only, g second only.

    Of (e + g) / n - (e + f) / n: second minus first.
    """
    n = e + f + g + h
    l2, u2 = wilson(e + f, n)
    l3, u3 = wilson(e + g, n)
    p2, p3 = (e + f) / n, (e + g) / n
    if 0 in (e + f, g + h, e + g, f + h):
        phi = 0.0
    else:
        numerator = e * h - f * g
        corrected = max(numerator - n / 2, 0) if numerator > 0 else numerator
        phi = corrected / math.sqrt((e + f) * (g + h) * (e + g) * (f + h))
    # delta: down from the minuend and up from the subtrahend; epsilon: the other way.
    delta = math.sqrt((p3 - l3) ** 2 - 2 * phi * (p3 - l3) * (u2 - p2) + (u2 - p2) ** 2)
    epsilon = math.sqrt((u3 - p3) ** 2 - 2 * phi * (u3 - p3) * (p2 - l2) + (p2 - l2) ** 2)
    return p3 - p2 - delta, p3 - p2 + epsilon


def mcnemar(fixed: int, broken: int) -> float:
    """Twice the smaller tail of tossing a fair coin, at most 1."""
    tosses = fixed + broken
    tail = sum(math.comb(tosses, k) for k in range(min(fixed, broken) + 1)) / 2**tosses
    return min(1.0, 2 * tail)
