"""Compressive Transformer: Transformer-XL's memory, and a second one that keeps what leaves the first, compressed.

Rae, Potapenko, Jayakumar, Hillier, Lillicrap, "Compressive Transformers for Long-Range Sequence Modelling" (ICLR 2020),
section 3 and algorithms 1 and 2. For every block, with n_m = `size`, n_cm = `compressed`, c = `rate`:

    attend    block l of a segment sees [cm ; m ; h], all of them hidden states that entered the block; queries from h
    old       the oldest states of SG[m ; h] that exceed n_m, in whole groups of c
    m         <- the rest of SG[m ; h]
    cm        <- the last n_cm of [cm ; f_c(old)]

| `compression` | f_c of a group x_1 ... x_c | trains |
| --- | --- | --- |
| `mean`, `max` | Σ_i x_i / c, max_i x_i | |
| `convolution` | b + Σ_i W_iᵀ x_i, kernel and stride c, W and b of each block | by its `objective` |
| `most used` | of all that leave at once, the share 1 / c with the most attention, in their order | |

What a convolution learns from, with the gradient stopped in all that goes in, so that f_c alone (and g) has one:

    attention       |attn(h, old) - attn(h, f_c(old))|²      "attention-reconstruction loss"
    auto-encoding   |old - g(f_c(old))|²                     g a transposed convolution
    task            the task's own loss, through cm          "BPTT"; with the other two cm is a constant to it

The queue of every row is exact: token i of N is in m from i >= c g on, with g = ⌊(N - n_m) / c⌋ groups gone, and the
j-th state of cm was made of tokens c j ... c j + c - 1 (`most used` chooses among what leaves together). States that do
not fill a group stay in m until others join them, so that m may hold c - 1 more than n_m; nothing is padded.

What is ours. The memory stands before the segment as in `transformer_xl`, and the same holds of positions; a compressed
state takes one. A memory does not see its host's projections or attention weights, so attn here is attention over the
states themselves, of one head: attn(h, m) = softmax(n(h) n(m)ᵀ / √d) n(m), n a layer norm without weights. Its weights
also say what was used, counted over the segment that has just ended; the paper's are the host's own. The squares are
means, a convolution begins next to mean pooling, and dilated ones are not here.

What is forgotten: what leaves cm. State: at most `(n_m + c - 1 + n_cm) * blocks * d * 4 + 16` bytes a stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.compressive_naive import compressive_naive
from mnemic.memory import Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State, append_rows, check_range, drop_rows

# Shapes: b batch, t time, l blocks, d host width, D = l * d, m and n tokens, g groups, c tokens of a group.

CompressionName = Literal["mean", "max", "convolution", "most used"]
ObjectiveName = Literal["attention", "auto-encoding", "task"]
NOISE = 0.1
"""How far a new convolution is from mean pooling, in what it makes of states without order."""


@dataclass
class CompressiveConfig(MemoryConfig):
    """Settings of a Compressive Transformer's memory.

    `size` tokens are held as they are, and before them `compressed` states, each made of `rate` tokens, so a block sees
    `size + rate * compressed` tokens back. `objective` is what a convolution learns from; the others have nothing to
    learn, and the host learns to use them.
    """

    kind: ClassVar[str] = "compressive"
    card: ClassVar[Card] = Card(
        title="Compressive Transformer",
        seam="hidden states before the segment, at every block",
        trains="the compression, if it is a convolution; the host itself",
        bytes_law="(size + rate - 1 + compressed) x blocks x d x 4",
        paper="Rae et al., ICLR 2020, arXiv 1911.05507",
        citation="@inproceedings{rae2020compressive, title = {Compressive Transformers for Long-Range Sequence "
        "Modelling}, author = {Rae, Jack W. and Potapenko, Anna and Jayakumar, Siddhant M. and Hillier, Chloe and "
        "Lillicrap, Timothy P.}, booktitle = {ICLR}, year = {2020}}",
    )

    size: int = 512
    compressed: int = 512
    rate: int = 4
    compression: CompressionName = "mean"
    objective: ObjectiveName = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("size", 0), ("compressed", 1), ("rate", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.compression == "most used" and self.size < self.segment_length:
            raise ValueError(
                f"size {self.size} is smaller than a segment of {self.segment_length}, so tokens leave before any "
                f"segment could use them; set size to at least {self.segment_length}, or choose another compression"
            )
        if self.window not in (None, self.segment_length):
            raise ValueError(
                f"window is {self.window}, so the base would keep keys that the memory holds too; "
                f"leave it at the segment's {self.segment_length} and make size larger instead"
            )

    def unused(self) -> dict[str, str]:
        """The objective, where the compression has nothing to learn."""
        return {} if self.compression == "convolution" else {"objective": "set compression='convolution'"}

    @property
    def learns_from_task(self) -> bool:
        """Whether the task's loss reaches the compression."""
        return self.compression == "convolution" and self.objective == "task"

    def build(self, width: int, depth: int, causal: bool = True) -> Compressive:
        """The module for a decoder; raises `ValueError` for an encoder, whose call is one segment."""
        if not causal:
            raise ValueError("a Compressive Transformer's is a decoder's memory; attach it to a causal model")
        return Compressive(self, width, depth)

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """Each compression, one of them with a rate that does not divide a segment; the convolution the task trains."""
        return [
            cls(segment_length=8, size=8, compressed=6, rate=4),
            cls(segment_length=8, size=6, compressed=5, rate=3, compression="max"),
            cls(segment_length=8, size=4, compressed=6, rate=4, compression="convolution", objective="task"),
            cls(segment_length=8, size=8, compressed=7, rate=2, compression="most used"),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """`size` states in all, as many as a segment has tokens by default: half of them tokens, half compressed."""
        states = size or segment_length
        return cls(segment_length=segment_length, size=states // 2, compressed=states - states // 2)


class Compressive(Memory):
    """The tokens `memory [b, m, D]`, `memory_count [b]` of them in each row, and the states `compressed [b, n, D]`,
    `compressed_count [b]`; hidden states that entered each block, oldest first, D the blocks' widths together.
    """

    starts_empty = True

    def __init__(self, config: CompressiveConfig, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, width, depth
        self.reads, self.writes = (), tuple(Site(block, "input") for block in range(depth))
        self.beside = config.size + config.rate - 1 + config.compressed
        self.gradient_reach = None if config.learns_from_task else 0
        learned = config.compression == "convolution"
        self.convolution = Filter(depth, config.rate, width, 1 / config.rate) if learned else None
        decodes = learned and config.objective == "auto-encoding"
        self.decoder = Filter(depth, config.rate, width, 1.0) if decodes else None

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Nothing."""
        state: State = {}
        for name in ("memory", "compressed"):
            state[name] = torch.zeros(batch, 0, self.depth * self.width, device=device)
            state[f"{name}_count"] = torch.zeros(batch, dtype=torch.long, device=device)
        return state

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """The compressed states and then the tokens, at every block; None while there are none.

        Rows that hold less than others have theirs on the right, without a gap before the segment.
        """
        memory, counts = state["memory"].detach(), state["memory_count"].tolist()
        there = None if set(counts) == {memory.shape[1]} else filled(memory, counts)
        both, counts = append_rows(self._held(state), state["compressed_count"].tolist(), memory, there)
        if both.shape[1] == 0:
            return None
        keep = None
        if len(set(counts)) > 1:
            gap = torch.tensor([both.shape[1] - count for count in counts], device=both.device)
            place = torch.arange(both.shape[1], device=both.device) - gap[:, None]
            both, keep = taken(both, place.clamp_min(0)), place >= 0
        layers = both.to(self.parameter_dtype()).unflatten(-1, (self.depth, self.width))
        inputs = {block: layers[:, :, block] for block in range(self.depth)}
        return MemoryTokens(torch.zeros_like(layers[:, :, 0]), keep, inputs)

    def _held(self, state: State) -> Tensor:
        """cm, a constant unless the task's loss trains the compression."""
        return state["compressed"] if self.config.learns_from_task else state["compressed"].detach()

    def write(
        self, hidden_btd: Float[Tensor, "b t D"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """m and cm after one segment."""
        queue, counts, groups = self._queue(hidden_btd, state, keep_bt)
        old_bnD = queue[:, : max(groups) * self.config.rate]
        if self.config.compression == "most used":
            used_bln = self._used(hidden_btd, state, keep_bt)[..., : old_bnD.shape[1]]
            new_bgD = self._most_used(old_bnD, used_bln, groups)
        else:
            new_bgD = self._compress(self._by_group(old_bnD)).flatten(-2)
        if not self.config.learns_from_task:
            new_bgD = new_bgD.detach()
        compressed, total = append_rows(
            self._held(state), state["compressed_count"].tolist(), new_bgD, filled(new_bgD, groups)
        )
        compressed, total = drop_rows(compressed, total, [max(0, n - self.config.compressed) for n in total])
        memory, counts = drop_rows(queue, counts, [each * self.config.rate for each in groups])
        return {
            "memory": memory,
            "memory_count": state["memory_count"].new_tensor(counts),
            "compressed": compressed,
            "compressed_count": state["compressed_count"].new_tensor(total),
        }

    def auxiliary(
        self, hidden_btd: Float[Tensor, "b t D"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, " b"] | None:
        """The loss of the compression that `write` makes of the same arguments, to be added to the task's.

        A mean for each row, 0 for rows where nothing is compressed; None where no loss of its own trains f_c. Only f_c,
        and the decoder, get a gradient.
        """
        if self.convolution is None or self.config.learns_from_task:
            return None
        queue, _, groups = self._queue(hidden_btd, state, keep_bt)
        old = self._by_group(queue[:, : max(groups) * self.config.rate])
        new, there = self._compress(old), filled(old, groups)
        if self.decoder is not None:
            error = (self.decoder.transposed(new) - old).square().mean((-3, -2, -1))
            weight = there
        else:
            hidden = hidden_btd.detach().to(old.dtype).unflatten(-1, (self.depth, self.width))
            of_old = attend(hidden, old.flatten(1, 2), there.repeat_interleave(self.config.rate, 1))
            error = (attend(hidden, new, there) - of_old).square().mean((-2, -1))
            weight = torch.ones_like(error) if keep_bt is None else keep_bt
            weight = weight * there.any(1, keepdim=True)
        return (error * weight).sum(1) / weight.sum(1).clamp_min(1)

    def _queue(self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[Tensor, list[int], list[int]]:
        """SG[m ; h], how many states each row has in it, and how many groups of them leave."""
        memory = state["memory"].detach()
        new = hidden_btd.detach().to(memory.dtype)
        queue, counts = append_rows(memory, state["memory_count"].tolist(), new, keep_bt)
        return queue, counts, [max(0, count - self.config.size) // self.config.rate for count in counts]

    def _by_group(self, old_bnD: Tensor) -> Float[Tensor, "b g c l d"]:
        groups = old_bnD.shape[1] // self.config.rate
        return old_bnD.unflatten(1, (groups, self.config.rate)).unflatten(-1, (self.depth, self.width))

    def _compress(self, old: Float[Tensor, "b g c l d"]) -> Float[Tensor, "b g l d"]:
        """f_c of whole groups."""
        if self.convolution is not None:
            return self.convolution(old)
        if self.config.compression == "max":
            return old.amax(2)
        return old.mean(2)

    def _used(self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> Float[Tensor, "b l m"]:
        """How much attention a segment paid to every token of m, in each block."""
        memory = state["memory"].detach()
        hidden = hidden_btd.detach().to(memory.dtype)
        hidden, memory = (each.unflatten(-1, (self.depth, self.width)) for each in (hidden, memory))
        weight = weights(hidden, memory, filled(memory, state["memory_count"].tolist()))
        return (weight if keep_bt is None else weight * keep_bt[:, None, :, None]).sum(2)

    def _most_used(self, old_bnD: Tensor, used_bln: Tensor, groups: list[int]) -> Float[Tensor, "b g D"]:
        """Of each row's `groups * rate` states the `groups` most used, every block its own, in their order."""
        old = old_bnD.unflatten(-1, (self.depth, self.width)).transpose(1, 2)
        wanted = torch.tensor(groups, device=old.device)
        leaving = filled(old_bnD, [each * self.config.rate for each in groups])
        used_bln = used_bln.masked_fill(~leaving[:, None], -torch.inf)
        order = torch.argsort(used_bln, dim=-1, descending=True, stable=True)
        chosen = order.argsort(-1) < wanted[:, None, None]
        place = torch.argsort(chosen.long(), dim=-1, descending=True, stable=True)[..., : max(groups)]
        return old.gather(2, place[..., None].expand(-1, -1, -1, self.width)).transpose(1, 2).flatten(-2)

    def rate_scale(self, name: str) -> float:
        """1 / √(c d) for weights, so that a step moves what a convolution makes by as much in any host."""
        return 1 / math.sqrt(self.config.rate * self.width) if name.endswith("weight") else 1.0

    def naive(
        self, hidden_btd: Float[Tensor, "b t D"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t D"], State]:
        """The equations above, one row, token and group at a time."""
        return hidden_btd, compressive_naive(self, hidden_btd, state, keep_bt)

    def check_state(self, state: State, written: int) -> None:
        """Both counts are among what is there."""
        for name in ("memory", "compressed"):
            check_range(f"{name}_count", state[f"{name}_count"], 0, state[name].shape[1])

    def most_bytes(self, written: int) -> int:
        """`size` tokens and those that wait for a group, the compressed states, and two counts."""
        config, tokens = self.config, written * self.config.segment_length
        held = min(tokens, config.size + config.rate - 1)
        made = min(max(0, tokens - config.size) // config.rate, config.compressed)
        return (held + made) * self.depth * self.width * 4 + 16


class Filter(nn.Module):
    """Convolutions of kernel and stride c, one for each block: `weight [l, c, d, d]` and `bias [l, d]`.

    They begin as `scale` times the sum of a group, and some noise.
    """

    def __init__(self, depth: int, rate: int, width: int, scale: float) -> None:
        super().__init__()
        noise = torch.randn(depth, rate, width, width) / math.sqrt(width)
        self.weight = nn.Parameter(scale * (torch.eye(width) + NOISE * noise))
        self.bias = nn.Parameter(torch.zeros(depth, width))

    def forward(self, old: Float[Tensor, "b g c l d"]) -> Float[Tensor, "b g l d"]:
        """One state of every group."""
        weight, bias = self.weight.to(old.dtype), self.bias.to(old.dtype)
        return torch.einsum("bgcld,lcde->bgle", old, weight).to(old.dtype) + bias

    def transposed(self, new: Float[Tensor, "b g l d"]) -> Float[Tensor, "b g c l d"]:
        """A group of every state."""
        weight, bias = self.weight.to(new.dtype), self.bias.to(new.dtype)
        return torch.einsum("bgld,lcde->bgcle", new, weight).to(new.dtype) + bias


def weights(
    hidden: Float[Tensor, "b t l d"], memory: Float[Tensor, "b m l d"], there_bm: Bool[Tensor, "b m"]
) -> Float[Tensor, "b l t m"]:
    """softmax(n(h) n(m)ᵀ / √d), over what is there; where nothing is, it means nothing."""
    width = hidden.shape[-1]
    query, key = (F.layer_norm(each, (width,)) for each in (hidden, memory))
    score = torch.einsum("btld,bmld->bltm", query, key) / math.sqrt(width)
    return score.masked_fill(~there_bm[:, None, None], torch.finfo(score.dtype).min).softmax(-1)


def attend(
    hidden: Float[Tensor, "b t l d"], memory: Float[Tensor, "b m l d"], there_bm: Bool[Tensor, "b m"]
) -> Float[Tensor, "b t l d"]:
    """attn(h, m)."""
    value = F.layer_norm(memory, memory.shape[-1:])
    return torch.einsum("bltm,bmld->btld", weights(hidden, memory, there_bm), value)


def filled(rows: Float[Tensor, "b n *_"], counts: list[int]) -> Bool[Tensor, "b n"]:
    """Marks each row's own first `counts[b]`."""
    return torch.arange(rows.shape[1], device=rows.device) < torch.tensor(counts, device=rows.device)[:, None]


def taken(rows_bnd: Float[Tensor, "b n d"], place_bm: Tensor) -> Float[Tensor, "b m d"]:
    """Each row's own at these places."""
    return rows_bnd.gather(1, place_bm[..., None].expand(-1, -1, rows_bnd.shape[-1]))
