"""What Memoria's engrams do while a model reads: ages, autocorrelation of reminding, and a text seen twice.

After the engram analyses of the paper (Park & Bak, ICML 2024, arXiv 2310.03052: table 7, figures 5, 6, 10). All is read
off states, so a saved session, a batch of streams or a model reading a text will do.

An engram's *age* is how many segments back the text lies that it was made of: `step - born`, 1 for working memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mnemic.attachment import router_of
from mnemic.inspect.engrams import Level, Moment
from mnemic.memories.memoria import MemoriaConfig
from mnemic.session import Session
from mnemic.state import State, batch_size

LAGS = (1, 2, 5, 15)
"""The lags of the paper's table 7."""
PAPER: dict[int, float] = dict(zip(LAGS, (0.575, 0.529, 0.461, 0.321), strict=True))
"""Table 7: share of reminded long-term engrams that were also reminded that many steps earlier."""
PUBLISHED: dict[int, float] = dict(zip(LAGS, (0.57, 0.48, 0.31, 0.09), strict=True))
"""The same share in the published code, memoria-pytorch 1.1.0, measured on synthetic input."""


@dataclass
class History:
    """Moments of several streams: `rows[b][s]`. `kept[b, step]` are whole states that were asked for."""

    rows: list[list[Moment]] = field(default_factory=list)
    kept: dict[tuple[int, int], State] = field(default_factory=dict)

    def record(self, state: State, config: MemoriaConfig | None = None, *, first_row: int = 0) -> None:
        """Adds a state: its rows are streams `first_row` and following."""
        for row in range(batch_size(state)):
            while len(self.rows) <= first_row + row:
                self.rows.append([])
            self.rows[first_row + row].append(Moment.of(state, row, config))

    @property
    def steps(self) -> list[int]:
        """Every step that some stream has a moment of."""
        return sorted({moment.step for row in self.rows for moment in row})


def observe(
    reader: nn.Module | Session,
    ids: Tensor | Sequence[int],
    *,
    keep: Iterable[int] = (),
    progress: Callable[[int], None] | None = None,
) -> History:
    """Reads token ids `[t]` or `[b, t]` segment by segment and records every stream after each write.

    `reader` is a causal model or an encoder with a Memoria memory, each row then a new session, or one session, which
    goes on where it stands. `keep` names steps whose whole states are kept; `progress` is told every segment.
    """
    model = reader.model if isinstance(reader, Session) else reader
    router = router_of(model)
    config = router.config
    if not isinstance(config, MemoriaConfig):
        raise ValueError(f"this analyses Memoria, and the model's memory is {config.kind!r}")
    rows = torch.atleast_2d(torch.as_tensor(ids))
    if isinstance(reader, Session) and len(rows) != 1:
        raise ValueError(f"a session is one stream, got {len(rows)} rows of ids; pass the model instead")
    window = router.segment_length if router.causal else None  # the engrams alone, not what a longer window shows
    history, keep = History([[] for _ in rows]), set(keep)
    for row, tokens in enumerate(rows):
        session = reader if isinstance(reader, Session) else Session(model, window=window)
        start = 0
        while start < len(tokens):
            waiting = session.stream.counts[0] if session.stream is not None else 0
            stop = start + router.segment_length - waiting
            session.read(tokens[start:stop][None])
            start = stop
            stream = session.stream
            assert stream is not None
            if stream.counts[0] == 0:
                history.record(stream.state, config, first_row=row)
                step = history.rows[row][-1].step
                if step in keep:
                    history.kept[row, step] = stream.state
                if progress is not None:
                    progress(1)
    return history


# --- ages and autocorrelation ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ages:
    """Ages of the reminded engrams of a level at each step: mean, 10th and 90th percentile, nan where there are none.

    `alive` is the mean age of all engrams of that level: what reminding at random would give.
    """

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    alive: np.ndarray


def ages(history: History, level: Level = "long") -> Ages:
    """Figure 5: how old the reminded engrams are as a stream goes on, all streams together."""
    steps = history.steps
    columns: dict[str, list[float]] = {name: [] for name in ("mean", "low", "high", "alive")}
    for step in steps:
        now = [moment for row in history.rows for moment in row if moment.step == step]
        old = np.concatenate([moment.ages(moment.reminded(level)) for moment in now])
        every = np.concatenate([moment.ages(moment.alive(level)) for moment in now])
        columns["mean"].append(old.mean() if len(old) else np.nan)
        columns["low"].append(np.percentile(old, 10) if len(old) else np.nan)
        columns["high"].append(np.percentile(old, 90) if len(old) else np.nan)
        columns["alive"].append(every.mean() if len(every) else np.nan)
    return Ages(np.array(steps), **{name: np.array(values) for name, values in columns.items()})


def autocorrelation(
    history: History, level: Level, lags: Iterable[int] = LAGS, *, since: int = 0, chance: bool = False
) -> dict[int, float]:
    """Table 7, figure 6: of the engrams reminded at step t, the share that was also reminded, at the same level, at
    t - lag; the mean over steps t >= `since` and streams, nan where there is none.

    With `chance` what reminding at random would give: the share of all engrams alive at t that was reminded at t - lag.
    """
    shares: dict[int, list[float]] = {lag: [] for lag in lags}
    for row in history.rows:
        by_step = {moment.step: moment for moment in row}
        for step, moment in by_step.items():
            now = moment.alive(level) if chance else moment.reminded(level)
            if step < since or not len(moment.reminded(level)):
                continue
            for lag, found in shares.items():
                if (before := by_step.get(step - lag)) is not None:
                    found.append(float(np.isin(now, before.reminded(level)).mean()))
    return {lag: float(np.mean(found)) if found else float("nan") for lag, found in shares.items()}


