"""The contract of a mechanism: a config that names it, and a module that reads and writes at sites of a host's forward
pass, over explicit state.

The core does the rest: it cuts every stream into segments, keeps the tokens of an unfinished segment waiting, carries
the state in the cache, and places the hooks. A mechanism knows nothing of Hugging Face.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mnemic.bank import Bank
from mnemic.memories.registry import CONFIGS, Card
from mnemic.memories.settings import defaults, hints, is_a, readable
from mnemic.packing import Stored
from mnemic.state import State, nbytes

At = Literal["input", "attention", "ffn", "output", "logits"]
"""What enters a block, its attention, its feed-forward, what it puts out, and the distribution behind the last one."""


@functools.total_ordering
@dataclass(frozen=True)
class Site:
    """A place in a host's forward pass: block `layer`, counted from 0, and where in it. The earlier one is the smaller.

    At "input" and "output" hidden states pass. At "attention" a memory gives keys and values of its own. At "logits",
    behind the last block, it changes the distribution of the next token, and may write the hidden states that the head
    makes it of. "ffn" is a name: the host serves it with the first mechanism that needs it.
    """

    layer: int
    at: At = "output"

    def __lt__(self, other: Site) -> bool:
        places = get_args(At)
        return (self.layer, places.index(self.at)) < (other.layer, places.index(other.at))

    def __str__(self) -> str:
        return f"{self.at} of block {self.layer}"


@dataclass(frozen=True)
class MemoryTokens:
    """Tokens that a memory puts beside a segment, where the base takes them for its own.

    `embeddings [b, n, d]` stand where those of words do; `keep [b, n]` marks the ones that are there (None for all).
    `inputs` are hidden states `[b, n, d]` that enter some blocks, by index, in place of what the tokens became.
    """

    embeddings: Float[Tensor, "b n d"]
    keep: Bool[Tensor, "b n"] | None = None
    inputs: dict[int, Float[Tensor, "b n d"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What the attention of one block asks a memory for, for tokens of one row.

    `turned_hts` are the queries as the block turned them by their positions `position_t`; the window's oldest key that
    may leave stands at `first`, and the window has `window` keys at most. `bank` has what left it, of this block at
    `place`. `turn(x, position)` puts positions in, and takes them out with `back=True`. `scale` multiplies products.
    `number` says which token of its segment each one is, from 0 on; -1 for padding. While a session is `reading`,
    nobody waits for what the model says. With `chosen_ktc` what was chosen before is wanted again (see `Further`).
    `state` is the row's, of batch size 1, as it stood when the segment began.
    """

    turned_hts: Float[Tensor, "h t s"]
    position_t: Int[Tensor, " t"]
    first: int
    scale: float
    bank: Bank
    place: int
    turn: Callable[..., Tensor]
    window: int
    number: Sequence[int]
    reading: bool = False
    chosen_ktc: Int[Tensor, "k t c"] | None = None
    state: State = field(default_factory=dict)

    @functools.cached_property
    def query_hts(self) -> Float[Tensor, "h t s"]:
        """The queries before any rotation."""
        return self.turn(self.turned_hts, self.position_t, back=True)


@dataclass(frozen=True)
class Further:
    """Keys and values that stand before the window in the softmax of a block, for each head of keys and each token, or
    (`t` is 1, nothing left out) for all tokens alike. `keep_ktm` marks what is there; None for all. `chosen_ktc` says
    where in the bank those tokens are that decide all of it, in their order: of what is held a file has these alone.
    `bias_ktm` is added to the scaled products: a key of bias log n weighs as much as n keys; None for no bias.
    """

    keys_ktms: Float[Tensor, "k t m s"]
    values_ktmv: Float[Tensor, "k t m v"]
    keep_ktm: Bool[Tensor, "k t m"] | None = None
    chosen_ktc: Int[Tensor, "k t c"] | None = None
    bias_ktm: Float[Tensor, "k t m"] | None = None

    @property
    def shared(self) -> bool:
        """Whether all tokens see the same."""
        return self.keys_ktms.shape[1] == 1 and self.keep_ktm is None

    def of(self, token: int) -> Further:
        """What one token sees."""
        one = slice(token, token + 1) if self.keys_ktms.shape[1] > 1 else slice(None)
        return self.map(lambda tensor: tensor[:, one])

    def map(self, function: Callable[[Tensor], Tensor]) -> Further:
        """With every tensor replaced by what `function` makes of it."""
        parts = (getattr(self, each.name) for each in dataclasses.fields(self))
        return Further(*(None if part is None else function(part) for part in parts))  # pyright: ignore


