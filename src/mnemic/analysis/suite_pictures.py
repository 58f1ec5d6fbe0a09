"""Pictures of a suite: scores over length with the floors drawn in, and what recall costs. Needs `mnemic[plot]`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.analysis.suite_tables import FLOORS, NONE, by_case, floor, mechanisms_of, metrics, settings_of
from mnemic.bench.results import Record, Score

COLOURS = ("#1f5fa8", "#b5651d", "#2e7d32", "#8e3b8a", "#c9a227", "#00838f", "#c62828", "#6d4c41", "#5e7d1f", "#455a9d")
COLOURS += ("#e377c2", "#17becf", "#ff7f0e", "#9edae5", "#7f6084", "#a0d468")
STYLES = {"own segment": ("#bbbbbb", ":"), "last segment": ("#888888", ":"), "last 2 segments": ("#444444", ":")}
STYLES |= {"sample": ("#7b9e87", "--"), "without binding": ("#c77d7d", "--")}
assert set(STYLES) == set(FLOORS)


def colours(found: Sequence[Record]) -> dict[str, str]:
    """The same colour for a mechanism in every picture."""
    named = [name for name in mechanisms_of(found) if name != NONE]
    return {NONE: "#222222"} | {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(named)}


def draw_suite(found: Sequence[Record], folder: Path, name: str) -> list[Path]:
    """All pictures of a suite: `suite-NAME.png`, `suite-NAME-pareto.png`, and `suite-NAME-TASK.png` by depth."""
    if not found:
        return []
    made = [over_length(found, folder / f"suite-{name}.png", f"suite {name}: score over length")]
    made.append(pareto(found, folder / f"suite-{name}-pareto.png", f"suite {name}: what is gained, and what it costs"))
    return made + [heat(found, task, folder / f"suite-{name}-{task}.png") for task in depth_tasks(found)]


def over_length(found: Sequence[Record], path: Path, title: str) -> Path:
    """One panel a task: score over its axis, mean and range over seeds, every floor as a line."""
    plt = _pyplot()
    cases, colour = by_case(found), colours(found)
    panels = list(dict.fromkeys((task, settings) for task, settings, _ in cases))
    axes_of = {(record.task, settings_of(record)): record.measures.get("axis", "length") for record in found}
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(max(6.5, 3.1 * columns), 2.7 * lines + 0.9), squeeze=False)
    figure.set_layout_engine("constrained")
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        task, settings = panels[place]
        here = {length: found for (name, its, length), found in sorted(cases.items()) if (name, its) == panels[place]}
        unit = metrics(found)[task]
        _panel(axes, here, colour, 100 if unit == "%" else 1)
        axes.set_title(task if unit == "%" else f"{task}: {unit}, lower is better", fontsize=9)
        axes.set_xlabel(axes_of[task, settings], fontsize=8)
        if unit == "%":
            axes.set_ylim(-3, 104)
        axes.tick_params(labelsize=7.5)
        if place % columns == 0:
            axes.set_ylabel("score, %", fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles = [plt.Line2D([], [], color=value, marker="o", markersize=4, label=name) for name, value in colour.items()]
    handles += [
        plt.Line2D([], [], color=value, linestyle=dashes, label=f"floor: {name}")
        for name, (value, dashes) in STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5 if columns > 2 else 3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return _save(plt, figure, path)


def _panel(axes: Any, here: dict[int, dict[str, list[Score]]], colour: dict[str, str], scale: float) -> None:
    lengths = list(here)
    for name, value in colour.items():
        known = [(place, here[length][name]) for place, length in enumerate(lengths) if name in here[length]]
        if not known:
            continue
        at = [place for place, _ in known]
        scores = [[scale * score.score for score in seeds] for _, seeds in known]
        axes.plot(
            at, [statistics.mean(each) for each in scores], color=value, marker="o", markersize=3.5, linewidth=1.6
        )
        axes.fill_between(at, [min(e) for e in scores], [max(e) for e in scores], color=value, alpha=0.15, linewidth=0)
    for name, (value, dashes) in STYLES.items():
        line = [floor(next(iter(here[length].values()))[0], name) for length in lengths]
        known = [(place, scale * each) for place, each in enumerate(line) if each is not None]
        if len(known) == 1:
            axes.axhline(known[0][1], color=value, linestyle=dashes, linewidth=1)
        axes.plot([x for x, _ in known], [y for _, y in known], color=value, linestyle=dashes, linewidth=1)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    if len(lengths) == 1:
        axes.set_xlim(-0.6, 0.6)


def pareto(found: Sequence[Record], path: Path, title: str) -> Path:
    """What a mechanism adds to the host without a memory, mean over tasks, lengths and seeds, against the bytes of a
    stream's state and against the time a token takes beside the host's own.
    """
    plt = _pyplot()
    colour = colours(found)
    found = [record for record in found if record.measures.get("metric", "%") == "%"]
    without = {
        (case, place): score.score
        for case, by_mechanism in by_case(found).items()
        for place, score in enumerate(by_mechanism.get(NONE, []))
    }
    figure, pair = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained", sharey=True)
    for name in mechanisms_of(found):
        gains = [
            100 * (score.score - without[case, place])
            for case, by_mechanism in by_case(found).items()
            for place, score in enumerate(by_mechanism.get(name, []))
            if (case, place) in without
        ]
        if name == NONE or not gains:
            continue
        mine = [record for record in found if record.mechanism == name]
        sizes = statistics.median(record.state_bytes or 0 for record in mine)
        times = statistics.median(record.measures["cost"]["with memory / base"] for record in mine)
        for axes, x in zip(pair, (sizes, times), strict=True):
            axes.plot([x], [statistics.mean(gains)], "o", color=colour[name], markersize=7)
            axes.annotate(name, (x, statistics.mean(gains)), xytext=(6, 5), textcoords="offset points", fontsize=8.5)
    pair[0].set_xscale("log", base=2)
    pair[0].xaxis.set_major_formatter(lambda value, place: f"{value / 1024:,.3g} KiB")
    pair[0].xaxis.set_minor_locator(plt.NullLocator())
    pair[0].set_xlabel("bytes of state a stream (median over tasks)")
    pair[1].set_xlabel("time a token, with memory / host alone")
    pair[0].set_ylabel("points above the host without a memory")
    for axes in pair:
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.margins(x=0.3, y=0.2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    slowest = max((line.get_xdata()[0] for line in pair[1].lines if len(line.get_xdata()) == 1), default=2)
    pair[1].set_xlim(1, max(1.1, 1 + 1.35 * (slowest - 1)))
    figure.suptitle(title, fontsize=11)
    return _save(plt, figure, path)


DEPTH = "depth from "


def depth_tasks(found: Sequence[Record]) -> list[str]:
    """Tasks whose scores are known by depth."""
    return sorted({r.task for r in found for score in r.scores if any(key.startswith(DEPTH) for key in score.details)})


def heat(found: Sequence[Record], task: str, path: Path) -> Path:
    """Length x depth of the evidence, one panel a mechanism: the share of right answers, mean over seeds."""
    plt = _pyplot()
    found = [record for record in found if record.task == task]
    names = mechanisms_of(found)
    lengths = sorted({score.length for record in found for score in record.scores})
    starts = sorted(
        {int(key[len(DEPTH) :]) for r in found for s in r.scores for key in s.details if key.startswith(DEPTH)}
    )
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(1.2 + (0.7 + 0.55 * len(lengths)) * len(names), 3.0),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axes, name in zip(panels[0], names, strict=True):
        cells = [
            [
                statistics.mean(
                    [
                        100 * score.details[f"{DEPTH}{start}"]
                        for record in found
                        for score in record.scores
                        if record.mechanism == name and score.length == length and f"{DEPTH}{start}" in score.details
                    ]
                    or [float("nan")]
                )
                for length in lengths
            ]
            for start in starts
        ]
        image = axes.imshow(cells, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                if value == value:
                    dark = value < 55
                    axes.text(
                        column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if dark else "k"
                    )
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7.5)
        axes.set_yticks(range(len(starts)), [f"{start}" for start in starts], fontsize=7.5)
        axes.set_title(name, fontsize=9.5)
    panels[0][0].set_ylabel("depth from, %", fontsize=8)
    figure.supxlabel("tokens of context", fontsize=8)
    figure.colorbar(image, ax=panels[0].tolist(), label="right, %", shrink=0.9)
    figure.suptitle(f"{task}: length x depth", fontsize=11)
    return _save(plt, figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
