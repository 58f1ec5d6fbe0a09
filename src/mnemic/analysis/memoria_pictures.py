"""Pictures of what a Memoria memory does, from what `mnemic.analysis.memoria` finds. Needs `mnemic[plot]`."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemic.analysis.memoria import PAPER, PUBLISHED, History, Level, SeenTwice, ages, autocorrelation, require, ring

if TYPE_CHECKING:
    import networkx as nx

COLOURS = ("#1f5fa8", "#d1701c", "#2a8f6d", "#8d5a9e", "#444444")
"""Blue, orange, green, purple, grey: apart in hue and in lightness, for readers who do not see red and green apart."""
MARKERS = "os^Dv"
LEVEL_COLOURS = {"long": "#1f5fa8", "short": "#e0a030", "working": "#7a7a7a"}
LEVEL_NAMES = {"long": "long-term", "short": "short-term", "working": "working"}
QUIET = "#8c8c8c"


def _figure(*grid: int, size: tuple[float, float], **options: Any) -> tuple[Any, np.ndarray]:
    mpl = require("matplotlib")
    mpl.use("Agg")
    plt = require("matplotlib.pyplot")
    figure, axes = plt.subplots(*grid, figsize=size, layout="constrained", squeeze=False, **options)
    for panel in axes.flat:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path, dots: int = 150) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dots)
    require("matplotlib.pyplot").close(figure)
    # a palette: hundreds of translucent lines make a file several times as large without
    require("PIL.Image").open(drawn).convert("RGB").quantize(256).save(path, format="PNG", optimize=True)
    return path


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
    figure, axes = _figure(1, len(histories), size=(1.2 + 3.1 * len(histories), 3.7), sharey=True)
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
    return _save(figure, path)


def draw_autocorrelation(
    histories: Mapping[str, History], path: str | Path, title: str, *, longest: int = 30, since: int = 0
) -> Path:
    """Figure 6, long-term memory beside short-term memory, with the paper's and the published code's values."""
    figure, axes = _figure(1, 2, size=(9.6, 4.0), sharey=True)
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
    return _save(figure, path)


def _points(shares: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(shares), [100 * share for share in shares.values()]


# --- the graph -------------------------------------------------------------------------------------------------------


def places(directed: nx.DiGraph) -> dict[int, tuple[float, float]]:
    """Where each engram is drawn: see `mnemic.analysis.memoria.ring`."""
    order = sorted(directed.nodes(data=True))
    spots = ring([about["born"] for _, about in order], [about["level"] for _, about in order])
    return {engram: (float(x), float(y)) for (engram, _), (x, y) in zip(order, spots, strict=True)}


def draw_graph(
    graphs: Mapping[str, nx.DiGraph],
    path: str | Path,
    title: str,
    *,
    most: int = 300,
    colours: Mapping[str, tuple[str, Callable[[dict[str, Any]], bool]]] | None = None,
) -> Path:
    """Figure 9, a panel for each graph: engrams on rings by level, oldest first, and their strongest ties.

    A tie has the colour of the engram that it leaves, and the stronger the thicker; of more than `most` every second,
    third or so is drawn. Engrams that are reminded have a tick. `colours` gives a colour and a test of an engram's
    attributes for each name in the legend, levels by default; the first that fits counts.
    """
    colours = colours or {
        LEVEL_NAMES[level]: (colour, functools.partial(_is_of, level)) for level, colour in LEVEL_COLOURS.items()
    }
    figure, axes = _figure(1, len(graphs), size=(4.6 * len(graphs), 5.2))
    for panel, (name, directed) in zip(axes[0], graphs.items(), strict=True):
        _draw_ties(panel, directed, most, list(colours.values()))
        reminded = sum(about["reminded"] for _, about in directed.nodes(data=True))
        panel.set_title(f"{name}: {len(directed):,} engrams, {reminded} reminded", fontsize=10)
    lines = require("matplotlib.lines")
    dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7}
    handles = [lines.Line2D([], [], color=colour, label=name, **dots) for name, (colour, _) in colours.items()]
    handles.append(lines.Line2D([], [], color="#111111", linestyle="", marker="|", label="reminded now"))
    columns = len(handles) if len(graphs) > 1 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path, dots=110)


def _is_of(level: str, about: dict[str, Any]) -> bool:
    return about["level"] == level


def _draw_ties(panel: Any, directed: nx.DiGraph, most: int, colours: list[Any]) -> None:
    lines = require("matplotlib.collections")
    place = places(directed)
    colour = {
        engram: next((colour for colour, fits in colours if fits(about)), QUIET)
        for engram, about in directed.nodes(data=True)
    }
    ties = list(directed.edges(data="weight"))
    ties = ties[:: max(1, -(-len(ties) // most))]
    along = np.linspace(0, 1, 24)[:, None]
    # curves that bend towards the middle of the circle
    curves = [
        (1 - along) ** 2 * place[i] + 2 * along * (1 - along) * 0.15 * np.add(place[i], place[j]) + along**2 * place[j]
        for i, j, _ in ties
    ]
    weights = np.array([weight for *_, weight in ties])
    panel.add_collection(
        lines.LineCollection(
            curves,
            colors=[colour[i] for i, *_ in ties],
            linewidths=0.3 + 1.0 * weights**2,
            alpha=0.15 + 0.35 * weights**2,
            zorder=1,
        )
    )
    engrams = sorted(directed.nodes(data=True))
    where = np.array([place[engram] for engram, _ in engrams])
    size = np.array([2.0 + 3.0 * np.log2(1 + about["fires"]) for _, about in engrams])
    panel.scatter(*where.T, s=size, c=[colour[engram] for engram, _ in engrams], linewidths=0, zorder=2)
    ticked = where[np.array([about["reminded"] for _, about in engrams], dtype=bool)]
    ticks = [(spot * (1 + 0.025 / norm), spot * (1 + 0.065 / norm)) for spot in ticked if (norm := np.hypot(*spot))]
    panel.add_collection(lines.LineCollection(ticks, colors="#111111", linewidths=0.9, zorder=3))
    panel.set_aspect("equal")
    panel.set_xlim(-1.08, 1.08)
    panel.set_ylim(-1.08, 1.08)
    panel.axis("off")
    for engram, word, align in ((engrams[0][0], "oldest", "right"), (engrams[-1][0], "newest", "center")):
        spot = np.array(place[engram])
        spot = spot - np.array([0.03, 0.0]) if align == "right" else spot * 1.13
        panel.annotate(word, spot, ha=align, va="center", fontsize=8, color="#555555")


# --- text seen twice -------------------------------------------------------------------------------------------------


def reading_colours(segments: int, between: int) -> dict[str, tuple[str, Callable[[dict[str, Any]], bool]]]:
    """Colours for `draw_graph` after a text was read twice: by the reading in which an engram was made."""
    return {
        "made in the first reading": ("#1f5fa8", lambda about: about["born"] < segments),
        "in between": ("#b0b0b0", lambda about: about["born"] < segments + between),
        "in the second reading": ("#d1701c", lambda about: True),
    }


def draw_seen_twice(found: Mapping[str, SeenTwice], path: str | Path, title: str, *, widest: int = 12) -> Path:
    """Figure 10 in numbers: what of the first reading is reminded in the second, against chance, and from where."""
    figure, axes = _figure(1, 2, size=(9.6, 4.0))
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
    return _save(figure, path)
