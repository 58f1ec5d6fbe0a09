"""Tables of the comparison with public packages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record


def cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a pair at a shape each: package / ours in parameters, time and peak of memory."""
    threads = record.config["threads"]
    header = ["pair", "shape", "parameters, M", f"ms, {_threads(threads[0])}"]
    header += [f"times faster, {_threads(count)}" for count in threads]
    header += ["peak, MiB", "our peak / theirs"]
    rows = []
    for label in record.config["shapes"]:
        for name, pair in record.measures["pairs"].items():
            found = pair["shapes"][label]
            first = found["threads"][str(threads[0])]["ms"]
            size, peak = found["parameters"], found["peak bytes"]
            rows.append(
                [
                    name,
                    label,
                    f"{size['package'] / 1e6:.2f} / {size['ours'] / 1e6:.2f}" if size["ours"] else "none",
                    f"{first['package']:,.0f} / {first['ours']:,.0f}",
                    *(_faster(found["threads"][str(count)]) for count in threads),
                    f"{peak['package'] / 2**20:,.0f} / {peak['ours'] / 2**20:,.0f}",
                    f"{peak['ours / package']:.2f}",
                ]
            )
    return header, rows


def table(records: Sequence[Record]) -> str:
    """The table for the documentation: times, and how they were made."""
    if not records:
        return missing("the packages")
    record = records[0]
    sentences = [
        "A pair of numbers is the package's / ours. Times faster: the median of the ratios of "
        f"{record.config['runs']} alternating steps, with the least and the most.",
        *(f"{_shape(label, shape)}." for label, shape in record.config["shapes"].items()),
        *(f"`{name}` was skipped: {reason}." for name, reason in record.measures["skipped"].items()),
        f"Made by `{record.command}` on {record.machine['cores']} {record.machine['processor']} cores with torch "
        f"{record.versions['torch']} and transformers {record.versions['transformers']}.",
    ]
    return markdown(*cells(record)) + "\n\n" + " ".join(sentences)


def table_of_pairs(records: Sequence[Record]) -> str:
    """What stands against what, and what differs."""
    if not records:
        return missing("the packages")
    rows = [
        [name, f"{pair['package']} {pair['version']}", f"{pair['mechanism']}; {pair['scope']}", pair["differs"]]
        for name, pair in records[0].measures["pairs"].items()
    ]
    return markdown(["pair", "package", "ours", "what differs"], rows)


def _faster(found: dict[str, Any]) -> str:
    wall = found["package / ours"]
    return f"**{wall['median']:.2f}** ({wall['least']:.2f}-{wall['most']:.2f})"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _shape(label: str, shape: dict[str, int]) -> str:
    return (
        f"*{label}*: batch {shape['batch']}, {shape['segments']} segments of {shape['segment']} tokens, "
        f"width {shape['width']}, {shape['depth']} blocks, {shape['heads']} heads, vocabulary {shape['vocabulary']}, "
        f"{shape['slots']} memory slots"
    )
