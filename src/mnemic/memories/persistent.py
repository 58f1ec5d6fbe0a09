"""Six memories for a frozen decoder: three ways to write, and three ways to let a model that does not change read.

Jeong, "Trained Persistent Memory for Frozen Decoder-Only LLMs" (arXiv 2603.22329), methods M.1 to M.6; the write rules
are those of its sister study on encoder-decoders (arXiv 2603.16413). z_i are the hidden states of a segment behind the
last block, γ is `decay`, d the host's width, κ_j the key of row j of the memory P.

Writes:

    rows     A_ij = softmax_j(z_i W_Q . κ_j / √d)              for each token over the rows
             P <- γ P + Aᵀ (Z W_V)
    hebbian  M~ = γ M + 1/n (Z W_K)ᵀ (Z W_V),   M <- M~ / max(‖M~‖, 1)
    slots    z = mean of z_i,   a_j = softmax_j(z W_A . κ_j / √d)
             P_j <- γ P_j + (1 - γ) z W_U                      for the `top` largest a_j; other rows stay

| `method` | writes | reads | starts at zero |
| --- | --- | --- | --- |
| `prefix`, M.1 | rows | P W_mem as tokens at the embeddings | W_mem |
| `cross-attention`, M.2 | rows | h + β softmax(h W_Q (P W_K)ᵀ / √d) P W_V W_O behind every block, β its own | β |
| `key-value`, M.3 | rows | P W_mem as hidden states that enter every block | W_mem |
| `hebbian`, M.4 | hebbian | R W_mem at every block, R = (E W_Q) M | W_mem |
| `gated`, M.5 | rows | h + g c likewise, c = softmax(...) P W_V, g = sigmoid([h; c] W_g + b_g) | W_V; b_g at -2 |
| `slots`, M.6 | slots | as M.3 | W_mem |

M.1, M.3, M.4 and M.6 leave the retrieval to the base's attention: the memory's rows are tokens before the segment, and
at every block the base's own norm and projections make keys and values of W_mem's. M.2 and M.5 retrieve themselves.

Three things in the study's own form keep it from remembering, and are mended here unless a setting asks for them:

- `trained_write=False`: W_Q, W_V ... of the writes stay random, and no gradient passes through a write.
- `keys="content"`: κ_j = P_j W_K, where P starts as noise. Its logits are next to equal, so all rows are written alike,
  and soon hold one vector. With `keys="rows"` each row has a key of its own, at first at right angles to the others and
  so long that a token chooses among them; P starts at zero, and while all of it is zero, no token is there.
- `write_mask=False`: means are taken over `segment_length` tokens however few a segment has, as if padding of zeros
  were written too. In the study's code padding is written with the hidden states it happens to have.

What else differs. z and h are layer-normed (no parameters), where the study takes the last hidden states behind the
host's last norm. So are the rows that M.2 and M.5 read, as the base's own norms do elsewhere: rows are sums, and grow
with a segment's tokens. M.2 and M.5 read behind blocks, not beside their attention. In M.4 learned vectors E ask, where
the study asks with the running turn's hidden states: its tokens would see what comes after them. M.6's choice has no
gradient: the a_j of chosen slots count as 1, with the gradient of a_j.

What is trained: the reads, and with `trained_write` the writes. What is forgotten: everything, with γ to the power of
the segments since (of the times a slot was chosen since), 5 % a segment by default. State: `rows * d * 4` bytes a
stream; `dim² * 4` for M.4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.fast_weights import by_head
from mnemic.memory import Attribution, Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State, detach

# Shapes: b batch, t time, d host width, n rows, k rows and columns of the Hebbian matrix.

Method = Literal["prefix", "cross-attention", "key-value", "hebbian", "gated", "slots"]
BEHIND_BLOCKS = ("cross-attention", "gated")
"""Methods that read behind blocks; the others put tokens before the segment."""

SPREAD = 4.0
"""The standard deviation of a token's logits over rows with keys of their own, at first: it writes to a few of them."""
NOISE = 0.02
"""That of the numbers of P at first with `keys="content"`, as in the study."""


