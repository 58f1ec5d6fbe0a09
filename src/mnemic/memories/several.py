"""Several memories on one model, in order, each with its own state.

Each memory reads and writes where it would alone, from and into a state of its own:

    h'     = read_n(... read_1(h))           at a site where several read, in their order
    S_i   <- write_i(h_i, S_i)               h_i what passes the sites that memory i writes, before any read there
    before the window: what the memory inside attention gives, if one of them is

All have one segment length and one window, as segments and keys are the host's. At most one may put memory tokens
beside a segment, or one stand inside attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mnemic.memories.registry import CONFIGS
from mnemic.memory import Asked, Attribution, Card, Further, Memory, MemoryConfig, MemoryTokens, Site
from mnemic.state import State


@dataclass
class SeveralConfig(MemoryConfig):
    """Settings of several memories: those of each, as `to_dict` gives them. `mnemic.attach(model, [a, b])` makes it.

    `segment_length` and `window` are those of all of them.
    """

    kind: ClassVar[str] = "several"
    card: ClassVar[Card] = Card(
        title="Several memories",
        seam="those of each",
        trains="what trains in each",
        bytes_law="the sum",
        paper="a composition, no paper",
        citation="",
    )

    memories: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if wrong := [each for each in self.memories if not isinstance(each, dict)]:
            raise ValueError(f"memories has {wrong[0]!r}; give each as its config's to_dict()")
        if len(self.memories) < 2:
            raise ValueError(f"memories has {len(self.memories)}; several are two at least")
        given = self.configs
        for name in ("segment_length", "window"):
            found = {getattr(config, name) for config in given}
            if len(found) > 1:
                said = " and ".join(map(str, sorted(found, key=str)))
                raise ValueError(
                    f"{name} is {said}; segments and the window are the host's, so give all memories one {name}"
                )
        if any(isinstance(config, SeveralConfig) for config in given):
            raise ValueError("several memories stand among the memories; name each of them instead")
        for name, default in (("segment_length", MemoryConfig.segment_length), ("window", MemoryConfig.window)):
            value, its = getattr(self, name), getattr(given[0], name)
            if value not in (default, its):
                raise ValueError(f"{name} is {value}, and {its} in each of the memories; set it there, or leave it out")
            setattr(self, name, its)
        super().__post_init__()

    def replace(self, **changes: Any) -> SeveralConfig:
        """A copy with some settings changed: of segments and the window, in each of the memories."""
        common = {name: changes.pop(name) for name in ("segment_length", "window") if name in changes}
        if common:
            changes = {"memories": self.memories, **changes}
            changes["memories"] = [settings | common for settings in changes["memories"]]
        return dataclasses.replace(self, **changes | common)

    @property
    def configs(self) -> list[MemoryConfig]:
        """The config of each memory."""
        return [MemoryConfig.from_dict(settings) for settings in self.memories]

    @classmethod
    def of(cls, configs: list[MemoryConfig]) -> SeveralConfig:
        """These memories, in this order."""
        return cls(memories=[config.to_dict() for config in configs])

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """Two between blocks; one of them with one inside attention."""
        emt: Any = {"kind": "emt", "segment_length": 8, "slots": 4, "dim": 16}
        weights = {"kind": "fast-weights", "segment_length": 8, "dim": 16, "heads": 2, "write_layer": 0}
        recall = {"segment_length": 8, "window": 16, "budget": 8, "sinks": 4, "unit": 4, "recall_in_reading": True}
        return [cls(memories=[emt, weights]), cls(memories=[{"kind": "recall", **recall}, {**emt, "window": 16}])]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> SeveralConfig:
        """EMT and fast weights, each in its own small settings."""
        kinds = ("emt", "fast-weights")
        return cls.of([CONFIGS[kind].small(segment_length, width, size) for kind in kinds])

    def build(self, width: int, depth: int, causal: bool = True) -> Several:
        """The module; raises `ValueError` where one of the memories does."""
        return Several([config.build(width, depth, causal) for config in self.configs], width)


class Several(Memory):
    """The module: the memories, `members`; a name in the state begins with the number of its memory."""

    def __init__(self, members: list[Memory], width: int) -> None:
        super().__init__()
        self.members, self.width = nn.ModuleList(members), width
        self.reads = tuple(sorted({site for each in members for site in each.reads}))
        self.writes = tuple(sorted({site for each in members for site in each.writes}))
        beside = [each for each in members if each.beside]
        if len(beside) > 1:
            raise ValueError("two of the memories put tokens beside a segment; at most one can")
        if any(each.writes_inside for each in members):
            raise ValueError("a memory that writes inside attention stands alone")
        inside = [each for each in members if each.attention_reads]
        if len(inside) > 1:
            raise ValueError("two of the memories keep the keys that leave the window; one is enough")
        if inside and beside:
            raise ValueError(
                "one of the memories puts tokens beside a segment, and another keeps keys that leave the window, of "
                "which theirs are none; attach one of them alone"
            )
        self.beside = beside[0].beside if beside else 0
        self.stored = inside[0].stored if inside else "base"
        self.writes_tokens_behind = any(each.writes_tokens_behind for each in members)
        if self.writes_tokens_behind:
            raise ValueError("a memory that writes tokens behind a segment stands alone")
        self.span = next((each.span for each in members if each.span is not None), None)
        self.takes_ids = any(each.takes_ids for each in members)
        reaches = [each.reach for each in members if each.hidden_reads or each.logits_reads or each.beside]
        self.reach = None if None in reaches or not reaches else max(each for each in reaches if each is not None)
        scopes = [each.gradient_reach for each in members]
        self.gradient_reach = None if None in scopes else max(each for each in scopes if each is not None)
        self.reads_own_segment = any(each.reads_own_segment for each in members)
        self.starts_empty = all(each.starts_empty for each in members)
        self.newer = tuple(start + name for start, each in self.all for name in each.newer)

    @property
    def all(self) -> Iterator[tuple[str, Memory]]:
        """The memories, each with what its names in the state begin with."""
        for number, member in enumerate(self.members):
            assert isinstance(member, Memory)
            yield f"{number}.", member

    @property
    def writes_see_reads(self) -> bool:
        """Where it is so for one of them, or one reads below where another one writes."""
        return super().writes_see_reads or any(each.writes_see_reads for _, each in self.all)

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """The state of each, side by side."""
        return {start + name: t for start, each in self.all for name, t in each.init_state(batch, device).items()}

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """h'."""
        return self.read_and_trace(site, hidden_btd, state)[0]

    def read_and_trace(
        self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """h', and what the reads of each leave."""
        traces: State = {}
        for start, each in self.all:
            if site in each.reads:
                hidden_btd, left = each.read_and_trace(site, hidden_btd, own(state, start))
                traces |= {start + name: trace for name, trace in left.items()}
        return hidden_btd, traces

    def mix(
        self, site: Site, logits_btv: Float[Tensor, "b t v"], hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> Float[Tensor, "b t v"]:
        """The logits with what each adds to the distribution."""
        for start, each in self.all:
            if site in each.reads:
                logits_btv = each.mix(site, logits_btv, hidden_btd, own(state, start))
        return logits_btv

    def further(self, site: Site, asked: Asked) -> Further | None:
        """What the one memory inside attention gives."""
        return next((each.further(site, asked) for _, each in self.all if site in each.reads), None)

    def sharing(self, reading: bool) -> int:
        """What the one memory inside attention says."""
        return next((each.sharing(reading) for _, each in self.all if each.attention_reads), 1)

    def tokens_before(self, state: State) -> MemoryTokens | None:
        """Those of the one memory that has any."""
        return next((each.tokens_before(own(state, start)) for start, each in self.all if each.beside), None)

    def write(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> State:
        """The state of each after the segment."""
        after: State = {}
        for start, each in self.all:
            written = each.write(self._of(each, hidden_btd), own(state, start), keep_bt, **each.known(ids_bt))
            after |= {start + name: tensor for name, tensor in written.items()}
        return after

    def write_and_tell(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> tuple[State, Attribution | None]:
        """`write`, and where the first of them that can tell has written."""
        after, told = {}, None
        for start, each in self.all:
            written, found = each.write_and_tell(
                self._of(each, hidden_btd), own(state, start), keep_bt, **each.known(ids_bt)
            )
            after |= {start + name: tensor for name, tensor in written.items()}
            told = found if told is None else told
        return after, told

    def naive(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """That of each, one after another."""
        read_btd, after = hidden_btd[..., : self.width], {}
        for start, each in self.all:
            if each.hidden_reads and each.hidden_reads[0] == self.hidden_reads[0]:
                read_btd, _ = each.naive(
                    torch.cat([read_btd] * len(each.writes), -1), own(state, start), keep_bt, **each.known(ids_bt)
                )
            _, written = each.naive(self._of(each, hidden_btd), own(state, start), keep_bt, **each.known(ids_bt))
            after |= {start + name: tensor for name, tensor in written.items()}
        return read_btd, after

    def auxiliary(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, " b"] | None:
        """The sum of theirs."""
        losses = [each.auxiliary(self._of(each, hidden_btd), own(state, start), keep_bt) for start, each in self.all]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum(0) if found else None

    def calibrate(self, written_nd: Float[Tensor, "n d"], asked_nd: dict[Site, Float[Tensor, "n d"]]) -> None:
        """Each by what it writes and reads."""
        for _, each in self.all:
            asked = {site: hidden for site, hidden in asked_nd.items() if site in each.reads}
            each.calibrate(self._of(each, written_nd), asked)

    def most_bytes(self, written: int) -> int:
        """The sum of theirs."""
        return sum(each.most_bytes(written) for _, each in self.all)

    def rate_scale(self, name: str) -> float:
        """That of the memory whose parameter it is."""
        _, number, rest = name.split(".", 2)
        member = self.members[int(number)]
        assert isinstance(member, Memory)
        return member.rate_scale(rest)

    def check_state(self, state: State, written: int) -> None:
        """What each checks of its own."""
        for start, each in self.all:
            each.check_state(own(state, start), written)

    def _of(self, member: Memory, hidden: Tensor) -> Tensor:
        """Of what is written, joined, what one memory writes."""
        places = [self.writes.index(site) for site in member.writes]
        if len(places) == len(self.writes):
            return hidden
        parts = hidden.unflatten(-1, (len(self.writes), -1)) if self.writes else hidden[..., None, :]
        return parts[..., places, :].flatten(-2)


def own(state: State, start: str) -> State:
    """One memory's part of the state, under its own names."""
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
