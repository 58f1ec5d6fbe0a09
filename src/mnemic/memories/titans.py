"""Titans' neural memory: a small network that every token trains on a pair of key and value, and that a query asks.

Behrouz et al. 2025, arXiv 2501.00663. x_t is the layer-normed hidden state of token t, x_{t-1} that of the token before
it, also across a segment's border. For each head, with a network M of `layers` matrices W_1 ... W_L,

    k_t = unit(K x_t + K' x_{t-1}),   v_t = V x_t         K' only with `shift`
    M(k) = W_Lᵀ a_{L-1},   a_l = σ(W_lᵀ a_{l-1}),  a_0 = k
    ℓ_t(M) = ½ ‖M(k_t) - v_t‖²                            what the network should say of this key
    θ_t = sigmoid(b . x_t + `rate_bias`)                  how much a token trains
    η_t = sigmoid(c . x_t + `momentum_bias`)              how much of the surprise of before goes on
    α_t = sigmoid(a . x_t + `forget_bias`)                how much is forgotten
    S_t = η_t S_{t-1} - θ_t Σ_{t-w<i<=t} γ_i ∇ℓ_i(M)      surprise: momentum and gradient
    M_t = M_* + (1 - α_t) (M_{t-1} - M_*) + S_t

w is `window_tokens`. At 1, Titans' own, γ is 1. Above it the loss is over the last w tokens of the segment (the Omega
rule of ATLAS, Behrouz et al. 2025, arXiv 2505.23735) and γ_i = sigmoid(g . x_i - log(w - 1)) says how much token i
counts. ∇ℓ is taken at the weights of the start of the token's chunk, `chunk` real tokens of a segment: Titans' parallel
form. With `chunk=1` each token is trained at what the one before it left. Read, at every read layer, from the network
as it stood when the segment began, with q = unit(Q x):

    r = M(q)
    h' = h + G O [r / sqrt(mean r² + δ)]                  the mean of each head, O of all; δ = 0.01
    G = diag(sigmoid(F x + f))                            `context="gate"`, "tokens"; 1 with "layer"

"gate" stands for memory as a gate (MAG) and "layer" for memory as a layer (MAL). "tokens" stands for memory as a
context (MAC): a decoder's segment S is read as [p ; h ; S], where p are `persistent` learned embeddings and h `queries`
memory tokens, made of learned e_i when the segment begins:

    h_i = e_i + O' [r_i / sqrt(mean r_i² + δ)],   r_i = M(unit(Q' e_i)),  e_i layer-normed first

The base's attention reads them. What the write layer puts out, the paper's y, has attended to them, and it is what is
written. The read after a block, with G, is then MAC's closing gate y ⊗ M(y); `read_layers=[]` leaves it out. The
paper asks with the segment's own tokens and shows every answer to all of them: a token would see what comes after it,
and one call of many tokens would not equal many calls of one. So queries are learned here, as many as are set. e_i
stands in the sum because norms blow up what is nearly zero, and a new memory says nothing.

Titans reads a segment with what that segment has written so far, here every token reads the segment's start; an encoder
reads what its own segment wrote.

What is ours. The memory is added to the base and O, O' are zero at first, so an untrained one adds nothing to hidden
states, and h is e whatever was read; G begins at one half. Forgetting leads back to M_*, the learned weights of a new
stream, where the paper's leads to zero: a network whose first layer is zero learns nothing any more. The half in ℓ
makes θ the rate of the delta rule, which `layers=1`, `chunk=1`, η = 0 and α = 0 give. σ(z) = SiLU(z) sqrt(2.8 / width),
and W_1 ... W_{L-1} of M_* begin as normal numbers: features are then about as long as keys, 1, so one rate suits every
layer. W_L begins at zero. A gradient longer than `clip` is shortened to it, smoothly: ∇ℓ / sqrt(1 + ‖∇ℓ‖² / clip²). All
tokens of a chunk push at once, and where they have one key, all push the same way: without a limit this can grow
without end. `shift` is in place of the paper's convolutions, and Q, Q' start equal to K' (to K without `shift`), as in
`fast_weights`.

The network and its training are in `titans_network`.

What is trained: the projections, M_*, p and e. What is forgotten: what α takes, and what other keys are trained over.
State: M_t - M_* and S_t, `8 * heads * n` bytes a stream, where n counts the numbers of one head's network: `size * 2`
for each hidden unit of two layers, with `size = dim / heads`; 512 KiB by default. `shift` adds `4 * dim`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.fast_weights import by_head, scaled, unit, wide
from mnemic.memories.layers import latest, resolve_sites, shifted
from mnemic.memories.titans_naive import titans_naive
from mnemic.memories.titans_network import Pairs, learn, recall
from mnemic.memory import Attribution, Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State

# Shapes: b batch, t time, d host width, h heads, k keys' and values' width (dim / heads).

DEVIATION = 0.02
"""The standard deviation of p and e at first, as of a host's embeddings."""

