"""The pictures of `memoria_engrams.py`. They need `mnemic[plot]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memoria_engrams_history import PAPER, PUBLISHED, History, SeenTwice, ages, autocorrelation
from mnemic.inspect.engram_pictures import panels, save
from mnemic.inspect.engrams import Level, require

COLOURS = ("#1f5fa8", "#d1701c", "#2a8f6d", "#8d5a9e", "#444444")
"""Blue, orange, green, purple, grey: apart in hue and in lightness, for readers who do not see red and green apart."""
MARKERS = "os^Dv"


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours that are numbers."""
    known = ~np.isnan(values)
    ones = np.ones(width)
    total = np.convolve(np.where(known, values, 0), ones, "same")
    return np.divide(
        total, np.convolve(known, ones, "same"), out=np.full(len(values), np.nan), where=known & (total > 0)
    )


def draw_ages(histories: Mapping[str, History], path: str | Path, title: str) -> Path:
    """Figure 5, a panel for each history: how old the reminded long-term engrams are, step by step."""
    figure, axes = panels(1, len(histories), size=(1.2 + 3.1 * len(histories), 3.7), sharey=True)
    for panel, (name, history), colour in zip(axes[0], histories.items(), COLOURS, strict=False):
        found = ages(history)
        width = max(1, len(found.step) // 60)
        panel.plot(found.step, found.step, color="#bbbbbb", linestyle=":", linewidth=1)
        low, high = _smooth(found.low, width), _smooth(found.high, width)
        panel.fill_between(found.step, low, high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(found.step, _smooth(found.alive, width), color="#444444", linestyle="--", linewidth=1.2)
        panel.plot(found.step, _smooth(found.mean, width), color=colour, linewidth=2.2)
        panel.set_title(name, fontsize=10, color=colour)
        panel.set_xlabel("segments read")
        panel.set_xlim(0, found.step[-1])
        panel.set_ylim(0, found.step[-1])
    axes[0, 0].set_ylabel("age of long-term engrams, segments")
    patches, lines = require("matplotlib.patches"), require("matplotlib.lines")
    figure.legend(
        handles=[
            lines.Line2D([], [], color="#333333", linewidth=2.2, label="reminded, mean"),
            patches.Patch(color="#333333", alpha=0.18, label="reminded, 10th to 90th percentile"),
            lines.Line2D([], [], color="#444444", linestyle="--", linewidth=1.2, label="all alive, mean"),
            lines.Line2D([], [], color="#bbbbbb", linestyle=":", label="as old as the stream"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8.5,
    )
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def draw_autocorrelation(
    histories: Mapping[str, History], path: str | Path, title: str, *, longest: int = 30, since: int = 0
) -> Path:
    """Figure 6, long-term memory beside short-term memory, with the paper's and the published code's values."""
    figure, axes = panels(1, 2, size=(9.6, 4.0), sharey=True)
    sides: tuple[tuple[Level, str], ...] = (("long", "long-term memory"), ("short", "short-term memory"))
    for panel, (level, name) in zip(axes[0], sides, strict=True):
        for (label, history), colour, marker in zip(histories.items(), COLOURS, MARKERS, strict=False):
            lags = range(1, longest + 1)
            shares = autocorrelation(history, level, lags, since=since)
            chance = autocorrelation(history, level, lags, since=since, chance=True)
            panel.plot(
                *_points(shares), color=colour, marker=marker, markersize=4.5, markevery=2, linewidth=1.8, label=label
            )
            panel.plot(*_points(chance), color=colour, linestyle=":", linewidth=1.1)
        if level == "long":
            panel.plot(*_points(PAPER), "*", color="#111111", markersize=10, label="the paper's table 7")
            panel.plot(*_points(PUBLISHED), "x", color="#111111", markersize=7, label="published code, synthetic input")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("lag, segments")
        panel.set_xlim(0, longest + 1)
    axes[0, 0].set_ylim(bottom=-2)
    axes[0, 0].set_ylabel("reminded that many segments before, too, %")
    lines = require("matplotlib.lines")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(lines.Line2D([], [], color="#333333", linestyle=":", linewidth=1.1))
    axes[0, 1].legend(handles, [*labels, "the same by chance"], loc="upper right", frameon=False, fontsize=8.5)
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _points(shares: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(shares), [100 * share for share in shares.values()]


def reading_colours(segments: int, between: int) -> dict[str, tuple[str, Callable[[dict[str, Any]], bool]]]:
    """Colours for `draw_graph` after a text was read twice: by the reading in which an engram was made."""
    return {
        "made in the first reading": ("#1f5fa8", lambda about: about["born"] < segments),
        "in between": ("#b0b0b0", lambda about: about["born"] < segments + between),
        "in the second reading": ("#d1701c", lambda about: True),
    }


def draw_seen_twice(found: Mapping[str, SeenTwice], path: str | Path, title: str, *, widest: int = 12) -> Path:
    """Figure 10 in numbers: what of the first reading is reminded in the second, against chance, and from where."""
    figure, axes = panels(1, 2, size=(9.6, 4.0))
    left, right = axes[0]
    for (label, twice), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
        segment = np.arange(1, twice.segments + 1)
        left.plot(segment, 100 * twice.first, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
        left.plot(segment, 100 * twice.first_by_chance, color=colour, linestyle=":", linewidth=1.2)
        near = {offset: share for offset, share in twice.by_offset.items() if abs(offset) <= widest}
        right.plot(*_points(near), color=colour, marker=marker, markersize=4, linewidth=1.8)
        right.axhline(100 * twice.any_engram, color=colour, linestyle=":", linewidth=1.2)
    left.set_title("of what is reminded, made in the first reading", fontsize=10)
    left.set_xlabel("segment of the second reading")
    left.set_ylabel("share of the reminded LTM engrams, %")
    left.set_ylim(bottom=0)
    right.set_title("of what is alive from the first reading, reminded", fontsize=10)
    right.set_xlabel("made this many segments after the one now read again")
    right.set_ylabel("share of the LTM engrams alive, %")
    right.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    right.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    lines = require("matplotlib.lines")
    handles.append(lines.Line2D([], [], color="#333333", linestyle=":", linewidth=1.2))
    figure.legend(
        handles,
        [*labels, "by chance: all long-term engrams alive"],
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
    )
    figure.suptitle(title, fontsize=11)
    return save(figure, path)