@dataclass(frozen=True)
class Inside:
    """The attention that a memory stands inside of: how many blocks are served, how many heads of queries and of keys
    each has, how wide keys and values are, and by what each block multiplies products. Nothing until it is attached.
    """

    blocks: int = 0
    queries: int = 0
    heads: int = 0
    key_width: int = 0
    value_width: int = 0
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class Leaving:
    """What leaves the window of one row as it ends a segment: keys without their positions, float32, and values of each
    block that is served, the first of which stood at `first`, the others behind it; none where n is 0. The segment
    that ends began at `begins`. `turns[i](x, position)` puts positions in as the i-th of these blocks does. Of the keys
    that stay in the window `stays_lkms` are as they stand there, with positions. Where a session makes its window short
    before its segment ends, `ratio` of the keys that leave are to become one, else it is None.
    """

    keys_lkns: Float[Tensor, "l k n s"]
    values_lknv: Float[Tensor, "l k n v"]
    first: int
    begins: int
    turns: Sequence[Callable[..., Tensor]]
    stays_lkms: Float[Tensor, "l k m s"]
    ratio: float | None = None


@dataclass(frozen=True)
class Attribution:
    """Where a write went, and from which tokens, for whoever looks inside.

    `place [b, n]` numbers the slots, engrams or heads that were written, -1 for none; `share [b, n]` says how much of
    each came with this write, from 0 (nothing) to 1 (all of it); `weight [b, n, t]` how much each token of the segment
    weighed in that, at least 0 and 0 for padding, adding up to 1. `alive [b, m]` are all places that are there after
    the write, -1 for none; None where places never go.
    """

    place: Int[Tensor, "b n"]
    share: Float[Tensor, "b n"]
    weight: Float[Tensor, "b n t"]
    alive: Int[Tensor, "b m"] | None = None


class UnknownSetting(ValueError):
    """A kind of memory or a setting that this release does not have."""


@dataclass
class MemoryConfig(ABC):
    """Settings of a mechanism: plain values (numbers, text, lists of them), each of the type it is declared with.

    `segment_length` is the number of a row's real tokens between two writes. `window` is how many of the latest tokens
    the base itself sees while the memory is trained and used. By default that is one segment in training, so that all
    that is earlier must come through the memory, and in a session as much as `mnemic.attachment.default_window` says.
    """

    kind: ClassVar[str]
    card: ClassVar[Card]

    segment_length: int = 512
    window: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            CONFIGS[cls.kind] = cls

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            if isinstance(value := getattr(self, name), tuple):
                value = list(value)  # which is what a file gives back
                setattr(self, name, value)
            if not is_a(value, hint):
                raise ValueError(f"{name} is {value!r}; use {readable(hint)}")
        for name, mend in self.unused().items():
            if (value := getattr(self, name)) != defaults(type(self))[name]:
                raise ValueError(f"{name} is {value!r}, but nothing here uses it; leave it out, or {mend}")
        if self.segment_length < 1:
            raise ValueError(f"segment_length is {self.segment_length}; a segment needs at least 1 token")
        if self.window is not None and self.window < self.segment_length:
            raise ValueError(
                f"segment_length {self.segment_length} is longer than the window of {self.window}; "
                f"set window to at least {self.segment_length}"
            )

    def unused(self) -> dict[str, str]:
        """The settings that nothing uses beside the others, each with what would give it a use ("set rule='decay'").
        They have to be left at their defaults.
        """
        return {}

    @abstractmethod
    def build(self, width: int, depth: int, causal: bool = True) -> Memory:
        """The module for a host with hidden states of `width` and `depth` blocks, a decoder or (`causal=False`) an
        encoder; raises `ValueError` if it cannot.
        """

    @classmethod
    @abstractmethod
    def tiny(cls) -> list[MemoryConfig]:
        """Small settings, one of each form, for the matrix of invariants (segments of 8, hosts of width 64)."""

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> Self:
        """Settings for comparisons on a small host of `width`. Where the state has a size to choose, `size` chooses it,
        from 1 on, and bytes never fall as it grows; None is the mechanism's own choice. Where there is nothing to
        choose it is ignored.
        """
        return cls(segment_length=segment_length)

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the kind, as written to `memory_config.json`."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MemoryConfig:
        """The inverse of `to_dict`. A setting that is not there has its default.

        Raises:
            UnknownSetting: a kind or settings that are not known.
            ValueError: values that cannot be.
        """
        cls, settings = _known(values)
        return cls(**settings)

    @staticmethod
    def from_file(values: Mapping[str, Any]) -> MemoryConfig:
        """`from_dict` for what was written once: earlier releases let settings stand that nothing used, which are left
        out here.
        """
        cls, settings = _known(values)
        raw = object.__new__(cls)
        vars(raw).update(defaults(cls) | settings)
        unused = raw.unused()
        for name in unused.keys() & settings.keys():  # left out, but not taken on trust
            if not is_a(settings[name], hints(cls)[name]):
                raise ValueError(f"{name} is {settings[name]!r}; use {readable(hints(cls)[name])}")
        return cls(**{name: value for name, value in settings.items() if name not in unused})

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)


