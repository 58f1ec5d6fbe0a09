"""Infinity-former: the past as a continuous signal on a fixed number of Gaussians, of which a query reads a stretch.

Martins, Marinho, Martins, ACL 2022, arXiv 2109.00301. Time runs over [0, 1]; the newest token is near 1. The signal is
x(t) = Bᵀ ψ(t) with N basis functions ψ_j(t) = N(t; μ_j, σ_j²), the μ_j on a grid, one of each of `widths` at every
place of it. A segment of L tokens with hidden states x_l is written in three steps (sections 3.1 and 3.2):

    contract      t -> τ t: all that was written moves into [0, τ]
    sample        x_m = Bᵀ ψ(t_m), m = 1 ... M, at places t_m of the old signal; they now stand at τ (m - ½) / M,
                  the new x_l at τ + (1 - τ) (l - ½) / L
    fit           B = (F Fᵀ + λ I)⁻¹ F X                  ridge regression; F has ψ of all M + L places, X their vectors

The first segment fills [0, 1] and is fitted alone. t_m = (m - ½) / M, or with `sticky` (section 3.3) the quantiles
(m - ½) / M of the attention that the running segment paid to the signal: a histogram over D bins of the densities
below, added up over tokens, heads and read layers. What is attended to keeps more room. Read, for each head, at every
read layer, from the signal as it stood when the segment began (section 3.1), with q = Q x, keys K B and values V B:

    s_j = q . k_j / sqrt(dim / heads)
    μ = sigmoid(w . s + c),   σ² = softplus(w' . s + c')  where the query looks, and how far around
    z = E[V B ψ(t)] under N(t; μ, σ²) = Σ_j v_j N(μ; μ_j, σ² + σ_j²), in closed form
    h' = h + O z

w . s is q . (K Bᵀw) / sqrt(dim / heads): the mean and the variance need one vector each, not a score for each basis.

What is ours. The memory is added after a block, and O is zero at first, so an untrained one changes nothing. Hidden
states are scaled to mean 0 and variance 1 before the fit. w and w' begin as normal numbers, so that queries look at
different places from the start. `widths` are in steps of the grid: by default .005 and .01 at N = 512, as published,
and as much overlap at any other N. Tokens, samples and μ_j stand in the middle of equal intervals. The published code
also fits zeros outside of [0, 1], and draws the sticky t_m at random from the histogram; quantiles are where such draws
lie on the mean, and need no randomness. An encoder reads what its own segment wrote.

What is trained: the projections, and with `gate` a convolution: x_l is scaled by sigmoid(conv(x)_l), over 3 tokens,
before the fit. With `detach`, as published, hidden states and the old B are constants where they are written. What is
forgotten: resolution. After k more segments, τᵏ of the signal is left to what filled it; where the basis functions no
longer tell it apart, it is gone. State: `bases * width * 4 + 8` bytes a stream; `sticky` adds `bins * 4`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.memories.fast_weights import wide
from mnemic.memories.infinity_former_naive import infinity_former_naive
from mnemic.memories.layers import resolve_sites
from mnemic.memory import Card, Memory, MemoryConfig, Site
from mnemic.state import State, check_range

# Shapes: b batch, t time, d host width, h heads, e a head's width, n basis functions, m samples, p places of a fit.

LEAST_VARIANCE = 1e-4
"""What σ² of a query is clamped to."""


@dataclass
class InfinityFormerConfig(MemoryConfig):
    """Settings of the infinity-former; layers are block indices, negative ones counted from the end.

    `bases` is N, `widths` their σ in steps of the grid, `ridge` is λ, `tau` the share of [0, 1] that the past keeps,
    `samples` is M. `dim` is the width of queries, keys and values over all `heads`. `sticky` samples by attention,
    counted in `bins`; segments can then only run one after another. `gate` smooths what is written. `prior` is σ_0 of
    the regulariser, `regularise` its weight in the loss. With `detach` a gradient passes one write, without it all of
    them. `read_layers` and `write_layer` default to the middle of the stack.
    """

    kind: ClassVar[str] = "infinity-former"
    card: ClassVar[Card] = Card(
        title="Infinity-former",
        seam="after block",
        trains="queries, keys, values, readers",
        bytes_law="bases x width x 4 + 8, and bins x 4 if sticky",
        paper="Martins et al., ACL 2022, arXiv 2109.00301",
        citation="@inproceedings{martins2022infinite, title = {$\\infty$-former: Infinite Memory Transformer}, "
        "author = {Martins, Pedro Henrique and Marinho, Zita and Martins, Andr{\\'e} F. T.}, booktitle = {ACL}, "
        "year = {2022}}",
    )

    bases: int = 512
    widths: list[float] = field(default_factory=lambda: [1.28, 2.56])
    ridge: float = 0.5
    tau: float = 0.5
    samples: int = 512
    heads: int = 4
    dim: int = 256
    sticky: bool = False
    bins: int = 128
    gate: bool = False
    prior: float = 0.05
    regularise: float = 1e-6
    detach: bool = True
    read_layers: list[int] | None = None
    write_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bases", "samples", "heads", "dim", "bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if not self.widths or min(self.widths) <= 0:
            raise ValueError(f"widths are {self.widths}; give at least one, all above 0, in steps of the grid")
        if self.bases % len(self.widths):
            raise ValueError(
                f"bases {self.bases} is not divisible by the {len(self.widths)} widths that stand at each place; "
                "set bases= to a multiple"
            )
        for name in ("ridge", "prior"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.regularise < 0:
            raise ValueError(f"regularise is {self.regularise}; a weight in the loss is 0 or more")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is {self.tau}; the share of the signal that the past keeps lies in (0, 1)")
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for the middle one")

    def unused(self) -> dict[str, str]:
        """The settings of what is switched off."""
        found = {} if self.sticky else {"bins": "set sticky=True"}
        return found if self.regularise else {**found, "prior": "set regularise above 0"}

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """The default, and a sticky memory with a gate, gradients through all writes and reads below the write."""
        small: dict[str, Any] = {"segment_length": 8, "bases": 16, "samples": 12, "dim": 16, "heads": 2}
        return [
            cls(**small),
            cls(**small, sticky=True, bins=8, gate=True, tau=0.75, detach=False, read_layers=[0, 1], write_layer=1),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> InfinityFormerConfig:
        """`size` places with two basis functions each, by default 32, sampled at as many as there are functions."""
        bases = 2 * (size or 32)
        return cls(segment_length=segment_length, bases=bases, samples=bases, heads=2, dim=2 * (width // 2))

    def build(self, width: int, depth: int, causal: bool = True) -> InfinityFormer:
        """The module; raises `ValueError` naming a layer that the host does not have, or a sticky decoder that reads
        above where it writes.
        """
        return InfinityFormer(self, width, depth, causal)


class InfinityFormer(Memory):
    """The module: a reader for every read layer; what is written is a fit, which only a gate trains."""

    def __init__(self, config: InfinityFormerConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.reads_own_segment, self.starts_empty = not causal, causal
        self.gradient_reach = 1 if config.detach else None
        self.writes, self.reads = resolve_sites(config.write_layer, config.read_layers, depth)
        if causal and config.sticky and self.reads[-1] > self.writes[-1]:
            raise ValueError(
                f"read layer {self.reads[-1].layer} lies above write_layer {self.writes[-1].layer}: a sticky memory is "
                "written after all its reads, whose attention it needs; read at or below the write, or set sticky=False"
            )
        self.readers = nn.ModuleDict({str(site.layer): Reader(config, width) for site in self.reads})
        self.gate = nn.Conv1d(width, width, 3, padding=1) if config.gate else None

    @property
    def writes_see_reads(self) -> bool:
        """Where a decoder's memory is sticky or read below the write layer. An encoder's call is one segment."""
        return not self.reads_own_segment and (self.config.sticky or super().writes_see_reads)

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Zeros: `coefficients [b, n, d]` float32, B; `written [b]` int64, segments so far; if sticky `attention
        [b, bins]` float32, what the running segment's tokens paid to each part of [0, 1].
        """
        state = {
            "coefficients": torch.zeros(batch, self.config.bases, self.width, device=device),
            "written": torch.zeros(batch, dtype=torch.long, device=device),
        }
        if self.config.sticky:
            state["attention"] = torch.zeros(batch, self.config.bins, device=device)
        return state

    def check_state(self, state: State, written: int) -> None:
        """The segments that it counts."""
        check_range("written", state["written"], 0, written)

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h' at one site; the signal is that of the segment's start."""
        return self.read_and_trace(site, hidden_btd, state)[0]

    def read_and_trace(
        self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """h', and if sticky the share of its attention that each token pays to each bin: `attention [b, t, bins]`."""
        added_btd, mean_bht, variance_bht = self.readers[str(site.layer)](hidden_btd.to(self.parameter_dtype()), state)
        read_btd = hidden_btd + added_btd.to(hidden_btd.dtype)
        if not self.config.sticky:
            return read_btd, {}
        mass_btk = masses(mean_bht.detach(), variance_bht.detach(), self.config.bins).mean(1)
        # nothing can be said of an empty signal
        return read_btd, {"attention": mass_btk.to(state["attention"].dtype) * _begun(state)[:, None, None]}

    def auxiliary(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, " b"] | None:
        """`regularise` x KL(N(μ, σ²) ‖ N(μ, σ_0²)) = ½ (σ²/σ_0² - log σ²/σ_0² - 1), the mean over heads, tokens and
        readers (section 3.1); 0 where nothing is written yet.

        It keeps reads narrow. Of each reader it is taken at what the write layer puts out.
        """
        if not self.config.regularise:
            return None
        terms = [self._divergence(reader, hidden_btd.to(self.parameter_dtype()), state) for reader in self._readers()]
        keep_bt = torch.ones_like(terms[0], dtype=torch.bool) if keep_bt is None else keep_bt
        mean_b = (torch.stack(terms).mean(0) * keep_bt).sum(1) / keep_bt.sum(1).clamp_min(1)
        return self.config.regularise * mean_b

    def _readers(self) -> list[Reader]:
        return [reader for reader in self.readers.values() if isinstance(reader, Reader)]

    def _divergence(self, reader: Reader, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t"]:
        _, variance_bht = reader.densities(hidden_btd, state)
        ratio_bht = variance_bht / self.config.prior**2
        return (ratio_bht - ratio_bht.log() - 1).mean(1) / 2 * _begun(state)[:, None]

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The signal after one segment."""
        config, before_bnd = self.config, state["coefficients"]
        if config.detach:
            hidden_btd, before_bnd = hidden_btd.detach(), before_bnd.detach()
        new_btd, counts = self._signal(hidden_btd, keep_bt)
        before_bnd = before_bnd.to(new_btd.dtype)
        if config.sticky:
            places_bm = quantiles(state["attention"].detach().to(new_btd.dtype), config.samples)
        else:
            places_bm = middles(config.samples, new_btd)[None]
        fit_bnp = self._fits(counts, _begun(state).tolist(), new_btd)
        with torch.autocast(new_btd.device.type, enabled=False):
            old_bmd = evaluate(places_bm, config) @ before_bnd
            after_bnd = fit_bnp @ torch.cat([old_bmd, new_btd], 1)
        wrote_b = torch.tensor(counts, device=new_btd.device) > 0
        after = {
            "coefficients": torch.where(wrote_b[:, None, None], after_bnd, before_bnd).float(),
            "written": state["written"] + wrote_b,
        }
        if config.sticky:
            after["attention"] = state["attention"].detach().masked_fill(wrote_b[:, None], 0).float()
        return after

    def _signal(self, hidden_btd: Tensor, keep_bt: Tensor | None) -> tuple[Tensor, list[int]]:
        """What is fitted, real tokens first and zeros behind them, and how many are real in each row."""
        batch, time, width = hidden_btd.shape
        counts, behind_bt = [time] * batch, None
        if keep_bt is not None:
            order_bt = (~keep_bt).long().argsort(dim=1, stable=True)
            hidden_btd = hidden_btd.gather(1, order_bt[..., None].expand_as(hidden_btd))
            behind_bt, counts = ~keep_bt.gather(1, order_bt), keep_bt.sum(1).tolist()
        signal_btd = F.layer_norm(wide(hidden_btd), (width,))
        if behind_bt is not None:
            signal_btd = signal_btd.masked_fill(behind_bt[..., None], 0)
        if self.gate is not None:
            smooth_bdt = self.gate(signal_btd.to(self.parameter_dtype()).mT)
            signal_btd = signal_btd * wide(smooth_bdt.mT).sigmoid()
        return signal_btd, counts

    def _fits(self, counts: list[int], begun: list[bool], like_btd: Tensor) -> Float[Tensor, "b n p"]:
        """(F Fᵀ + λ I)⁻¹ F of each row, for M samples and t tokens: zeros for those it lacks. A batch of 1 for all."""
        config, kinds = self.config, list(zip(counts, begun, strict=True))
        found = {}
        for count, old in set(kinds):
            fit = torch.zeros(config.bases, config.samples + like_btd.shape[1], dtype=torch.float64)
            samples = config.samples if old else 0
            if count:
                known = regression(
                    config.bases, tuple(config.widths), config.ridge, samples, count, config.tau if old else 0.0
                )
                fit[:, :samples] = known[:, :samples]
                fit[:, config.samples : config.samples + count] = known[:, samples:]
            found[count, old] = fit.to(like_btd)
        return torch.stack([found[kind] for kind in (kinds if len(found) > 1 else kinds[:1])])

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row, token, head, basis function and bin at a time."""
        return infinity_former_naive(self, hidden_btd, state, keep_bt)


class Reader(nn.Module):
    """Continuous attention: `[b, t, d] -> [b, t, d]`, and the densities of all heads, μ and σ² `[b, h, t]`."""

    def __init__(self, config: InfinityFormerConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, config.dim, bias=False) for _ in range(3))
        self.mean, self.variance = nn.Linear(config.bases, 1), nn.Linear(config.bases, 1)
        self.output = nn.Linear(config.dim, width, bias=False)
        for affine in (self.mean, self.variance):
            nn.init.normal_(affine.weight)
            nn.init.zeros_(affine.bias)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden_btd: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """O z, μ and σ²."""
        mean_bht, variance_bht = self.densities(hidden_btd, state)
        value_bhne = self._heads(self.value(state["coefficients"].to(hidden_btd.dtype)))
        with torch.autocast(hidden_btd.device.type, enabled=False):
            read_bhte = expectation(mean_bht, variance_bht, self.config) @ value_bhne
        return self.output(read_bhte.to(hidden_btd.dtype).transpose(1, 2).flatten(-2)), mean_bht, variance_bht

    def densities(self, hidden_btd: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """μ and σ² `[b, h, t]`, in float32 or wider, under autocast too."""
        query_bhte = self._heads(self.query(self.norm(hidden_btd)))
        with torch.autocast(hidden_btd.device.type, enabled=False):
            weights_cn = torch.cat([self.mean.weight, self.variance.weight]).to(query_bhte.dtype)
            summed_bcd = weights_cn @ state["coefficients"].to(query_bhte.dtype)
        anchor_bhce = self._heads(self.key(summed_bcd.to(hidden_btd.dtype)))
        with torch.autocast(hidden_btd.device.type, enabled=False):
            mean_bht, variance_bht = (query_bhte @ anchor_bhce.mT / math.sqrt(query_bhte.shape[-1])).unbind(-1)
            variance_bht = F.softplus(variance_bht + wide(self.variance.bias)).clamp_min(LEAST_VARIANCE)
            return torch.sigmoid(mean_bht + wide(self.mean.bias)), variance_bht

    def _heads(self, flat: Tensor) -> Tensor:
        return wide(flat.unflatten(-1, (self.config.heads, -1)).transpose(1, 2))


def middles(count: int, like: Tensor) -> Float[Tensor, " count"]:
    """The middles of `count` equal intervals of [0, 1]."""
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


def bell(distance: Tensor, variance: Tensor) -> Tensor:
    """The density of a Gaussian at a distance from its mean."""
    return torch.exp(-distance.square() / (2 * variance)) / (2 * math.pi * variance).sqrt()


def _basis(bases: int, widths: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """μ_j and σ_j² of the basis functions."""
    grid = bases // len(widths)
    deviations = torch.tensor(widths, dtype=like.dtype, device=like.device) / grid
    return middles(grid, like).repeat_interleave(len(widths)), deviations.square().repeat(grid)


def evaluate(places: Float[Tensor, "*p"], config: InfinityFormerConfig) -> Float[Tensor, "*p n"]:
    """ψ at places of [0, 1]."""
    return expectation(places, torch.zeros_like(places), config)


def expectation(
    mean: Float[Tensor, "*p"], variance: Float[Tensor, "*p"], config: InfinityFormerConfig
) -> Float[Tensor, "*p n"]:
    """E[ψ(t)] for t ~ N(mean, variance): ∫ N(t; μ, σ²) N(t; μ_j, σ_j²) dt = N(μ; μ_j, σ² + σ_j²)."""
    centre, squared = _basis(config.bases, tuple(config.widths), mean)
    return bell(mean[..., None] - centre, variance[..., None] + squared)


@functools.lru_cache(maxsize=32)
def regression(
    bases: int, widths: tuple[float, ...], ridge: float, samples: int, tokens: int, tau: float
) -> Float[Tensor, "n p"]:
    """(F Fᵀ + λ I)⁻¹ F for `samples` spread over [0, τ] and `tokens` over [τ, 1]: a constant, in float64 on the CPU."""
    with torch.inference_mode(False), torch.no_grad():
        like = torch.empty(0, dtype=torch.float64, device="cpu")
        places = torch.cat([tau * middles(samples, like), tau + (1 - tau) * middles(tokens, like)])
        centre, squared = _basis(bases, widths, like)
        basis_np = bell(places - centre[:, None], squared[:, None])
        normal = basis_np @ basis_np.T + ridge * torch.eye(bases, dtype=like.dtype, device="cpu")
        return torch.cholesky_solve(basis_np, torch.linalg.cholesky(normal))


def masses(mean: Float[Tensor, "*p"], variance: Float[Tensor, "*p"], bins: int) -> Float[Tensor, "*p bins"]:
    """How much of a Gaussian lies in each of `bins` equal parts of [0, 1]."""
    edges = torch.arange(bins + 1, dtype=mean.dtype, device=mean.device) / bins
    return torch.special.ndtr((edges - mean[..., None]) / variance[..., None].sqrt()).diff(dim=-1)


def quantiles(attention: Float[Tensor, "b bins"], samples: int) -> Float[Tensor, "b samples"]:
    """Places of [0, 1] with equal attention between them, half as much at the ends; evenly spread where there is none.

    They are the quantiles (m - ½) / `samples` of the histogram, whose density is constant within a bin.
    """
    batch, bins = attention.shape
    total = attention.sum(1, keepdim=True)
    share = torch.where(total > 0, attention / total.where(total > 0, 1), 1 / bins)
    up_to = share.cumsum(1)
    # rounding must not lead beyond the last bin that has a share
    levels = middles(samples, attention).expand(batch, -1) * up_to[:, -1:]
    place = torch.searchsorted(up_to, levels.contiguous(), right=True).clamp_max(bins - 1)
    own = share.gather(1, place)
    within = (levels - (up_to.gather(1, place) - own)) / own
    return (place + within.clamp(0, 1)) / bins


def _begun(state: State) -> Bool[Tensor, " b"]:
    return state["written"] > 0
