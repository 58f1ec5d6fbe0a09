"""How many pairs does a matrix hold, and does a new value replace the old one? A probe without any training.

Keys are random unit vectors, values come from a codebook of random unit vectors. Pairs are written one after another;
then every key is read, and the answer is the entry of the codebook nearest to what comes back (largest dot product).

- *distinct*: every key is written once, so only capacity matters.
- *rewrites*: four writes for each key, keys drawn with replacement, and the last value counts. A rule that only adds
  gives back a mixture of the values that a key has had. A key that chance never picks is not asked.

Random keys are the worst case: a trained model can place its keys further apart. Nothing here is a sequence of tokens,
so this is no `Task`: what is drawn are vectors, which update rules take without a network around them.

The probe is ours. Schlag et al. 2021 (arXiv 2102.11174) train on key-value retrieval of both kinds, with keys drawn
without and with replacement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from mnemic.tasks.base import generator, seed_of, shuffled

REWRITES = 4
"""Writes for each key, on average, where values are rewritten."""


@dataclass
class Writes:
    """Rows of writes. Write `t` of a row is `keys[order[t]]` with `codebook[values[t]]`, both of that row.

    `order` and `values` are int64, the vectors float32. The integers are the same on every machine, the vectors but for
    the last bit.
    """

    keys: Float[Tensor, "b p d"]
    codebook: Float[Tensor, "b c v"]
    order: Int[Tensor, "b w"]
    values: Int[Tensor, "b w"]

    @property
    def last(self) -> Int[Tensor, "b p"]:
        """Which write each key has had last; -1 for a key never written."""
        return self._last(torch.ones_like(self.order, dtype=torch.bool))

    @property
    def asked(self) -> Bool[Tensor, "b p"]:
        """Keys that were written at all."""
        return self.last >= 0

    @property
    def answer(self) -> Int[Tensor, "b p"]:
        """The value each key has had last, as a place in the codebook; -1 for a key never written."""
        return self._value_at(self.last)

    @property
    def age(self) -> Int[Tensor, "b p"]:
        """How many writes came after each key's last one; meaningless where not `asked`."""
        return self.order.shape[1] - 1 - self.last

    def pairs(self) -> tuple[Float[Tensor, "b w d"], Float[Tensor, "b w v"]]:
        """Keys and values of all writes in their order."""
        return _pick(self.keys, self.order), _pick(self.codebook, self.values)

    def decode(self, read: Float[Tensor, "b p v"]) -> Int[Tensor, "b p"]:
        """The entry of the codebook with the largest dot product: positive factors do not matter."""
        return (read @ self.codebook.mT).argmax(-1)

    def right(self, answers: Int[Tensor, "b p"]) -> Bool[Tensor, " n"]:
        """Whether each asked key has got its last value, in row-major order."""
        return (answers == self.answer)[self.asked]

    def earlier(self, answers: Int[Tensor, "b p"]) -> Bool[Tensor, " n"]:
        """Whether each asked key has got a value that it had before, but not last: what was not overwritten."""
        own = self.order[:, None, :] == torch.arange(self.keys.shape[1])[:, None]
        had = (own & (self.values[:, None, :] == answers[..., None])).any(2)
        return (had & (answers != self.answer))[self.asked]

    def guess(self, seen: Bool[Tensor, "b w"], generator: Generator) -> Int[Tensor, "b p"]:
        """The latest value of each key among the writes that are `seen`; any value where there is none.

        With all seen this is the oracle.
        """
        known = self._value_at(self._last(seen))
        return torch.where(known >= 0, known, torch.randint(self.codebook.shape[1], known.shape, generator=generator))

    def _last(self, seen: Bool[Tensor, "b w"]) -> Int[Tensor, "b p"]:
        rows, writes = self.order.shape
        place = torch.where(seen, torch.arange(writes), -1)
        return torch.full((rows, self.keys.shape[1]), -1).scatter_reduce(1, self.order, place, "amax")

    def _value_at(self, place: Int[Tensor, "b p"]) -> Int[Tensor, "b p"]:
        return torch.where(place >= 0, self.values.gather(1, place.clamp_min(0)), -1)