TOKENS = ("persistent", "queries")
"""Settings of `context="tokens"` alone."""


MOST_LAYERS = 64
"""Layers of the network: a file that asks for millions would be refused too late."""


@dataclass
class TitansConfig(MemoryConfig):
    """Settings of Titans' neural memory; layers are block indices, negative ones counted from the end.

    `dim` is the width of keys and of values over all `heads`. The network of a head has `layers` matrices, 1 for a
    linear memory, and `expansion` hidden units for each number of a key. `chunk` tokens are trained at the same
    weights; a longer chunk is faster, and wants a lower rate: by default `rate_bias` makes it 1 / (2 `chunk`), so that
    a key that fills a chunk is learned about once, with the momentum of the start, one half. `window_tokens` is how
    many of the latest tokens a loss is over. `clip` is the greatest length of a token's gradient, None for no limit.
    `read_layers` and `write_layer` default to the middle of the stack. `shift` makes keys of the token before, too.
    With `context="tokens"` there stand `persistent` learned tokens and `queries` memory tokens before each segment.
    """

    kind: ClassVar[str] = "titans"
    card: ClassVar[Card] = Card(
        title="Titans' neural memory",
        seam="after block; tokens before the segment",
        trains="keys, values, gates, first weights, readers",
        bytes_law="8 x heads x weights of a head's network",
        paper="Behrouz et al. 2025, arXiv 2501.00663",
        citation="@article{behrouz2025titans, title = {Titans: Learning to Memorize at Test Time}, "
        "author = {Behrouz, Ali and Zhong, Peilin and Mirrokni, Vahab}, journal = {arXiv:2501.00663}, year = {2025}}",
    )

    layers: int = 2
    heads: int = 4
    dim: int = 256
    expansion: int = 2
    chunk: int = 16
    window_tokens: int = 1
    context: Literal["gate", "layer", "tokens"] = "gate"
    read_layers: list[int] | None = None
    write_layer: int | None = None
    shift: bool = True
    rate_bias: float | None = None
    momentum_bias: float = 0.0
    forget_bias: float = -8.0
    clip: float | None = 10.0
    persistent: int = 4
    queries: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "heads", "dim", "expansion", "chunk", "window_tokens", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers is {self.layers}; the network has at most {MOST_LAYERS}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; a gradient's greatest length is above 0, or None for no limit")
        if self.persistent < 0:
            raise ValueError(f"persistent is {self.persistent}; use 0 for no persistent tokens, or more")
        if self.context == "tokens":
            return
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for the middle one")

    def unused(self) -> dict[str, str]:
        """The tokens, where none stand before a segment, and hidden units, where a network has a single matrix."""
        found: dict[str, str] = {} if self.context == "tokens" else dict.fromkeys(TOKENS, "set context='tokens'")
        return found if self.layers > 1 else {**found, "expansion": "set layers to 2 or more"}

    def to_dict(self) -> dict[str, Any]:
        """As for every memory, without the settings that the context has no use for: descriptions of other contexts
        then equal those from before they were there.
        """
        values = super().to_dict()
        return values if self.context == "tokens" else {k: v for k, v in values.items() if k not in TOKENS}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the matrices of one head's network."""
        size = self.dim // self.heads
        widths = [size, *[self.expansion * size] * (self.layers - 1), size]
        return list(itertools.pairwise(widths))

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """The default; a linear memory with a window, without a gate, and with reads below the write; and as context,
        with a closing gate.
        """
        small: dict[str, Any] = {"segment_length": 8, "dim": 16, "heads": 2}
        return [
            cls(**small, chunk=4),
            cls(
                **small,
                chunk=3,
                layers=1,
                window_tokens=3,
                context="layer",
                shift=False,
                read_layers=[0, 1],
                write_layer=1,
            ),
            cls(**small, chunk=4, context="tokens", persistent=2, queries=3),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> TitansConfig:
        """2 heads with keys, values and hidden units of width `size`, by default half the host's; 4 chunks a segment,
        or more.
        """
        chunk = min(cls.chunk, max(segment_length // 4, 1))
        return cls(segment_length=segment_length, heads=2, dim=2 * (size or width // 2), expansion=1, chunk=chunk)

    def build(self, width: int, depth: int, causal: bool = True) -> Titans:
        """The module; raises `ValueError` naming a layer that the host does not have, and for an encoder and a context
        that puts tokens before a decoder's text.
        """
        if not causal and self.context == "tokens":
            raise ValueError(
                "context 'tokens' puts tokens before a decoder's text; attach it to a causal model, or use 'gate' or "
                "'layer'"
            )
        return Titans(self, width, depth, causal)


class Titans(Memory):
    """The module: the weights of new streams, a writer, a reader for every read layer, and one for memory tokens.

    `tokens [n, d]` are p and e; None, and no `asker`, where nothing stands before a segment.
    """

    newer = ("last",)

    def __init__(self, config: TitansConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.reads_own_segment = not causal
        self.writes, self.reads = resolve_sites(config.write_layer, config.read_layers, depth)
        self.writer = Writer(config, width)
        gated = config.context != "layer"
        self.readers = nn.ModuleDict({str(site.layer): Reader(config, width, gated) for site in self.reads})
        self.beside = config.persistent + config.queries if config.context == "tokens" else 0
        self.asker = Reader(config, width, gated=False) if self.beside else None
        for reader in (*self.readers.values(), *([] if self.asker is None else [self.asker])):
            asked = self.writer.key if self.writer.previous is None else self.writer.previous
            reader.query.load_state_dict(asked.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        self.first = nn.ParameterList(torch.randn(config.heads, *shape) for shape in config.shapes)
        nn.init.zeros_(self.first[-1])
        self.tokens = nn.Parameter(DEVIATION * torch.randn(self.beside, width)) if self.beside else None

    @property
    def writes_see_reads(self) -> bool:
        """Where a decoder reads below the write layer, or before its text. An encoder's call is one segment, which
        nothing cuts.
        """
        return not self.reads_own_segment and super().writes_see_reads

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros, float32: for every layer l `learned_l`, M - M_*, and `momentum_l`, S, both `[b, h, in, out]`; with
        `shift` `last [b, h * k]`, K' x of the last token.
        """
        last = {"last": torch.zeros(batch, self.config.dim, device=device)} if self.config.shift else {}
        return last | {
            f"{name}_{layer}": torch.zeros(batch, self.config.heads, *shape, device=device)
            for name in ("learned", "momentum")
            for layer, shape in enumerate(self.config.shapes, 1)
        }

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """[p ; h], for a segment that begins with `state`; None unless `context="tokens"`."""
        if self.asker is None or self.tokens is None:
            return None
        tokens_bnd = self.tokens.expand(len(state["learned_1"]), -1, -1)
        persistent_bnd, asking_bnd = tokens_bnd.split([self.config.persistent, self.config.queries], 1)
        memory_bnd = asking_bnd + self.asker(asking_bnd, state, list(self.first))
        return MemoryTokens(torch.cat([persistent_bnd, memory_bnd], 1))

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h' at one site; the network is that of the segment's start."""
        added_btd = self.readers[str(site.layer)](hidden_btd.to(self.parameter_dtype()), state, list(self.first))
        return hidden_btd + added_btd.to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """What one segment teaches the network."""
        pairs, last_bd = self.writer(hidden_btd.to(self.parameter_dtype()), keep_bt, state.get("last"))
        return self._learn(pairs, last_bd, state)

    def _learn(self, pairs: Pairs, last_bd: Tensor | None, state: State) -> State:
        config = self.config
        after = learn(state, list(self.first), pairs, config.chunk, config.window_tokens, config.clip)
        after |= {} if last_bd is None else {"last": last_bd}
        return {name: tensor.float() for name, tensor in after.items()}

    def write_and_tell(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[State, Attribution]:
        """A place for each head: by how much its network changed, and θ_t ‖M(k_t) - v_t‖ of every token, M as the
        segment found it.
        """
        pairs, last_bd = self.writer(hidden_btd.to(self.parameter_dtype()), keep_bt, state.get("last"))
        after = self._learn(pairs, last_bd, state)
        surprise_bht = (recall(state, list(self.first), pairs.key) - pairs.value).norm(dim=-1) * pairs.rate
        if keep_bt is not None:
            # the writer moves padding to the end
            back_bt = (~keep_bt).long().argsort(dim=1, stable=True).argsort(1)
            surprise_bht = surprise_bht.gather(2, back_bt[:, None].expand_as(surprise_bht))
        learned = [name for name in state if name.startswith("learned")]
        before, now = (torch.cat([each[name].flatten(2) for name in learned], -1) for each in (state, after))
        return after, by_head(before, now, surprise_bht)

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row, head and token at a time."""
        return titans_naive(self, hidden_btd, state, keep_bt)


class Writer(nn.Module):
    """Makes pairs and gates of the tokens of a segment."""

    def __init__(self, config: TitansConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.key, self.value = nn.Linear(width, config.dim, bias=False), nn.Linear(width, config.dim, bias=False)
        self.previous = nn.Linear(width, config.dim, bias=False) if config.shift else None
        self.rate, self.momentum, self.forget = (nn.Linear(width, config.heads) for _ in range(3))
        self.share = nn.Linear(width, config.heads) if config.window_tokens > 1 else None
        rate_bias = -math.log(2 * config.chunk - 1) if config.rate_bias is None else config.rate_bias
        biases = (rate_bias, config.momentum_bias, config.forget_bias)
        for gate, bias in zip((self.rate, self.momentum, self.forget), biases, strict=True):
            nn.init.constant_(gate.bias, bias)
        if self.share is not None:
            # the shares of a window then add up to about 1
            nn.init.constant_(self.share.bias, -math.log(max(config.window_tokens - 1, 1)))

    def forward(
        self, hidden_btd: Tensor, keep_bt: Tensor | None, last_bd: Tensor | None
    ) -> tuple[Pairs, Tensor | None]:
        """The pairs of a segment; and K' x of its last token, as `last_bd` is that of the token before it."""
        if keep_bt is None:
            keep_bt = hidden_btd.new_ones(hidden_btd.shape[:2], dtype=torch.bool)
        else:
            # chunks, windows and the token before are of real tokens, wherever padding stands
            order_bt = (~keep_bt).long().argsort(dim=1, stable=True)
            keep_bt = keep_bt.gather(1, order_bt)
            hidden_btd = hidden_btd.gather(1, order_bt[..., None].expand_as(hidden_btd))
        hidden_btd, real_b1t = self.norm(hidden_btd), keep_bt[:, None]
        key = self.key(hidden_btd)
        if self.previous is not None and last_bd is not None:
            before_btd, last_bd = self.previous(hidden_btd), last_bd.to(key.dtype)
            key = key + shifted(before_btd, None, last_bd)
            last_bd = latest(before_btd, keep_bt, last_bd)
        key, value = (
            wide(flat.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)) for flat in (key, self.value(hidden_btd))
        )
        rate, momentum, forget = (
            wide(gate(hidden_btd)).transpose(1, 2) for gate in (self.rate, self.momentum, self.forget)
        )
        share = torch.ones_like(rate) if self.share is None else wide(self.share(hidden_btd)).transpose(1, 2).sigmoid()
        pairs = Pairs(
            key=unit(key),
            value=value,
            rate=rate.sigmoid() * real_b1t,
            log_momentum=F.logsigmoid(momentum) * real_b1t,
            log_keep=F.logsigmoid(-forget) * real_b1t,
            share=share,
            real=real_b1t.to(key.dtype),
        )
        return pairs, last_bd


class Reader(nn.Module):
    """What the memory adds to the tokens of one layer: `[b, t, d] -> [b, t, d]`."""

    def __init__(self, config: TitansConfig, width: int, gated: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        self.query, self.output = nn.Linear(width, config.dim, bias=False), nn.Linear(config.dim, width, bias=False)
        self.gate = nn.Linear(width, width) if gated else None
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden_btd: Tensor, state: State, first: list[Tensor]) -> Tensor:
        """G O [r / sqrt(mean r² + δ)] of the equations above, without G for memory tokens."""
        normed_btd = self.norm(hidden_btd)
        query_bhtk = self.query(normed_btd).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read_bhtk = recall(state, first, unit(wide(query_bhtk)))
        added_btd = self.output(scaled(read_bhtk).to(hidden_btd.dtype).transpose(1, 2).flatten(-2))
        return added_btd if self.gate is None else self.gate(normed_btd).sigmoid() * added_btd
