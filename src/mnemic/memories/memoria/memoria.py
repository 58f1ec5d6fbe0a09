"""Memoria: engrams in working, short-term and long-term memory, tied when they fire together, forgotten by lifespan.

Source: Park & Bak, "Memoria: Resolving Fateful Forgetting Problem through Human-Inspired Memory Architecture" (ICML
2024), sections 3.1 to 3.4. An engram e is a vector of the host's width d with a lifespan. Step t, once a segment:

    encode     M_wm = FFN(softmax(Q W_k X) W_v X)                  N_wm engrams of the segment before (encoders: this)
    remind     C_i = mean_j exp(-|e_i - wm_j|^2)                   short-term: the N_stm of highest C
               E_ij = Count_ij / Count_ii                          from each the long-term engram of highest E, from
                                                                   there N_depth steps to the highest not yet found;
                                                                   of all found the N_ltm of highest C
    exploit    h <- h + A(h, M_wm);  h <- h + A(h, M_stm + M_ltm)  after every block, the same weights for both
    memorise   Count_ij += 1                                       for all pairs of M_wm + M_stm + M_ltm
               lifespan_i += w_i / sum_k w_k |M_rem| alpha         w_i: mean attention the reminded engram received
    forget     lifespan_i -= 1;  those at 0 are removed; working memory becomes short-term, the oldest of that beyond
               its capacity long-term

What is trained: Q, W_k, W_v, FFN and the readers A, nothing of the host. Stored engrams and the hidden states they are
made of are constants to the gradient, so the abstractor learns through working memory alone (`grad_segments` extends
it). A's output projection starts at zero: an untrained memory changes nothing.

Where we depart: A reads after the block, not between its attention and its feed-forward, so that one hook serves every
family. Where the published code departs from the paper we follow the paper (`docs/mechanisms/memoria.md` lists all).
State: 4 d + 24 bytes an engram and 4 bytes for each pair of engrams older than 128 segments. The number of engrams
levels off near alpha (N_stm + N_ltm) + lifespan N_wm.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.layers import distinct_layers, resolve_layer
from mnemic.memories.memoria import engrams, graph, reservoir
from mnemic.memories.memoria.attention import Abstractor, Reader
from mnemic.memories.memoria.config import MemoriaConfig
from mnemic.memories.memoria.naive import naive_read, naive_write
from mnemic.memories.memoria.remind import advance
from mnemic.memory import Attribution, Memory, Site
from mnemic.state import State, StateError, check_range


class Memoria(Memory):
    """The module: one abstractor, and a reader for every read layer."""

    def __init__(self, config: MemoriaConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.config, self.width = config, width
        last = depth - 1 if causal else max(0, depth * 3 // 4 - 1)
        write = resolve_layer(last if config.write_layer is None else config.write_layer, depth, "write_layer")
        layers = range(0 if causal else write + 1, depth) if config.read_layers is None else config.read_layers
        reads = distinct_layers(layers, depth, "read_layers")
        self.reads, self.writes = tuple(map(Site, reads)), (Site(write),)
        self.reads_own_segment, self.starts_empty = not causal, causal
        # working memory is of the last write; where hidden states are no constants a gradient goes on through them
        self.gradient_reach = None if config.grad_segments else 1
        if causal and max(reads) > write:
            raise ValueError(
                f"read layer {max(reads)} lies above write_layer {write}: a decoder's segment is "
                "written after all its reads, which lifespans need; leave write_layer out"
            )
        if not causal and (not reads or min(reads) <= write):
            raise ValueError(
                f"an encoder reads above the block that writes, here {write} of {depth}: set write_layer to "
                f"at most {depth - 2} and read_layers above it, not {list(reads)}"
            )
        inner = config.dim or width
        if inner % config.heads:
            raise ValueError(f"dim {inner} is not divisible by {config.heads} heads; set heads= to a divisor")
        self.abstractor = Abstractor(config.working, width, config.feed_forward or 4 * width)
        self.readers = nn.ModuleDict({str(layer): Reader(width, inner, config.heads, config.null) for layer in reads})

    @property
    def writes_see_reads(self) -> bool:
        """Always: what is written depends on what was read, as lifespans do on attention."""
        return True

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """No engrams. Slots of a row lie in order of birth: long-term, short-term, working memory, free ones (zeros).

        `engram [b, n, d]` and `lifespan [b, n]` float32, `id [b, n]` int32 from 1, `levels [b, 3]` int64: how many are
        long-term, short-term, working; `fired [b, n, 16]` uint8 and `elders [b, e, e]` int32: the graph;
        `recalled [b, N_stm + N_ltm]` int64: reminded slots, best first, short-term before long-term, -1 for none;
        `use`, of the same shape: the attention they received in the running segment; `step [b]` int64.
        """
        config = self.config
        state = engrams.empty(batch, self.width, config.reminded_stm + config.reminded_ltm, device)
        return {**state, **reservoir.empty(batch, config.reservoir, self.width, device)} if config.reservoir else state

    def check_state(self, state: State, written: int) -> None:
        """Tables of one length, levels that fill no more of it, reminded slots among them, steps that were made."""
        slots, working = state["id"].shape[1], self.config.working
        sizes = {name: tuple(state[name].shape[1:]) for name in ("engram", "lifespan", "fired", "elders")}
        if {sizes[name][0] for name in ("engram", "lifespan", "fired")} != {slots} or len({*sizes["elders"]}) != 1:
            raise StateError(f"tables of engrams have sizes {sizes} and {slots} ids; each slot has a row in each")
        check_range("elders", torch.tensor(sizes["elders"]), 0, slots)
        check_range("levels", state["levels"], 0, slots)
        check_range("the sum of levels", state["levels"].sum(1), 0, slots)
        if int(state["levels"][0, 2]) not in (0, working):
            raise StateError(f"working memory has {int(state['levels'][0, 2])} engrams; it has {working}, or none")
        check_range("recalled", state["recalled"], -1, slots - 1)
        check_range("id", state["id"], 0, 2**31 - 1)
        check_range("step", state["step"], 0, min(written, 2**31 // working))
        if "tokens" in state:
            check_range("tokens", state["tokens"], 0, written * self.config.segment_length)

    def most_bytes(self, written: int) -> int:
        """At most N_wm engrams a segment were written; how many of them live depends on the stream."""
        slots = engrams.capacity(written * self.config.working, self.config.working)
        fixed = (
            12 * (self.config.reminded_stm + self.config.reminded_ltm)
            + 40
            + self.config.reservoir * 4 * (self.width + 1)
        )
        elders = slots if written > graph.COLUMNS else 0
        return fixed + slots * (4 * self.width + 8 + graph.COLUMNS // 8) + 4 * elders**2

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """Hidden states with what the engrams add."""
        return self.read_and_trace(site, hidden_btd, state)[0]

    def read_and_trace(
        self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """Hidden states, and the attention that each token paid to each reminded engram: `use [b, t, k]`."""
        if not state["id"].shape[1]:
            return hidden_btd, {}
        dtype = self.parameter_dtype()
        working = engrams.working_slots(state, self.config.working)
        recalled = state["recalled"]
        both = engrams.gather(state["engram"], torch.cat([working, recalled], 1))
        working_bwd, recalled_bkd = both.split([working.shape[1], recalled.shape[1]], 1)
        real_bk = recalled >= 0
        if self.config.reservoir:
            recalled_bkd = torch.cat([recalled_bkd, state["sample"]], 1)
            real_bk = torch.cat([real_bk, state["sample_key"] > 0], 1)
        begun_b, reader = working[:, 0] >= 0, self.readers[str(site.layer)]
        read_btd, use_btk = reader(
            hidden_btd.to(dtype), working_bwd.to(dtype), recalled_bkd.to(dtype), begun_b, real_bk
        )
        return read_btd.to(hidden_btd.dtype), {"use": use_btk[..., : recalled.shape[1]].to(state["use"].dtype)}

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The state after a segment: the running step is finished, the next begins with its working memory."""
        kept = None
        if self.config.grad_segments:
            oldest = (state["step"] - self.config.grad_segments) * self.config.working
            kept = state["id"] > oldest[:, None]
        else:
            hidden_btd = hidden_btd.detach()
        if self.config.reservoir:
            state = reservoir.draw(state, hidden_btd, keep_bt, self.config.seed)
        working_bwd = self.abstractor(hidden_btd.to(self.parameter_dtype()), keep_bt)
        return advance(state, working_bwd, self.config, kept)

    def write_and_tell(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[State, Attribution]:
        """The new engrams by their ids, each all of this write, and the tokens that the abstractor attended to."""
        after = self.write(hidden_btd, state, keep_bt)
        normed_btd = self.abstractor.norm(hidden_btd.to(self.parameter_dtype()))
        weight_bwt = self.abstractor.weights(normed_btd, keep_bt)
        new_bw = after["id"].gather(1, engrams.working_slots(after, self.config.working)).long()
        alive_bn = after["id"].long().where(after["id"] > 0, -1)
        return after, Attribution(new_bw, torch.ones_like(weight_bwt[..., 0]), weight_bwt, alive_bn)

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above with dictionaries and loops, one engram, token and head at a time."""
        output, traces = naive_read(self, self.reads[0].layer, hidden_btd, state, keep_bt)
        return output, naive_write(self, hidden_btd, {**state, "use": state["use"] + traces["use"]}, keep_bt)
