"""Medians, ratios and tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def figure(value: float) -> str:
    """A number with as many digits as mean anything on such a machine."""
    if value != value or value == float("inf"):
        return "none"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def median_of(values: Sequence[float]) -> str:
    """The median and the spread."""
    low, high = figure(min(values)), figure(max(values))
    middle = figure(statistics.median(values))
    return middle if low == high else f"{middle} ({low}–{high})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ours to theirs, of the medians; the worst and the best of the rounds beside it."""
    rounds = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    middle = statistics.median(ours) / statistics.median(theirs)
    return f"{middle:.2f}× ({min(rounds):.2f}–{max(rounds):.2f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
