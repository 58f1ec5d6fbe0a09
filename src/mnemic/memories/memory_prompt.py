"""MemoryPrompt: a small recurrent network reads a segment's last token and writes soft prompts for the next segment.

Carraz Rakotonirina, Baroni, "MemoryPrompt: A Light Wrapper to Improve Context Tracking in Pre-trained Language Models"
(LREC-COLING 2024, arXiv 2402.15268), section 2. With x the last real token's hidden state behind the last block,

    z = W_2 relu(W_1 norm(x) + b_1) + b_2                  MLP
    i, f, g, o = split(U z + b + V h + b')                 LSTM
    c <- sigmoid(f) c + sigmoid(i) tanh(g)
    h <- sigmoid(o) tanh(c)
    p = h, or O h with `dim`, split into `tokens` vectors of the host's width

and p stands before the next segment's words, at the embeddings. The LSTM has as many units as the prompts have numbers,
`tokens * width`, or `dim` of them and a projection O. The first segment has no prompt, so it is the base's own.

What differs: x passes a norm of its own where the official code takes it behind the host's last norm; the MLP starts as
linear layers do (there at a ten-thousandth of the usual size, which leaves it to the optimiser to scale it up); the
loss has no term for the prompts' length. `dim` and O are ours: without them the LSTM's square is most of the memory.

What is trained: norm, MLP, LSTM, O. What is forgotten: what the forget gate lets go. State: h and c and how many
segments were written, `8 * dim + 8` bytes a stream, `dim = tokens * width` unless it is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memory import Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State, check_range

# Shapes: b batch, t time, d host width, n prompts, u units of the LSTM.


@dataclass
class MemoryPromptConfig(MemoryConfig):
    """Settings of MemoryPrompt: `tokens` soft prompts, an MLP of two layers of `hidden` units, and an LSTM of `dim`
    units; by default as many as the prompts have numbers, without a projection behind it.
    """

    kind: ClassVar[str] = "memory-prompt"
    card: ClassVar[Card] = Card(
        title="MemoryPrompt",
        seam="tokens before the segment",
        trains="norm, MLP, LSTM, projection of the prompts",
        bytes_law="8 x units + 8, units = tokens x d or dim",
        paper="Carraz Rakotonirina and Baroni 2024, arXiv 2402.15268",
        citation="N. Carraz Rakotonirina, M. Baroni. MemoryPrompt: A Light Wrapper to Improve Context Tracking in "
        "Pre-trained Language Models. LREC-COLING 2024.",
    )

    tokens: int = 5
    hidden: int = 1024
    dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "hidden", "dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def build(self, width: int, depth: int, causal: bool = True) -> MemoryPrompt:
        """The module for a decoder; raises `ValueError` for an encoder, whose first token must stay the first."""
        if not causal:
            raise ValueError("MemoryPrompt puts prompts before a decoder's text; attach it to a causal model")
        return MemoryPrompt(self, width, depth)

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """As in the paper, and with fewer units and a projection."""
        return [
            cls(segment_length=8, tokens=2, hidden=16),
            cls(segment_length=8, tokens=3, hidden=16, dim=24),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """5 prompts; an LSTM of `size` units, by default as many as the prompts have numbers."""
        return cls(segment_length=segment_length, hidden=2 * width, dim=size)


class MemoryPrompt(Memory):
    """The LSTM's `hidden [b, u]` and `cell [b, u]`, and the segments `count [b]` that it has read."""

    starts_empty = True

    def __init__(self, config: MemoryPromptConfig, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.reads, self.writes, self.beside = (), (Site(depth - 1),), config.tokens
        numbers = config.tokens * width
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, config.hidden), nn.Linear(config.hidden, config.hidden)
        self.lstm = nn.LSTMCell(config.hidden, config.dim or numbers)
        self.output = nn.Linear(config.dim, numbers) if config.dim else nn.Identity()

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros: nothing was read, and there is no prompt."""
        zeros = torch.zeros(batch, self.lstm.hidden_size, device=device)
        return {"hidden": zeros, "cell": zeros.clone(), "count": torch.zeros(batch, dtype=torch.long, device=device)}

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """p, in the rows that have read a segment; None where none has."""
        there = state["count"] > 0
        if not bool(there.any()):
            return None
        prompts = self.output(state["hidden"].to(self.parameter_dtype())).unflatten(-1, (-1, self.width))
        return MemoryTokens(prompts, there[:, None].expand(-1, self.config.tokens))

    def check_state(self, state: State, written: int) -> None:
        """The segments that it counts."""
        check_range("count", state["count"], 0, written)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """One step of the LSTM with each row's last real token; a row without any stays as it is."""
        last_bd, there = hidden_btd[:, -1], None
        if keep_bt is not None:
            place_t = torch.arange(hidden_btd.shape[1], device=hidden_btd.device)
            last_b = torch.where(keep_bt, place_t, -1).amax(1)
            there = (last_b >= 0)[:, None]
            last_bd = hidden_btd[torch.arange(len(last_b), device=last_b.device), last_b.clamp_min(0)]
        lstm, dtype = self.lstm, self.parameter_dtype()
        inner = self.second(F.relu(self.first(self.norm(last_bd.to(dtype)))))
        gates = F.linear(inner, lstm.weight_ih, lstm.bias_ih)
        gates = gates + F.linear(state["hidden"].to(dtype), lstm.weight_hh, lstm.bias_hh)
        # the cell adds up over many segments, so it does in the state's own precision
        enter, keep, new, leave = gates.to(state["cell"].dtype).chunk(4, -1)
        cell = torch.sigmoid(keep) * state["cell"] + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        if there is not None:
            cell, hidden = torch.where(there, cell, state["cell"]), torch.where(there, hidden, state["hidden"])
        read = 1 if there is None else there[:, 0].long()
        return {"hidden": hidden.float(), "cell": cell.float(), "count": state["count"] + read}

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations, one row and one unit at a time."""
        lstm, rows = self.lstm, []
        for b, row in enumerate(hidden_btd):
            read = [token for t, token in enumerate(row) if keep_bt is None or keep_bt[b, t]]
            if not read:
                rows.append((state["hidden"][b], state["cell"][b], state["count"][b]))
                continue
            inner = (self.first.weight @ self.norm(read[-1]) + self.first.bias).clamp_min(0)
            inner = self.second.weight @ inner + self.second.bias
            units, before = lstm.hidden_size, state["hidden"][b]
            hidden, cell = [], []
            for unit in range(units):
                enter, keep, new, leave = (
                    torch.dot(lstm.weight_ih[gate], inner)
                    + lstm.bias_ih[gate]
                    + torch.dot(lstm.weight_hh[gate], before)
                    + lstm.bias_hh[gate]
                    for gate in range(unit, 4 * units, units)
                )
                cell.append(state["cell"][b, unit] / (1 + (-keep).exp()) + new.tanh() / (1 + (-enter).exp()))
                hidden.append(cell[-1].tanh() / (1 + (-leave).exp()))
            rows.append((torch.stack(hidden), torch.stack(cell), state["count"][b] + 1))
        hidden, cell, count = (torch.stack(each) for each in zip(*rows, strict=True))
        return hidden_btd, {"hidden": hidden, "cell": cell, "count": count}
