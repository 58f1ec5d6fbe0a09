"""Fast weights: a matrix that every token writes a pair of key and value into, and that a query multiplies.

One recurrence, with settings. x_t is the layer-normed hidden state of token t, x_{t-1} that of the token before it, in
the segment before for the first of a segment. For each head, with a matrix W of `dim / heads` rows and columns,

    k_t = φ(K x_t + K' x_{t-1}),   v_t = V x_t            K' only with `shift`
    β_t = sigmoid(b . x_t + `rate_bias`)                  how much is written; 1 for Infini-attention
    λ_t                                                   how much is kept; 1 unless the rule forgets
    v̄_t = λ_t W_{t-1}ᵀ k_t / n_t                          what is remembered under this key; only rules with delta
    W_t = λ_t W_{t-1} + β_t k_t (v_t - v̄_t)ᵀ
    z_t = z_{t-1} + k_t,   n_t = z_{t-1}ᵀ k_t + ε         only with `features="elu1"`; else n_t = 1

| `rule` | delta | λ_t | source |
| --- | --- | --- | --- |
| `sum` | no | 1 | linear attention: Katharopoulos et al. 2020, arXiv 2006.16236; Schlag et al. 2021, arXiv 2102.11174 |
| `decay` | no | `decay` | RetNet, Sun et al. 2023, arXiv 2307.08621, one λ for all heads |
| `delta` | yes | 1 | Schlag et al. 2021; DeltaNet, Yang et al. 2024, arXiv 2406.06484 |
| `gated delta` | yes | sigmoid(a . x_t + `forget_bias`) | Yang et al. 2024, arXiv 2412.06464 |
| `infini` | no | 1 | Infini-attention, Munkhdalai et al. 2024, arXiv 2404.07143, "Linear" |
| `infini delta` | yes | 1 | the same, "Linear + Delta" |

φ divides by the length ("l2"), or is ELU + 1 ("elu1", Infini-attention's own). Read, at every read layer, from W as it
stood when the segment began, with q = φ(Q x):

    r = Wᵀ q / (zᵀ q + ε)                                 without a normaliser r = Wᵀ q
    h' = h + O [r / sqrt(mean r² + δ)]                    the mean of each head, O of all; δ = 0.01

What is ours: memory and attention are not mixed by a gate but added, so that an untrained memory changes nothing (O is
zero at first). Q starts equal to K', or to K without `shift`: a token then asks for what followed it, or came with it,
before anything is learned. Keys see the token before, because what is told of a token usually stands behind it. r is
scaled, since sums grow with the stream; zero stays zero. An encoder reads what its own segment wrote.

A segment is written in chunks. Within one, all v_t - v̄_t solve one triangular system (the WY or UT form: Yang et al.
2024, arXiv 2406.06484), so no loop over tokens is left.

What is trained: the projections. What is forgotten: what is overwritten, and what λ takes; the plain sums only blur.
State: `heads * (dim / heads)² * 4` bytes a stream, 64 KiB by default; "elu1" and `shift` add `dim * 4` each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.fast_weights_naive import fast_weights_naive
from mnemic.memories.layers import EPSILON, NEXT_TO_NOTHING, latest, resolve_sites, shifted
from mnemic.memories.rules import elu_plus_one
from mnemic.memory import Attribution, Card, Memory, MemoryConfig, Site
from mnemic.state import State

# Shapes: b batch, t time, d host width, h heads, k keys' width, v values' width (both dim / heads).

RuleName = Literal["sum", "decay", "delta", "gated delta", "infini", "infini delta"]
CHUNK = 64
"""Tokens whose corrections are solved for at once: more cost more work each, and take fewer steps."""


@dataclass
class FastWeightsConfig(MemoryConfig):
    """Settings of fast weights; layers are block indices, negative ones counted from the end.

    `dim` is the width of keys and of values over all `heads`. `read_layers` and `write_layer` default to the middle of
    the stack; `write_layer="embeddings"` writes what enters the first block, where no token knows of others yet.
    `shift` makes keys of the token before, too. `correct` is what Infini-attention's delta corrects: the matrix as the
    token before left it ("token"), or as the segment found it ("segment"), as its paper has it; then the corrections of
    a key that comes twice in a segment add up, so it needs the paper's normaliser.
    """

    kind: ClassVar[str] = "fast-weights"
    card: ClassVar[Card] = Card(
        title="Fast weights",
        seam="after block",
        trains="keys, values, gates, readers",
        bytes_law="heads x (dim / heads)^2 x 4",
        paper="Schlag et al., ICML 2021, arXiv 2102.11174",
        citation="@inproceedings{schlag2021linear, title = {Linear Transformers Are Secretly Fast Weight Programmers}, "
        'author = {Schlag, Imanol and Irie, Kazuki and Schmidhuber, J{\\"u}rgen}, booktitle = {ICML}, year = {2021}}',
    )

    rule: RuleName = "delta"
    heads: int = 4
    dim: int = 256
    features: Literal["l2", "elu1"] = "l2"
    read_layers: list[int] | None = None
    write_layer: int | Literal["embeddings"] | None = None
    shift: bool = True
    decay: float = 0.999
    rate_bias: float = 0.0
    forget_bias: float = 8.0
    correct: Literal["token", "segment"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if not 0 < self.decay < 1:
            raise ValueError(
                f"decay is {self.decay}; the share that a token keeps lies in (0, 1), see rule='sum' for 1"
            )
        if self.features == "elu1" and not self.infini:
            raise ValueError(
                f"features 'elu1' need Infini-attention's normaliser, which rule {self.rule!r} lacks; use 'l2'"
            )
        if self.correct == "segment" and not (self.rule == "infini delta" and self.features == "elu1"):
            raise ValueError(
                "correct='segment' is stable with rule='infini delta' and features='elu1' only; use 'token'"
            )
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for the middle one")

    def unused(self) -> dict[str, str]:
        """The settings of gates that the rule does not have."""
        found = {} if self.rule == "decay" else {"decay": "set rule='decay'"}
        if self.rule != "gated delta":
            found["forget_bias"] = "set rule='gated delta'"
        if self.infini:
            found["rate_bias"] = "use a rule with rates, such as 'delta'"
        return found

    @property
    def infini(self) -> bool:
        """Whether the rule is one of Infini-attention's: without a rate."""
        return self.rule.startswith("infini")

    @property
    def delta(self) -> bool:
        """Whether a write corrects what is there."""
        return self.rule.endswith("delta")

    @classmethod
    def infini_attention(cls, **changes: Any) -> FastWeightsConfig:
        """Infini-attention's own update, "Linear + Delta": ELU + 1 of the token alone, corrected by the segment."""
        setting: dict[str, Any] = {"rule": "infini delta", "features": "elu1", "shift": False, "correct": "segment"}
        return cls(**{**setting, **changes})

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """One of each form: the default, a forget gate and reads below the write, and a normaliser."""
        small: dict[str, Any] = {"segment_length": 8, "dim": 16, "heads": 2}
        return [
            cls(**small),
            cls(**small, rule="gated delta", read_layers=[0, 1], write_layer=1),
            cls(**small, rule="infini delta", features="elu1", shift=False, write_layer="embeddings"),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> FastWeightsConfig:
        """2 heads with keys and values of width `size`, by default half the host's."""
        return cls(segment_length=segment_length, heads=2, dim=2 * (size or width // 2))

    def build(self, width: int, depth: int, causal: bool = True) -> FastWeights:
        """The module; raises `ValueError` naming a layer that the host does not have."""
        return FastWeights(self, width, depth, causal)


class FastWeights(Memory):
    """The module: a writer, and a reader for every read layer."""

    newer = ("last",)

    def __init__(self, config: FastWeightsConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.reads_own_segment, self.starts_empty = not causal, causal
        block = None if isinstance(config.write_layer, str) else config.write_layer
        self.writes, self.reads = resolve_sites(block, config.read_layers, depth)
        if config.write_layer == "embeddings":
            self.writes = (Site(0, "input"),)
        self.writer = Writer(config, width)
        self.readers = nn.ModuleDict({str(site.layer): Reader(config, width) for site in self.reads})
        for reader in self.readers.values():
            asked = self.writer.key if self.writer.previous is None else self.writer.previous
            reader.query.load_state_dict(asked.state_dict())  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def writes_see_reads(self) -> bool:
        """Where a decoder reads below the write layer. An encoder's call is one segment, which nothing cuts."""
        return not self.reads_own_segment and super().writes_see_reads

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros, float32: `matrix [b, h, k, v]`, with "elu1" `normaliser [b, h, k]`, with `shift` `last [b, h * k]`,
        K' x of the last token.
        """
        size = self.config.dim // self.config.heads
        state = {"matrix": torch.zeros(batch, self.config.heads, size, size, device=device)}
        if self.config.features == "elu1":
            state["normaliser"] = torch.zeros(batch, self.config.heads, size, device=device)
        if self.config.shift:
            state["last"] = torch.zeros(batch, self.config.dim, device=device)
        return state

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h' at one site; the matrix is that of the segment's start."""
        return hidden_btd + self.readers[str(site.layer)](hidden_btd.to(self.parameter_dtype()), state).to(
            hidden_btd.dtype
        )

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The matrix after one segment."""
        pairs, last_bd = self.writer(hidden_btd.to(self.parameter_dtype()), keep_bt, state.get("last"))
        return self._written(pairs, last_bd, state)

    def _written(
        self, pairs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], last_bd: Tensor | None, state: State
    ) -> State:
        after = write_pairs(state, *pairs, delta=self.config.delta, correct=self.config.correct)
        after |= {} if last_bd is None else {"last": last_bd}
        return {name: tensor.float() for name, tensor in after.items()}

    def write_and_tell(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[State, Attribution]:
        """A place for each head: by how much its matrix changed, and β_t ‖k_t‖ ‖v_t - v̄_t‖ of every token, v̄ of the
        matrix that the segment found.
        """
        pairs, last_bd = self.writer(hidden_btd.to(self.parameter_dtype()), keep_bt, state.get("last"))
        after, (key, value, rate, _) = self._written(pairs, last_bd, state), pairs
        if self.config.delta:
            value = wide(value) - read_pairs(state, key)
        weight_bht = key.norm(dim=-1) * value.norm(dim=-1)
        weight_bht = weight_bht if rate is None else weight_bht * rate
        return after, by_head(state["matrix"], after["matrix"], weight_bht)

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row, head and token at a time."""
        return fast_weights_naive(self, hidden_btd, state, keep_bt)


def by_head(
    before: Float[Tensor, "b h *n"], after: Float[Tensor, "b h *n"], weight_bht: Float[Tensor, "b h t"]
) -> Attribution:
    """The attribution of a write to one place for each head, of which |Δ| / (|Δ| + |before|) is new."""
    change_bh, held_bh = (each.flatten(2).norm(dim=-1) for each in (after - before, before))
    tiny = torch.finfo(change_bh.dtype).tiny
    weight_bht = weight_bht / weight_bht.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_bht.dtype).tiny)
    place_h = torch.arange(change_bh.shape[1], device=change_bh.device)
    return Attribution(place_h.expand(len(before), -1), change_bh / (change_bh + held_bh).clamp_min(tiny), weight_bht)


def unit(keys: Float[Tensor, "*n k"]) -> Float[Tensor, "*n k"]:
    """φ(k) = k / ‖k‖."""
    return F.normalize(keys, dim=-1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"l2": unit, "elu1": elu_plus_one}
"""φ by its name."""


class Writer(nn.Module):
    """Makes pairs of the tokens of a segment: `[b, t, d] -> k, v [b, h, t, .], β [b, h, t], log λ [b, h, t]`."""

    def __init__(self, config: FastWeightsConfig, width: int) -> None:
        super().__init__()
        self.config, self.features = config, FEATURES[config.features]
        self.norm = nn.LayerNorm(width)
        self.key, self.value = nn.Linear(width, config.dim, bias=False), nn.Linear(width, config.dim, bias=False)
        self.previous = nn.Linear(width, config.dim, bias=False) if config.shift else None
        self.rate = None if config.infini else nn.Linear(width, config.heads)
        self.forget = nn.Linear(width, config.heads) if config.rule == "gated delta" else None
        for gate, bias in ((self.rate, config.rate_bias), (self.forget, config.forget_bias)):
            if gate is not None:
                nn.init.constant_(gate.bias, bias)

    def forward(
        self, hidden_btd: Tensor, keep_bt: Tensor | None, last_bd: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], Tensor | None]:
        """Keys, values, rates (None for 1) and the logarithms of λ (None for λ = 1); and K' x of the last token, as
        `last_bd` is that of the token before the segment.

        Padding has a key of zero and keeps everything, so it changes nothing.
        """
        hidden_btd = self.norm(hidden_btd)
        key = self.key(hidden_btd)
        if self.previous is not None and last_bd is not None:
            before_btd, last_bd = self.previous(hidden_btd), last_bd.to(key.dtype)
            key = key + shifted(before_btd, keep_bt, last_bd)
            last_bd = latest(before_btd, keep_bt, last_bd)
        key, value = (
            flat.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for flat in (key, self.value(hidden_btd))
        )
        key = self.features(wide(key))
        rate = None if self.rate is None else torch.sigmoid(self.rate(hidden_btd)).transpose(1, 2)
        log_keep = None
        if self.forget is not None:
            log_keep = F.logsigmoid(wide(self.forget(hidden_btd))).transpose(1, 2)
        elif self.config.rule == "decay":
            log_keep = key.new_full(key.shape[:-1], math.log(self.config.decay))
        if keep_bt is not None:
            key = key * keep_bt[:, None, :, None]
            log_keep = None if log_keep is None else log_keep * keep_bt[:, None]
        return (key, value, rate, log_keep), last_bd


class Reader(nn.Module):
    """What the memory adds to the tokens of one layer: `[b, t, d] -> [b, t, d]`."""

    def __init__(self, config: FastWeightsConfig, width: int) -> None:
        super().__init__()
        self.heads, self.features = config.heads, FEATURES[config.features]
        self.norm = nn.LayerNorm(width)
        self.query, self.output = nn.Linear(width, config.dim, bias=False), nn.Linear(config.dim, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden_btd: Tensor, state: State) -> Tensor:
        """O [r / sqrt(mean r² + δ)] of the equations above."""
        query_bhtk = self.query(self.norm(hidden_btd)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read_bhtv = read_pairs(state, self.features(wide(query_bhtk)))
        return self.output(scaled(read_bhtv).to(hidden_btd.dtype).transpose(1, 2).flatten(-2))


def wide(tensor: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scaled(read: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """r / sqrt(mean r² + δ)."""
    return read * torch.rsqrt(read.square().mean(-1, keepdim=True) + NEXT_TO_NOTHING)


def read_pairs(state: State, query_bhtk: Float[Tensor, "b h t k"]) -> Float[Tensor, "b h t v"]:
    """r: what a matrix answers to queries, in float32 or wider, under autocast too."""
    query_bhtk = wide(query_bhtk)
    state = {name: tensor.to(query_bhtk.dtype) for name, tensor in state.items()}
    with torch.autocast(query_bhtk.device.type, enabled=False):
        read_bhtv = query_bhtk @ state["matrix"]
        if "normaliser" in state:
            read_bhtv = read_bhtv * normed(query_bhtk, state["normaliser"]).reciprocal()
    return read_bhtv


def normed(keys: Float[Tensor, "*n t k"], normaliser: Float[Tensor, "*n k"]) -> Float[Tensor, "*n t 1"]:
    """zᵀ k + ε; a sum, as a product with a single column is slow."""
    return (keys * normaliser[..., None, :]).sum(-1, keepdim=True) + EPSILON


def write_pairs(
    state: State,
    key_bhtk: Float[Tensor, "b h t k"],
    value_bhtv: Float[Tensor, "b h t v"],
    rate_bht: Float[Tensor, "b h t"] | None = None,
    log_keep_bht: Float[Tensor, "b h t"] | None = None,
    *,
    delta: bool = False,
    correct: Literal["token", "segment"] = "token",
    chunk: int = CHUNK,
) -> State:
    """The state after `t` pairs, one after another, chunk by chunk; in float32 or wider, under autocast too.

    Without a normaliser in the state nothing is divided. A pair whose key is zero and whose log λ is 0 changes nothing.
    """
    dtype = wide(key_bhtk).dtype
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    at_once = not delta or correct == "segment"
    pieces = [
        [None] if each is None else each.to(dtype).split(key_bhtk.shape[2] if at_once else chunk, 2)
        for each in (key_bhtk, value_bhtv, rate_bht, log_keep_bht)
    ]
    count = len(pieces[0])
    with torch.autocast(key_bhtk.device.type, enabled=False):
        for key, value, rate, log_keep in zip(*(each * (count // len(each)) for each in pieces), strict=True):
            state = _write_chunk(state, key, value, rate, log_keep, delta, solve=not at_once)
    return state


def _write_chunk(
    state: State, key: Tensor, value: Tensor, rate: Tensor | None, log_keep: Tensor | None, delta: bool, solve: bool
) -> State:
    """All pairs of a chunk at once.

    With G_t = λ_1 ... λ_t and u_t = β_t (v_t - v̄_t), the recurrence is W_t = G_t W_0 + Σ_{i<=t} (G_t / G_i) k_i u_iᵀ.
    Put into v̄_t it gives for the u of the chunk a triangular system,

        u_t + β_t / n_t Σ_{i<t} (G_t / G_i) (k_tᵀ k_i) u_i = β_t (v_t - G_t W_0ᵀ k_t / n_t).
    """
    matrix, normaliser = state["matrix"], state.get("normaliser")
    # logarithms, as G itself may be too small for a quotient
    log_kept = None if log_keep is None else log_keep.cumsum(-1)
    if delta:
        there = key @ matrix
        if log_kept is not None:
            there = there * log_kept.exp()[..., None]
        overlap = (key @ key.mT).tril(-1) if solve else None
        if normaliser is not None:
            norm = normed(key, normaliser)
            if overlap is not None:
                norm = norm + overlap.sum(-1, keepdim=True)
                overlap = overlap / norm
            there = there * norm.reciprocal()
        value = value - there
        if overlap is not None and log_kept is not None:
            overlap = overlap * (log_kept[..., None] - log_kept[..., None, :]).tril().exp()
    else:
        overlap = None
    update = value if rate is None else rate[..., None] * value
    if overlap is not None:
        overlap = overlap if rate is None else rate[..., None] * overlap
        # the diagonal counts as ones
        update = torch.linalg.solve_triangular(overlap, update, upper=False, unitriangular=True)
    weighted = key
    if log_kept is not None:
        weighted = key * (log_kept[..., -1:] - log_kept).exp()[..., None]
        matrix = matrix * log_kept[..., -1, None, None].exp()
    after = {"matrix": matrix + weighted.mT @ update}
    return after if normaliser is None else after | {"normaliser": normaliser + key.sum(-2)}
