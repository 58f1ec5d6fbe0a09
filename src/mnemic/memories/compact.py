"""Compact: a constant number of keys a head stands for all that left the window. Nothing is trained.

After Attention Matching (arXiv 2602.16284): of a block's keys few are kept, with a bias and a new value each, so that
queries find the same mass and the same output in them as in all. Here it is recurrent: at each segment's end what was
kept and what leaves the window now become what is kept. `Session.compact` does it before they would leave.

For one block and one head of keys: k_i, v_i and masses m_i (1 for a key that was read) are what was kept and what
leaves, q_j queries of the segment that ends, of all heads of queries that share these keys, s the scale of products, R
the rotation by positions, and z_j the sum of exp(s R q_j . R k) over the keys k that stay in the window:

    e_ji  = exp(s R q_j . R k_i)        y_j = sum_i m_i e_ji        p_ji = m_i e_ji / y_j
    w_j   = y_j / (y_j + z_j)           how much query j has to do with what is far
    C     = the `keys` keys of the greatest sum_j (w_j p_ji)^2, in order of time; or by `pursuit`
    B     = argmin_{B >= 0} sum_j w_j^2 (sum_{i in C} B_i e_ji / y_j - 1)^2             mass
    x_ji  = B_i e_ji / sum_{i in C} B_i e_ji
    V     = argmin_V sum_j w_j^2 |sum_{i in C} x_ji V_i - sum_i p_ji v_i|^2 + r |V - v_C|^2   output

B is found by multiplicative steps (Lee and Seung's) from the masses that the chosen keys had, so it stays positive; V
by the normal equations. In the softmax of later tokens key i has the bias log B_i, and stands where it stood,
`farthest` tokens before the window at most. As long as all that left fits into `keys` keys nothing is lost.

Where we depart. The paper compacts a context once, with queries made for this ("repeat the context", questions), and
weighs all alike. Here queries are those that came: `queries` tokens of the segment that ends, evenly chosen, and a
reservoir of earlier ones. Caps on products (Gemma 2) are left out of the matching.

What is trained: nothing. What is forgotten: what later segments did not look for.
State: `8 x width + 8` bytes a key, of `blocks x heads of keys x keys`: key, value and mass in float32, and where it
stands. The queries of a segment that has not ended wait: `blocks x heads of queries x width` numbers a token, as many
as a token of the reservoir has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mnemic.memories import compact_reservoir as reservoir
from mnemic.memories.compact_matching import matching, pursuit
from mnemic.memories.compact_naive import naive
from mnemic.memories.compact_presses import PRESSES, Kept, Seen
from mnemic.memories.layers import distinct_layers
from mnemic.memory import Asked, Card, Further, Leaving, Memory, MemoryConfig, Site
from mnemic.state import State, StateError, check_range

# Shapes: l blocks, h heads of queries, k heads of keys, t tokens, n keys before, c after, s and v widths of a head.

By = Literal["matching", "pursuit", "recent", "heavy", "norm", "merged", "random"]
MATCHED = {"matching": matching, "pursuit": pursuit}
NAMES = ("keys", "values", "mass", "behind")


@dataclass
class CompactConfig(MemoryConfig):
    """Settings of compact.

    `keys` is how many keys a head of each block keeps for all that left the window, found for the queries of so many
    tokens of a segment (`queries`), and of so many of all that came before (`reservoir`). They stand `farthest` tokens
    before the window at most: choose it so that window and all are within the positions that the model was trained for.
    `by` says how they are found: "matching"; "pursuit", which chooses with more care and is slow; or a way to compare
    these with (`mnemic.memories.compact_presses`). `read_layers` are the blocks that keep, by default all; the others
    see the window and its sinks.
    """

    kind: ClassVar[str] = "compact"
    card: ClassVar[Card] = Card(
        title="Compact",
        seam="inside attention",
        trains="nothing",
        bytes_law="layers x key heads x keys x (8 width + 8)",
        paper="Zweiger et al., arXiv 2602.16284",
        citation="@misc{zweiger2026fast, title = {Fast {KV} Compaction via Attention Matching}, author = {Zweiger, "
        "Adam and Fu, Xinghong and Guo, Han and Kim, Yoon}, eprint = {2602.16284}, archivePrefix = {arXiv}, "
        "year = {2026}}",
    )

    segment_length: int = 256
    window: int | None = 512
    keys: int = 256
    queries: int = 64
    reservoir: int = 0
    farthest: int = 4096
    by: By = "matching"
    read_layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "queries", "farthest"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
        if self.reservoir < 0:
            raise ValueError(f"reservoir is {self.reservoir}; use 0 or more tokens")
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for all")

    def unused(self) -> dict[str, str]:
        """How many queries look, where none do."""
        return {} if self.asks else dict.fromkeys(("queries", "reservoir"), "set by='matching'")

    @property
    def asks(self) -> bool:
        """Whether it matters what queries see."""
        return self.by in (*MATCHED, "heavy")

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """Few keys for a window of two segments; other ways to find them; one block keeps."""
        small = cls(segment_length=8, window=16, keys=6)
        more = small.replace(by="merged"), small.replace(by="recent"), small.replace(read_layers=[0])
        return [small, *more, small.replace(reservoir=3, by="pursuit")]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> CompactConfig:
        """A window of one segment, `size` keys, by default 32."""
        return cls(segment_length=segment_length, window=None, keys=size or 32)

    def build(self, width: int, depth: int, causal: bool = True) -> Compact:
        """The module; raises `ValueError` for an encoder, and for a block that the host does not have."""
        if not causal:
            raise ValueError("an encoder has no keys that compact could keep for it; use another mechanism")
        layers = range(depth) if self.read_layers is None else distinct_layers(self.read_layers, depth, "read_layers")
        return Compact(self, layers)


class Compact(Memory):
    """The module: no parameters."""

    def __init__(self, config: CompactConfig, layers: Iterable[int]) -> None:
        super().__init__()
        self.config = config
        self.reads = self.writes = tuple(Site(layer, "attention") for layer in layers)

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Keys `[b, l, k, c, s]` without positions, in order of time, values `[b, l, k, c, v]`, masses `[b, l, k, c]`
        and how many tokens before the window each stands, likewise; 0 where there is none yet. And the reservoir.
        """
        inside = self.inside
        shape = batch, inside.blocks, inside.heads, self.config.keys
        return {
            "keys": torch.zeros(*shape, inside.key_width, device=device),
            "values": torch.zeros(*shape, inside.value_width, device=device),
            "mass": torch.zeros(shape, device=device),
            "behind": torch.zeros(shape, dtype=torch.int32, device=device),
            **reservoir.empty(batch, self.config.reservoir, math.prod(self._heads), device),
        }

    def further(self, site: Site, asked: Asked) -> Further | None:
        """What is kept, where it stood, with the logarithms of its masses."""
        own = here(asked.state, 0, asked.place)
        if not own.mass_kn.shape[1]:
            return None
        bias_ktc = None if bool((own.mass_kn == 1).all()) else own.mass_kn[:, None].log()
        return Further(own.placed(asked.first, asked.turn)[:, None], own.value_knv[:, None], bias_ktm=bias_ktc)

    def write_and_tell(
        self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None = None, leaving: Sequence[Leaving] | None = None
    ) -> tuple[State, None]:
        """`write`; what is kept stands for many tokens."""
        return self.write(hidden_btd, state, keep_bt, leaving), None

    @torch.no_grad()
    def write(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        leaving: Sequence[Leaving] | None = None,
    ) -> State:
        """What is kept, when keys have left the window: made of itself and of them, for these queries."""
        after = {name: tensor.clone() for name, tensor in state.items()}
        for row, left in enumerate(leaving or ()):
            query_td = hidden_btd[row] if keep_bt is None else hidden_btd[row][keep_bt[row]]
            every = max(1, len(query_td) // self.config.queries)
            earlier_rd, number_r = reservoir.earlier(state, row, query_td)
            asking_nd = torch.cat([query_td[::every].float(), earlier_rd])
            if left.ratio is not None and not len(asking_nd) and self.config.asks:
                raise ValueError(
                    "a segment has just ended, so no token waits for whose queries keys could be made; pass a text "
                    "that asks, read on, or keep a reservoir"
                )
            # those from before ask again, as far from their segment's beginning as they were
            stood_n = torch.arange(0, len(query_td), every).to(number_r)
            stood_n = torch.cat([stood_n, number_r % self.config.segment_length])
            asking_lhns = asking_nd.unflatten(-1, self._heads).permute(1, 2, 0, 3)
            for place, asking_hns in enumerate(asking_lhns if left.keys_lkns.shape[2] else ()):
                asking_hns = left.turns[place](asking_hns, left.begins + stood_n) * self.inside.scales[place]
                own = self._kept(here(state, row, place), asking_hns, left, place)
                for name, made in zip(NAMES, own, strict=True):
                    after[name][row, place, :, : made.shape[1]] = made
            if left.ratio is None:  # else these tokens' segment goes on, and they come again
                reservoir.draw(after, row, query_td)
        return after

    def naive(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        leaving: Sequence[Leaving] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """As they came, and `write` in plain loops (`compact_naive`)."""
        return hidden_btd, naive(self, hidden_btd, state, keep_bt, leaving)

    def check_state(self, state: State, written: int) -> None:
        """Raises `StateError` for masses below 0, keys that stand elsewhere than before the window, and heads that have
        more keys than others.
        """
        check_range("behind", state["behind"], 0, self.config.farthest)
        if bool((state["mass"] < 0).any()):
            raise StateError(f"mass goes down to {float(state['mass'].min()):g}, and masses are 0 or more")
        there = state["mass"] > 0
        count = int(there.sum(-1).max()) if there.numel() else 0
        uneven = not bool(there[..., :count].all())
        if uneven or not torch.equal(there, state["behind"] > 0):
            raise StateError("mass and behind do not have the same keys for each head, from the first one on")
        reservoir.check(state, written * self.config.segment_length)

    @property
    def _heads(self) -> tuple[int, int, int]:
        """Blocks, heads of queries, and how wide these are: the queries of one token."""
        return self.inside.blocks, self.inside.queries, self.inside.key_width

    def _kept(self, own: Kept, asking_hns: Float[Tensor, "h n s"], left: Leaving, place: int) -> Kept:
        """What one block keeps, of what it had and of what leaves."""
        (heads, had), new = own.mass_kn.shape, left.keys_lkns.shape[2]
        keep = min(self.config.keys, had + (new if left.ratio is None else math.ceil(new / left.ratio)))
        behind_kn = torch.arange(new, 0, -1).to(own.behind_kn).expand(heads, -1)
        came = Kept(left.keys_lkns[place], left.values_lknv[place].float(), own.mass_kn.new_ones(heads, new), behind_kn)
        own = own._replace(behind_kn=own.behind_kn + new)
        old = Kept(*(torch.cat(parts, 1) for parts in zip(own, came, strict=True)))
        old = old._replace(behind_kn=old.behind_kn.clamp_max(self.config.farthest))
        if had + new <= keep:
            return old
        query_kjs = asking_hns.unflatten(0, (heads, -1)).flatten(1, 2)
        score_kjn = query_kjs @ old.placed(left.first + new, left.turns[place]).mT + old.mass_kn.log()[:, None]
        total_kj1 = score_kjn.logsumexp(-1, keepdim=True)
        near_kj1 = (query_kjs @ left.stays_lkms[place].float().mT).logsumexp(-1, keepdim=True)
        seen = Seen((score_kjn - total_kj1).exp(), (total_kj1 - near_kj1).sigmoid())
        return (MATCHED | PRESSES)[self.config.by](old, seen, keep)


def here(state: State, row: int, place: int) -> Kept:
    """What one block of one row keeps: as many keys for each head."""
    mass_kc = state["mass"][row, place]
    count = int((mass_kc[0] > 0).sum())
    return Kept(*(state[name][row, place, :, :count] for name in NAMES))
