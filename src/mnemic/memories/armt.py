"""Associative Recurrent Memory Transformer: memory tokens that write a matrix for every block, which all tokens read.

Rodkin, Kuratov, Bulatov, Burtsev 2024, arXiv 2407.04841, section 2. Behind every segment stand the same learned memory
tokens, and they are not passed on. Each block has a matrix W `[f, d]` and a normaliser z `[f]`, zero at the start of a
stream. With the features of Schlag et al. 2021 (arXiv 2102.11174), f = 6 `dim`,

    φ(k) = [r ⊙ roll(r, 1); r ⊙ roll(r, 2); r ⊙ roll(r, 3)],   r = [relu(k); relu(-k)]

*Read*, before the block, for every token of the segment and every memory token, with hidden state x:

    h = x + Wᵀ φ(Q x) / (zᵀ φ(Q x) + ε)                   ε = 0.00001

*Write*, after the block, from what it makes of the memory tokens, m_1 ... m_n:

    k_i = φ(K m_i),   v_i = V m_i,   β_i = sigmoid(b . m_i + c)
    v̄_i = Wᵀ k_i / (zᵀ k_i + ε)                           what is remembered under this key already
    γ_i = clip(1 - zᵀ k_i / ‖k_i‖², 0, 1)                 how much of this key z does not hold yet; no gradient
    W <- W + Σ β_i k_i (v_i - v̄_i)ᵀ,   z <- z + Σ γ_i k_i

All tokens of a segment correct the W that the segment found. γ is the paper's correction: a key that is written again
leaves z as it is. Without it (γ = 1, `correct=False`) z grows with every rewrite, v̄ comes out too small, and the old
value stays beside the new. With W and z at zero the first segment has v̄ = 0 and γ = 1, and reads nothing.

V starts at zero, so a new memory stays empty whatever it reads. A decoder's words do not see the tokens behind them.
So a host with a new memory puts out, on every segment, what it does without.

What differs. Q takes the layer-normed x, and K, V, b the layer-normed m_i (`norm`). Hidden states have no fixed size,
and without the norm what V makes of what was read can grow from segment to segment; `norm=False` is as in the paper.
Q starts equal to K, so that at first tokens ask for what is like them. The memory tokens stand at the positions behind
the segment's last word, in the official code at the end of a longer table of positions. With a window longer than a
segment words see the memory tokens of earlier segments that are still in it; there they do not.

What is trained: the memory tokens, and Q, K, V, b, c of every block, through as many segments as training asks for; the
host may learn along. What is forgotten: what is written over, and what shares features with it. State:
`4 * f * (d + 1)` bytes a block; it does not grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.fast_weights import wide
from mnemic.memories.layers import EPSILON
from mnemic.memories.rules import dpfp3
from mnemic.memory import Card, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State

# Shapes: b batch, t time, n memory tokens, d host width, f features.

FEATURES = 6
"""Features of one key dimension: two signs, three shifts."""


@dataclass
class ARMTConfig(MemoryConfig):
    """Settings of an associative recurrent memory: `tokens` memory tokens, which start as random ones of standard
    deviation `deviation`, and keys of width `dim` before their features. `correct=False` leaves out the correction, and
    `norm=False` the norms of what is projected.
    """

    kind: ClassVar[str] = "armt"
    card: ClassVar[Card] = Card(
        title="Associative Recurrent Memory Transformer",
        seam="tokens behind the segment, reads before every block",
        trains="memory tokens; queries, keys, values, rates of every block",
        bytes_law="24 x dim x (d + 1) x blocks",
        paper="Rodkin et al. 2024, arXiv 2407.04841",
        citation="I. Rodkin, Y. Kuratov, A. Bulatov, M. Burtsev. Associative Recurrent Memory Transformer. "
        "ICML 2024 Workshop on Next Generation of Sequence Modeling Architectures.",
    )

    tokens: int = 16
    dim: int = 64
    deviation: float = 0.02
    correct: bool = True
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.deviation <= 0:
            raise ValueError(f"deviation is {self.deviation}; tokens that start alike stay alike, use more than 0")

    def build(self, width: int, depth: int, causal: bool = True) -> ARMT:
        """The module for a decoder; raises `ValueError` for an encoder."""
        if not causal:
            raise ValueError("ARMT's memory tokens stand behind a decoder's segment; attach it to a causal model")
        return ARMT(self, width, depth)

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """With the correction and without."""
        return [cls(segment_length=8, tokens=3, dim=32), cls(segment_length=8, tokens=2, dim=24, correct=False)]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """As many tokens as a segment has, but no more than 16; keys of width `size`, by default half the host's."""
        return cls(segment_length=segment_length, tokens=min(16, segment_length), dim=size or width // 2)


class ARMT(Memory):
    """The module: the memory tokens, and for every block what reads and writes its matrix."""

    writes_tokens_behind = True
    starts_empty = True

    def __init__(self, config: ARMTConfig, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, width, depth
        self.reads = tuple(Site(block, "input") for block in range(depth))
        self.writes = tuple(Site(block) for block in range(depth))
        self.beside = config.tokens
        self.tokens = nn.Parameter(config.deviation * torch.randn(config.tokens, width))
        self.blocks = nn.ModuleList(Association(width, config.dim, config.norm) for _ in range(depth))

    def block(self, index: int) -> Association:
        """What reads and writes the matrix of a block."""
        return cast(Association, self.blocks[index])

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros, float32: for every block l `matrix_l [b, f, d]` and `normaliser_l [b, f]`."""
        features = FEATURES * self.config.dim
        state = {}
        for block in range(self.depth):
            state[f"matrix_{block}"] = torch.zeros(batch, features, self.width, device=device)
            state[f"normaliser_{block}"] = torch.zeros(batch, features, device=device)
        return state

    def tokens_behind(self, state: State) -> MemoryTokens | None:
        """The memory tokens, the same behind every segment."""
        rows = len(state["normaliser_0"])
        return MemoryTokens(self.tokens.to(self.parameter_dtype()).expand(rows, -1, -1))

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h for what enters a block."""
        block = site.layer
        feature_btf = self.block(block).ask(hidden_btd.to(self.parameter_dtype()))
        matrix, normaliser = state[f"matrix_{block}"], state[f"normaliser_{block}"]
        return hidden_btd + look_up(feature_btf, matrix, normaliser).to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b n l*d"], state: State, keep_bt: Bool[Tensor, "b n"] | None = None
    ) -> State:
        """W and z of every block after one segment, from its outputs at the memory tokens, joined along d."""
        after = {}
        for block, behind_bnd in enumerate(hidden_btd.to(self.parameter_dtype()).split(self.width, -1)):
            matrix, normaliser = state[f"matrix_{block}"], state[f"normaliser_{block}"]
            key, value, rate = self.block(block)(behind_bnd)
            if keep_bt is not None:
                key = key * keep_bt[..., None]
            with torch.autocast(key.device.type, enabled=False):
                missing_bnd = rate * (value - look_up(key, matrix, normaliser))
                matrix = matrix + key.mT @ missing_bnd
                normaliser = normaliser + (new_share(key, normaliser) * key if self.config.correct else key).sum(1)
            after |= {f"matrix_{block}": matrix.float(), f"normaliser_{block}": normaliser.float()}
        return after

    def naive(
        self, hidden_btd: Float[Tensor, "b n l*d"], state: State, keep_bt: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], State]:
        """The equations above, one row, block and token at a time; what is read is for the first block's share of d."""
        outputs, rows = [], []
        for b in range(hidden_btd.shape[0]):
            row, after = {name: tensor[b] for name, tensor in state.items()}, {}
            first = [token[: self.width] for token in hidden_btd[b]]
            outputs.append(
                torch.stack([x + _naive_look_up(self.block(0).query(self.block(0).asked(x)), row, 0) for x in first])
            )
            for block in range(self.depth):
                part = slice(block * self.width, (block + 1) * self.width)
                kept = [token[part] for t, token in enumerate(hidden_btd[b]) if keep_bt is None or keep_bt[b, t]]
                after |= _naive_write(self.block(block), self.config.correct, kept, row, block)
            rows.append(after)
        return torch.stack(outputs), {name: torch.stack([row[name] for row in rows]) for name in state}


