"""Memorizing Transformer: keys and values of all that was read, of which a query attends to the few nearest.

Wu et al., "Memorizing Transformers" (ICLR 2022, arXiv 2203.08913), section 3. x_t is the layer-normed hidden state of
token t after one upper block, x_{t-1} that of the token before it, also across a segment's border. For each head,

    k_t = unit(K x_t + K' x_{t-1}),   v_t = V x_t         K' only with `shift`
    M  <- M, (k_t, v_t)                                   at a segment's end; beyond `size` entries the oldest leave
    q_t = unit(Q x_t)
    N   = the `top_k` entries of M with the greatest q_t . k_i
    r_t = Σ_{i in N} softmax_i(e^s q_t . k_i) v_i         s is learned; e^s is `scale` at first
    h'  = h + O [g r_t],   g = sigmoid(b)                 s and b: one a head; O: over all heads

Keys and queries have length 1, so that old entries stay comparable with new queries. There are no positions. An empty M
gives r = 0. M belongs to one row and is empty in a new stream, so no document sees another's.

Where we depart. In the paper the layer's own projections serve the memory, too, and a gate mixes both reads,
g r + (1 - g) r_local. Here the base is frozen and families differ inside their blocks: the memory has projections of
its own, stands behind the block, and is added. O is zero at first, so an untrained memory changes nothing. In the paper
M is a constant to the gradient, and K and V learn from local attention. Here nothing else would teach them, so entries
pass a gradient, through as many writes as `bptt_segments` allows; with 0 they are the paper's constants, and K and V
stay as they began. `shift` is ours, as in `fast_weights`: what is told of something stands behind it, and Q starts
equal to K', or to K without it. `size` is rounded down to whole segments. An encoder reads its own segment, too.

Search. Up to `exact_up_to` entries a row: products with all keys and torch's top-k, a part of the queries at a time.
Beyond: FAISS's IndexFlatIP, on the CPU, as exact. The search tells which entries are nearest and has no gradient; their
scores are computed again from query and key, and have one.

What is trained: the projections, s and b. What is forgotten: the oldest segments.
State: `8 * dim` bytes an entry, 16 MiB a stream by default when it is full; `shift` adds `4 * dim`.
"""

from __future__ import annotations

import importlib.util
import math
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mnemic.memories.fast_weights import unit, wide
from mnemic.memories.layers import latest, resolve_layer, shifted
from mnemic.memory import Card, Memory, MemoryConfig, Site
from mnemic.state import State, check_range, push_rows

# Shapes: b batch, t time, d host width, h heads, s width of a head (dim / heads), n entries, m entries that are found.

SCORES_AT_ONCE = 2**24
"""How many products of query and key the search holds at a time."""
INDEXES_KEPT = 8
"""How many states' indexes are kept at a time; one that is not is built again."""


