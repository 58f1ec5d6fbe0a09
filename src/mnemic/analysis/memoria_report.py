"""The engram analyses of one text under several rules of reminding: run, recorded as JSON, drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemic.analysis import memoria_pictures as pictures
from mnemic.analysis.memoria import (
    PAPER,
    PUBLISHED,
    History,
    SeenTwice,
    autocorrelation,
    compare_readings,
    engram_graph,
    observe,
    summary,
)
from mnemic.attachment import attach
from mnemic.bench.results import Record
from mnemic.memories.memoria import MemoriaConfig
from mnemic.state import State

LONGEST_LAG = 30


@dataclass
class Analysis:
    """What was seen under each rule: `histories` of the whole text, `twice` of its beginning read again."""

    histories: dict[str, History]
    twice: dict[str, SeenTwice]
    since: int


def analyse(
    model: nn.Module,
    config: MemoriaConfig,
    weights: State | None,
    ids: Tensor,
    rules: Sequence[str],
    *,
    twice: int,
    keep: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Analysis:
    """Reads `ids [t]`, whole segments, under each rule with the same memory: `weights`, or untrained ones from `seed`.

    Then a new stream reads the first `twice` segments, as many more, and the first ones again. Ages and autocorrelation
    are those of the later half. The model has no memory when it comes and when it goes.
    """
    length = config.segment_length
    if 2 * twice * length > len(ids):
        raise ValueError(
            f"{twice} segments, as many between and the first again need {2 * twice} segments of {length} tokens, "
            f"the text has {len(ids) // length}; read {twice} segments fewer twice or more text"
        )
    histories, again = {}, {}
    repeated = torch.cat([ids[: 2 * twice * length], ids[: twice * length]])
    for rule in rules:
        torch.manual_seed(seed)
        attachment = attach(model, config.with_rule(rule))
        try:
            if weights is not None:
                attachment.memory.load_state_dict(weights)
            histories[rule] = observe(model, ids, keep=keep, progress=progress)
            read = observe(model, repeated, keep=[3 * twice], progress=progress)
            again[rule] = compare_readings(read, twice, twice)
        finally:
            attachment.detach()
    return Analysis(histories, again, since=len(ids) // length // 2)


def record_of(analysis: Analysis, config: MemoriaConfig, host: str, seed: int, **notes: Any) -> Record:
    """The result file: the comparison of rules, the curves, and for every step who was reminded."""
    measures: dict[str, Any] = {
        **notes,
        "rules": {rule: summary(history, analysis.since) for rule, history in analysis.histories.items()},
        "from step": analysis.since,
        "LTM again, paper": PAPER,
        "LTM again, published code on synthetic input": PUBLISHED,
        "autocorrelation": {rule: _curves(history, analysis.since) for rule, history in analysis.histories.items()},
        "seen twice": {rule: twice_line(twice) for rule, twice in analysis.twice.items()},
        "steps": {rule: [_step(moment) for moment in h.rows[0]] for rule, h in analysis.histories.items()},
    }
    return Record("memoria-engrams", config.kind, host, seed, config.to_dict(), measures=_without_nan(measures))


def _curves(history: History, since: int) -> dict[str, dict[int, float]]:
    lags = range(1, LONGEST_LAG + 1)
    return {
        "LTM": autocorrelation(history, "long", lags, since=since),
        "LTM by chance": autocorrelation(history, "long", lags, since=since, chance=True),
        "STM": autocorrelation(history, "short", lags, since=since),
        "STM by chance": autocorrelation(history, "short", lags, since=since, chance=True),
    }


def twice_line(twice: SeenTwice) -> dict[str, Any]:
    """A text read twice in a few numbers."""
    reminded, alive = twice.counts_by_offset[0]
    return {
        "segments": twice.segments,
        "between": twice.between,
        "of LTM reminded, made in the first reading": float(np.nanmean(twice.first)),
        "the same by chance": float(np.nanmean(twice.first_by_chance)),
        "alive of the segment read again": alive,
        "of those, reminded": reminded / alive if alive else math.nan,
        "of the first reading's other segments, reminded": twice.other_offsets,
        "of all LTM alive, reminded": twice.any_engram,
        "by offset": {offset: list(counts) for offset, counts in twice.counts_by_offset.items() if counts[1]},
    }


def _step(moment: Any) -> dict[str, Any]:
    old = moment.ages(moment.long)
    return {
        "step": moment.step,
        "levels": " ".join(map(str, moment.levels)),
        "start points": moment.starts,
        "found": moment.found,
        "mean age of reminded LTM": round(float(old.mean()), 3) if len(old) else None,
        "mean age of LTM": round(float(moment.ages(moment.alive("long")).mean()), 3) if moment.levels[0] else None,
        "longest lifespan": round(float(moment.lifespans.max()), 3),
        "LTM reminded": " ".join(map(str, moment.long)),
        "STM reminded": len(moment.short),
    }


def _without_nan(value: Any) -> Any:
    """The same values with None for nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(analysis: Analysis, folder: Path, about: str) -> list[Path]:
    """All pictures, `memoria-*.png`; `about` says what read what."""
    made = [
        pictures.draw_ages(analysis.histories, folder / "memoria-ages.png", f"Age of reminded engrams: {about}"),
        pictures.draw_autocorrelation(
            analysis.histories,
            folder / "memoria-autocorrelation.png",
            f"Reminded again: {about}",
            longest=LONGEST_LAG,
            since=analysis.since,
        ),
        pictures.draw_seen_twice(
            analysis.twice, folder / "memoria-seen-twice.png", f"The same text read twice: {about}"
        ),
    ]
    for rule, history in analysis.histories.items():
        graphs = {f"after {step} segments": _ties(state) for (_, step), state in history.kept.items()}
        if graphs:
            path = folder / f"memoria-graph-{rule}.png"
            made.append(pictures.draw_graph(graphs, path, f"The engrams and their strongest ties, rule {rule!r}"))
    ends = {f"rule {rule!r}": _ties(*twice.history.kept.values()) for rule, twice in analysis.twice.items()}
    first = next(iter(analysis.twice.values()))
    colours = pictures.reading_colours(first.segments, first.between)
    title = "Engrams when a text has been read for the second time"
    made.append(pictures.draw_graph(ends, folder / "memoria-graph-seen-twice.png", title, colours=colours))
    return made


def _ties(state: State) -> Any:
    return engram_graph(state, strongest=1, within=False)
