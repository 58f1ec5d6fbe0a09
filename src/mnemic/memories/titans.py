"""Titans' neural memory: a small network that every token trains on a pair of key and value, and that a query asks.

Behrouz et al. 2025, arXiv 2501.00663. x_t is the layer-normed hidden state of token t of a segment, x_{t-1} that of the
token before it in the segment (zero for the first). For each head, with a network M of `layers` matrices W_1 ... W_L,

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
    G = diag(sigmoid(F x + f))                            `context="gate"`; 1 with "layer"

"gate" stands for memory as a gate (MAG) and "layer" for memory as a layer (MAL). Memory as a context (MAC) puts what is
read before the segment as tokens; mnemic has no seam for more tokens yet, so it is not here. Titans reads a segment
with what that segment has written so far, here every token reads the segment's start; an encoder reads what its own
segment wrote.

What is ours. The memory is added to the base and O is zero at first, so an untrained one changes nothing; G begins at
one half. Forgetting leads back to M_*, the learned weights of a new stream, where the paper's leads to zero: a network
whose first layer is zero learns nothing any more. The half in ℓ makes θ the rate of the delta rule, which `layers=1`,
`chunk=1`, η = 0 and α = 0 give. σ(z) = SiLU(z) sqrt(2.8 / width), and W_1 ... W_{L-1} of M_* begin as normal numbers:
features are then about as long as keys, 1, so one rate suits every layer. W_L begins at zero. A gradient longer than
`clip` is shortened to it, smoothly: ∇ℓ / sqrt(1 + ‖∇ℓ‖² / clip²). All tokens of a chunk push at once, and where they
have one key, all push the same way: without a limit this can grow without end. `shift` is in place of the paper's
convolutions, and Q starts equal to K' (to K without `shift`), as in `fast_weights`.

Within a chunk S and M are linear in gradients that are known, so what is left of each at the chunk's end is a number,
and each layer is written with one product. Gradients are written out, so they have gradients themselves.

What is trained: the projections, and M_*. What is forgotten: what α takes, and what other keys are trained over.
State: M_t - M_* and S_t, `8 * heads * n` bytes a stream, where n counts the numbers of one head's network: `size * 2`
for each hidden unit of two layers, with `size = dim / heads`; 512 KiB by default.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.base import Card, Memory, MemoryConfig, resolve_layers
from mnemic.memories.fast_weights import NEXT_TO_NOTHING, scaled, unit, wide
from mnemic.state import State

# Shapes: b batch, t time, d host width, h heads, k keys' and values' width (dim / heads), n tokens of a chunk's losses,
# c tokens of a chunk.

UNIT_LENGTH = 2.8
"""1 / the mean of SiLU(z)² over normal z: with it features of any width are about as long as keys."""


@dataclass
class TitansConfig(MemoryConfig):
    """Settings of Titans' neural memory; layers are block indices, negative ones counted from the end.

    `dim` is the width of keys and of values over all `heads`. The network of a head has `layers` matrices, 1 for a
    linear memory, and `expansion` hidden units for each number of a key. `chunk` tokens are trained at the same
    weights; a longer chunk is faster, and wants a lower rate: by default `rate_bias` makes it 1 / (2 `chunk`), so that
    a key that fills a chunk is learned about once, with the momentum of the start, one half. `window_tokens` is how
    many of the latest tokens a loss is over. `clip` is the greatest length of a token's gradient, None for no limit.
    `read_layers` and `write_layer` default to the middle of the stack. `shift` makes keys of the token before, too.
    """

    kind: ClassVar[str] = "titans"
    card: ClassVar[Card] = Card(
        title="Titans' neural memory",
        seam="after block",
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
    context: Literal["gate", "layer"] = "gate"
    read_layers: list[int] | None = None
    write_layer: int | None = None
    shift: bool = True
    rate_bias: float | None = None
    momentum_bias: float = 0.0
    forget_bias: float = -8.0
    clip: float | None = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context not in ("gate", "layer"):
            raise ValueError(f"context is {self.context!r}; use one of 'gate', 'layer'")
        for name in ("layers", "heads", "dim", "expansion", "chunk", "window_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; a gradient's greatest length is above 0, or None for no limit")
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for the middle one")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the matrices of one head's network."""
        size = self.dim // self.heads
        widths = [size, *[self.expansion * size] * (self.layers - 1), size]
        return list(itertools.pairwise(widths))

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """The default, and a linear memory with a window, without a gate, and with reads below the write."""
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
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> TitansConfig:
        """2 heads with keys, values and hidden units of width `size`, by default half the host's; 4 chunks a segment,
        or more.
        """
        chunk = min(cls.chunk, max(segment_length // 4, 1))
        return cls(segment_length=segment_length, heads=2, dim=2 * (size or width // 2), expansion=1, chunk=chunk)

    def build(self, width: int, depth: int, causal: bool = True) -> Titans:
        """The module; raises `ValueError` naming a layer that the host does not have."""
        return Titans(self, width, depth, causal)


class Titans(Memory):
    """The module: the weights of new streams, a writer, and a reader for every read layer."""

    def __init__(self, config: TitansConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.reads_own_segment = not causal
        self.write_layer, self.read_layers = resolve_layers(config.write_layer, config.read_layers, depth)
        self.writer = Writer(config, width)
        self.readers = nn.ModuleDict({str(layer): Reader(config, width) for layer in self.read_layers})
        for reader in self.readers.values():
            asked = self.writer.key if self.writer.previous is None else self.writer.previous
            reader.query.load_state_dict(asked.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        self.first = nn.ParameterList(torch.randn(config.heads, *shape) for shape in config.shapes)
        nn.init.zeros_(self.first[-1])

    @property
    def writes_see_reads(self) -> bool:
        """Where a decoder reads below the write layer. An encoder's call is one segment, which nothing cuts."""
        return not self.reads_own_segment and super().writes_see_reads

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros, float32: for every layer l `learned_l`, M - M_*, and `momentum_l`, S, both `[b, h, in, out]`."""
        return {
            f"{name}_{layer}": torch.zeros(batch, self.config.heads, *shape, device=device)
            for name in ("learned", "momentum")
            for layer, shape in enumerate(self.config.shapes, 1)
        }

    def read(self, layer: int, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h' for one read layer; the network is that of the segment's start."""
        added_btd = self.readers[str(layer)](hidden_btd.to(self.parameter_dtype()), state, list(self.first))
        return hidden_btd + added_btd.to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """What one segment teaches the network."""
        pairs, config = self.writer(hidden_btd.to(self.parameter_dtype()), keep_bt), self.config
        after = learn(state, list(self.first), pairs, config.chunk, config.window_tokens, config.clip)
        return {name: tensor.float() for name, tensor in after.items()}

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row, head and token at a time."""
        return _naive(self, hidden_btd, state, keep_bt)


class Pairs(NamedTuple):
    """What a segment teaches: real tokens first, padding behind them with θ = 0, η = 1 and α = 0."""

    key: Float[Tensor, "b h t k"]
    value: Float[Tensor, "b h t k"]
    rate: Float[Tensor, "b h t"]
    log_momentum: Float[Tensor, "b h t"]
    log_keep: Float[Tensor, "b h t"]
    share: Float[Tensor, "b h t"]
    real: Float[Tensor, "b 1 t"]

    def cut(self, start: int, stop: int) -> Pairs:
        """Those of some tokens."""
        return Pairs(*(each.narrow(2, start, stop - start) for each in self))


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

    def forward(self, hidden_btd: Tensor, keep_bt: Tensor | None) -> Pairs:
        """The pairs of a segment."""
        if keep_bt is None:
            keep_bt = hidden_btd.new_ones(hidden_btd.shape[:2], dtype=torch.bool)
        else:
            # chunks, windows and the token before are of real tokens, wherever padding stands
            order_bt = (~keep_bt).long().argsort(dim=1, stable=True)
            keep_bt = keep_bt.gather(1, order_bt)
            hidden_btd = hidden_btd.gather(1, order_bt[..., None].expand_as(hidden_btd))
        hidden_btd, real_b1t = self.norm(hidden_btd), keep_bt[:, None]
        key = self.key(hidden_btd)
        if self.previous is not None:
            key = key + self.previous(F.pad(hidden_btd, (0, 0, 1, -1)))
        key, value = (
            wide(flat.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)) for flat in (key, self.value(hidden_btd))
        )
        rate, momentum, forget = (
            wide(gate(hidden_btd)).transpose(1, 2) for gate in (self.rate, self.momentum, self.forget)
        )
        share = torch.ones_like(rate) if self.share is None else wide(self.share(hidden_btd)).transpose(1, 2).sigmoid()
        return Pairs(
            key=unit(key),
            value=value,
            rate=rate.sigmoid() * real_b1t,
            log_momentum=F.logsigmoid(momentum) * real_b1t,
            log_keep=F.logsigmoid(-forget) * real_b1t,
            share=share,
            real=real_b1t.to(key.dtype),
        )


class Reader(nn.Module):
    """What the memory adds to the tokens of one layer: `[b, t, d] -> [b, t, d]`."""

    def __init__(self, config: TitansConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        self.query, self.output = nn.Linear(width, config.dim, bias=False), nn.Linear(config.dim, width, bias=False)
        self.gate = nn.Linear(width, width) if config.context == "gate" else None
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden_btd: Tensor, state: State, first: list[Tensor]) -> Tensor:
        """G O [r / sqrt(mean r² + δ)] of the equations above."""
        normed_btd = self.norm(hidden_btd)
        query_bhtk = self.query(normed_btd).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read_bhtk = recall(state, first, unit(wide(query_bhtk)))
        added_btd = self.output(scaled(read_bhtk).to(hidden_btd.dtype).transpose(1, 2).flatten(-2))
        return added_btd if self.gate is None else self.gate(normed_btd).sigmoid() * added_btd


def activate(z: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """σ(z) = SiLU(z) sqrt(2.8 / width)."""
    return F.silu(z) * math.sqrt(UNIT_LENGTH / z.shape[-1])


def slope(z: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """σ'(z)."""
    gate = z.sigmoid()
    return gate * (1 + z * (1 - gate)) * math.sqrt(UNIT_LENGTH / z.shape[-1])


def network(state: State, first: list[Tensor], dtype: torch.dtype) -> list[Float[Tensor, "b h _ _"]]:
    """The matrices of M."""
    return [weights.to(dtype) + state[f"learned_{layer}"].to(dtype) for layer, weights in enumerate(first, 1)]


def recall(state: State, first: list[Tensor], query_bhtk: Float[Tensor, "b h t k"]) -> Float[Tensor, "b h t k"]:
    """r = M(q), in float32 or wider, under autocast too; `first` are the matrices `[h, in, out]` of M_*."""
    with torch.autocast(query_bhtk.device.type, enabled=False):
        features = wide(query_bhtk)
        *hidden, last = network(state, first, features.dtype)
        for weights in hidden:
            features = activate(features @ weights)
        return features @ last


def gradients(
    weights: list[Tensor], key: Float[Tensor, "*b n k"], value: Float[Tensor, "*b n k"], clip: float | None
) -> list[tuple[Float[Tensor, "*b n _"], Float[Tensor, "*b n _"]]]:
    """∇ℓ of every token for every matrix W_l, as two vectors whose outer product it is: a_{l-1} and the gradient of
    W_lᵀ a_{l-1}.
    """
    inputs, sums = [key], []
    for matrix in weights[:-1]:
        sums.append(inputs[-1] @ matrix)
        inputs.append(activate(sums[-1]))
    errors = [inputs[-1] @ weights[-1] - value]
    for matrix, z in zip(reversed(weights[1:]), reversed(sums), strict=True):
        errors.insert(0, (errors[0] @ matrix.mT) * slope(z))
    if clip is not None:
        squares = [x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True)]
        shorter = torch.rsqrt(1 + torch.stack(squares).sum(0) / clip**2)[..., None]
        errors = [error * shorter for error in errors]
    return list(zip(inputs, errors, strict=True))


def learn(
    state: State, first: list[Tensor], pairs: Pairs, chunk: int, window_tokens: int = 1, clip: float | None = None
) -> State:
    """The state after pairs, chunk after chunk, in float32 or wider, under autocast too."""
    dtype, time = wide(pairs.key).dtype, pairs.key.shape[2]
    pairs = Pairs(*(each.to(dtype) for each in pairs))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with torch.autocast(pairs.key.device.type, enabled=False):
        for start in range(0, time, chunk):
            stop = min(start + chunk, time)
            begin = max(0, start - window_tokens + 1)
            state = _learn_chunk(state, first, pairs.cut(begin, stop), pairs.cut(start, stop), window_tokens, clip)
    return state


def _learn_chunk(
    state: State, first: list[Tensor], seen: Pairs, here: Pairs, window_tokens: int, clip: float | None
) -> State:
    """All tokens of a chunk at once; `seen` are those of their losses, so a window begins before the chunk.

    With E_t = η_1 ... η_t and A_t = (1 - α_1) ... (1 - α_t), and u_t the gradients that token t takes,

        S_c = E_c S_0 - Σ_i (E_c / E_i) θ_i u_i
        M_c = A_c M_0 + Σ_t (A_c / A_t) S_t = A_c M_0 + [Σ_t (A_c / A_t) E_t] S_0 - Σ_i p_i θ_i u_i
        p_i = Σ_{t>=i} (A_c / A_t) (E_t / E_i)

    where M stands for M - M_*, and padding has no S_t to add.
    """
    # logarithms, as E and A may be too small for a quotient
    momentum, kept = here.log_momentum.cumsum(-1), here.log_keep.cumsum(-1)
    left = (kept[..., -1:] - kept).exp() * here.real
    passed = (momentum[..., None] - momentum[..., None, :]).tril().exp().tril()
    to_momentum = here.rate * (momentum[..., -1:] - momentum).exp()
    to_learned = here.rate * (left[..., None, :] @ passed).squeeze(-2)
    if window_tokens > 1:
        before, time = seen.key.shape[2] - here.key.shape[2], here.key.shape[2]
        # token t of the chunk stands at t + before among those seen
        window = momentum.new_ones(time, before + time).tril(before).triu(before - window_tokens + 1)
        to_momentum, to_learned = to_momentum @ window * seen.share, to_learned @ window * seen.share
    from_momentum = (left * momentum.exp()).sum(-1)[..., None, None]
    after: State = {}
    weights = network(state, first, momentum.dtype)
    for layer, (inputs, errors) in enumerate(gradients(weights, seen.key, seen.value, clip), 1):
        learned, surprise = state[f"learned_{layer}"], state[f"momentum_{layer}"]
        after[f"learned_{layer}"] = (
            kept[..., -1, None, None].exp() * learned
            + from_momentum * surprise
            - (inputs * to_learned[..., None]).mT @ errors
        )
        after[f"momentum_{layer}"] = (
            momentum[..., -1, None, None].exp() * surprise - (inputs * to_momentum[..., None]).mT @ errors
        )
    return after


# --- the equations in plain loops ------------------------------------------------------------------------------------


def _naive(memory: Titans, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[Tensor, State]:
    config, reader = memory.config, memory.readers[str(memory.read_layers[0])]
    size, count = config.dim // config.heads, config.layers
    outputs, rows = [], []
    for b in range(hidden_btd.shape[0]):
        kept = [t for t in range(hidden_btd.shape[1]) if keep_bt is None or keep_bt[b, t]]
        tokens, heads = [memory.writer.norm(hidden_btd[b, t]) for t in kept], []
        reads = [[] for _ in hidden_btd[b]]
        for head in range(config.heads):
            part = slice(head * size, (head + 1) * size)
            first = [weights[head] for weights in memory.first]
            learned = [state[f"learned_{layer + 1}"][b, head] for layer in range(count)]
            surprise = [state[f"momentum_{layer + 1}"][b, head] for layer in range(count)]
            matrices = [f + m for f, m in zip(first, learned, strict=True)]
            for token, read in zip(hidden_btd[b], reads, strict=True):
                query = reader.query(reader.norm(token))[part]  # pyright: ignore[reportCallIssue]
                answer = _naive_network(matrices, query / torch.dot(query, query).sqrt())[0][-1]
                read.append(answer / ((answer * answer).mean() + NEXT_TO_NOTHING).sqrt())
            heads.append(_naive_write(memory, tokens, first, learned, surprise, head, part))
        for token, read in zip(hidden_btd[b], reads, strict=True):
            added = reader.output(torch.cat(read))  # pyright: ignore[reportCallIssue]
            if config.context == "gate":
                added = torch.sigmoid(reader.gate(reader.norm(token))) * added  # pyright: ignore[reportCallIssue]
            outputs.append(token + added)
        rows.append({name: torch.stack([after[name] for after in heads]) for name in state})
    return (
        torch.stack(outputs).view(hidden_btd.shape),
        {name: torch.stack([row[name] for row in rows]) for name in state},
    )


def _naive_network(matrices: list[Tensor], key: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """W_lᵀ a_{l-1} and a_{l-1} of every layer for one key."""
    sums, inputs = [], [key]
    for matrix in matrices:
        sums.append(matrix.T @ inputs[-1])
        inputs.append(sums[-1] * torch.sigmoid(sums[-1]) * (UNIT_LENGTH / len(sums[-1])) ** 0.5)
    return sums, inputs[:-1]


def _naive_gradient(matrices: list[Tensor], key: Tensor, value: Tensor, clip: float | None) -> list[Tensor]:
    sums, inputs = _naive_network(matrices, key)
    error, found = sums[-1] - value, []
    for layer in reversed(range(len(matrices))):
        found.insert(0, torch.outer(inputs[layer], error))
        if layer > 0:
            z, back = sums[layer - 1], matrices[layer] @ error
            steep = torch.sigmoid(z) + z * torch.sigmoid(z) * torch.sigmoid(-z)
            error = back * steep * (UNIT_LENGTH / len(z)) ** 0.5
    if clip is not None:
        square = sum((each * each).sum() for each in found)
        found = [each / (1 + square / clip**2) ** 0.5 for each in found]
    return found


def _naive_write(
    memory: Titans,
    tokens: list[Tensor],
    first: list[Tensor],
    learned: list[Tensor],
    surprise: list[Tensor],
    head: int,
    part: slice,
) -> State:
    config, writer = memory.config, memory.writer
    pairs: list[tuple[Tensor, Tensor]] = []
    matrices: list[Tensor] = []
    for t, token in enumerate(tokens):
        key = writer.key(token)
        if writer.previous is not None and t > 0:
            key = key + writer.previous(tokens[t - 1])
        pairs.append((key[part] / torch.dot(key[part], key[part]).sqrt(), writer.value(token)[part]))
        if t % config.chunk == 0:
            matrices = [f + m for f, m in zip(first, learned, strict=True)]
        rate, momentum, forget = (
            torch.sigmoid(gate(token)[head]) for gate in (writer.rate, writer.momentum, writer.forget)
        )
        surprise = [momentum * each for each in surprise]
        for i in range(max(0, t - config.window_tokens + 1), t + 1):
            share = 1.0 if writer.share is None else torch.sigmoid(writer.share(tokens[i])[head])
            gradient = _naive_gradient(matrices, *pairs[i], config.clip)
            surprise = [s - rate * share * g for s, g in zip(surprise, gradient, strict=True)]
        learned = [(1 - forget) * m + s for m, s in zip(learned, surprise, strict=True)]
    after = {f"learned_{layer}": each for layer, each in enumerate(learned, 1)}
    return after | {f"momentum_{layer}": each for layer, each in enumerate(surprise, 1)}
