"""Exponential average: one vector a stream, the running mean of the segments' mean hidden states.

    m <- decay m + (1 - decay) mean_t h_t          write, once a segment
    h' = h + W_o m                                 read, W_o = 0 at first

What is trained: W_o. What is forgotten: everything, by the factor `decay` a segment. State: `width * 4` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.layers import resolve_layer
from mnemic.memory import Card, Memory, MemoryConfig, Site
from mnemic.state import State


@dataclass
class AverageConfig(MemoryConfig):
    """Settings of an exponential average; `layer` is a block index, the middle of the stack by default."""

    kind: ClassVar[str] = "average"
    card: ClassVar[Card] = Card(
        title="Exponential average",
        seam="after block",
        trains="output projection",
        bytes_law="width x 4",
        paper="none: an example",
        citation="",
    )

    decay: float = 0.9
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must lie in [0, 1)")

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """One form only."""
        return [cls(segment_length=8)]

    def build(self, width: int, depth: int, causal: bool = True) -> Average:
        """The module; raises `ValueError` naming a layer that the host does not have."""
        return Average(self, width, depth)


class Average(Memory):
    """The module: one projection from the average to the host's width."""

    def __init__(self, config: AverageConfig, width: int, depth: int) -> None:
        super().__init__()
        layer = resolve_layer((depth - 1) // 2 if config.layer is None else config.layer, depth, "layer")
        self.reads = self.writes = (Site(layer),)
        self.decay = config.decay
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """`mean [b, d]`, float32."""
        return {"mean": torch.zeros(batch, self.output.in_features, device=device)}

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """Every token gets the same vector."""
        read_bd = self.output(state["mean"].to(self.parameter_dtype()))
        return hidden_btd + read_bd[:, None].to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The average after one segment."""
        hidden_btd = hidden_btd.to(state["mean"].dtype)  # float32, even where the host is bfloat16
        keep_bt = torch.ones_like(hidden_btd[..., 0], dtype=torch.bool) if keep_bt is None else keep_bt
        mean_bd = (hidden_btd * keep_bt[..., None]).sum(1) / keep_bt.sum(1, keepdim=True)
        return {"mean": torch.lerp(mean_bd, state["mean"], self.decay)}

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row and token at a time."""
        read, mean = [], []
        for b, row in enumerate(hidden_btd):
            m = state["mean"][b]
            kept = [token for t, token in enumerate(row) if keep_bt is None or keep_bt[b, t]]
            read.append(torch.stack([token + self.output(m) for token in row]))
            mean.append(self.decay * m + (1 - self.decay) * sum(kept, torch.zeros_like(m)) / len(kept))
        return torch.stack(read), {"mean": torch.stack(mean)}
