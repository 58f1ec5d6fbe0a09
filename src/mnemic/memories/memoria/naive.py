"""Memoria with dictionaries and loops, to be read beside sections 3.1 to 3.4 of the paper (arXiv 2310.03052).

One row, one engram, one token and one head at a time; slow on purpose. `Mind` is the memory of one row. The tests run
it in lockstep with the fast path, which shares nothing with it but the noise that breaks ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.memories.memoria.engrams import capacity
from mnemic.memories.memoria.graph import seed_keys, tie_vectors, token_keys
from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.memoria.config import MemoriaConfig
    from mnemic.memories.memoria.memoria import Memoria

COLUMNS = 128
"""H: the steps whose firing is kept bit by bit; older ones are kept as sums, `Mind.folded`."""


@dataclass(eq=False)
class Engram:
    """A piece of memory: what it holds, how many steps it has to live, and where it lies."""

    id: int
    vector: Tensor
    lifespan: float
    level: Literal["working", "short", "long"]


class Mind:
    """The memory of one row: `engrams` in order of birth, `counts[i, j]` how often i and j fired together.

    `history[i]` holds the steps among the last H at which i fired, `folded[i, j]` the counts of steps before those:
    counts[i, j] = |history[i] & history[j]| + folded[i, j]. They serve only to write the state down.
    """

    def __init__(self, config: MemoriaConfig) -> None:
        self.config = config
        self.engrams: list[Engram] = []
        self.counts: dict[tuple[int, int], int] = {}
        self.history: dict[int, set[int]] = {}
        self.folded: dict[tuple[int, int], int] = {}
        self.recalled: list[int] = []
        self.use: dict[int, float] = {}
        self.step = 0
        self.direct: set[int] = set()
        self.sample: list[tuple[float, Tensor]] = []
        self.tokens = 0

    def at(self, *levels: str) -> list[Engram]:
        """The engrams of these levels, oldest first."""
        return [engram for engram in self.engrams if engram.level in levels]

    def finish(self) -> None:
        """Ends the step that the last write began: fire, age, forget, move on (3.4)."""
        working = self.at("working")
        if not working:
            return
        # Count_ij += 1 for all i, j that were active together
        self.fold(self.step - 1)
        active = [engram.id for engram in working] + self.recalled
        for i in active:
            self.history[i].add(self.step - 1)
            for j in active:
                self.counts[i, j] = self.counts.get((i, j), 0) + 1
        # lifespan_i += w_i / sum_k w_k * N_rem * alpha, then every engram loses one step
        total = sum(self.use.values())
        for engram in self.engrams:
            if total > 0 and engram.id in self.use:
                gain = self.use[engram.id] / total * len(self.recalled) * self.config.alpha
                # in the float32 that the state keeps: a gain below its precision saves nobody
                engram.lifespan = float(torch.tensor(engram.lifespan + gain, dtype=torch.float32))
            engram.lifespan -= 1
        self.engrams = [engram for engram in self.engrams if engram.lifespan > 0]
        alive = {engram.id for engram in self.engrams}
        self.history = {i: steps for i, steps in self.history.items() if i in alive}
        self.counts = {(i, j): n for (i, j), n in self.counts.items() if i in alive and j in alive}
        self.folded = {(i, j): n for (i, j), n in self.folded.items() if i in alive and j in alive}
        # working memory becomes short-term memory; what that cannot hold becomes long-term memory, oldest first
        for engram in self.at("working"):
            engram.level = "short"
        short = self.at("short")
        for engram in short[: max(0, len(short) - self.config.stm_capacity)]:
            engram.level = "long"

    def fold(self, step: int) -> None:
        """At every eighth step the eight oldest columns, steps t-H .. t-H+7, move from `history` to `folded`."""
        if step % 8:
            return
        for column in range(step - COLUMNS, step - COLUMNS + 8):
            fired = [i for i, steps in self.history.items() if column in steps]
            for i in fired:
                self.history[i].remove(column)
                for j in fired:
                    self.folded[i, j] = self.folded.get((i, j), 0) + 1

    def begin(self, wm_vectors: Iterable[Tensor]) -> None:
        """Begins a step with a new working memory and reminds what is associated with it (3.1, 3.2)."""
        size = self.config.working
        for engram in self.engrams:
            # engram i was born at write (i - 1) // N_wm; before the last `grad_segments` writes it is a constant
            if (engram.id - 1) // size < self.step - self.config.grad_segments:
                engram.vector = engram.vector.detach()
        for number, vector in enumerate(wm_vectors, start=self.step * size + 1):
            self.engrams.append(Engram(number, vector.float(), self.config.lifespan, "working"))
            self.history[number] = set()
        self.step += 1
        # C_i for every engram, and this step's noise vectors: p_i where an edge leaves, q_j where it arrives
        working = [engram.vector.tolist() for engram in self.at("working")]
        self.score = {engram.id: self.correlation(engram, working) for engram in self.at("short", "long")}
        self.leaves, self.arrives = self.noise(role=0), self.noise(role=1)
        self.interfere()
        if self.config.graded:
            # the longer an engram will live the more easily it comes to mind
            for engram in self.at("short", "long"):
                self.score[engram.id] += math.log(max(engram.lifespan, 1e-6))
        short = self.remind_short()
        self.direct = set(short)
        found = self.search(self.start_points(short))
        self.recalled = short + self.best(found, self.config.reminded_ltm)
        self.use = dict.fromkeys(self.recalled, 0.0)

    def interfere(self) -> None:
        """Not in the paper: new engrams take lifespan from stored ones, in proportion to exp(C_i)."""
        if not self.config.interference or not self.score:
            return
        nearest = max(self.score.values())
        total = sum(math.exp(score - nearest) for score in self.score.values())
        for engram in self.at("short", "long"):
            share = math.exp(self.score[engram.id] - nearest) / total
            engram.lifespan -= self.config.interference * self.config.working * share

    def draw(self, tokens: list[Tensor]) -> None:
        """Not in the paper: of all tokens so far those of the highest random keys."""
        if not self.config.reservoir:
            return
        for token in tokens:
            self.tokens += 1
            key = token_keys(self.config.seed, torch.tensor([[self.tokens]])).item()
            self.sample.append((key, F.layer_norm(token, token.shape).float()))
        highest = sorted(self.sample, key=lambda pair: -pair[0])[: self.config.reservoir]
        self.sample = [(key, token.detach()) for key, token in highest]

    def correlation(self, engram: Engram, working: list[list[float]]) -> float:
        """C_i = log mean_j exp(-|e_i - wm_j|^2), or the published code's mean_j -|e_i - wm_j|^2."""
        vector = engram.vector.tolist()
        near = [-sum((x - y) ** 2 for x, y in zip(vector, other, strict=True)) for other in working]
        if self.config.correlation == "distance":
            return sum(near) / len(near)
        nearest = max(near)  # taken out of the sum, or exp would underflow
        return nearest + math.log(sum(math.exp(d - nearest) for d in near) / len(near))

    def best(self, ids: Iterable[int], limit: int) -> list[int]:
        """The ids of highest C, best first; the older one first where two are equal."""
        return sorted(ids, key=lambda i: (-self.score[i], i))[:limit]

    def remind_short(self) -> list[int]:
        """The N_stm engrams of short-term memory that correlate most with working memory."""
        levels = ("short", "long") if self.config.graded else ("short",)
        return self.best((engram.id for engram in self.at(*levels)), self.config.reminded_stm)

    def reachable(self) -> list[int]:
        """What the search may find: LTM, or (`graded`) all that is stored and not reminded yet."""
        if self.config.graded:
            return [engram.id for engram in self.at("short", "long") if engram.id not in self.direct]
        return [engram.id for engram in self.at("long")]

    def start_points(self, short: list[int]) -> set[int]:
        """From every reminded STM engram i the LTM engram arg max_j E_ij, and `random_ltm_seeds` others at random."""
        long = self.reachable()
        starts = {j for i in short if (j := self.neighbour(i, long)) is not None}
        if long and self.config.random_ltm_seeds:
            drawn = seed_keys(self.config.seed, torch.tensor([self.step]), torch.tensor([long]))[0].tolist()
            key = dict(zip(long, drawn, strict=True))
            starts |= set(sorted(long, key=lambda j: (-key[j], j))[: self.config.random_ltm_seeds])
        return starts

    def search(self, starts: set[int]) -> set[int]:
        """Depth-first, all paths abreast: N_depth times each goes on to the best engram not found before this depth."""
        long = self.reachable()
        found, ends = set(starts), set(starts)
        for _ in range(self.config.depth):
            new = [j for j in long if j not in found]
            ends = {j for i in ends if (j := self.neighbour(i, new)) is not None}
            found |= ends
        return found

    def neighbour(self, i: int, candidates: list[int]) -> int | None:
        """arg max_j E_ij; among equals the highest noise, then the oldest. None where there is nothing to go to."""
        edges = {j: self.edge(i, j) for j in candidates}
        if self.config.positive_edges:
            edges = {j: edge for j, edge in edges.items() if edge > 0}
        highest = max(edges.values(), default=0.0)
        return max((j for j in edges if edges[j] == highest), key=lambda j: (self.tie(i, j), -j), default=None)

    def edge(self, i: int, j: int) -> float:
        """E_ij = Count_ij / Count_ii, the share of i's firings at which j fired too; lift divides by Count_jj."""
        base = j if self.config.edges == "lift" else i
        return self.counts.get((i, j), 0) / self.counts[base, base]

    def tie(self, i: int, j: int) -> int:
        """<p_i, q_j>: orders edges of equal weight anew at every step."""
        if self.config.ties == "oldest":
            return 0
        return sum(p * q for p, q in zip(self.leaves[i], self.arrives[j], strict=True))

    def noise(self, role: int) -> dict[int, list[int]]:
        """The 16 integers of every engram at this step."""
        ids = [engram.id for engram in self.engrams]
        vectors = tie_vectors(self.config.seed, torch.tensor([self.step]), torch.tensor([ids]), role=role)
        return {i: [int(x) for x in vector] for i, vector in zip(ids, vectors[0].tolist(), strict=True)}


