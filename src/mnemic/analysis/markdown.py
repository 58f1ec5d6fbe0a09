"""Pieces of Markdown that tables are made of."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from mnemic.bench.results import Record


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


def chance(probability: float) -> str:
    """A probability with what can be told of it."""
    return "<1e-9" if probability < 1e-9 else f"{probability:.1g}" if probability < 0.095 else f"{probability:.2f}"


def merged(columns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Columns, those whose cells are all the same as one under all their titles: `{"zeroed, fresh": [..]}`."""
    titles: dict[tuple[str, ...], list[str]] = {}
    for title, cells in columns.items():
        titles.setdefault(tuple(cells), []).append(title)
    return {", ".join(names): list(cells) for cells, names in titles.items()}


def provenance(found: Sequence[Record]) -> str:
    """In a sentence or two what the records lack that says which code, model and texts they are of."""
    changed = sum((record.commit or "").endswith("+changes") for record in found)
    outside = sum(record.commit is None for record in found)
    said = [
        (changed, "from source trees with changes that were not committed"),
        (outside, "from outside of a checkout"),
        (sum(not record.digests for record in found), "earlier ones, which name no model and no texts by a digest"),
    ]
    told = [f"{count} of {len(found)} records are {what}" for count, what in said if count]
    return ". ".join(told) + "." if told else "All records are of committed code, and name model and texts by digests."


def missing(what: str) -> str:
    """What stands where a result file is wanted."""
    return f"*Not measured yet: no result file for {what}.*"
