"""Pieces of Markdown that tables are made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean and, in brackets, least and most."""
    if not values:
        return "-"
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1 or max(values) == min(values):
        return mean
    return f"{mean} ({scale * min(values):.{digits}f}-{scale * max(values):.{digits}f})"


def missing(what: str) -> str:
    """What stands where a result file is wanted."""
    return f"*Not measured yet: no result file for {what}.*"
