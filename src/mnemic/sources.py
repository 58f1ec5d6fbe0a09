"""Where an answer comes from: which of the tokens that left the window were attended to, in passages of the text.

A memory inside attention gives tokens that were read long ago to the softmax of a block. What they get there, head by
head, is noted within `Session.sources`, and tells which passages an answer was made of. What a head does not need
goes to the first tokens of a stream (attention sinks), which say nothing of that and are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from mnemic.bank import Bank
    from mnemic.history import Log
    from mnemic.host.cache import MemoryLayer
    from mnemic.memory import Further

SINKS = 4
"""The first tokens of a stream, whose attention is nobody's answer."""
RUN = 16
"""Tokens of the shortest passage."""


Noted = Mapping[int, tuple[Tensor, int]]
"""Of each block, by its place among those that are served, the attention `[k, n]` that each head of keys gave to each
position of the stream, float32, summed over so many tokens. Immutable, so a call that fails leaves nothing in it.
"""


@torch.no_grad()
def noted(before: Noted, place: int, weight_kgtn: Float[Tensor, "k g t n"], more: Further, bank: Bank) -> Noted:
    """What was noted `before`, and what tokens attended to in one block: `more`, of this bank, then the window."""
    count, device = more.keys_ktms.shape[2], weight_kgtn.device
    weight_ktm = weight_kgtn[..., :count].mean(1)
    index_ktm = torch.arange(count, device=device)
    if more.chosen_ktc is not None:  # where runs begin
        run = torch.arange(count // more.chosen_ktc.shape[-1], device=device)
        index_ktm = (more.chosen_ktc[..., None] + run).flatten(2).clamp_max(bank.length - 1)
    position_ktm = bank.positions.to(device)[index_ktm].expand_as(weight_ktm)
    size = int(bank.positions[-1]) + 1
    mass_kn, tokens = before.get(place, (weight_ktm.new_zeros(len(weight_ktm), size), 0))
    mass_kn = F.pad(mass_kn, (0, max(0, size - mass_kn.shape[1])))
    mass_kn = mass_kn.scatter_add(1, position_ktm.flatten(1), weight_ktm.flatten(1))
    return {**before, place: (mass_kn, tokens + weight_ktm.shape[1])}


@dataclass
class Sources:
    """What `Session.sources` noted, in passages: there when its block has ended."""

    noted: Noted | None = field(default=None, repr=False)
    log: Log | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)

    def passages(self, count: int = 5) -> list[dict[str, Any]]:
        """At most `count` passages, those first that were attended to most: `first` and `last` position in the stream,
        the `share` of its attention that the head of keys gave it which gave most, and the `text`, None where it was
        not kept (`keep_text`, and a tokenizer).

        Raises:
            RuntimeError: the block of `Session.sources` goes on.
        """
        if self.noted is None:
            raise RuntimeError("answers are still being noted; ask for passages when the block of sources() has ended")
        if not self.noted:
            return []
        size = max(mass.shape[1] for mass, _ in self.noted.values())
        share_hn = torch.cat([F.pad(mass, (0, size - mass.shape[1])) / count for mass, count in self.noted.values()])
        share_hn[:, :SINKS] = 0
        share_u = F.pad(share_hn, (0, -size % RUN)).unflatten(1, (-1, RUN)).sum(2).amax(0).tolist()
        best = sorted(sorted(range(len(share_u)), key=lambda run: -share_u[run])[:count])
        found: list[dict[str, Any]] = []
        for run in (run for run in best if share_u[run] > 0):
            first, last = max(SINKS, run * RUN), min(size, (run + 1) * RUN) - 1
            if found and found[-1]["last"] == first - 1:
                found[-1] |= {"last": last, "share": max(found[-1]["share"], share_u[run])}
            else:
                found.append({"first": first, "last": last, "share": share_u[run]})
        for each in found:
            each["share"], each["text"] = round(each["share"], 4), self._text(each["first"], each["last"])
        return sorted(found, key=lambda each: -each["share"])

    def _text(self, first: int, last: int) -> str | None:
        ids = None if self.log is None else self.log.ids
        part = [] if ids is None else ids[first : last + 1]
        if self.tokenizer is None or not part or min(part) < 0:
            return None
        return self.tokenizer.decode(part, skip_special_tokens=True)


@contextlib.contextmanager
def noting(layer: MemoryLayer, log: Callable[[], Log | None], tokenizer: Any) -> Iterator[Sources]:
    """Within it the calls that `layer` rides are noted; behind it the text is what `log` then has."""
    found, outer = Sources(tokenizer=tokenizer), layer.noted
    layer.noted = {}
    try:
        yield found
    finally:
        found.noted, found.log, layer.noted = layer.noted, log(), outer