@dataclass(frozen=True)
class Capacity:
    """The generator. `pairs` is the number of keys, `rewrites` whether each is written four times rather than once."""

    pairs: int = 32
    rewrites: bool = False
    key_width: int = 32
    value_width: int = 32
    codebook: int = 256

    def __post_init__(self) -> None:
        for name in ("pairs", "key_width", "value_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")
        if self.codebook < 2:
            raise ValueError(f"codebook is {self.codebook}; a choice needs at least 2 values")

    @property
    def writes(self) -> int:
        """Writes of a row."""
        return self.pairs * (REWRITES if self.rewrites else 1)

    @property
    def uniform(self) -> float:
        """Score of any value at random."""
        return 1 / self.codebook

    def draw(self, rows: int, generator: Generator) -> Writes:
        """`rows` new rows of writes, each with keys and a codebook of its own."""
        if self.rewrites:
            order = torch.randint(self.pairs, (rows, self.writes), generator=generator)
        else:
            order = shuffled(rows, self.pairs, generator)
        values = torch.randint(self.codebook, (rows, self.writes), generator=generator)
        keys = unit_vectors((rows, self.pairs, self.key_width), generator)
        return Writes(keys, unit_vectors((rows, self.codebook, self.value_width), generator), order, values)

    def examples(self, rows: int, split: str = "test", number: int = 0) -> Writes:
        """Batch `number` of a split: the same whenever it is asked for."""
        return self.draw(rows, generator(seed_of(split, number)))

    def floors(self, rows: int = 200, number: int = 0, recent: int = 8) -> dict[str, float]:
        """What is reached without a matrix, on test rows: a uniform guess, the most frequent value of other rows, the
        last write, the last few, as many drawn evenly; a value that was written, no matter under which key; a value
        that this key has had, no matter when; and the oracle, which sees every write.
        """
        writes, source = self.examples(rows, "test", number), generator(seed_of("test", number) + 1)
        place = torch.arange(self.writes)
        luck = shuffled(rows, self.writes, source)
        asked_values = writes.answer[writes.asked]
        train = self.examples(rows, "train", number)
        frequent = train.answer[train.asked].bincount().argmax()
        own = writes.order[:, None, :] == torch.arange(self.pairs)[:, None]
        chance = torch.rand(rows, self.pairs, self.writes, generator=source, dtype=torch.float64)
        views = {
            "last write": (place >= self.writes - 1).expand(rows, -1),
            f"last {recent} writes": (place >= self.writes - recent).expand(rows, -1),
            f"{recent} writes at random": luck < recent,
            "oracle": torch.ones_like(writes.order, dtype=torch.bool),
        }
        said = {name: writes.guess(seen, source) for name, seen in views.items()}
        said["any value written"] = writes.values.gather(1, chance.argmax(2))
        said["any value of the key"] = writes.values.gather(1, chance.masked_fill(~own, -1).argmax(2))
        scored = {name: writes.right(answers).double().mean().item() for name, answers in said.items()}
        majority = (asked_values == frequent).double().mean().item()
        oracle = scored.pop("oracle")
        return {"uniform": self.uniform, "majority": majority, **scored, "oracle": oracle}

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def unit_vectors(shape: tuple[int, ...], generator: Generator) -> Float[Tensor, "*shape d"]:
    """Directions drawn evenly: normal numbers (Box-Muller, from float64), divided by their length."""
    count = math.prod(shape)
    radius, angle = torch.rand(2, (count + 1) // 2, generator=generator, dtype=torch.float64)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(shape)
    return F.normalize(normal, dim=-1).float()


def _pick(vectors: Float[Tensor, "b n d"], index: Int[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
    return vectors.gather(1, index[..., None].expand(-1, -1, vectors.shape[2]))
