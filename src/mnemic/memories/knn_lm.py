"""kNN-LM: every token that was read, under the hidden state that came before it, mixed into the next distribution.

Khandelwal et al., "Generalization through Memorization: Nearest Neighbor Language Models" (ICLR 2020, arXiv
1911.00172), section 2. h_t is the hidden state of token t that enters the head, x_{t+1} the token that follows.

    M        <- M, (h_t, x_{t+1})           at a segment's end; beyond `size` entries the oldest leave
    d_i      = |h_t - k_i|² / |h_t|²        for the entries (k_i, v_i) of M
    N        = the `top_k` entries of M with the least d_i
    S(y)     = Σ_{i in N, v_i = y} e^(-d_i / T),   S = Σ_y S(y)            T is `temperature`
    p(y)     = λ S(y) / S + (1 - λ) p_LM(y)                                λ is `rate`

With `sentinel` δ the model counts as one more entry, at the distance δ: λ_t = λ S / (S + e^(-δ / T)) in place of λ. The
mixture is given as logits of the same softmax, z'_y = log(e^z_y + Z λ / (1 - λ) S(y) / S) with Z = Σ_y e^z_y, so those
of tokens outside of N keep their bits. The last token of a segment waits in the state for what follows it.

Where we depart. The paper's keys are what enters the last block's feed-forward, which it finds to work best; here they
are what enters the head, which every family has in one place. Distances are divided by |h_t|²: for a query that changes
the unit of T alone, so that it is the same on every host. The paper has no sentinel, and M of a whole training set.
What is trained: nothing. What is forgotten: the oldest tokens. State: `4 * width + 12` bytes a token, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.memories.fast_weights import wide
from mnemic.memories.knn import SCORES_AT_ONCE, check_faiss, nearest, nearest_by_faiss
from mnemic.memories.knn_lm_naive import naive_write
from mnemic.memory import Attribution, Card, Memory, MemoryConfig, Site
from mnemic.state import State, append_rows, check_range, push_rows

# Shapes: b batch, t time, d host width, v vocabulary, n entries, m entries that are found.


@dataclass
class KNNLMConfig(MemoryConfig):
    """Settings of a kNN-LM.

    `size` is the most entries of a stream, `top_k` how many of them speak, `rate` how much they count beside the model.
    `temperature` is how slowly they count for less with distance, in squared lengths of the hidden state; a `sentinel`
    is a distance, too. Beyond `exact_up_to` entries the search is FAISS's: `pip install mnemic[faiss]`.
    """

    kind: ClassVar[str] = "knn-lm"
    card: ClassVar[Card] = Card(
        title="kNN-LM",
        seam="output distribution",
        trains="nothing",
        bytes_law="tokens x (width + 3) x 4",
        paper="Khandelwal et al., ICLR 2020, arXiv 1911.00172",
        citation="@inproceedings{khandelwal2020generalization, title = {Generalization through Memorization: Nearest "
        "Neighbor Language Models}, author = {Khandelwal, Urvashi and Levy, Omer and Jurafsky, Dan and Zettlemoyer, "
        "Luke and Lewis, Mike}, booktitle = {ICLR}, year = {2020}}",
    )

    size: int = 65_536
    top_k: int = 64
    rate: float = 0.1
    temperature: float = 0.05
    sentinel: float | None = None
    exact_up_to: int = 1_048_576

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("size", 1), ("top_k", 1), ("exact_up_to", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}; a share beside the model's own lies between 0 and 1")
        for name in ("temperature", "sentinel"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; a distance is above 0")

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """One rate for all tokens, with room for three segments and a half; and a sentinel."""
        plain = cls(segment_length=8, size=28, top_k=6, rate=0.5, temperature=1.0)
        return [plain, plain.replace(size=24, top_k=32, rate=0.8, temperature=0.5, sentinel=1.0)]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> KNNLMConfig:
        """Room for `size` segments, by default for as many as make 4096 entries, or one."""
        return cls(segment_length=segment_length, size=segment_length * (size or max(1, 4096 // segment_length)))

    def build(self, width: int, depth: int, causal: bool = True) -> KNNLM:
        """The module; raises `ValueError` for an encoder, `ModuleNotFoundError` where FAISS is needed and missing."""
        if not causal:
            raise ValueError("a kNN-LM is about the token that follows, which an encoder has none of; use a decoder")
        check_faiss(self.size, self.exact_up_to)
        return KNNLM(self, width, depth)


class KNNLM(Memory):
    """The module, which has no weights."""

    takes_ids = starts_empty = True

    def __init__(self, config: KNNLMConfig, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.reads = self.writes = (Site(depth - 1, "logits"),)
        self.reach = config.size // config.segment_length + 1  # a segment's last token is told of by the next one

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """No entries. `keys [b, n, d + 1]` float32, behind each -|k|²/2; `tokens [b, n]` int64, id + 1; a row's own
        `count [b]` first, oldest first, then zeros. `last [b, d]`: the latest hidden state if it `waits [b]`, or 0.
        """
        shapes = {"keys": (0, self.width + 1), "tokens": (0,), "count": (), "last": (self.width,), "waits": ()}
        kinds = {name: torch.float32 if name in ("keys", "last") else torch.long for name in shapes}
        return {name: torch.zeros(batch, *shape, dtype=kinds[name], device=device) for name, shape in shapes.items()}

    def most_bytes(self, written: int) -> int:
        """`size` entries at most, and the latest hidden state."""
        entries = min(self.config.size, written * self.config.segment_length)
        return 16 + 4 * self.width + entries * (4 * self.width + 12)

    def check_state(self, state: State, written: int) -> None:
        """As many keys as tokens, and tokens as far as the count says."""
        entries = state["tokens"].shape[1]
        check_range("keys", torch.tensor(state["keys"].shape[1]), entries, entries)
        check_range("count", state["count"], 0, entries)
        check_range("tokens", state["tokens"][:, : int(state["count"].max())], 1, 2**62)
        check_range("waits", state["waits"], 0, 1)

    def mix(
        self, site: Site, logits_btv: Float[Tensor, "b t v"], hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> Float[Tensor, "b t v"]:
        """z'; the entries are those of the segment's start."""
        if not state["tokens"].shape[1]:
            return logits_btv
        at_once = SCORES_AT_ONCE // (len(logits_btv) * max(logits_btv.shape[-1], self.width * self.config.top_k))
        parts = (each.split(max(1, at_once), 1) for each in (logits_btv, hidden_btd))
        with torch.autocast(hidden_btd.device.type, enabled=False):
            return torch.cat([self._mixed(z, *self.nearest(h, state)) for z, h in zip(*parts, strict=True)], 1)

    def nearest(self, hidden_btd: Tensor, state: State) -> tuple[Float[Tensor, "b t m"], Int[Tensor, "b t m"]]:
        """d_i and v_i of the entries in N; infinite and any where a row has fewer than `top_k`."""
        hidden_btd, keys = wide(hidden_btd), state["keys"]
        search = nearest if keys.shape[1] <= self.config.exact_up_to else nearest_by_faiss
        with torch.no_grad():  # |h - k|² is least where h . k - |k|²/2 is greatest
            query_b1ts = F.pad(hidden_btd, (0, 1), value=1.0)[:, None]
            found_btm = search(query_b1ts, keys.to(query_b1ts.dtype), state["count"], self.config.top_k)[:, 0]
        row_b11, place_btm = torch.arange(len(keys), device=keys.device)[:, None, None], found_btm.clamp_min(0)
        away_btm = (hidden_btd[:, :, None] - keys[row_b11, place_btm][..., :-1]).square().sum(-1)
        away_btm = away_btm / hidden_btd.square().sum(-1, keepdim=True)
        return away_btm.masked_fill(found_btm < 0, torch.inf), state["tokens"][row_b11, place_btm] - 1

    def _mixed(self, logits_btv: Tensor, away_btm: Tensor, token_btm: Tensor) -> Tensor:
        config, logits = self.config, logits_btv.to(away_btm.dtype)
        real_btm = away_btm.isfinite() & (token_btm < logits.shape[-1])
        score_btm = (-away_btm / config.temperature).masked_fill(~real_btm, torch.finfo(away_btm.dtype).min)
        p_btv = torch.zeros_like(logits).scatter_add(-1, token_btm.where(real_btm, 0), score_btm.softmax(-1) * real_btm)
        rate = logits.new_tensor(config.rate)
        if config.sentinel is not None:
            rate = rate * torch.sigmoid(score_btm.logsumexp(-1, keepdim=True) + config.sentinel / config.temperature)
        odds, there = logits.logsumexp(-1, keepdim=True) + rate.log() - (-rate).log1p(), p_btv > 0
        mixed = torch.logaddexp(logits, odds + p_btv.where(there, 1).log()).to(logits_btv.dtype)
        return torch.where(there, mixed, logits_btv)

    def write_and_tell(
        self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None = None, ids_bt: Tensor | None = None
    ) -> tuple[State, Attribution | None]:
        """`write`; entries have no places that are written again."""
        return self.write(hidden_btd, state, keep_bt, ids_bt), None

    def write(
        self, hidden_btd: Tensor, state: State, keep_bt: Bool[Tensor, "b t"] | None = None, ids_bt: Tensor | None = None
    ) -> State:
        """The entries after one segment: those of the token that waited and of the segment's own, but its last."""
        assert ids_bt is not None
        waits, counts, most = state["waits"].tolist(), state["count"].tolist(), self.config.size
        told, total = append_rows(state["last"][:, None], waits, hidden_btd.to(state["last"].dtype), keep_bt)
        ids, _ = append_rows(state["waits"][:, None, None], waits, ids_bt[..., None] + 1, keep_bt)
        key_btd, new = told[:, :-1], torch.tensor([max(0, each - 1) for each in total], device=told.device)
        key_btd = torch.cat([key_btd, -key_btd.square().sum(-1, keepdim=True) / 2], -1)
        there = torch.arange(key_btd.shape[1], device=told.device) < new[:, None]
        there = None if bool(there.all()) else there
        keys, count = push_rows(state["keys"], counts, key_btd, there, most)
        tokens, _ = push_rows(state["tokens"][..., None], counts, ids[:, 1:], there, most)
        last = F.pad(told, (0, 0, 0, 1))[torch.arange(len(told), device=told.device), new]
        numbers = {"count": count, "waits": [min(1, each) for each in total]}
        after = {name: state[name].new_tensor(values) for name, values in numbers.items()}
        return after | {"keys": keys, "tokens": tokens[..., 0], "last": last}

    def naive(
        self, hidden_btd: Tensor, state: State, keep_bt: Bool[Tensor, "b t"] | None = None, ids_bt: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """M in plain loops; the mixture is `naive_mix`."""
        return hidden_btd, naive_write(self.config.size, hidden_btd, ids_bt, state, keep_bt)
