"""Where an answer comes from: which of the tokens that left the window were attended to, in passages of the text.

A memory inside attention gives tokens that were read long ago to the softmax of a block. What they get there, head by
head, is noted while `Session.sources` stands, and tells which passages an answer was made of. What a head does not need
goes to the first tokens of a stream (attention sinks), which say nothing of that and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mnemic.bank import Bank
    from mnemic.history import Log
    from mnemic.memory import Further

SINKS = 4
"""The first tokens of a stream, whose attention is nobody's answer."""
RUN = 16
"""Tokens of the shortest passage."""


@dataclass
class Sources:
    """The attention that kept tokens got, as `note` was told: of each block, by its place among those that are served,
    `mass[place] [k, n]` of each head of keys and position of the stream, summed over `tokens[place]` tokens.
    """

    mass: dict[int, Tensor] = field(default_factory=dict, repr=False)
    tokens: dict[int, int] = field(default_factory=dict, repr=False)
    log: Log | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)

    @torch.no_grad()
    def note(self, place: int, weight_kgtn: Tensor, more: Further, bank: Bank) -> None:
        """Adds what tokens attended to in one block: `more`, of this bank, and then the window."""
        count, device = more.keys_ktms.shape[2], weight_kgtn.device
        weight_ktm = weight_kgtn[..., :count].mean(1)
        index_ktm = torch.arange(count, device=device)
        if more.chosen_ktc is not None:  # where runs begin
            run = torch.arange(count // more.chosen_ktc.shape[-1], device=device)
            index_ktm = (more.chosen_ktc[..., None] + run).flatten(2).clamp_max(bank.length - 1)
        position_ktm = bank.positions.to(device)[index_ktm].expand_as(weight_ktm)
        size, before = int(bank.positions[-1]) + 1, self.mass.get(place)
        if before is None:
            before = weight_ktm.new_zeros(len(weight_ktm), size)
        mass_kn = F.pad(before, (0, max(0, size - before.shape[1])))
        mass_kn.scatter_add_(1, position_ktm.flatten(1), weight_ktm.flatten(1))
        self.mass[place] = mass_kn
        self.tokens[place] = self.tokens.get(place, 0) + weight_ktm.shape[1]

    def passages(self, count: int = 5) -> list[dict[str, Any]]:
        """At most `count` passages, those first that were attended to most: `first` and `last` position in the stream,
        the `share` of its attention that the head of keys gave it which gave most, and the `text`, None where it was
        not kept (`keep_text`, and a tokenizer).
        """
        if not self.mass:
            return []
        size = max(mass.shape[1] for mass in self.mass.values())
        share_hn = torch.cat(
            [F.pad(mass, (0, size - mass.shape[1])) / self.tokens[at] for at, mass in self.mass.items()]
        )
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