@dataclass
class KNNConfig(MemoryConfig):
    """Settings of a Memorizing Transformer.

    `size` is the most entries of a stream, in whole segments; `top_k` how many of them a query attends to. `dim` is the
    width of keys and of values over all `heads`. `layer` is the block after which it reads and writes, negative ones
    counted from the end; by default the one at three quarters of the stack, as the paper's ninth of twelve. `scale`
    multiplies products of unit keys and queries, at first. `shift` makes keys of the token before, too. Beyond
    `exact_up_to` entries the search is FAISS's: `pip install mnemic[faiss]`.
    """

    kind: ClassVar[str] = "knn"
    card: ClassVar[Card] = Card(
        title="Memorizing Transformer",
        seam="after block",
        trains="keys, values, queries, gates, output",
        bytes_law="entries x dim x 8",
        paper="Wu et al., ICLR 2022, arXiv 2203.08913",
        citation="@inproceedings{wu2022memorizing, title = {Memorizing Transformers}, author = {Wu, Yuhuai and Rabe, "
        "Markus N. and Hutchins, DeLesley and Szegedy, Christian}, booktitle = {ICLR}, year = {2022}}",
    )

    size: int = 8192
    top_k: int = 32
    heads: int = 4
    dim: int = 256
    layer: int | None = None
    scale: float = 10.0
    shift: bool = True
    exact_up_to: int = 65_536

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.size < self.segment_length:
            raise ValueError(
                f"size {self.size} holds no whole segment of {self.segment_length} tokens; set size to at least that"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; a factor of scores is above 0")
        if self.exact_up_to < 0:
            raise ValueError(f"exact_up_to is {self.exact_up_to}; use 0 or more entries")

    @property
    def segments(self) -> int:
        """How many whole segments fit."""
        return self.size // self.segment_length

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """The default, with room for three segments, and one of the last block without the shift."""
        small: dict[str, Any] = {"segment_length": 8, "size": 28, "dim": 16, "heads": 2}
        return [cls(**small, top_k=4), cls(**small, top_k=6, layer=-1, shift=False)]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> KNNConfig:
        """2 heads with keys and values of half the host's width, and room for `size` segments, by default for as many
        as make 4096 entries, or one.
        """
        segments = size or max(1, 4096 // segment_length)
        return cls(segment_length=segment_length, size=segments * segment_length, heads=2, dim=2 * max(1, width // 2))

    def build(self, width: int, depth: int, causal: bool = True) -> KNN:
        """The module; raises `ValueError` naming a layer that the host does not have, and `ModuleNotFoundError` where
        FAISS will be needed and is not installed.
        """
        return KNN(self, width, depth, causal)


class KNN(Memory):
    """The module: projections of one layer, and a number or two for each head."""

    newer = ("last",)

    def __init__(self, config: KNNConfig, width: int, depth: int, causal: bool = True) -> None:
        super().__init__()
        check_faiss(config.segments * config.segment_length, config.exact_up_to)
        self.config = config
        layer = max(0, depth * 3 // 4 - 1) if config.layer is None else resolve_layer(config.layer, depth, "layer")
        self.reads = self.writes = (Site(layer),)
        self.reads_own_segment, self.starts_empty = not causal, causal
        # of the segments that fit, an encoder's own is one; the oldest key may be of one more
        self.reach = config.segments + config.shift - (not causal)
        self.norm = nn.LayerNorm(width)
        self.key, self.value, self.query = (nn.Linear(width, config.dim, bias=False) for _ in range(3))
        self.previous = nn.Linear(width, config.dim, bias=False) if config.shift else None
        self.output = nn.Linear(config.dim, width, bias=False)
        self.log_scale = nn.Parameter(torch.full((config.heads,), math.log(config.scale)))
        self.gate = nn.Parameter(torch.zeros(config.heads))
        self.query.load_state_dict((self.key if self.previous is None else self.previous).state_dict())
        nn.init.zeros_(self.output.weight)

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """No entries. `keys` and `values [b, n, dim]` float32, a row's own `count [b]` int64 first, oldest first, then
        zeros; with `shift` `last [b, dim]`, K' x of the last token.
        """
        last = {"last": torch.zeros(batch, self.config.dim, device=device)} if self.config.shift else {}
        return last | {
            "keys": torch.zeros(batch, 0, self.config.dim, device=device),
            "values": torch.zeros(batch, 0, self.config.dim, device=device),
            "count": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def most_bytes(self, written: int) -> int:
        """`size` entries, whatever was written, once something was."""
        last = 4 * self.config.dim if self.config.shift else 0
        return 8 + last + (8 * self.config.dim * self.config.size if written else 0)

    def check_state(self, state: State, written: int) -> None:
        """As many keys as values, and the count among them."""
        check_range("values", torch.tensor(state["values"].shape[1]), *(2 * [state["keys"].shape[1]]))
        check_range("count", state["count"], 0, state["keys"].shape[1])

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h'; the entries are those of the segment's start."""
        if not state["keys"].shape[1]:
            return hidden_btd
        query_bhts = unit(wide(self._by_head(self.query(self.norm(hidden_btd.to(self.parameter_dtype()))))))
        with torch.autocast(query_bhts.device.type, enabled=False):
            scale_h, gate_h = wide(self.log_scale).exp(), torch.sigmoid(wide(self.gate))
            read_bhts = attend(query_bhts, scale_h, state, self.config.top_k, self.config.exact_up_to)
            read_bhts = gate_h[:, None, None] * read_bhts
        added_btd = self.output(read_bhts.transpose(1, 2).flatten(2).to(self.parameter_dtype()))
        return hidden_btd + added_btd.to(hidden_btd.dtype)

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The entries after one segment."""
        hidden_btd = self.norm(hidden_btd.to(self.parameter_dtype()))
        key_btd, last = self.key(hidden_btd), {}
        if self.previous is not None:
            before_btd, last_bd = self.previous(hidden_btd), state["last"].to(key_btd.dtype)
            key_btd = key_btd + shifted(before_btd, keep_bt, last_bd)
            last = {"last": latest(before_btd, keep_bt, last_bd).float()}
        key_btd = unit(wide(key_btd).unflatten(-1, (self.config.heads, -1))).flatten(2)
        counts, most = state["count"].tolist(), self.config.segments * self.config.segment_length
        keys, count = push_rows(state["keys"], counts, key_btd.float(), keep_bt, most)
        values, _ = push_rows(state["values"], counts, self.value(hidden_btd).float(), keep_bt, most)
        return last | {"keys": keys, "values": values, "count": state["count"].new_tensor(count)}

    def _by_head(self, flat_btd: Tensor) -> Tensor:
        return flat_btd.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row, head and token at a time."""
        return _naive(self, hidden_btd, state, keep_bt)


def attend(
    query_bhts: Float[Tensor, "b h t s"], scale_h: Float[Tensor, " h"], state: State, top_k: int, exact_up_to: int
) -> Float[Tensor, "b h t s"]:
    """r_t; zero for rows without entries. Raises `ModuleNotFoundError` where FAISS is needed and not installed."""
    keys, values = (state[name].to(query_bhts.dtype) for name in ("keys", "values"))
    batch, heads, _, size = query_bhts.shape
    count = keys.shape[1]
    with torch.no_grad():
        if count > exact_up_to:
            found_bhtm = nearest_by_faiss(query_bhts, state["keys"], state["count"], top_k)
        else:
            found_bhtm = nearest(query_bhts, keys, state["count"], top_k)
        row, head = (torch.arange(length, device=keys.device) for length in (batch, heads))
        place_bhtm = (row[:, None, None, None] * count + found_bhtm.clamp_min(0)) * heads + head[:, None, None]
    key_bhtms, value_bhtms = (F.embedding(place_bhtm, table.reshape(-1, size)) for table in (keys, values))
    score_bhtm = (key_bhtms @ query_bhts[..., None]).squeeze(-1) * scale_h[:, None, None]
    real_bhtm = found_bhtm >= 0
    weight_bhtm = score_bhtm.masked_fill(~real_bhtm, torch.finfo(score_bhtm.dtype).min).softmax(-1) * real_bhtm
    return (weight_bhtm[..., None, :] @ value_bhtms).squeeze(-2)


def nearest(
    query_bhts: Float[Tensor, "b h t s"],
    keys_bnd: Float[Tensor, "b n d"],
    count_b: Int[Tensor, " b"],
    top_k: int,
) -> Int[Tensor, "b h t m"]:
    """The entries with the greatest products, -1 where a row has fewer than `top_k`."""
    batch, heads, time, size = query_bhts.shape
    place_n = torch.arange(keys_bnd.shape[1], device=keys_bnd.device)
    empty_bn = place_n >= count_b[:, None]
    if len(place_n) <= top_k:
        return place_n.where(~empty_bn, -1)[:, None, None].expand(batch, heads, time, -1)
    keys_bhsn = keys_bnd.unflatten(-1, (heads, size)).permute(0, 2, 3, 1)
    parts = []
    for query in query_bhts.split(max(1, SCORES_AT_ONCE // (batch * heads * len(place_n))), 2):
        score = (query @ keys_bhsn).masked_fill(empty_bn[:, None, None], -torch.inf)
        best, place = score.topk(top_k)
        parts.append(place.masked_fill(best == -torch.inf, -1))
    return torch.cat(parts, 2)


# --- beyond `exact_up_to` --------------------------------------------------------------------------------------------


def check_faiss(size: int, exact_up_to: int) -> None:
    """Raises `ModuleNotFoundError` where a memory of so many entries will need FAISS, which is not installed."""
    if size > exact_up_to and importlib.util.find_spec("faiss") is None:
        raise ModuleNotFoundError(
            f"a memory of {size} entries needs FAISS to search more than exact_up_to={exact_up_to}: "
            "pip install mnemic[faiss], or set exact_up_to to the memory's size"
        )


class Indexes:
    """FAISS's indexes of the latest states that were read, one for each row and head of a tensor of keys.

    They hold what the tensor holds and live as long as it. They are kept by the tensor itself, so that one made of
    other keys is never taken for its index; where it is changed in place, or gone, they are built again.
    """

    def __init__(self, most: int = INDEXES_KEPT) -> None:
        self.most, self.built = most, 0
        self.kept: OrderedDict[int, tuple[weakref.ref[Tensor], tuple[int | None, list[int], int], list[Any]]] = (
            OrderedDict()
        )

    def of(self, keys_bnd: Tensor, counts: list[int], heads: int) -> list[Any]:
        """The indexes of `[row][head]`, in a flat list."""
        # tensors of torch.inference_mode keep no version, and cannot be changed outside it
        mark = (None if keys_bnd.is_inference() else keys_bnd._version, counts, heads)
        name = id(keys_bnd)
        if name in self.kept:
            owner, known, indexes = self.kept[name]
            if owner() is keys_bnd and known == mark:
                self.kept.move_to_end(name)
                return indexes
        indexes = _build(keys_bnd, counts, heads)
        self.built += 1
        self.kept[name] = (weakref.ref(keys_bnd, lambda gone: self._drop(name, gone)), mark, indexes)
        self.kept.move_to_end(name)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return indexes

    def _drop(self, name: int, gone: weakref.ref[Tensor]) -> None:
        if name in self.kept and self.kept[name][0] is gone:
            del self.kept[name]


INDEXES = Indexes()


def _build(keys_bnd: Tensor, counts: list[int], heads: int) -> list[Any]:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{keys_bnd.shape[1]} entries are searched with FAISS, which is not installed: pip install mnemic[faiss], "
            "or raise exact_up_to"
        ) from error
    keys_bhns = keys_bnd.detach().float().cpu().unflatten(-1, (heads, -1)).transpose(1, 2)
    indexes = []
    for keys_hns, count in zip(keys_bhns, counts, strict=True):
        for keys_ns in keys_hns:
            index = faiss.IndexFlatIP(keys_ns.shape[1])
            index.add(keys_ns[:count].contiguous().numpy())
            indexes.append(index)
    return indexes


def nearest_by_faiss(
    query_bhts: Float[Tensor, "b h t s"], keys_bnd: Float[Tensor, "b n d"], count_b: Int[Tensor, " b"], top_k: int
) -> Int[Tensor, "b h t m"]:
    """As `nearest`. Indexes are kept while their keys live, so many reads of one state build them once."""
    heads = query_bhts.shape[1]
    indexes = INDEXES.of(keys_bnd, count_b.tolist(), heads)
    query = query_bhts.detach().float().cpu().flatten(0, 1).contiguous().numpy()
    found = [torch.from_numpy(index.search(part, top_k)[1]) for index, part in zip(indexes, query, strict=True)]
    return torch.stack(found).unflatten(0, (-1, heads)).to(query_bhts.device)


# --- the equations in plain loops ------------------------------------------------------------------------------------


def _naive(memory: KNN, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[Tensor, State]:
    config = memory.config
    size, most = config.dim // config.heads, config.segments * config.segment_length
    parts = [slice(head * size, (head + 1) * size) for head in range(config.heads)]
    outputs, rows, lasts = [], [], []
    for b in range(hidden_btd.shape[0]):
        count = int(state["count"][b])
        entries = [(state["keys"][b, i], state["values"][b, i]) for i in range(count)]
        for token in hidden_btd[b]:
            reads, asked = [], memory.query(memory.norm(token))
            for head, part in enumerate(parts):
                query = asked[part] / torch.dot(asked[part], asked[part]).sqrt()
                scored = [(torch.dot(query, key[part]), value[part]) for key, value in entries]
                scored = sorted(scored, key=lambda pair: -float(pair[0].detach()))[: config.top_k]
                powers = [torch.exp(torch.exp(memory.log_scale[head]) * score) for score, _ in scored]
                read = sum((p / sum(powers) * v for p, (_, v) in zip(powers, scored, strict=True)), 0 * query)
                reads.append(torch.sigmoid(memory.gate[head]) * read)
            outputs.append(token + memory.output(torch.cat(reads)))
        before = state["last"][b] if config.shift else None
        for t, token in enumerate(hidden_btd[b]):
            if keep_bt is None or keep_bt[b, t]:
                token, key = memory.norm(token), memory.key(memory.norm(token))
                if memory.previous is not None and before is not None:
                    key, before = key + before, memory.previous(token)
                units = [key[part] / torch.dot(key[part], key[part]).sqrt() for part in parts]
                entries = [*entries, (torch.cat(units), memory.value(token))][-most:]
        rows.append(entries)
        lasts.append(before)
    longest, nothing = max(map(len, rows)), hidden_btd.new_zeros(config.dim)
    keys, values = (
        torch.stack([torch.stack([entry[i] for entry in row] + [nothing] * (longest - len(row))) for row in rows])
        for i in (0, 1)
    )
    count = torch.tensor([len(row) for row in rows], device=hidden_btd.device)
    after = {"keys": keys, "values": values, "count": count}
    return torch.stack(outputs).view(hidden_btd.shape), after | ({"last": torch.stack(lasts)} if config.shift else {})
