"""What `mnemic train` measures: what a memory does to its base on plain text, and what it keeps of what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records


def tables(results: Path) -> dict[str, str]:
    """The tables of both, by name."""
    return {"drift": drift(records(results, "drift")), "told": told(records(results, "told"))}


def drift(found: Sequence[Record]) -> str:
    """Perplexity on held-out text under every condition, one row a run, and the commands."""
    if not found:
        return missing("the drift of a base")
    names = list(dict.fromkeys(name for record in found for name in record.measures["perplexity"]))
    rows, commands = [], []
    for record in found:
        perplexity = record.measures["perplexity"]
        rows.append(
            [f"{record.mechanism} on {record.host}", record.config["text"], record.config["held-out text"]]
            + [f"{perplexity[name]:.2f}" if name in perplexity else "" for name in names]
            + [f"{record.measures['tokens']:,}", f"{record.seconds['training'] / 60:.1f}"]
        )
        commands.append(f"`{record.command}`")
    header = ["memory and base", "trained on", "measured on", *names, "tokens", "training, minutes"]
    return (
        markdown(header, rows)
        + "\n\nPerplexity a token of text that was held out. Made by "
        + ", ".join(commands)
        + "."
    )


def _begun(config: dict[str, Any]) -> str:
    """The steps of the run that another one began with, as `800 + `."""
    if not (before := config.get("begin")):
        return ""
    return _begun(before) + f"{sum(lesson['steps'] for lesson in before['lessons']):,} + "


def told(found: Sequence[Record]) -> str:
    """Whole values right, one row for each question of each run."""
    if not found:
        return missing("told things")
    rows, commands = [], []
    names = list(dict.fromkeys(name for record in found for name in record.scores[0].controls))
    floors = found[0].scores[0].floors
    for record in sorted(found, key=lambda record: -record.scores[0].score):
        others = [other for other in found if other.mechanism == record.mechanism]
        for score in record.scores:
            shown = [score.score, *(score.controls.get(name) for name in names), *score.floors.values()]
            rows.append(
                [
                    ", ".join([f"`{record.mechanism}`", *_apart(record, others)]),
                    f"{score.details['facts']:.0f}",
                    f"{'1 to ' if score.length < 64 else ''}{score.length}",
                    "new" if score.details["held-out relations"] else "known",
                    *("-" if value is None else f"{100 * value:.1f}" for value in shown),
                    _begun(record.config) + f"{record.measures['loss'][-1][0]:,}",
                    f"{record.seconds['training'] / 60:.0f}",
                ]
            )
        commands.append(f"`{record.command}`")
    header = ["memory", "facts", "segments", "relations", "own", *names, *floors, "steps", "minutes"]
    note = f"Per cent of whole values right, {found[0].scores[0].examples} questions a row; names, values, wordings "
    note += "and text that training did not have. Made by " + ", ".join(dict.fromkeys(commands)) + "."
    return f"{markdown(header, rows)}\n\n{note}"


def _apart(record: Record, others: Sequence[Record]) -> list[str]:
    """The memory's settings in which records of one mechanism differ, where this one's says them."""
    own, settings = record.config["memory"], [other.config["memory"] for other in others]
    names = [name for name in own if any(each.get(name, own[name]) != own[name] for each in settings)]
    names += [name for name in own if any(name not in each for each in settings)]
    return [f"{name} {own[name]:g}" for name in names if own[name]]
