"""The recall curve: score over distance, with every control, floor and ceiling drawn in. Needs `mnemic[plot]`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.bench.results import Record, Score

STYLES: dict[str, dict[str, Any]] = {
    "zeroed": {"color": "#8c8c8c", "marker": "s"},
    "other stream": {"color": "#b5651d", "marker": "^"},
    "fresh": {"color": "#c9a227", "marker": "v"},
    "no memory": {"color": "#444444", "marker": "x"},
}


def recall_curve(records: Sequence[Record], path: str | Path, title: str) -> Path:
    """Draws the mean over seeds with its range at every length and saves a PNG (150 dots an inch) at `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({score.length for record in records for score in record.scores})
    by_length = {n: [s for record in records for s in record.scores if s.length == n] for n in lengths}
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")

    def line(values: dict[int, list[float]], label: str, **style: Any) -> None:
        means = [100 * statistics.mean(values[n]) for n in lengths]
        axes.plot(lengths, means, label=label, **style)
        axes.fill_between(
            lengths,
            [100 * min(values[n]) for n in lengths],
            [100 * max(values[n]) for n in lengths],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )

    def values(pick: Any) -> dict[int, list[float]]:
        return {n: [pick(score) for score in scores] for n, scores in by_length.items()}

    line(values(lambda score: score.score), "with memory", color="#1f5fa8", marker="o", linewidth=2.2)
    for name, style in STYLES.items():
        line(values(lambda score, name=name: score.controls[name]), name, linewidth=1.1, markersize=5, **style)
    first: Score = by_length[lengths[0]][0]
    for name, value in first.floors.items():
        axes.axhline(100 * value, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(name, (lengths[-1], 100 * value), fontsize=7.5, color="#666666", ha="right", va="bottom")
    if first.ceiling is not None:
        ceiling = 100 * statistics.mean(s.ceiling for s in by_length[lengths[0]] if s.ceiling is not None)
        axes.axhline(ceiling, color="#2e7d32", linestyle="--", linewidth=1)
        axes.annotate("everything in one window", (lengths[0], ceiling), fontsize=7.5, color="#2e7d32", va="bottom")
    tokens = first.tokens // max(1, first.length) if first.length else None
    if lengths[0] > 0:
        axes.set_xscale("log", base=4)
        axes.set_xlim(lengths[0] / 1.7, lengths[-1] * 1.7)
    else:
        axes.set_xscale("symlog", linthresh=1, base=4)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    per = f" ({tokens} tokens each)" if tokens else ""
    axes.set_xlabel(f"segments of filler between fact and question{per}")
    axes.set_ylabel("answers exactly right, %")
    axes.set_ylim(-2, 106)
    axes.set_title(title, fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
