"""The table of what trained memories do to their bases on plain text."""

from __future__ import annotations

from collections.abc import Sequence

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record


def table(found: Sequence[Record]) -> str:
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
