"""Table and picture of the capacity probe. The picture needs `mnemic[plot]`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record

MODES = ("distinct", "rewrites")
AGE_PAIRS = 32
"""Number of pairs for which accuracy by age is drawn."""

STYLES: dict[str, dict[str, Any]] = {
    "sum": {"color": "#444444", "marker": "o"},
    "decay": {"color": "#c9a227", "marker": "v"},
    "delta": {"color": "#1f5fa8", "marker": "s"},
    "infini": {"color": "#d1701c", "marker": "^"},
    "infini-delta": {"color": "#a8324a", "marker": "D"},
    "armt": {"color": "#2a8f6d", "marker": "P"},
    "armt-uncorrected": {"color": "#8d5a9e", "marker": "X"},
}
DASHES = ("-", "--", ":")
"""For rules that are probed with several kinds of keys, in their order."""


def cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a rule a row: right answers in per cent with keys written once / with rewrites."""
    pairs = [str(count) for count in record.config["pairs"]]
    rows = []
    for rule in record.measures["rules"]:
        shape = " x ".join(str(size) for size in rule["shapes"]["weights"])
        found = [" / ".join(f"{100 * _mean(_at(rule[mode], count)):.1f}" for mode in MODES) for count in pairs]
        rows.append([rule["label"], shape, *found])
    return ["rule", "state", *(f"{count} pairs" for count in pairs)], rows


def table(records: Sequence[Record]) -> str:
    """The table for the documentation, with floors and how it was made."""
    if not records:
        return missing("capacity")
    record = records[0]
    header, rows = cells(record)
    pairs = [str(count) for count in record.config["pairs"]]
    floors = {mode: record.measures["floors"][mode] for mode in MODES}
    for name in _at(floors["distinct"], pairs[0]):
        found = [" / ".join(f"{100 * _at(floors[mode], count)[name]:.1f}" for mode in MODES) for count in pairs]
        rows.append([f"*{name}*", "", *found])
    each = [_at(rule[mode], count)["right"] for rule in record.measures["rules"] for mode in MODES for count in pairs]
    widest = max(max(values) - min(values) for values in each)
    return markdown(header, rows) + (
        "\n\nRight answers in per cent, keys written once / four times on average; floors in italics. Mean over "
        f"{len(record.config['seeds'])} seeds of up to {record.config['reads']:,} questions each; seeds lie at most "
        f"{100 * widest:.1f} points apart. Made by `{record.command}` in {record.seconds['processor']:.0f} seconds of "
        f"processor time ({record.machine['processor']})."
    )


def table_of_earlier(records: Sequence[Record]) -> str:
    """Answers that are a value which the key had before its last: what was not overwritten."""
    if not records:
        return missing("capacity")
    record = records[0]
    pairs = [str(count) for count in record.config["pairs"]]
    rows = [
        [rule["label"], *(f"{100 * statistics.mean(_at(rule['rewrites'], n)['earlier value']):.1f}" for n in pairs)]
        for rule in record.measures["rules"]
    ]
    return markdown(["an earlier value of the key, %", *(f"{count} pairs" for count in pairs)], rows)


def picture(records: Sequence[Record], path: str | Path) -> Path:
    """Accuracy over the number of pairs and by age, with keys written once and with rewrites; a PNG at `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    record = records[0]
    pairs = record.config["pairs"]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.6), layout="constrained", sharey=True)
    kinds: dict[str, int] = {}
    for rule in record.measures["rules"]:
        kind = kinds[rule["rule"]] = kinds.get(rule["rule"], -1) + 1
        style = {**STYLES[rule["rule"]], "linestyle": DASHES[kind % len(DASHES)], "linewidth": 1.5, "markersize": 4.5}
        for column, mode in enumerate(MODES):
            means = [100 * _mean(_at(rule[mode], count)) for count in pairs]
            axes[0, column].plot(pairs, means, label=rule["label"], **style)
            if AGE_PAIRS in pairs:
                ages = {int(each): counts for each, counts in _at(rule[mode], AGE_PAIRS)["ages"].items()}
                # a bin that few reads fall into says nothing
                known = [counts for _, counts in sorted(ages.items()) if counts[1] >= 100]
                places = [1 + total / asked for _, asked, total in known]
                axes[1, column].plot(places, [100 * right / asked for right, asked, _ in known], **style)
    for column, title in enumerate(("every key written once", "four writes a key, the last counts")):
        axes[0, column].set_title(title, fontsize=10.5)
        axes[0, column].set_xscale("log", base=2)
        axes[0, column].set_xticks(pairs, [str(count) for count in pairs])
        axes[0, column].set_xlabel("pairs")
        axes[1, column].set_xscale("log", base=2)
        ticks = [2**power for power in range(8 if column else 6)]
        axes[1, column].set_xticks(ticks, [str(tick) for tick in ticks])
        axes[1, column].set_xlabel(f"the key's last write, counted from the end; {AGE_PAIRS} pairs")
    for panel in axes.flat:
        panel.minorticks_off()
        panel.set_ylim(-3, 104)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("right answers, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def _at(by_count: dict[Any, Any], count: int | str) -> dict[str, Any]:
    """A cell by its number of pairs, which is text in a record that was read from a file."""
    return by_count[str(count)] if str(count) in by_count else by_count[int(count)]


def _mean(cell: dict[str, Any]) -> float:
    return statistics.mean(cell["right"])
