"""Multi-query associative recall, MQAR (Arora et al. 2023, "Zoology", https://arxiv.org/abs/2312.04927).

A stream of `length` tokens opens with all pairs of a key and a value; every key then comes once more and asks for its
value, some soon, most of the rest much later. Layout in slots of a key and a value, cut into segments:

    k1 v1 k2 v2 .. kK vK | filler .. k2 [v2] filler .. k1 [v1] .. filler | padding to a whole segment

Rules of the paper. Half of the alphabet are keys (1 .. A/2 - 1), half values (A/2 .. A - 1), both drawn without
replacement, so they are unique within a stream. The slots behind the pairs are numbered g = 1, 2, ..; each key in turn
takes one that is still free, with weight g^(power - 1), power = 0.01: most questions come early. What is left is the
token 0, or random. Published sizes are in `PUBLISHED`, with an alphabet of 8192.

Variants. `gaps="uniform"`: every free slot is equally probable. `rebound`: so many more pairs follow the first, each
with one of the keys at random and a new value; the last value counts. `key_tokens=2`: keys are cells of a square grid,
named by row and column, so neither token alone tells the value.

Ours:

- A random filler has tokens of its own, from A on (`noise` of them). Drawn from the whole alphabet it equals some key
  in about a third of the published streams of 256 tokens and 16 pairs, and what follows it is not that key's value.
- All values of a stream differ, the new ones of re-bound keys too: an old value is never right by chance.
- The asked value stands behind its key, as an answer that is generated does; only it has a label.
- A question may lie in the segment of its pair, when both are near: `extra["segments"]` tells how many segments lie
  between, and `measures` scores the rest apart. `extra["gap"]` is the slot behind the pairs, counted from 0,
  `extra["rewrites"]` how often the key was bound again. The evidence is the last pair of the asked key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Candidates, Examples, Task, TaskCard
from mnemic.unrolling import IGNORED

PUBLISHED: dict[str, tuple[tuple[int, int], ...]] = {
    "train": ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64)),
    "test": ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)),
}
"""The published sizes as (length, pairs), for an alphabet of 8192."""


@dataclass(frozen=True)
class MQAR(Task):
    """`pairs` pairs, then the questions, in `length` tokens that are cut into segments of `segment_length`.

    `alphabet` counts the tokens for fillers, keys and values, `noise` the tokens of a random filler (0: the filler is
    token 0). `gaps` is "power" or "uniform".

    Raises:
        ValueError: settings that do not fit each other.
    """

    name = "mqar"
    card = TaskCard(
        title="Multi-query associative recall",
        asks="Keep many pairs of key and value, and give the value of each key when it comes again.",
        paper="Zoology: Measuring and Improving Recall in Efficient Language Models, https://arxiv.org/abs/2312.04927",
    )
    axis = "pairs"

    length: int = 64
    pairs: int = 4
    segment_length: int = 8
    alphabet: int = 256
    key_tokens: int = 1
    rebound: int = 0
    noise: int = 0
    gaps: str = "power"
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.key_tokens not in (1, 2):
            raise ValueError(f"key_tokens is {self.key_tokens}; keys have 1 or 2 tokens")
        if self.gaps not in ("power", "uniform"):
            raise ValueError(f'gaps is {self.gaps!r}; use "power" or "uniform"')
        if not self.power > 0:
            raise ValueError(f"power is {self.power}; it must be above 0 (published: 0.01)")
        if self.rebound < 0 or self.noise < 0:
            raise ValueError(f"rebound is {self.rebound} and noise is {self.noise}; neither may be below 0")
        if self.alphabet < 10:
            raise ValueError(f"alphabet is {self.alphabet}; keys and values need at least 10 tokens")
        if not 1 <= self.pairs <= self.keys:
            raise ValueError(f"pairs is {self.pairs}; an alphabet of {self.alphabet} has {self.keys} keys, use fewer")
        if self.bindings > self.values:
            raise ValueError(
                f"{self.pairs} pairs and {self.rebound} rebound need as many values; an alphabet of {self.alphabet} "
                f"has {self.values}, raise alphabet="
            )
        if self.segment_length < 1 or self.segment_length % self.width:
            raise ValueError(
                f"segment_length is {self.segment_length}; a pair takes {self.width} tokens and must not be cut, use "
                f"a multiple of {self.width}"
            )
        needed = self.width * (self.bindings + self.pairs)
        if self.length < needed:
            raise ValueError(
                f"length is {self.length}; {self.pairs} pairs, {self.rebound} rebound and {self.pairs} questions take "
                f"{needed} tokens"
            )

    @property
    def width(self) -> int:
        """Tokens of a pair."""
        return self.key_tokens + 1

    @property
    def bindings(self) -> int:
        """Pairs that open a stream."""
        return self.pairs + self.rebound

    @property
    def side(self) -> int:
        """Rows, and columns, of the grid of keys with two tokens: there are at most as many keys as with one."""
        return isqrt(self.alphabet // 2 - 1)

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.alphabet // 2 - 1 if self.key_tokens == 1 else self.side**2

    @property
    def values(self) -> int:
        """How many values there are."""
        return self.alphabet - self.alphabet // 2

    @property
    def vocabulary(self) -> int:
        """The alphabet, then the filler's tokens."""
        return self.alphabet + self.noise

    @property
    def uniform(self) -> float:
        """One of all values."""
        return 1 / self.values

    @property
    def unit(self) -> int:
        """A pair."""
        return self.width

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`[rows, length]` tokens, then padding to a whole segment. Answers are numbered as they are asked."""
        keys = _distinct(rows, self.keys, self.pairs, generator)
        values = _distinct(rows, self.values, self.bindings, generator) + self.alphabet // 2
        again = torch.randint(self.pairs, (rows, self.rebound), generator=generator)
        bound = torch.cat([torch.arange(self.pairs).expand(rows, -1), again], 1)
        every = torch.arange(self.bindings).expand(rows, -1)
        # later pairs have higher numbers, so the highest is the one that counts
        latest = torch.zeros(rows, self.pairs, dtype=torch.long).scatter_reduce(1, bound, every, "amax")
        rewrites = torch.zeros(rows, self.pairs, dtype=torch.long).scatter_add(1, again, torch.ones_like(again))

        gap, order = self._gaps(rows, generator).sort(1)
        latest, rewrites, asked = latest.gather(1, order), rewrites.gather(1, order), keys.gather(1, order)
        slot = torch.cat([every, self.bindings + gap], 1)
        said = torch.cat([self._tokens(keys.gather(1, bound)), self._tokens(asked)], 1)
        said = torch.cat([said, torch.cat([values, values.gather(1, latest)], 1)[..., None]], 2)
        place = slot[..., None] * self.width + torch.arange(self.width)

        total = -(-self.length // self.segment_length) * self.segment_length
        ids = torch.zeros(rows, total, dtype=torch.long)
        if self.noise:
            shape = (rows, self.length)
            ids[:, : self.length] = torch.randint(self.alphabet, self.vocabulary, shape, generator=generator)
        ids.scatter_(1, place.flatten(1), said.flatten(1))
        answers = place[:, self.bindings :, -1]
        numbers = torch.arange(self.pairs).expand(rows, -1)
        return Examples(
            input_ids=ids,
            labels=torch.full_like(ids, IGNORED).scatter_(1, answers, said[:, self.bindings :, -1]),
            answer=torch.full_like(ids, -1).scatter_(1, answers, numbers),
            evidence=(latest * self.width)[..., None],
            facts=torch.full((rows,), self.bindings),
            extra={
                "gap": gap,
                "rewrites": rewrites,
                "segments": answers // self.segment_length - latest * self.width // self.segment_length,
            },
        )

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The value of the last pair with the asked key that is seen, else a value that is not seen in another pair.

        A seen value may have been replaced by one that is not seen; it is still more probable than any other.
        """
        rows, slots = len(ids), ids.shape[1] // self.width
        tokens, shown = (each.unflatten(1, (slots, self.width)) for each in (ids, seen))
        code = self._codes(tokens[..., :-1]).masked_fill(~shown[..., :-1].all(2), self.keys)
        value = tokens[..., -1] - self.alphabet // 2
        pair = (code < self.keys) & shown[..., -1] & (value >= 0) & (value < self.values)
        value = value.masked_fill(~pair, self.values)

        number = torch.arange(slots).expand(rows, -1)
        last = torch.full((rows, self.keys + 1), -1)
        last = last.scatter_reduce(1, code.masked_fill(~pair, self.keys), number.masked_fill(~pair, -1), "amax")
        found = last.gather(1, code).masked_fill(code == self.keys, -1)

        free = torch.ones(rows, self.values + 1, dtype=torch.bool).scatter(1, value, False)[:, :-1]
        order = free.cumsum(1)
        luck = torch.rand(rows, slots, generator=generator, dtype=torch.float64)
        luck = (luck * order[:, -1:]).long() + 1
        lucky = torch.searchsorted(order, luck).clamp(max=self.values - 1)
        said = torch.where(found >= 0, value.gather(1, found.clamp(min=0)), lucky) + self.alphabet // 2
        return torch.where(asked, said.repeat_interleave(self.width, 1), ids)

    def candidates(self, examples: Examples) -> Candidates | None:
        """The values of all pairs but those that earlier questions of the stream have shown: each is asked for once."""
        if self.bindings == 1:
            return None
        values = examples.input_ids[:, : self.bindings * self.width].unflatten(1, (self.bindings, self.width))[..., -1]
        latest = examples.evidence[..., 0] // self.width
        before = torch.ones(self.pairs, self.pairs, dtype=torch.bool).tril(-1)
        # [b, question, pair]: whether the pair's value was the answer to an earlier question
        answered = ((latest[:, :, None] == torch.arange(self.bindings))[:, None] & before[:, :, None]).any(2)
        left = values[:, None].expand_as(answered).masked_fill(answered, -1)
        return Candidates(left.flip(2).flatten(0, 1), self.bindings - 1 - latest.flatten())

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """ "a told value at random": a memory that has all the values of a stream and not whose they are."""
        return {"a told value at random": 1 / self.bindings}

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """ "across segments": the score where the pair lies in an earlier segment than its question. "older value": the
        share of answers that are an earlier value of the same key, where keys were bound again.
        """
        named = {}
        right, across = self.right(predicted, examples), examples.extra["segments"].flatten() > 0
        if bool(across.any()):
            named["across segments"] = right[across].double().mean().item()
        if self.rebound:
            told = examples.input_ids[:, : self.bindings * self.width].unflatten(1, (self.bindings, self.width))
            key = self._codes(told[..., :-1])
            latest = examples.evidence[..., 0] // self.width
            said = predicted.gather(1, examples.place)
            same = key.gather(1, latest)[..., None] == key[:, None]
            older = same & (torch.arange(self.bindings) < latest[..., None])
            named["older value"] = (older & (told[:, None, :, -1] == said[..., None])).any(2).double().mean().item()
        return named

    def text(self, ids: Sequence[int]) -> list[str]:
        """Keys as k1, k2, .. (two-token keys as r1 c1, ..), values as v0, v1, .., fillers as points."""
        return [self._name(token) for token in ids]

    def _name(self, token: int) -> str:
        if token == 0 or token >= self.alphabet:
            return "." if token == 0 else f".{token - self.alphabet}"
        if token >= self.alphabet // 2:
            return f"v{token - self.alphabet // 2}"
        if self.key_tokens == 1:
            return f"k{token}"
        return f"r{token}" if token <= self.side else f"c{token - self.side}"

    def _gaps(self, rows: int, generator: Generator) -> Int[Tensor, "b pairs"]:
        # exponential clocks with rates g^(power - 1): the order in which they ring is a draw without replacement
        free = self.length // self.width - self.bindings
        clocks = -torch.rand(rows, free, generator=generator, dtype=torch.float64).log()
        if self.gaps == "power":
            clocks = clocks * torch.arange(1, free + 1, dtype=torch.float64) ** (1 - self.power)
        return clocks.topk(self.pairs, 1, largest=False).indices

    def _tokens(self, code: Int[Tensor, "b n"]) -> Int[Tensor, "b n k"]:
        if self.key_tokens == 1:
            return code[..., None] + 1
        return torch.stack([code // self.side + 1, code % self.side + 1 + self.side], -1)

    def _codes(self, tokens: Int[Tensor, "b n k"]) -> Int[Tensor, "b n"]:
        # the number of each key, `keys` for what is none
        if self.key_tokens == 1:
            code = tokens[..., 0] - 1
            return code.masked_fill((code < 0) | (code >= self.keys), self.keys)
        row, column = tokens[..., 0] - 1, tokens[..., 1] - 1 - self.side
        inside = (row >= 0) & (row < self.side) & (column >= 0) & (column < self.side)
        return (row * self.side + column).masked_fill(~inside, self.keys)


def _distinct(rows: int, count: int, taken: int, generator: Generator) -> Int[Tensor, "b taken"]:
    return torch.rand(rows, count, generator=generator, dtype=torch.float64).topk(taken, 1).indices
