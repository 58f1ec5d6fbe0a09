"""Pictures of what a Memoria memory does, from what `mnemic.inspect.engrams` finds. Needs `mnemic[plot]`."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemic.inspect.engrams import require, ring

if TYPE_CHECKING:
    import networkx as nx

COLOURS = ("#1f5fa8", "#d1701c", "#2a8f6d", "#8d5a9e", "#444444")
"""Blue, orange, green, purple, grey: apart in hue and in lightness, for readers who do not see red and green apart."""
MARKERS = "os^Dv"
LEVEL_COLOURS = {"long": "#1f5fa8", "short": "#e0a030", "working": "#7a7a7a"}
LEVEL_NAMES = {"long": "long-term", "short": "short-term", "working": "working"}
QUIET = "#8c8c8c"


def panels(*grid: int, size: tuple[float, float], **options: Any) -> tuple[Any, np.ndarray]:
    """A figure `size` inches large and its panels `[rows, columns]`, without frames above and to the right."""
    mpl = require("matplotlib")
    mpl.use("Agg")
    plt = require("matplotlib.pyplot")
    figure, axes = plt.subplots(*grid, figsize=size, layout="constrained", squeeze=False, **options)
    for panel in axes.flat:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def save(figure: Any, path: str | Path, dots: int = 150) -> Path:
    """Saves a PNG, `dots` an inch, and closes the figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dots)
    require("matplotlib.pyplot").close(figure)
    # a palette: hundreds of translucent lines make a file several times as large without
    require("PIL.Image").open(drawn).convert("RGB").quantize(256).save(path, format="PNG", optimize=True)
    return path


# --- the graph -------------------------------------------------------------------------------------------------------


def places(directed: nx.DiGraph) -> dict[int, tuple[float, float]]:
    """Where each engram is drawn: see `mnemic.inspect.engrams.ring`."""
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
    figure, axes = panels(1, len(graphs), size=(4.6 * len(graphs), 5.2))
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
    return save(figure, path, dots=110)


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
