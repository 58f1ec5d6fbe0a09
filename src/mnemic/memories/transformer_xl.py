"""Transformer-XL: segment-level recurrence over the hidden states of every layer.

Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context" (ACL 2019), section 3.2. Block l
of segment t+1 attends over `[SG(m^l) ; h^l]`, where m^l are the last M hidden states that entered the block in earlier
segments and SG stops the gradient; queries come from h alone. The memory is a queue, so with L blocks information moves
at most L * M tokens, and since no gradient crosses a segment, what has to be relayed over several is not learned.

The memory's hidden states stand before the segment at every block and the base's own projections make keys and values
of them, so their weights learn from them as in the paper. Positions differ: the paper's relative encodings belong to
its own attention. On a host with rotary or linear biases the memory stands at the positions before the segment's, so
distances are the same and a memory as long as the text equals one forward over everything. On a host with a table of
positions the hidden states keep the positions that they were computed at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mnemic.memory import Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State, check_range, push_rows


@dataclass
class TransformerXLConfig(MemoryConfig):
    """Settings of a Transformer-XL memory: nothing in it trains, the host learns to use it.

    `size` is M, how many earlier tokens the memory holds; it may be larger in use than in training. With `same_length`
    every token sees exactly M tokens, its own the last of them, as in the paper's evaluation, instead of all there are.
    """

    kind: ClassVar[str] = "transformer-xl"
    card: ClassVar[Card] = Card(
        title="Transformer-XL",
        seam="hidden states before the segment, at every block",
        trains="nothing: the host itself",
        bytes_law="M x blocks x d x 4, M tokens",
        paper="Dai et al. 2019, arXiv 1901.02860",
        citation="Z. Dai, Z. Yang, Y. Yang, J. Carbonell, Q. V. Le, R. Salakhutdinov. Transformer-XL: Attentive "
        "Language Models beyond a Fixed-Length Context. ACL 2019.",
    )

    size: int = 512
    same_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size is {self.size}; the memory holds at least 1 token")
        if self.window not in (None, self.segment_length):
            raise ValueError(
                f"window is {self.window}, so the base would keep keys that the memory holds too; "
                f"leave it at the segment's {self.segment_length} and make size larger instead"
            )

    def build(self, width: int, depth: int, causal: bool = True) -> TransformerXL:
        """The module for a decoder; raises `ValueError` for an encoder."""
        if not causal:
            raise ValueError("Transformer-XL is a decoder's memory; attach it to a causal model")
        return TransformerXL(self, width, depth)

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """A memory of one segment, and one of no whole number of them."""
        return [cls(segment_length=8, size=8), cls(segment_length=8, size=11)]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """A memory of one segment."""
        return cls(segment_length=segment_length, size=size or segment_length)


class TransformerXL(Memory):
    """The last M hidden states `memory [b, m, depth * d]` that entered each block, `count [b]` of them in each row."""

    gradient_reach = 0
    starts_empty = True

    def __init__(self, config: TransformerXLConfig, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, width, depth
        self.reads, self.writes = (), tuple(Site(block, "input") for block in range(depth))
        self.beside = config.size
        self.span = config.size if config.same_length else None
        self.reach = depth * -(-config.size // config.segment_length)

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Nothing."""
        hidden = torch.zeros(batch, 0, self.depth * self.width, device=device)
        return {"memory": hidden, "count": torch.zeros(batch, dtype=torch.long, device=device)}

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """The memory, at every block; None while it is empty."""
        hidden_bmd = state["memory"].to(self.parameter_dtype())
        if hidden_bmd.shape[1] == 0:
            return None
        layers = hidden_bmd.unflatten(-1, (self.depth, self.width))
        column = torch.arange(hidden_bmd.shape[1], device=hidden_bmd.device)
        return MemoryTokens(
            torch.zeros_like(layers[:, :, 0]),
            column < state["count"][:, None],
            {block: layers[:, :, block] for block in range(self.depth)},
        )

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """m <- SG(the last M of [m ; h])."""
        hidden_btd, held_bmd = hidden_btd.detach().to(state["memory"].dtype), state["memory"].detach()
        memory, count = push_rows(held_bmd, state["count"].tolist(), hidden_btd, keep_bt, self.config.size)
        return {"memory": memory, "count": state["count"].new_tensor(count)}

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The queue, one token after another."""
        rows = []
        for b, count in enumerate(state["count"].tolist()):
            queue = list(state["memory"][b, :count].detach())
            for t, hidden_d in enumerate(hidden_btd[b]):
                if keep_bt is None or keep_bt[b, t]:
                    queue = [*queue, hidden_d.detach()][-self.config.size :]
            rows.append(queue)
        longest = max(len(queue) for queue in rows)
        empty = hidden_btd.new_zeros(hidden_btd.shape[-1])
        hidden = torch.stack([torch.stack([*queue, *[empty] * (longest - len(queue))]) for queue in rows])
        return hidden_btd, {"memory": hidden, "count": state["count"].new_tensor([len(queue) for queue in rows])}

    def check_state(self, state: State, written: int) -> None:
        """The count is among what is there."""
        check_range("count", state["count"], 0, state["memory"].shape[1])

    def most_bytes(self, written: int) -> int:
        """M tokens of every block at most, and the count."""
        return min(self.config.size, written * self.config.segment_length) * self.depth * self.width * 4 + 8