# --- the state as tensors --------------------------------------------------------------------------------------------


def minds_from_state(state: State, config: MemoriaConfig) -> list[Mind]:
    """Every row's memory out of the state's tensors."""
    minds = []
    for b, (long, short, working) in enumerate(state["levels"].tolist()):
        mind = Mind(config)
        mind.step = int(state["step"][b])
        ids, lifespans, fired = (state[name][b].tolist() for name in ("id", "lifespan", "fired"))
        ids = ids[: long + short + working]
        levels = ["long"] * long + ["short"] * short + ["working"] * working
        for slot, (i, level) in enumerate(zip(ids, levels, strict=True)):
            mind.engrams.append(Engram(i, state["engram"][b, slot], lifespans[slot], level))
            places = [place for place in range(COLUMNS) if fired[slot][place // 8] >> place % 8 & 1]
            # the latest step that fired is step - 2: a place holds the last one up to it that leads there
            mind.history[i] = {mind.step - 2 - (mind.step - 2 - place) % COLUMNS for place in places}
        elders = state["elders"][b].tolist()
        slots = range(min(len(ids), len(elders)))
        mind.folded = {(ids[x], ids[y]): elders[x][y] for x in slots for y in slots if elders[x][y]}
        both = {(i, j): len(mind.history[i] & mind.history[j]) + mind.folded.get((i, j), 0) for i in ids for j in ids}
        mind.counts = {pair: n for pair, n in both.items() if n}
        for slot, use in zip(state["recalled"][b].tolist(), state["use"][b].tolist(), strict=True):
            if slot >= 0:
                mind.recalled.append(ids[slot])
                mind.use[ids[slot]] = use
        reserved = range(config.reservoir)
        mind.direct = {ids[s] for s in state["recalled"][b, : config.reminded_stm].tolist() if s >= 0}
        mind.sample = [(key, state["sample"][b, k]) for k in reserved if (key := state["sample_key"][b, k].item())]
        mind.tokens = int(state["tokens"][b]) if reserved else 0
        minds.append(mind)
    return minds


def state_from_minds(minds: list[Mind], config: MemoriaConfig, width: int) -> State:
    """The inverse of `minds_from_state`; zeros wherever a row has fewer engrams than the fullest one."""
    batch, reminded = len(minds), config.reminded_stm + config.reminded_ltm
    size = capacity(max(len(mind.engrams) for mind in minds), config.working)
    slots = [{engram.id: slot for slot, engram in enumerate(mind.engrams)} for mind in minds]
    old = max((1 + slots[b][i] for b, mind in enumerate(minds) for i, _ in mind.folded), default=0)
    state = {
        "engram": torch.zeros(batch, size, width),
        "lifespan": torch.zeros(batch, size),
        "id": torch.zeros(batch, size, dtype=torch.int32),
        "levels": torch.tensor([[len(mind.at(level)) for level in ("long", "short", "working")] for mind in minds]),
        "fired": torch.zeros(batch, size, COLUMNS // 8, dtype=torch.uint8),
        "elders": torch.zeros(batch, old, old, dtype=torch.int32),
        "recalled": torch.full((batch, reminded), -1),
        "use": torch.zeros(batch, reminded),
        "step": torch.tensor([mind.step for mind in minds]),
    }
    for b, mind in enumerate(minds):
        for slot, engram in enumerate(mind.engrams):
            state["id"][b, slot], state["lifespan"][b, slot] = engram.id, engram.lifespan
            state["engram"][b, slot] = engram.vector
            for step in mind.history[engram.id]:
                state["fired"][b, slot, step % COLUMNS // 8] |= 1 << step % 8
        for (i, j), count in mind.folded.items():
            state["elders"][b, slots[b][i], slots[b][j]] = count
        places = [*range(config.reminded_stm)], [*range(config.reminded_stm, reminded)]
        for i in mind.recalled:
            place = places[i not in mind.direct].pop(0)
            state["recalled"][b, place], state["use"][b, place] = slots[b][i], mind.use[i]
    if config.reservoir:
        state["sample"] = torch.zeros(batch, config.reservoir, width)
        state["sample_key"] = torch.zeros(batch, config.reservoir)
        state["tokens"] = torch.tensor([mind.tokens for mind in minds])
        for b, mind in enumerate(minds):
            for k, (key, token) in enumerate(mind.sample):
                state["sample"][b, k], state["sample_key"][b, k] = token, key
    return state


# --- write and read --------------------------------------------------------------------------------------------------


def abstract(abstractor: Any, tokens: list[Tensor]) -> list[Tensor]:
    """Working memory: softmax(Q W_k h) W_v h for every learned query, then a feed-forward network (3.1)."""
    tokens = [abstractor.norm(h) for h in tokens]
    keys, values = [abstractor.key(h) for h in tokens], [abstractor.value(h) for h in tokens]
    engrams = []
    for query in abstractor.query:
        weights = torch.stack([torch.dot(query, key) for key in keys]).softmax(0)
        content = torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum(0)
        engrams.append(abstractor.contract(F.gelu(abstractor.expand(content))))
    return engrams


def naive_write(memory: Memoria, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> State:
    """The state after a segment; shapes as in `Memory.write`."""
    minds = minds_from_state(state, memory.config)
    for b, mind in enumerate(minds):
        write_row(memory, mind, hidden_btd[b] if keep_bt is None else hidden_btd[b, keep_bt[b]])
    return state_from_minds(minds, memory.config, hidden_btd.shape[-1])


def write_row(memory: Memoria, mind: Mind, hidden_td: Tensor) -> None:
    """One row's write, in place; `hidden_td` holds its real tokens."""
    if memory.config.grad_segments == 0:
        hidden_td = hidden_td.detach()
    tokens = list(hidden_td.to(memory.parameter_dtype()))
    mind.finish()
    mind.draw(tokens)
    mind.begin(abstract(memory.abstractor, tokens))


def naive_read(
    memory: Memoria, layer: int, hidden_btd: Tensor, state: State, keep_bt: Tensor | None
) -> tuple[Tensor, State]:
    """h + A(norm_1 h, WM), then the same h + A(norm_2 h, STM and LTM reminded) (3.3), and the attention received.

    `use[k]` is what the k-th recalled engram receives at this layer: the mean over heads, summed over real tokens.
    """
    reader: Any = memory.readers[str(layer)]
    dtype = memory.parameter_dtype()
    output, use = hidden_btd.clone(), torch.zeros(state["recalled"].shape)
    for b, (long, short, working) in enumerate(state["levels"].tolist()):
        engrams = list(state["engram"][b].to(dtype))
        held = engrams[long + short : long + short + working]
        places = [k for k, slot in enumerate(state["recalled"][b].tolist()) if slot >= 0]
        recalled = [engrams[int(state["recalled"][b, k])] for k in places]
        keys = state["sample_key"][b].tolist() if memory.config.reservoir else []
        sample = [state["sample"][b, k].to(dtype) for k, key in enumerate(keys) if key]
        for t in range(hidden_btd.shape[1]):
            token = hidden_btd[b, t].to(dtype)
            if held:
                token = token + attend(reader, reader.norm_working(token), held)[0]
            if recalled or sample:
                received, weights = attend(reader, reader.norm_recalled(token), recalled + sample)
                token = token + received
                if keep_bt is None or keep_bt[b, t]:
                    for k, weight in zip(places, weights, strict=False):  # the sample has no lifespan to extend
                        use[b, k] += weight
            output[b, t] = token.to(hidden_btd.dtype)
    return output, {"use": use}


def attend(reader: Any, token: Tensor, engrams: list[Tensor]) -> tuple[Tensor, list[float]]:
    """Multi-head attention of one token over engrams, and the mean weight over heads of each engram."""
    query, keys, values = reader.query(token), [reader.key(e) for e in engrams], [reader.value(e) for e in engrams]
    size = len(query) // reader.heads
    heads, received = [], [0.0] * len(engrams)
    for head in range(reader.heads):
        part = slice(head * size, (head + 1) * size)
        scores = [torch.dot(query[part], key[part]) / math.sqrt(size) for key in keys]
        if reader.null is not None:  # not in the paper: one more key, with nothing behind it
            scores.append(torch.dot(query[part], reader.null[head]) / math.sqrt(size))
        weights = torch.stack(scores).softmax(0)[: len(keys)]
        heads.append(torch.stack([w * value[part] for w, value in zip(weights, values, strict=True)]).sum(0))
        received = [r + w / reader.heads for r, w in zip(received, weights.tolist(), strict=True)]
    return reader.output(torch.cat(heads)), received