class Memory(nn.Module, ABC):
    """A recurrent layer over segments of hidden states, with its state outside itself.

    `read` is called at every site of `reads` where hidden states pass, on tokens of one segment, with the state as it
    stood at that segment's start. `write` is called once at a segment's end with the hidden states that passed the
    `writes` (before any read there), and returns the next state. Both are pure: nothing is kept on the module.
    """

    reads: tuple[Site, ...]
    """Where the memory reads, in order. At an "attention" site it is asked by `further`, and the keys and values that
    leave the window there are kept for it, unless it writes there; at "logits" it is asked by `mix`.
    """
    writes: tuple[Site, ...]
    """The sites whose hidden states `write` gets, in order, joined along d. The write happens at the last of them. At
    "attention" sites these are the queries of the segment's tokens without positions, heads joined along d: then the
    write happens when keys leave the window, and `write` gets those of each row as `leaving=`.
    """
    beside: int = 0
    """The most memory tokens that stand beside a segment, before and behind it. With any, a memory alters what the base
    puts out from the start, and the base keeps its keys in a `MemoryCache`, whatever cache it is given.
    """
    writes_tokens_behind: bool = False
    """True where `write` gets the hidden states of the tokens behind the segment instead of the segment's own."""
    takes_ids: bool = False
    """True where the memory has to know which tokens are written. Then `write`, `write_and_tell` and `naive` get their
    ids `[b, t]` as `ids_bt=`, and calls without `input_ids` are refused.
    """
    span: int | None = None
    """How many keys a token sees at most, its own among them; None for all that are there."""
    reach: int | None = None
    """How many segments back a write can still be read; None for no bound."""
    gradient_reach: int | None = None
    """Through how many writes a gradient can pass; None for no bound."""
    reads_own_segment: bool = False
    """True where reads after the write see what the running segment wrote: encoders, which look both ways."""
    starts_empty: bool = False
    """True where a new stream has nothing to read: its first segment is the base's own and trains nothing."""
    stored: Stored = "base"
    """How the keys and values that are kept for it are stored: as the base gives them, or packed (`mnemic.packing`)."""
    newer: tuple[str, ...] = ()
    """Names of the state that files of earlier releases do not have: they go on as in a new stream."""
    inside: Inside = Inside()
    """The attention that it stands inside of, as the host found it."""
    place: Tensor
    """An empty tensor where the memory computes, in its dtype: for memories without parameters too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)

    @abstractmethod
    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """The state of `batch` new streams: values in float32, bookkeeping in integers, first dimension `batch`.

        Other dimensions may grow with what is written, if they are 0 here; zeros in what they grow by must mean
        "nothing there".
        """

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """The hidden states at `site` with what the memory adds; same shape and dtype. To be written by whoever has
        `hidden_reads`; else they are as they came.
        """
        return hidden_btd

    def read_and_trace(
        self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """`read`, and what it leaves behind for the segment's write: for some names of the state values `[b, t, ...]`,
        which the core sums over real tokens and adds to the state. Only where `writes_see_reads`.
        """
        return self.read(site, hidden_btd, state), {}

    def mix(
        self, site: Site, logits_btv: Float[Tensor, "b t v"], hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> Float[Tensor, "b t v"]:
        """The logits at `site`, a "logits" site of `reads`, with what the memory adds to the distribution; same shape
        and dtype. `hidden_btd` are the hidden states behind the last block that the head made them of.
        """
        return logits_btv

    def further(self, site: Site, asked: Asked) -> Further | None:
        """What the attention at `site`, one of `reads`, sees before the window; None for nothing."""
        return None

    def sharing(self, reading: bool) -> int:
        """How many tokens, one behind another, share what `further` gives to the first of them, whose number in its
        segment is a multiple of this. It is asked for that one alone, and the core holds what it gave for the others,
        until the segment ends.
        """
        return 1

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """The memory tokens before a segment that begins with `state`; every token of the segment sees them."""
        return None

    def tokens_behind(self, state: State) -> MemoryTokens | None:
        """The memory tokens behind a segment that began with `state`; they see it and what stands before it."""
        return None

    @abstractmethod
    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """The state after a segment; tokens where `keep_bt` is False are padding and leave no trace.

        `hidden_btd` has what passed the `writes`, joined along d where there are several.
        """

    @abstractmethod
    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """`read` at the first site where it reads, then `write`, as plain loops over the equations: the tests' oracle.

        Where it reads nothing, the first result is the hidden states as they came; where several sites are written, it
        is the read of the first one's.
        """

    def auxiliary(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, " b"] | None:
        """A loss of the memory's own for each row, of what a `write` with the same arguments does; None for none.

        `train` adds its mean over rows and segments to the task's loss. It is asked for every segment that training
        reads, also where gradients do not reach through the memory.
        """
        return None

    def write_and_tell(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[State, Attribution | None]:
        """`write`, and where it went; None for the latter where a mechanism cannot tell.

        Sessions ask so, without a gradient, in place of `write`. It should cost little more.
        """
        return self.write(hidden_btd, state, keep_bt), None

    def calibrate(self, written_nd: Float[Tensor, "n d"], asked_nd: dict[Site, Float[Tensor, "n d"]]) -> None:
        """Fits what does not train to the host's hidden states, as `write` gets them and at each site where it reads.

        Does nothing unless a mechanism has something to fit. See `mnemic.calibrate`.
        """

    def most_bytes(self, written: int) -> int:
        """The law of a stream's size: most bytes of its state after `written` segments. Constant by default."""
        return nbytes(self.init_state(1))

    def rate_scale(self, name: str) -> float:
        """How much faster than the learning rate the parameter `name` learns in `mnemic.train`."""
        return 1.0

    def check_state(self, state: State, written: int) -> None:
        """Raises `StateError` for numbers that `written` writes do not make, in one row of a state of the right shapes:
        counts beyond a table, places that are not there. For files from elsewhere; by default nothing is checked.
        """

    def known(self, ids_bt: Int[Tensor, "b t"] | None, leaving: Sequence[Leaving] | None = None) -> dict[str, Any]:
        """What `write` gets beside hidden states, by name: the ids of a segment's tokens where the memory takes them,
        and what leaves the window of each row where it writes inside attention (None without a window).
        """
        ids = {"ids_bt": ids_bt} if self.takes_ids else {}
        return ids | ({"leaving": leaving} if self.writes_inside else {})

    @property
    def hidden_reads(self) -> tuple[Site, ...]:
        """The sites where `read` is called."""
        return tuple(site for site in self.reads if site.at not in ("attention", "logits"))

    @property
    def attention_reads(self) -> tuple[Site, ...]:
        """The sites where `further` is called."""
        return tuple(site for site in self.reads if site.at == "attention")

    @property
    def logits_reads(self) -> tuple[Site, ...]:
        """The sites where `mix` is called."""
        return tuple(site for site in self.reads if site.at == "logits")

    @property
    def writes_inside(self) -> bool:
        """Whether it writes inside attention: then it writes and reads nowhere else."""
        return any(site.at == "attention" for site in self.writes)

    @property
    def keeps(self) -> bool:
        """Whether the keys and values that leave the window are kept for it as they are, in the stream's bank."""
        return bool(self.attention_reads) and not self.writes_inside

    @property
    def writes_see_reads(self) -> bool:
        """True when what is written depends on what was read in the same segment, so that segments can only run one
        after another: it reads before it writes, or memory tokens stand beside the segment.
        """
        return self.beside > 0 or any(site < self.writes[-1] for site in self.hidden_reads if self.writes)

    def parameter_dtype(self) -> torch.dtype:
        """The dtype the memory computes in; its state is float32 whatever this is."""
        return next(self.parameters(), self.place).dtype  # parameters': FSDP2 lowers theirs and leaves buffers be


def _known(values: Mapping[str, Any]) -> tuple[type[MemoryConfig], dict[str, Any]]:
    """The class that a description names, and its settings, of which it knows every one."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise UnknownSetting(f"unknown memory kind {kind!r}; known: {', '.join(sorted(CONFIGS))}")
    cls, settings = CONFIGS[kind], {name: value for name, value in values.items() if name != "kind"}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(settings.keys() - known):
        raise UnknownSetting(f"{cls.__name__} has no setting {', '.join(unknown)}; known: {sorted(known)}")
    return cls, settings
