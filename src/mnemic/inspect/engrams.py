"""The engrams of a Memoria memory, read off its state: who is alive and reminded, who fired when, and their graph.

After figure 9 of the paper (Park & Bak, ICML 2024, arXiv 2310.03052). The graph needs `mnemic[plot]`;
`mnemic.inspect.engram_pictures` draws it.

An engram's *age* is how many segments back the text lies that it was made of: `step - born`, 1 for working memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from mnemic.memories.memoria import MemoriaConfig, engrams, graph
from mnemic.memories.memoria.remind import search
from mnemic.state import State, select

if TYPE_CHECKING:
    import networkx as nx

Level = Literal["long", "short", "working"]
LEVELS: tuple[Level, ...] = get_args(Level)


def require(package: str) -> Any:
    """A package of the `plot` extra; raises `ImportError` saying how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs {package}, which is not installed: pip install 'mnemic[plot]'") from error


# --- recording -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moment:
    """One stream right after a write: who is alive, and who was reminded by the new working memory.

    `ids` and `lifespans` are those of all engrams in order of birth, `levels` how many of them are long-term,
    short-term and working memory; `short` and `long` the ids reminded, best first. `starts` and `found` count the
    long-term engrams where the search began and all that it found, where they are known.
    """

    step: int
    ids: np.ndarray
    lifespans: np.ndarray
    levels: tuple[int, int, int]
    short: np.ndarray
    long: np.ndarray
    starts: int | None = None
    found: int | None = None

    @classmethod
    def of(cls, state: State, row: int = 0, config: MemoriaConfig | None = None) -> Moment:
        """The moment of one row of a state; with its memory's `config` the search is run again to count its finds."""
        check_memoria(state)
        state = select(state, torch.tensor([row]))
        long, short, working = state["levels"][0].tolist()
        taken = long + short + working
        ids = state["id"][0, :taken].numpy(force=True).astype(np.int64)
        slots = state["recalled"][0].numpy(force=True)
        slots = slots[slots >= 0]
        starts = found = None
        if config is not None and not config.graded:
            starts, found = _finds(state, config)
        return cls(
            step=int(state["step"][0]),
            ids=ids,
            lifespans=state["lifespan"][0, :taken].numpy(force=True).astype(np.float64),
            levels=(long, short, working),
            # long-term memory lies in the first slots
            short=ids[slots[slots >= long]],
            long=ids[slots[slots < long]],
            starts=starts,
            found=found,
        )

    def alive(self, level: Level) -> np.ndarray:
        """Ids of all engrams of a level, oldest first."""
        ends = np.cumsum([0, *self.levels])
        place = LEVELS.index(level)
        return self.ids[ends[place] : ends[place + 1]]

    def reminded(self, level: Level) -> np.ndarray:
        """Ids of the reminded engrams of a level, best first."""
        return {"long": self.long, "short": self.short}[level]

    def born(self, ids: np.ndarray) -> np.ndarray:
        """The segment, from 0, that each engram was made of."""
        return (ids - 1) // max(1, self.levels[2])

    def ages(self, ids: np.ndarray) -> np.ndarray:
        """How many segments back that one lies."""
        return self.step - self.born(ids)


def _finds(state: State, config: MemoriaConfig) -> tuple[int, int]:
    most = int(state["levels"][:, 0].max())
    if not most or not config.reminded_ltm:
        return 0, 0
    long_bl = engrams.level_masks(state)[0][:, :most]
    short_bk = state["recalled"][:, : config.reminded_stm]
    begun, found = (
        int(search(state, long_bl, short_bk, settings).sum()) for settings in (config.replace(depth=0), config)
    )
    return begun, found


def check_memoria(state: State) -> None:
    """Raises `ValueError` for the state of another mechanism."""
    if missing := {"id", "lifespan", "levels", "recalled", "fired", "elders", "step"} - set(state):
        raise ValueError(f"not a state of Memoria: it has {sorted(state)} and lacks {sorted(missing)}")


# --- the graph -------------------------------------------------------------------------------------------------------


