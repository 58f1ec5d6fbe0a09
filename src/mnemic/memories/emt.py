"""EMT, Enhanced Memory Transformer: persistent slots, a GRU controller that writes, attention that reads.

Source: the EMT whitepaper (section 3). It names the parts and their numbers but gives no equations; these are ours.

A memory has S slots M_s of width m, learned at the start of a stream, d the host's width, h_t the hidden state of
token t of a segment of T tokens.

Write, once per segment (`write="segment"`): slot s looks for what concerns it and decides how much to take,

    a_s = softmax_t( q(M_s) . k(h_t) / sqrt(m) )                    which tokens
    c_s = sum_t a_st v(h_t)                                         what to store
    g_s = sigmoid( w . [c_s ; M_s] + b ),  b = -1 at first          whether to store it
    M_s <- (1 - g_s) M_s + g_s GRU(c_s, M_s)                        how to blend

Write, once per token (`write="token"`), the recurrence of the author's script without its threshold:

    z_s   = W_i h_t . M_s - 0.1 age_s - 0.2 usage_s,  w = softmax_s( -z_s )       W_i h_t and M_s of norm 1
    n_s   = GRU(W_v h_t, M_s)
    M_s   <- normalise( (1 - eta w_s) M_s + eta w_s n_s )                         eta: update rate
    usage <- 0.99 (usage + w),   age <- 0.98 age + 1

so a token goes to the slots that resemble it least and were used most; age is the same for all slots and cancels in
the softmax. Both are the author's; the documentation says what they cost.

Write, once per segment, by allocation (`write="allocation"`): the slots compete for every token, and a slot holds two
halves, an address made of the token before and a content made of what entered the first block, where a token is itself:

    e_t  = [A h_(t-1) ; V h0_t]                           address and content, also across the segments' border
    w_st = beta_t softmax_s( 2 sqrt(m) [cos(u_s + U M_s, K LN(e_t)) - sum_(t' < t) w_st'] ),
                                                          beta_t = sigmoid(w_b . h_t + 2)
    c_s  = LN( sum_t w_st e_t / n_s ),  n_s = sum_t w_st
    g_s  = sigmoid( w . [c_s ; M_s] + b ) (1 - exp(-3 n_s)),  b = 1 at first
    M_s  <- (1 - g_s) M_s + g_s GRU(c_s, M_s)             a slot that no token goes to keeps what it has

so two tokens of a segment do not mix in one slot while others are free. With `usage_weight` r above 0 what earlier
segments put into a slot counts, too, as in the token write: the sum begins at r usage_s, and usage <- 0.99 (usage + n),
so tokens go where least was written of late, and what was told stays until all slots are full. Nothing tells beta_t
that a token will never be asked for, but that it takes room; `write_cost` adds that many nats times the mean of beta to
the training's loss.

Read, at every read layer, from the slots as they stood when the segment began:

    e  = h + W_o MHA(h, M);   e <- e + FF(e);   h' = h + feedback (e - h)

and after the last block, where the result is the output, h' <- h + final_blend (h' - h). Slots written by allocation
are addressed by their address halves and read back as what was put into them,

    MHA: softmax_s( sqrt(m) cos(q(h), k(M_s)) ) v(M_s),   e = h + alpha W_o MHA(h, M)

for each head, where q begins as A, k and v as the two halves, W_o as the inverse of V, and alpha, a number, at zero. So
a token asks from the start for what followed it, and one number turns the answer on. `mnemic.calibrate` fits the
whitening of every h, without which all hidden states of a large model look alike, and the inverse.

What is trained: everything here, nothing of the host. What is forgotten: what the gate overwrites; there is no decay.
W_o (or alpha) and the last matrix of FF start at zero, so an untrained memory changes nothing; `zero_shot=True` starts
them at random as the whitepaper's zero-shot mode does (nothing is remembered that way: see `docs/mechanisms/emt.md`).
State: `stack * slots * dim * 4` bytes a stream, 64 KiB by default; the token write adds 8 bytes a slot, allocation
2 dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.emt_naive import emt_naive
from mnemic.memories.emt_readers import AllocationReader, Reader
from mnemic.memories.emt_writers import AllocationWriter, SegmentWriter, TokenWriter, Whitening, write_tokens
from mnemic.memories.layers import resolve_sites
from mnemic.memory import Attribution, Card, Memory, MemoryConfig, Site
from mnemic.state import State

# Shapes: b batch, t time, s slots, d host width, m memory width (`dim`), k stacked memories.


MOST_STACKED = 64
"""Memories on each other: a file that asks for millions would be refused too late."""


@dataclass
class EMTConfig(MemoryConfig):
    """Settings of an Enhanced Memory Transformer; layers are block indices, negative ones counted from the end.

    `read_layers` and `write_layer` default to the middle of the stack, so that later blocks can use what was read.
    `update_rate` is the token write's eta; `gate_bias` the segment write's b. `sharpness` is a factor on the initial
    scores of the write: those of the segment write are otherwise so small that every slot begins by averaging the whole
    segment. `stack` puts several complete memories
    one after another at the same places. `whiten` puts a fixed linear map before the projections of h_t, which
    `mnemic.calibrate` fits to the host: small models keep what tells two names apart in directions of little variance.
    `write_cost` is what writing every token of a segment by allocation costs in training, in nats: with 0 a memory
    writes all that it reads, and old slots go under in it.
    `usage_weight` is how much a slot's usage counts against it where the slots compete: with 0 a token goes to
    the slot that claims its address, whatever is there.
    `segment_length` is counted in tokens.
    """

    kind: ClassVar[str] = "emt"
    card: ClassVar[Card] = Card(
        title="Enhanced Memory Transformer",
        seam="after block",
        trains="slots, controller, readers",
        bytes_law="stack x slots x dim x 4",
        paper="EMT whitepaper, section 3",
        citation="@misc{emt, title = {Enhanced Memory Transformers}, note = {whitepaper}}",
    )

    slots: int = 64
    dim: int = 256
    heads: int = 4
    read_layers: list[int] | None = None
    write_layer: int | None = None
    write: Literal["segment", "token", "allocation"] = "segment"
    feedback: float = 0.7
    final_blend: float = 0.6
    update_rate: float = 0.5
    gate_bias: float = -1.0
    sharpness: float = 1.0
    stack: int = 1
    whiten: bool = False
    write_cost: float = 0.0
    usage_weight: float = 0.0
    zero_shot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slots", "dim", "heads", "stack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.stack > MOST_STACKED:
            raise ValueError(f"stack is {self.stack}; at most {MOST_STACKED} memories stand on each other")
        if self.write == "allocation" and self.dim % (2 * self.heads):
            raise ValueError(
                f"half of dim {self.dim} is not divisible by {self.heads} heads; set dim= to a multiple of "
                f"{2 * self.heads}"
            )
        if self.write == "allocation" and self.zero_shot:
            raise ValueError("zero_shot=True reads at random, and write='allocation' reads back what it wrote")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if self.write_cost < 0:
            raise ValueError(f"write_cost is {self.write_cost}; use 0 or more nats, such as 0.5")
        if self.usage_weight < 0:
            raise ValueError(f"usage_weight is {self.usage_weight}; use 0 or more, such as 1")
        if self.sharpness <= 0:
            raise ValueError(f"sharpness is {self.sharpness}; it must be above 0")
        for name in ("feedback", "final_blend", "update_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in (0, 1]")
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for the middle one")

    def unused(self) -> dict[str, str]:
        """The settings of the other ways to write."""
        rate = {"update_rate": "set write='token'"}
        cost: dict[str, str] = dict.fromkeys(("write_cost", "usage_weight"), "set write='allocation'")
        if self.write == "segment":
            return rate | cost
        if self.write == "allocation":
            return rate | {"gate_bias": "set write='segment'"}
        return dict.fromkeys(("gate_bias", "sharpness"), "set write='segment'") | cost

    @classmethod
    def whitepaper(cls, **changes: Any) -> EMTConfig:
        """The whitepaper's own setting: two memories after the last block, written per token, used without training."""
        setting: dict[str, Any] = {"stack": 2, "read_layers": [-1], "write_layer": -1, "write": "token"}
        return cls(**{**setting, "zero_shot": True, **changes})

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """One of each form: the default, reads below the write, the token write, allocation, a stack after the last
        block.
        """
        small: dict[str, Any] = {"segment_length": 8, "slots": 4, "dim": 16, "heads": 2}
        return [
            cls(**small),
            cls(**small, read_layers=[0, 1], write_layer=1, whiten=True),
            cls(**small, write="token"),
            cls(**small, write="allocation", whiten=True, usage_weight=1.0),
            cls(**small, stack=2, read_layers=[0, -1], write_layer=0),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> EMTConfig:
        """`size` slots of the host's width, 16 by default."""
        return cls(segment_length=segment_length, slots=size or 16, dim=width, heads=4)

    def build(self, width: int, depth: int, causal: bool = True) -> EMT:
        """The module; raises `ValueError` naming a layer that the host does not have, and for a `final_blend` that no
        reader uses.
        """
        return EMT(self, width, depth)


class EMT(Memory):
    """The module: `stack` memories, each with slots, a controller, and a reader for every read layer."""

    newer = ("last",)

    def __init__(self, config: EMTConfig, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.writes, self.reads = resolve_sites(config.write_layer, config.read_layers, depth)
        if config.write == "allocation":
            self.writes = Site(0, "input"), *self.writes  # what enters the first block, too
        self.output_layer = depth - 1
        if Site(self.output_layer) not in self.reads and config.final_blend != EMTConfig.final_blend:
            raise ValueError(
                f"final_blend is {config.final_blend}, but nothing is read after the last block; leave it out, or put "
                "-1 into read_layers"
            )
        self.slots = nn.Parameter(torch.randn(config.stack, config.slots, config.dim) * 0.5)
        writer = {"segment": SegmentWriter, "token": TokenWriter, "allocation": AllocationWriter}[config.write]
        reader = AllocationReader if config.write == "allocation" else Reader
        self.writers = nn.ModuleList(writer(config, width) for _ in range(config.stack))
        self.readers = nn.ModuleDict(
            {str(site.layer): nn.ModuleList(reader(config, width) for _ in range(config.stack)) for site in self.reads}
        )
        self._tie()

    def _tie(self) -> None:
        """Where slots are written by allocation, readers begin as the inverse of their writer."""
        for readers in self.readers.values():
            for writer, reader in zip(self.writers, readers, strict=True):  # pyright: ignore[reportArgumentType]
                if isinstance(reader, AllocationReader):
                    reader.tie(writer)  # pyright: ignore[reportArgumentType]

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """`slots [b, k, s, m]`; for the token write `usage` and `age` `[b, k, s]`; for allocation `last [b, k, m/2]`,
        the address that the next token gets, and with `usage_weight` `usage [b, k, s]`. All float32.
        """
        slots = self.slots.float().to(device)
        if self.config.write == "token":
            slots = F.normalize(slots, dim=-1)
        slots = slots.expand(batch, -1, -1, -1)
        if self.config.write == "segment":
            return {"slots": slots}
        if self.config.write == "allocation":
            last = slots.new_zeros(batch, self.config.stack, self.config.dim // 2)
            usage = {"usage": slots.new_zeros(slots.shape[:-1])} if self.config.usage_weight else {}
            return {"slots": slots, "last": last, **usage}
        zeros = torch.zeros(slots.shape[:-1], device=slots.device)
        return {"slots": slots, "usage": zeros, "age": zeros}

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h' at one site; the slots are those of the segment's start."""
        dtype = self.parameter_dtype()
        read_btd = hidden_btd.to(dtype)
        for reader, slots_bsm in zip(self.readers[str(site.layer)], state["slots"].to(dtype).unbind(1), strict=True):  # pyright: ignore[reportArgumentType]
            read_btd = reader(read_btd, slots_bsm)
        if site.layer == self.output_layer:
            read_btd = hidden_btd + self.config.final_blend * (read_btd - hidden_btd)
        return read_btd.to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The slots after one segment."""
        if self.config.write == "token":
            dtype = self.parameter_dtype()
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
            after = write_tokens(list(self.writers), hidden_btd.to(dtype), state, keep_bt)  # pyright: ignore
            return {name: tensor.float() for name, tensor in after.items()}
        return self._blend(hidden_btd, state, keep_bt)[0]

    def _blend(self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[State, Tensor, Tensor]:
        """The state after a write once per segment, and of every stacked memory a `[b, k, s, t]`, g `[b, k, s, 1]`."""
        dtype = self.parameter_dtype()
        written = [
            writer(hidden_btd.to(dtype), {name: tensor[:, place].to(dtype) for name, tensor in state.items()}, keep_bt)
            for place, writer in enumerate(self.writers)
        ]
        states, weights, gates = zip(*written, strict=True)
        after = {name: torch.stack([each[name] for each in states], 1).float() for name in state}
        return after, torch.stack(weights, 1), torch.stack(gates, 1)

    def write_and_tell(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[State, Attribution | None]:
        """Slots are counted through all stacked memories. The token write cannot tell without doing its steps again."""
        if self.config.write == "token":
            return self.write(hidden_btd, state, keep_bt), None
        after, weight, gate = self._blend(hidden_btd, state, keep_bt)
        weight_bst, gate_bs = weight.flatten(1, 2), gate.flatten(1)
        place_s = torch.arange(gate_bs.shape[1], device=gate_bs.device)
        return after, Attribution(place_s.expand(len(gate_bs), -1), gate_bs, weight_bst)

    def auxiliary(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, " b"] | None:
        """`write_cost` times the mean of beta over a row's tokens, summed over stacked memories; None where it is 0."""
        if not self.config.write_cost:
            return None
        costs = [writer.cost(hidden_btd.to(self.parameter_dtype()), keep_bt) for writer in self.writers]  # pyright: ignore
        return self.config.write_cost * torch.stack(costs).sum(0)

    def calibrate(self, written_nd: Float[Tensor, "n d"], asked_nd: dict[Site, Float[Tensor, "n d"]]) -> None:
        """Fits the whitening to hidden states as the write meets them, and as each read does where it is
        asked. Without `whiten` there is nothing to fit.
        """
        if not self.config.whiten:
            return
        written_nd = written_nd.to(self.parameter_dtype())
        for writer in self.writers:
            if isinstance(writer, SegmentWriter):
                _fit(writer.whiten, writer.norm_hidden(written_nd))
            elif isinstance(writer, AllocationWriter):
                entered_nd, hidden_nd = written_nd.chunk(2, -1)
                _fit(writer.whiten, writer.norm_hidden(hidden_nd))
                _fit(writer.whiten_entered, writer.norm_entered(entered_nd))
        for site, hidden_nd in asked_nd.items():
            for reader in self.readers[str(site.layer)]:  # pyright: ignore[reportGeneralTypeIssues]
                _fit(reader.whiten, reader.norm_hidden(hidden_nd.to(self.parameter_dtype())))
        self._tie()

    def rate_scale(self, name: str) -> float:
        """The write gates learn 5 times faster: they must come close to 0 on what is not worth keeping, and their input
        has the scale of the slots, so at the common rate they get there last. alpha, one number for a whole matrix, has
        20 times the rate.
        """
        if name.endswith(".alpha"):
            return 20.0
        return 5.0 if ".gate." in name or ".keep." in name else 1.0

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row, slot, head and token at a time."""
        return emt_naive(self, hidden_btd, state, keep_bt)


def _fit(whitening: nn.Module, samples_nd: Tensor) -> None:
    assert isinstance(whitening, Whitening)
    whitening.fit(samples_nd)