class Association(nn.Module):
    """What reads and writes the matrix of one block."""

    def __init__(self, width: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.asked, self.told = (nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.query, self.key = nn.Linear(width, dim, bias=False), nn.Linear(width, dim, bias=False)
        self.value, self.rate = nn.Linear(width, width, bias=False), nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        self.query.load_state_dict(self.key.state_dict())

    def ask(self, hidden_btd: Float[Tensor, "b t d"]) -> Float[Tensor, "b t f"]:
        """φ(Q x) of tokens, in float32 or wider."""
        return dpfp3(wide(self.query(self.asked(hidden_btd))))

    def forward(
        self, behind_bnd: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, "b n d"], Float[Tensor, "b n 1"]]:
        """k, v and β of memory tokens, in float32 or wider."""
        told_bnd = self.told(behind_bnd)
        key, value, rate = (wide(each(told_bnd)) for each in (self.key, self.value, self.rate))
        return dpfp3(key), value, rate.sigmoid()


def look_up(
    feature_btf: Float[Tensor, "b t f"], matrix_bfd: Float[Tensor, "b f d"], normaliser_bf: Float[Tensor, "b f"]
) -> Float[Tensor, "b t d"]:
    """Wᵀ φ / (zᵀ φ + ε), in the dtype of the features, under autocast too."""
    with torch.autocast(feature_btf.device.type, enabled=False):
        matrix_bfd, normaliser_bf = matrix_bfd.to(feature_btf.dtype), normaliser_bf.to(feature_btf.dtype)
        # ε also makes an empty memory read as zero rather than as 0 / 0
        return feature_btf @ matrix_bfd / (feature_btf @ normaliser_bf[..., None] + EPSILON)


@torch.no_grad()
def new_share(key_bnf: Float[Tensor, "b n f"], normaliser_bf: Float[Tensor, "b f"]) -> Float[Tensor, "b n 1"]:
    """γ: how much of each key the normaliser does not hold yet."""
    # a key without features changes nothing, whatever its share
    size = key_bnf.square().sum(-1, keepdim=True).clamp_min(torch.finfo(key_bnf.dtype).tiny)
    return (1 - key_bnf @ normaliser_bf[..., None].to(key_bnf.dtype) / size).clamp(0, 1)


# --- the equations in plain loops ------------------------------------------------------------------------------------


def _naive_features(key: Tensor) -> Tensor:
    signed = [each.clamp(min=0) for each in (*key, *(-key))]
    return torch.stack([signed[i] * signed[i - shift] for shift in (1, 2, 3) for i in range(len(signed))])


def _naive_look_up(key: Tensor, row: State, block: int) -> Tensor:
    feature = _naive_features(key)
    return row[f"matrix_{block}"].T @ feature / (torch.dot(row[f"normaliser_{block}"], feature) + EPSILON)


def _naive_write(parts: Association, correct: bool, tokens: list[Tensor], row: State, block: int) -> State:
    matrix, normaliser = row[f"matrix_{block}"], row[f"normaliser_{block}"]
    found = normaliser
    for token in tokens:
        token = parts.told(token)
        key = parts.key(token)
        feature, gamma = _naive_features(key), 1.0
        if correct:
            gamma = (1 - torch.dot(found, feature) / torch.dot(feature, feature)).clamp(0, 1).detach()
        missing = parts.value(token) - _naive_look_up(key, row, block)
        matrix = matrix + torch.sigmoid(parts.rate(token)) * torch.outer(feature, missing)
        normaliser = normaliser + gamma * feature
    return {f"matrix_{block}": matrix, f"normaliser_{block}": normaliser}