def summary(history: History, since: int | None = None) -> dict[str, float]:
    """One line of the comparison of rules: means over the steps from `since`, by default the later half."""
    since = history.steps[len(history.steps) // 2] if since is None else since
    late = [moment for row in history.rows for moment in row if moment.step >= since]

    def mean(values: Iterable[float | None]) -> float:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else float("nan")

    old = [moment.ages(moment.long) for moment in late]
    line = {
        "LTM alive": mean(moment.levels[0] for moment in late),
        "start points": mean(moment.starts for moment in late),
        "found": mean(moment.found for moment in late),
        "LTM reminded": mean(len(moment.long) for moment in late),
        "mean age of reminded LTM": mean(age for ages_ in old for age in ages_.tolist()),
        "mean age of LTM alive": mean(age for m in late for age in m.ages(m.alive("long")).tolist()),
    }
    for level in ("long", "short"):
        name = {"long": "LTM", "short": "STM"}[level]
        line |= {f"{name} again at {lag}": v for lag, v in autocorrelation(history, level, since=since).items()}
    chance = autocorrelation(history, "long", since=since, chance=True)
    return line | {f"LTM again at {lag}, by chance": value for lag, value in chance.items()}


# --- text seen twice -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SeenTwice:
    """A text of `segments` segments, another of `between`, and the first again (figure 10).

    `first[s]`: while the second reading stands in segment s, the share of the reminded long-term engrams that were born
    in the first reading, and `first_by_chance[s]` that share of all long-term engrams. `by_offset[o]`: of the engrams
    alive that were made of segment s + o in the first reading, the share reminded in segment s of the second;
    `counts_by_offset[o]` both numbers; offset 0 is the same text. `any_engram`: that share of all long-term engrams.
    """

    segments: int
    between: int
    first: np.ndarray
    first_by_chance: np.ndarray
    by_offset: dict[int, float]
    counts_by_offset: dict[int, tuple[int, int]]
    any_engram: float
    history: History

    @property
    def other_offsets(self) -> float:
        """The share reminded of first-reading engrams that were made of other segments than the one read again."""
        others = [counts for offset, counts in self.counts_by_offset.items() if offset]
        reminded, alive = (sum(column) for column in zip(*others, strict=True)) if others else (0, 0)
        return reminded / alive if alive else float("nan")


def seen_twice(
    model: nn.Module,
    text: Tensor | Sequence[int],
    between: Tensor | Sequence[int],
    *,
    keep: Iterable[int] = (),
    progress: Callable[[int], None] | None = None,
) -> SeenTwice:
    """Reads `text`, `between` and `text` again, each `[t]` or `[b, t]` in whole segments, and asks whether what is
    reminded in the second reading is what was made of the first. `between` should outlast short-term memory.
    """
    again, other = torch.atleast_2d(torch.as_tensor(text)), torch.atleast_2d(torch.as_tensor(between))
    length = router_of(model).segment_length
    for name, ids in (("text", again), ("between", other)):
        if ids.shape[1] % length or not ids.shape[1]:
            raise ValueError(f"{name} has {ids.shape[1]} tokens, which are not whole segments of {length}")
    history = observe(model, torch.cat([again, other, again], 1), keep=keep, progress=progress)
    return compare_readings(history, again.shape[1] // length, other.shape[1] // length)


def compare_readings(history: History, segments: int, between: int) -> SeenTwice:
    """`seen_twice` of a history that is there already, recorded from the streams' beginning."""
    begun = segments + between
    # a column each: (of the first reading, all), reminded and alive, for every segment of the second
    reminded, alive = np.zeros((2, segments)), np.zeros((2, segments))
    counts = {offset: [0, 0] for offset in range(1 - segments, segments)}
    for row in history.rows:
        for moment in row:
            place = moment.step - 1 - begun
            if not 0 <= place < segments:
                continue
            for table, ids, side in ((reminded, moment.long, 0), (alive, moment.alive("long"), 1)):
                born = moment.born(ids)
                table[:, place] += ((born < segments).sum(), len(born))
                for offset in (born[born < segments] - place).tolist():
                    counts[offset][side] += 1
    share = np.divide(reminded[0], reminded[1], out=np.full(segments, np.nan), where=reminded[1] > 0)
    chance = np.divide(alive[0], alive[1], out=np.full(segments, np.nan), where=alive[1] > 0)
    pairs = {offset: (found, living) for offset, (found, living) in counts.items()}
    return SeenTwice(
        segments=segments,
        between=between,
        first=share,
        first_by_chance=chance,
        by_offset={offset: found / living for offset, (found, living) in pairs.items() if living},
        counts_by_offset=pairs,
        any_engram=float(reminded[1].sum() / alive[1].sum()) if alive[1].any() else float("nan"),
        history=history,
    )