def edge_table(state: State, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`E_ij = Count_ij / Count_ii` of one row's engrams, in order of birth, and `Count`; 0 where i never fired."""
    check_memoria(state)
    state = select(state, torch.tensor([row]))
    taken = int(state["levels"][0].sum())
    count = graph.counts(state)[0, :taken, :taken].numpy(force=True)
    return count / np.maximum(count.diagonal(), 1)[:, None], count


def firings(state: State, row: int = 0) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Which engrams of one row fired when, in order of birth, of those alive and as far back as the state tells.

    The numbers of the writes after which they fired, from 1, the latest 122 to 129; a table of them `[n, steps]`, of
    which the last column are those that are working or reminded now; and how often each two fired together before the
    first of them `[n, n]`.
    """
    check_memoria(state)
    state = select(state, torch.tensor([row]))
    taken, last = int(state["levels"][0].sum()), int(state["step"][0])
    # a byte is cleared when its first step comes round again
    first = max(0, (last - 2) // 8 * 8 - graph.COLUMNS + 8)
    columns = [step % graph.COLUMNS for step in range(first, last - 1)]
    bits = graph.unpack(state["fired"])[0, :taken, columns]
    now = engrams.activated(state)[0, :taken, None].to(bits.dtype)
    count = graph.counts(state)[0, :taken, :taken].numpy(force=True)
    fired = torch.cat([bits, now], 1).numpy(force=True).astype(np.int64)
    return list(range(first + 1, last + 1)), fired, count - fired[:, :-1] @ fired[:, :-1].T


def engram_graph(
    state: State, row: int = 0, *, least: float = 0.0, strongest: int | None = None, within: bool = True
) -> nx.DiGraph:
    """The engrams of one row by id, and edges i -> j of weight E_ij = Count_ij / Count_ii (figure 9).

    Edges have weight at least `least` and a count above 0, at most `strongest` leave each engram, and with
    `within=False` those between engrams of one segment are left out: they fired together when they were written, which
    says nothing. Nodes have `level`, `age`, `born`, `lifespan`, `fires` (Count_ii) and `reminded`; edges `weight` and
    `count`.
    """
    network = require("networkx")
    moment = Moment.of(state, row)
    weight, count = edge_table(state, row)
    born, age = moment.born(moment.ids), moment.ages(moment.ids)
    level = np.repeat(np.array(LEVELS, dtype=object), moment.levels)
    reminded = set(moment.short.tolist()) | set(moment.long.tolist())
    directed = network.DiGraph(step=moment.step)
    for slot, engram in enumerate(moment.ids.tolist()):
        directed.add_node(
            engram,
            level=level[slot],
            age=int(age[slot]),
            born=int(born[slot]),
            lifespan=float(moment.lifespans[slot]),
            fires=int(count[slot, slot]),
            reminded=engram in reminded,
        )
    chosen = (count > 0) & (weight >= least) & ~np.eye(len(count), dtype=bool)
    if not within:
        chosen &= born[:, None] != born[None]
    if strongest is not None and len(count):
        # the edges of one engram differ by their counts alone; of equal ones the younger's
        order = np.lexsort((np.broadcast_to(-moment.ids, count.shape), -count, ~chosen), axis=1)[:, :strongest]
        kept = np.zeros_like(chosen)
        np.put_along_axis(kept, order, True, axis=1)
        chosen &= kept
    for i, j in zip(*(side.tolist() for side in chosen.nonzero()), strict=True):
        ends = int(moment.ids[i]), int(moment.ids[j])
        directed.add_edge(*ends, weight=float(weight[i, j]), count=int(count[i, j]))
    return directed


RINGS = {"long": 1.0, "short": 0.84, "working": 0.72}
"""The radius of each level's ring."""


def ring(born: Sequence[int] | np.ndarray, levels: Sequence[str]) -> np.ndarray:
    """Where engrams are drawn, `[n, 2]`, x to the right and y up: on their level's ring, clockwise from the oldest at
    the top, segments set apart. They come in order of birth.
    """
    begins = np.diff(np.asarray(born), prepend=-1) != 0
    # the gaps between segments take a seventh of the circle, the one between the newest and the oldest a tenth
    each = 2 * np.pi * (1 - 1 / 7 - 1 / 10) / max(1, len(begins))
    gap = 2 * np.pi / 7 / max(1, int(begins.sum()))
    angle = each * np.arange(1, len(begins) + 1) + gap * begins.cumsum()
    radius = np.array([RINGS[level] for level in levels])
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)], 1)
