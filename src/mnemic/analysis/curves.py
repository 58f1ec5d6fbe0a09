"""The recall curve: score over filler for every kind of question, with controls, floors and ceiling drawn in. Needs
`mnemic[plot]`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.bench.recall import KINDS, asked_for, places_of
from mnemic.bench.results import Record, Score

STYLES: dict[str, dict[str, Any]] = {
    "facts": {"color": "#1f5fa8", "marker": "o", "linewidth": 2.2},
    "first facts": {"color": "#2a9d8f", "marker": "<", "linewidth": 1.8},
    "second facts": {"color": "#7b4fa3", "marker": ">", "linewidth": 1.8},
    "corrected facts": {"color": "#c8553d", "marker": "D", "linewidth": 1.8},
}
TITLES = ("one segment of facts", "first of two", "second of two", "corrected: the new value")

CONTROLS: dict[str, dict[str, Any]] = {
    "zeroed": {"color": "#8c8c8c", "marker": "s"},
    "other stream": {"color": "#b5651d", "marker": "^"},
    "fresh": {"color": "#c9a227", "marker": "v"},
    "no memory": {"color": "#444444", "marker": "x"},
}


def recall_curve(records: Sequence[Record], path: str | Path, title: str) -> Path:
    """Draws the mean over seeds with its range where as much filler lies before, between and after the facts, and saves
    a PNG (150 dots an inch) at `path`. The controls are the highest of all kinds of questions.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scores: dict[tuple[str, int], list[Score]] = {}
    for score in (score for record in records for score in record.scores):
        places = places_of(score)
        if places.before == places.between == places.after and not places.anywhere and asked_for(score) in KINDS:
            scores.setdefault((asked_for(score), places.before), []).append(score)
    lengths = sorted({length for _, length in scores})
    figure, axes = plt.subplots(figsize=(7.8, 4.4), layout="constrained")

    def line(kind: str, pick: Any, label: str, **style: Any) -> None:
        values = [[100 * pick(score) for score in scores[kind, length]] for length in lengths]
        axes.plot(lengths, [statistics.mean(each) for each in values], label=label, **style)
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(lengths, low, high, color=style["color"], alpha=0.15, linewidth=0)

    for (kind, style), label in zip(STYLES.items(), TITLES, strict=True):
        line(kind, lambda score: score.score, label, **style)
    line("corrected facts", lambda score: score.details["old"], "corrected: the old value", color="#c8553d", ls="--")
    for name, style in CONTROLS.items():
        line("facts", lambda score, name=name: score.controls[name], name, linewidth=1.1, markersize=5, **style)
    first = scores["facts", lengths[0]][0]
    for name, value in first.floors.items():
        axes.axhline(100 * value, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(name, (lengths[-1], 100 * value), fontsize=7.5, color="#666666", ha="right", va="bottom")
    if first.ceiling is not None:
        ceiling = 100 * statistics.mean(s.ceiling for s in scores["facts", lengths[0]] if s.ceiling is not None)
        axes.axhline(ceiling, color="#2e7d32", linestyle="--", linewidth=1)
        axes.annotate("everything in one window", (lengths[0], ceiling), fontsize=7.5, color="#2e7d32", va="bottom")
    axes.set_xscale("symlog", linthresh=1, base=4)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_xlim(lengths[0] - 0.25, 1.3 * lengths[-1])
    axes.minorticks_off()
    tokens = first.tokens // places_of(first).total
    axes.set_xlabel(f"segments of filler before, between and after the facts, each ({tokens} tokens a segment)")
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
