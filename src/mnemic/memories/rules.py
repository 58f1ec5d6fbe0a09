"""Associative update rules: how a matrix of fast weights takes in a pair of key and value, and gives the value back.

All are one recurrence over an explicit state, one pair at a time, in the notation of linear attention with columns:

    v̄_t = W_{t-1}ᵀ φ(k_t) / n(k_t)                        what is remembered under this key already
    W_t = λ_t W_{t-1} + φ(k_t) (β_t (v_t - [delta] v̄_t))ᵀ
    z_t = z_{t-1} + γ_t φ(k_t)                            only with a normaliser
    read(q) = W_tᵀ φ(q) / n(q),    n(q) = z_tᵀ φ(q) + ε, or 1 without a normaliser

A rule chooses the feature map φ, whether it subtracts what is there (delta) or only adds, how much it keeps (λ), and
the normaliser. `RULES` holds those of the literature by name:

| name | φ | delta | λ | normaliser | source |
| --- | --- | --- | --- | --- | --- |
| `sum` | identity | no | 1 | none | Hebbian; linear attention, unnormalised: Schlag et al. 2021, arXiv 2102.11174 |
| `decay` | identity | no | 0.95 | none | RetNet, Sun et al. 2023, arXiv 2307.08621 (one λ for all) |
| `delta` | identity | yes | 1 | none | Schlag et al. 2021; DeltaNet, Yang et al. 2024, arXiv 2406.06484 |
| `infini` | ELU + 1 | no | 1 | γ = 1 | Infini-attention, Munkhdalai et al. 2024, arXiv 2404.07143, "Linear" |
| `infini-delta` | ELU + 1 | yes | 1 | γ = 1 | the same, "Linear + Delta" |
| `armt` | DPFP-3 | yes | 1 | γ corrected | ARMT, Rodkin et al. 2024, arXiv 2407.04841 |
| `armt-uncorrected` | DPFP-3 | yes | 1 | γ = 1 | the same without the correction (an ablation) |

With a rate and a share kept that depend on the input, `delta` is the gated delta rule (Yang et al. 2024, arXiv
2412.06464), where v̄ is read from λ_t W_{t-1}: forget first, then correct. Titans (Behrouz et al. 2025, arXiv
2501.00663) without momentum and with a linear memory takes the gradient before it forgets; at λ = 1 the two agree.

ARMT's correction is γ_t = clip(1 - z_{t-1}ᵀ φ(k_t) / ‖φ(k_t)‖², 0, 1), without gradient: how much of this key is not
in the normaliser yet. A key that is written again leaves z as it is. With γ = 1 the normaliser grows with every
rewrite, v̄ is then too small, and the old value stays beside the new.

Where the papers write a whole segment at once, every pair of it corrects the state before the segment. Here a segment
has one pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mnemic.state import State

Rate = float | Float[Tensor, "*b #v"]
"""A number for all, one a row (`[*b, 1]`), or one a value dimension (`[*b, v]`)."""


def identity(keys: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """φ(k) = k."""
    return keys


def elu_plus_one(keys: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """φ(k) = ELU(k) + 1, positive everywhere (Katharopoulos et al. 2020, arXiv 2006.16236).

    Small keys all become nearly the vector of ones: what they have in common is larger than what tells them apart.
    """
    return F.elu(keys) + 1


def dpfp3(keys: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 6*d"]:
    """Deterministic parameter-free projection with ν = 3 (Schlag et al. 2021, arXiv 2102.11174).

    r = [relu(k); relu(-k)], φ(k) = [r ⊙ roll(r, 1); r ⊙ roll(r, 2); r ⊙ roll(r, 3)]. Positive and sparse.
    """
    halves = torch.cat([keys.relu(), (-keys).relu()], -1)
    return torch.cat([halves * halves.roll(shift, -1) for shift in (1, 2, 3)], -1)


MAPS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "identity": (identity, 1),
    "elu+1": (elu_plus_one, 1),
    "dpfp-3": (dpfp3, 6),
}
"""Feature maps by name, each with the number of features for one key dimension."""


@dataclass(frozen=True)
class Rule:
    """One update rule; see the module for the equations.

    The state is `{"weights": [*b, f, v]}`, with a normaliser also `{"normaliser": [*b, f]}`, where `*b` is the batch
    and, if wanted, heads. Methods are pure, differentiable, and keep the dtype of the state: have it in float32, the
    normaliser grows with the length of the stream.

    `map` is one of `MAPS`; `delta` subtracts what is remembered already; `keep` is λ; `normaliser` is "none",
    "sum" (γ = 1) or "corrected".
    """

    map: str = "identity"
    delta: bool = False
    keep: float = 1.0
    normaliser: Literal["none", "sum", "corrected"] = "none"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise ValueError(f"map is {self.map!r}; choose one of {', '.join(MAPS)}")
        if self.normaliser not in ("none", "sum", "corrected"):
            raise ValueError(f"normaliser is {self.normaliser!r}; choose none, sum or corrected")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; the share that stays lies in 0 .. 1")
        if self.keep != 1 and self.normaliser != "none":
            raise ValueError(f"keep is {self.keep} with a normaliser; what is normalised does not decay, set keep=1")

    def features(self, keys: Float[Tensor, "*b d"]) -> Float[Tensor, "*b f"]:
        """φ of keys or queries."""
        return MAPS[self.map][0](keys)

    def state_shape(self, key_width: int, value_width: int) -> dict[str, tuple[int, ...]]:
        """Sizes of the state's tensors, without the batch."""
        features = MAPS[self.map][1] * key_width
        shapes: dict[str, tuple[int, ...]] = {"weights": (features, value_width)}
        return shapes if self.normaliser == "none" else shapes | {"normaliser": (features,)}

    def init_state(
        self, batch: int | tuple[int, ...], key_width: int, value_width: int, device: torch.device | None = None
    ) -> State:
        """Zeros in float32: an empty memory, which reads as zero."""
        lead = (batch,) if isinstance(batch, int) else batch
        shapes = self.state_shape(key_width, value_width)
        return {name: torch.zeros(*lead, *shape, device=device) for name, shape in shapes.items()}

    def read(self, state: State, query: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """W ᵀφ(q) / n(q)."""
        return self._look_up(state, self.features(query))

    def write(
        self,
        state: State,
        key: Float[Tensor, "*b d"],
        value: Float[Tensor, "*b v"],
        rate: Rate = 1.0,
        keep: Rate | None = None,
    ) -> State:
        """The state after one pair; `rate` is β, `keep` is λ (the rule's own if None).

        Raises:
            ValueError: `keep` is given to a rule with a normaliser.
        """
        if keep is not None and self.normaliser != "none":
            raise ValueError(
                "keep is given to a rule with a normaliser; what is normalised does not decay, leave it out"
            )
        feature, weights = self.features(key), state["weights"]
        keep = self.keep if keep is None else keep
        if isinstance(keep, Tensor):
            weights = keep[..., None, :] * weights
        elif keep != 1:
            weights = keep * weights
        change = value - self._look_up({**state, "weights": weights}, feature) if self.delta else value
        written = {"weights": torch.addcmul(weights, feature[..., None], (rate * change)[..., None, :])}
        if self.normaliser != "none":
            written["normaliser"] = state["normaliser"] + self._new(state["normaliser"], feature) * feature
        return written

    def write_all(self, state: State, keys: Float[Tensor, "*b t d"], values: Float[Tensor, "*b t v"]) -> State:
        """The state after `t` pairs, one after another."""
        for key, value in zip(keys.unbind(-2), values.unbind(-2), strict=True):
            state = self.write(state, key, value)
        return state

    def _look_up(self, state: State, feature: Float[Tensor, "*b f"]) -> Float[Tensor, "*b v"]:
        value = (feature[..., None, :] @ state["weights"]).squeeze(-2)
        if self.normaliser == "none":
            return value
        # ε also makes an empty memory read as zero rather than as 0 / 0
        return value / ((feature * state["normaliser"]).sum(-1, keepdim=True) + self.epsilon)

    def _new(self, normaliser: Float[Tensor, "*b f"], feature: Float[Tensor, "*b f"]) -> float | Float[Tensor, "*b 1"]:
        """γ: the share of a key that the normaliser does not hold yet."""
        if self.normaliser == "sum":
            return 1.0
        # a key without features changes nothing, whatever its share
        size = feature.square().sum(-1, keepdim=True).clamp_min(torch.finfo(feature.dtype).tiny)
        return (1 - (feature * normaliser).sum(-1, keepdim=True) / size).clamp(0, 1).detach()


RULES: dict[str, Rule] = {
    "sum": Rule(),
    "decay": Rule(keep=0.95),
    "delta": Rule(delta=True),
    "infini": Rule("elu+1", normaliser="sum"),
    "infini-delta": Rule("elu+1", delta=True, normaliser="sum"),
    "armt": Rule("dpfp-3", delta=True, normaliser="corrected"),
    "armt-uncorrected": Rule("dpfp-3", delta=True, normaliser="sum"),
}
"""The rules of the literature by name."""
