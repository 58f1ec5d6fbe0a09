"""Recurrent Memory Transformer: memory tokens that are passed from segment to segment.

Bulatov, Kuratov, Burtsev, "Recurrent Memory Transformer" (NeurIPS 2022), section 3.2. A decoder's segment t is read as
`[m_t ; x_t ; m_t]`: the tokens in front are read, those behind see the whole segment and are written, and
`m_{t+1}` is what the last block makes of the latter. An encoder, which sees both ways, has one copy that is both. The
first memory m_0 is learned. Gradients pass through the memory, as many segments back as training asks for.

What differs: the last hidden states pass a layer norm of their own on the way to the next segment (in the official code
it is the host's last norm), so that their size stays what embeddings are trained with however many segments come. In an
encoder the memory stands behind the text, so that the first token stays the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memory import Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State


@dataclass
class RMTConfig(MemoryConfig):
    """Settings of a recurrent memory: `tokens` memory tokens, which start as random ones of standard deviation
    `deviation` and then are learned. `norm=False` passes hidden states on as they are.
    """

    kind: ClassVar[str] = "rmt"
    card: ClassVar[Card] = Card(
        title="Recurrent Memory Transformer",
        seam="tokens before and behind the segment",
        trains="the first memory and a norm; the host learns to use it",
        bytes_law="tokens x d x 4",
        paper="Bulatov et al. 2022, arXiv 2207.06881",
        citation="A. Bulatov, Y. Kuratov, M. S. Burtsev. Recurrent Memory Transformer. NeurIPS 2022.",
    )

    tokens: int = 10
    deviation: float = 0.02
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; a memory has at least 1")
        if self.deviation <= 0:
            raise ValueError(f"deviation is {self.deviation}; tokens that start alike stay alike, use more than 0")

    def build(self, width: int, depth: int, causal: bool = True) -> RMT:
        """The module for a decoder or an encoder."""
        return RMT(self, width, depth, causal)

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """With the norm and without."""
        return [cls(segment_length=8, tokens=3), cls(segment_length=8, tokens=2, norm=False)]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """As many tokens as a segment has, but no more than 16, unless `size` says otherwise."""
        return cls(segment_length=segment_length, tokens=size or min(16, segment_length), deviation=0.5)


class RMT(Memory):
    """The memory tokens `tokens [b, n, d]` that the last segment left."""

    writes_tokens_behind = True

    def __init__(self, config: RMTConfig, width: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.reads, self.writes = (), (Site(depth - 1),)
        self.beside = (2 if causal else 1) * config.tokens
        self.first = nn.Parameter(config.deviation * torch.randn(config.tokens, width))
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """m_0, as learned."""
        return {"tokens": self.first.to(device=device, dtype=torch.float32).expand(batch, -1, -1)}

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """The read tokens of a decoder."""
        return MemoryTokens(state["tokens"].to(self.parameter_dtype())) if self.causal else None

    def tokens_behind(self, state: State) -> MemoryTokens | None:
        """The write tokens, which begin as the read tokens do."""
        return MemoryTokens(state["tokens"].to(self.parameter_dtype()))

    def write(
        self, hidden_btd: Float[Tensor, "b n d"], state: State, keep_bt: Bool[Tensor, "b n"] | None = None
    ) -> State:
        """m_{t+1}: what the last block made of the write tokens."""
        return {"tokens": self.norm(hidden_btd.to(self.parameter_dtype())).to(torch.float32)}

    def naive(
        self, hidden_btd: Float[Tensor, "b n d"], state: State, keep_bt: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], State]:
        """The norm, one token after another."""
        rows = []
        for row in hidden_btd:
            tokens = []
            for token_d in row:
                if isinstance(self.norm, nn.LayerNorm):
                    centred = token_d - token_d.mean()
                    token_d = centred / (centred.pow(2).mean() + self.norm.eps).sqrt()
                    token_d = token_d * self.norm.weight + self.norm.bias
                tokens.append(token_d)
            rows.append(torch.stack(tokens))
        return hidden_btd, {"tokens": torch.stack(rows)}