@dataclass
class PersistentConfig(MemoryConfig):
    """Settings of the six methods, which `mnemic.memories.persistent` tells of: `rows` of the memory (for "hebbian" as
    many are asked for), `dim` rows and columns of the Hebbian matrix, `decay` γ, and `top` slots written at once.
    """

    kind: ClassVar[str] = "persistent"
    card: ClassVar[Card] = Card(
        title="Persistent memory, M.1 to M.6",
        seam="tokens before the segment; after every block",
        trains="reads, writes, keys of rows",
        bytes_law="rows x d x 4, or dim x dim x 4",
        paper="Jeong 2026, arXiv 2603.22329",
        citation="@article{jeong2026trained, title = {Trained Persistent Memory for Frozen Decoder-Only LLMs}, "
        "author = {Jeong, Hong}, journal = {arXiv:2603.22329}, year = {2026}}",
    )

    method: Method = "cross-attention"
    rows: int = 64
    dim: int = 256
    decay: float = 0.95
    top: int = 8
    keys: Literal["rows", "content"] = "rows"
    trained_write: bool = True
    write_mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "dim", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; what is kept of the memory is above 0 and at most 1")
        if self.method == "slots" and self.top > self.rows:
            raise ValueError(f"top is {self.top}, but there are {self.rows} slots; set top to at most that")
        if self.method == "slots" and self.decay == 1:
            raise ValueError("decay is 1, and 1 - decay of a slot is written; use less than 1")

    def unused(self) -> dict[str, str]:
        """The settings of other methods."""
        found: dict[str, str] = {}
        if self.method != "hebbian":
            found["dim"] = "set method='hebbian'"
        else:
            found["keys"] = "use a method that writes rows: a Hebbian matrix has none to choose from"
        if self.method != "slots":
            found["top"] = "set method='slots'"
        if self.method not in ("hebbian", "slots"):
            found["write_mask"] = "use a method that writes means over tokens, 'hebbian' or 'slots'"
        return found

    def build(self, width: int, depth: int, causal: bool = True) -> Persistent:
        """The module; raises `ValueError` for an encoder and a method that puts tokens before a decoder's text."""
        if not causal and self.method not in BEHIND_BLOCKS:
            raise ValueError(
                f"method {self.method!r} puts tokens before a decoder's text; attach it to a causal model, or use "
                f"{' or '.join(map(repr, BEHIND_BLOCKS))}"
            )
        return Persistent(self, width, depth, causal)

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """Every method; M.3 as in the study."""
        small: dict[str, Any] = {"segment_length": 8, "rows": 3}
        return [
            cls(**small, method="prefix"),
            cls(**small, method="cross-attention"),
            cls(**small, method="key-value", keys="content", trained_write=False),
            cls(**small, method="hebbian", dim=12, write_mask=False),
            cls(**small, method="gated"),
            cls(**small, method="slots", top=2, decay=0.8),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """As many rows as a segment has tokens, but no more than 16, unless `size` says otherwise."""
        return cls(segment_length=segment_length, rows=size or min(16, segment_length))


class Persistent(Memory):
    """The memory `rows [b, n, d]`, or `matrix [b, k, k]` for "hebbian"."""

    first: Tensor
    writer: Writer

    def __init__(self, config: PersistentConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.config, self.depth, self.behind = config, depth, config.method in BEHIND_BLOCKS
        self.reads_own_segment = not causal
        self.starts_empty = causal and config.keys == "rows"
        self.gradient_reach = None if config.trained_write else 0
        self.reads, self.writes = tuple(map(Site, range(depth))) if self.behind else (), (Site(depth - 1),)
        self.beside = 0 if self.behind else config.rows
        self.name = "matrix" if config.method == "hebbian" else "rows"
        self.writer = WRITERS.get(config.method, RowWriter)(config, width)
        shape = (config.dim, config.dim) if config.method == "hebbian" else (config.rows, width)
        noise = config.keys == "content"
        self.register_buffer("first", NOISE * torch.randn(shape) if noise else torch.zeros(shape), persistent=noise)
        if self.behind:
            self.query, self.key, self.value = (nn.Parameter(drawn(width, width)) for _ in range(3))
        if config.method == "cross-attention":
            self.output, self.beta = nn.Parameter(drawn(width, width)), nn.Parameter(torch.zeros(depth))
        elif config.method == "gated":
            nn.init.zeros_(self.value)
            self.gate = nn.Parameter(drawn(2 * width, width))
            self.gate_bias = nn.Parameter(torch.full((width,), -2.0))
        else:
            if config.method == "hebbian":
                self.asking = nn.Parameter(apart(config.rows, width))
                self.query = nn.Parameter(NOISE * torch.randn(width, config.dim))
            self.project = nn.Parameter(torch.zeros(shape[1], width))

    @property
    def writes_see_reads(self) -> bool:
        """For decoders. An encoder's call is one segment, which nothing cuts."""
        return not self.reads_own_segment and super().writes_see_reads

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros, or with `keys="content"` the same noise for every stream."""
        return {self.name: self.first.to(device=device, dtype=torch.float32).expand(batch, -1, -1).clone()}

    def held(self, state: State) -> Tensor:
        """The memory in the dtype of the parameters; constant to the gradient where writes do not train."""
        held = state[self.name].to(self.parameter_dtype())
        return held if self.config.trained_write else held.detach()

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """The rows as tokens, where the memory holds anything; None for methods that read behind blocks."""
        if self.behind:
            return None
        held = self.held(state)
        there = held.ne(0).flatten(1).any(1)
        if not bool(there.any()):
            return None
        tokens = ((self.asking @ self.query) @ held if self.config.method == "hebbian" else held) @ self.project
        blocks = () if self.config.method == "prefix" else range(self.depth)
        return MemoryTokens(tokens, there[:, None].expand(-1, self.beside), dict.fromkeys(blocks, tokens))

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h + β c W_O or h + g c behind a block; h itself where the base attends to tokens."""
        if not self.behind:
            return hidden_btd
        held, asks = normed(self.held(state)), normed(hidden_btd.to(self.parameter_dtype()))
        logits = (asks @ self.query) @ (held @ self.key).mT / math.sqrt(held.shape[-1])
        read = logits.softmax(-1) @ (held @ self.value)
        if self.config.method == "gated":
            read = torch.sigmoid(torch.cat([asks, read], -1) @ self.gate + self.gate_bias) * read
        else:
            read = self.beta[site.layer] * (read @ self.output)
        return hidden_btd + read.to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The memory after one segment."""
        hidden_btd = hidden_btd.to(self.parameter_dtype())
        if not self.config.trained_write:
            hidden_btd, state = hidden_btd.detach(), detach(state)
        keep = torch.ones_like(hidden_btd[..., 0]) if keep_bt is None else keep_bt.to(hidden_btd.dtype)
        return {self.name: self.writer(normed(hidden_btd), keep, state[self.name]).float()}

    def write_and_tell(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[State, Attribution | None]:
        """Of rows: by how much each changed, and A_ij of every token. A mean over all tokens tells nothing of them."""
        after = self.write(hidden_btd, state, keep_bt)
        if not isinstance(self.writer, RowWriter):
            return after, None
        shares_btn = self.writer.shares(normed(hidden_btd.to(self.parameter_dtype())), state[self.name])
        if keep_bt is not None:
            shares_btn = shares_btn * keep_bt[..., None]
        return after, by_head(state[self.name][..., None], after[self.name][..., None], shares_btn.mT)

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations, one row of the batch, one token and one row of the memory at a time."""
        outputs, after = [], []
        for b, held in enumerate(self.held(state)):
            outputs.append(torch.stack([self._naive_read(token, held) for token in hidden_btd[b]]))
            kept = [token for t, token in enumerate(hidden_btd[b]) if keep_bt is None or keep_bt[b, t]]
            if not self.config.trained_write:
                kept = [token.detach() for token in kept]
            after.append(self.writer.naive([normed(token) for token in kept], held))
        return torch.stack(outputs), {self.name: torch.stack(after)}

    def _naive_read(self, hidden_d: Tensor, held_nd: Tensor) -> Tensor:
        if not self.behind:
            return hidden_d
        query, held_nd = normed(hidden_d) @ self.query, normed(held_nd)
        weights = [(torch.dot(query, row @ self.key) / math.sqrt(len(query))).exp() for row in held_nd]
        total = torch.stack(weights).sum()
        read = torch.stack([w / total * (row @ self.value) for w, row in zip(weights, held_nd, strict=True)]).sum(0)
        if self.config.method == "cross-attention":
            return hidden_d + self.beta[self.reads[0].layer] * (read @ self.output)
        logits = torch.cat([normed(hidden_d), read]) @ self.gate + self.gate_bias
        return hidden_d + read / (1 + (-logits).exp())


# --- writes ----------------------------------------------------------------------------------------------------------


class Writer(nn.Module, ABC):
    """One of the three writes."""

    key: Tensor
    query: Tensor
    value: Tensor

    def __init__(self, config: PersistentConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width

    def weight(self, name: str, value: Tensor) -> None:
        """A matrix that trains, or stays as it was drawn."""
        if self.config.trained_write:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def count(self, keep_bt: Tensor) -> Tensor:
        """Tokens that a mean is over `[b, 1, 1]`."""
        count = keep_bt.sum(1) if self.config.write_mask else torch.full_like(keep_bt[:, 0], self.config.segment_length)
        return count.clamp_min(1)[:, None, None]

    def naive_count(self, tokens: list[Tensor]) -> int:
        """The same for one row."""
        return len(tokens) if self.config.write_mask else self.config.segment_length

    @abstractmethod
    def forward(self, z_btd: Tensor, keep_bt: Tensor, held: Tensor) -> Tensor:
        """The memory after one segment, of which `keep_bt` is 1 for real tokens and 0 for padding."""

    @abstractmethod
    def naive(self, tokens: list[Tensor], held: Tensor) -> Tensor:
        """The same in plain loops for one row of the batch and its real tokens."""


class KeyedWriter(Writer):
    """A write that chooses rows: by a key of each, over which queries spread, or by W_K of what it holds."""

    def __init__(self, config: PersistentConfig, width: int) -> None:
        super().__init__(config, width)
        self.own = config.keys == "rows"
        self.weight("key", apart(config.rows, width) if self.own else drawn(width, width))
        self.weight("query", (SPREAD if self.own else 1.0) * drawn(width, width))
        self.weight("value", drawn(width, width))

    def shares(self, asks_btd: Tensor, held_bnd: Tensor) -> Float[Tensor, "b t n"]:
        """softmax_j(z W . κ_j / √d)."""
        keys = self.key if self.own else held_bnd.to(asks_btd.dtype) @ self.key
        return ((asks_btd @ self.query) @ keys.mT / math.sqrt(self.width)).softmax(-1)

    def naive_shares(self, token: Tensor, held: Tensor) -> list[Tensor]:
        """The same for one token."""
        keys = list(self.key) if self.own else [row @ self.key for row in held]
        weights = [(torch.dot(token @ self.query, key) / math.sqrt(self.width)).exp() for key in keys]
        return [weight / torch.stack(weights).sum() for weight in weights]


class RowWriter(KeyedWriter):
    """P <- γ P + Aᵀ (Z W_V)."""

    def forward(self, z_btd: Tensor, keep_bt: Tensor, held: Tensor) -> Tensor:
        """All tokens at once."""
        shares_btn = self.shares(z_btd, held) * keep_bt[..., None]
        return self.config.decay * held + (shares_btn.mT @ (z_btd @ self.value)).to(held.dtype)

    def naive(self, tokens: list[Tensor], held: Tensor) -> Tensor:
        """Token by token."""
        after = [self.config.decay * row for row in held]
        for token in tokens:
            shares = self.naive_shares(token, held)
            after = [row + share * (token @ self.value) for row, share in zip(after, shares, strict=True)]
        return torch.stack(after)


class SlotWriter(KeyedWriter):
    """P_j <- γ P_j + (1 - γ) z W_U for the `top` rows of the largest a_j."""

    def forward(self, z_btd: Tensor, keep_bt: Tensor, held: Tensor) -> Tensor:
        """All slots at once."""
        decay, mean_b1d = self.config.decay, (z_btd * keep_bt[..., None]).sum(1, keepdim=True) / self.count(keep_bt)
        shares_bn = self.shares(mean_b1d, held)[:, 0]
        chosen = torch.zeros_like(shares_bn, dtype=torch.bool)
        chosen = chosen.scatter(1, shares_bn.topk(self.config.top, -1).indices, value=True)
        # 1 in number, a_j to the gradient
        weight_bn1 = (1 + shares_bn - shares_bn.detach())[..., None]
        new = decay * held + (1 - decay) * (weight_bn1 * (mean_b1d @ self.value)).to(held.dtype)
        return torch.where(chosen[..., None], new, held)

    def naive(self, tokens: list[Tensor], held: Tensor) -> Tensor:
        """Slot by slot."""
        mean = torch.stack(tokens).sum(0) / self.naive_count(tokens)
        shares, decay = self.naive_shares(mean, held), self.config.decay
        after = list(held)
        for j in sorted(range(len(held)), key=lambda j: float(shares[j].detach()), reverse=True)[: self.config.top]:
            after[j] = decay * held[j] + (1 - decay) * (1 + shares[j] - shares[j].detach()) * (mean @ self.value)
        return torch.stack(after)


class HebbianWriter(Writer):
    """M~ = γ M + 1/n (Z W_K)ᵀ (Z W_V), M <- M~ / max(‖M~‖, 1)."""

    def __init__(self, config: PersistentConfig, width: int) -> None:
        super().__init__(config, width)
        for name in ("key", "value"):
            self.weight(name, drawn(width, config.dim))

    def forward(self, z_btd: Tensor, keep_bt: Tensor, held: Tensor) -> Tensor:
        """All tokens at once."""
        pairs = (z_btd @ self.key * keep_bt[..., None]).mT @ (z_btd @ self.value) / self.count(keep_bt)
        new = self.config.decay * held + pairs.to(held.dtype)
        return new / torch.linalg.matrix_norm(new, keepdim=True).clamp_min(1)

    def naive(self, tokens: list[Tensor], held: Tensor) -> Tensor:
        """Token by token."""
        new = self.config.decay * held
        for token in tokens:
            new = new + torch.outer(token @ self.key, token @ self.value) / self.naive_count(tokens)
        length = (new * new).sum().sqrt()
        return new / length if length > 1 else new


WRITERS: dict[str, type[Writer]] = {"hebbian": HebbianWriter, "slots": SlotWriter}
"""Methods with a write of their own; the others write rows."""


def normed(hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """A layer norm without parameters."""
    return F.layer_norm(hidden, hidden.shape[-1:])


def drawn(inputs: int, outputs: int) -> Float[Tensor, "inputs outputs"]:
    """A random matrix that leaves numbers about as large as they are."""
    return torch.randn(inputs, outputs) / math.sqrt(inputs)


def apart(rows: int, width: int) -> Float[Tensor, "rows width"]:
    """Random rows of length √width, at right angles while there are no more of them than numbers in each."""
    return math.sqrt(width) * F.normalize(nn.init.orthogonal_(torch.empty(rows, width)), dim=-1)
