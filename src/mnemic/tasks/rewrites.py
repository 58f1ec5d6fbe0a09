"""Associative retrieval, with and without rewrites (ARMT, https://arxiv.org/abs/2407.04841), and pairs embedded in
random text (GradMem, https://arxiv.org/abs/2603.13875).

*Rewrites.* Keys are `key_length` and values `value_length` symbols of 16. A stream tells `pairs` pairs, one a segment,
and asks for the value of one key:

    [key, SEP, value, EOS | key, SEP, value, EOS | ... | key, GEN, value, EOS]

With `rewrite=False` all keys differ, and one of the pairs is asked for. With `rewrite=True` keys are drawn with
repetition from a pool of `keys` (drawn for each stream among all that can be spelt), one of the different keys that
came is asked for, each equally likely, and its last value is right: a memory must overwrite. The published training
goes through `CURRICULUM`, every stage from the one before, and the measurement beyond it, to 200 pairs and more.

The paper takes the loss over the last `value_length + 2` tokens: GEN, value and EOS. Here only the value has labels.
GEN and EOS are certain from their places, so they would add to the loss what no memory is needed for, and exact match
is over the value in either case. The paper's ids of SEP, GEN and EOS are 100, 101 and 102, ours follow the symbols. A
pool smaller than all keys is ours, too: with 256 keys and few pairs hardly one is rewritten.

*Embedded.* Segments of random letters and digits end in `|`; pairs `!K:V!` of different keys stand anywhere in them.
The last segment is `?!K:V!|`, and V has labels. Published segments have 32 to 64 characters; here all of a stream have
`segment_length`, so that a segment is what the model sees at a time, and padding follows the question. In the published
text random characters may spell a key; here they never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Candidates, Examples, Task, TaskCard
from mnemic.unrolling import IGNORED

CURRICULUM = (1, 2, 3, 5, 10, 20, 30, 40, 50)
"""Numbers of pairs that ARMT is trained on, one after another."""

SYMBOLS = 16
"""Symbols of keys and values are the tokens 0 .. 15."""

SEP, GEN, EOS = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2


def distinct(rows: int, count: int, size: int, generator: Generator) -> Int[Tensor, "b n"]:
    """`count` different numbers of `0 .. size - 1` in each row, in random order; every choice is equally likely."""
    if 8 * count > size:
        # float64 and a stable sort: the order is the same on every machine
        luck = torch.rand(rows, size, generator=generator, dtype=torch.float64)
        return luck.argsort(dim=1, stable=True)[:, :count]
    # a number that came before is drawn anew; no number is treated unlike another, so what comes out is uniform
    drawn = torch.randint(size, (rows, count), generator=generator)
    while True:
        order = drawn.argsort(dim=1, stable=True)
        ordered = drawn.gather(1, order)
        again = torch.zeros_like(drawn, dtype=torch.bool)
        again.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        if not again.any():
            return drawn
        drawn[again] = torch.randint(size, (int(again.sum()),), generator=generator)


def spelt(numbers: Int[Tensor, "*n"], length: int, base: int) -> Int[Tensor, "*n length"]:
    """Digits of numbers, the highest first."""
    power = base ** torch.arange(length - 1, -1, -1)
    return numbers[..., None] // power % base


def numbers(digits: Int[Tensor, "*n length"], base: int) -> Int[Tensor, "*n"]:
    """Numbers from their digits, the highest first."""
    return (digits * base ** torch.arange(digits.shape[-1] - 1, -1, -1)).sum(-1)


@dataclass(frozen=True)
class RewritesTask(Task):
    """`pairs` pairs in as many segments, one question. Keys repeat with `rewrite`, out of `keys` a stream (all that can
    be spelt by default: 16 with one symbol). Without it a memory must hold as many facts as there are pairs.

    `extra["age"]` is the number of segments since the pair that is asked for was last written (1 for the one before the
    question), `extra["rewrites"]` how often its value was replaced.

    Raises:
        ValueError: a number below 1, more different keys than can be spelt, or `keys` without `rewrite`.
    """

    pairs: int = 10
    key_length: int = 1
    value_length: int = 2
    rewrite: bool = True
    keys: int | None = None

    name = "rewrites"
    axis = "pairs"
    card = TaskCard(
        title="Associative retrieval with rewrites",
        asks="Store one pair of key and value a segment, replace the value of a key that comes again, and recall one.",
        paper="Associative Recurrent Memory Transformer, https://arxiv.org/abs/2407.04841",
    )

    def __post_init__(self) -> None:
        for name in ("pairs", "key_length", "value_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if max(self.key_length, self.value_length) > 8:
            raise ValueError(f"key_length is {self.key_length} and value_length {self.value_length}; use 8 or less")
        spellable = SYMBOLS**self.key_length
        if self.keys is not None and not self.rewrite:
            raise ValueError(f"keys is {self.keys}, but no key comes twice; set rewrite=True")
        if self.keys is not None and not 1 <= self.keys <= spellable:
            raise ValueError(f"keys is {self.keys}; use 1 .. {spellable} with keys of {self.key_length} symbols")
        if not self.rewrite and self.pairs > spellable:
            raise ValueError(
                f"pairs is {self.pairs}, but there are {spellable} keys of {self.key_length} symbols; use a larger "
                "key_length"
            )

    @property
    def segment_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A pair with its marks."""
        return self.key_length + self.value_length + 2

    @property
    def vocabulary(self) -> int:
        """The symbols, SEP, GEN and EOS."""
        return SYMBOLS + 3

    @property
    def uniform(self) -> float:
        """Any value."""
        return float(SYMBOLS) ** -self.value_length

    @property
    def unit(self) -> int:
        """A segment: a part of a pair is of no use."""
        return self.segment_length

    def text(self, ids: Sequence[int]) -> list[str]:
        """Symbols as hexadecimal digits."""
        return [{SEP: "SEP", GEN: "GEN", EOS: "EOS"}.get(token, f"{token:x}") for token in ids]

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """Streams of `pairs + 1` segments."""
        pairs, spellable = self.pairs, SYMBOLS**self.key_length
        if self.rewrite:
            pool = spellable if self.keys is None else self.keys
            keys = torch.randint(pool, (rows, pairs), generator=generator)
            if pool < spellable:
                keys = distinct(rows, pool, spellable, generator).gather(1, keys)
        else:
            keys = distinct(rows, pairs, spellable, generator)
        values = torch.randint(SYMBOLS**self.value_length, (rows, pairs), generator=generator)
        # every key that came has one last write: a uniform choice among these is one among the keys
        order = keys.argsort(dim=1, stable=True)
        ordered = keys.gather(1, order)
        final = torch.ones_like(keys, dtype=torch.bool)
        final.scatter_(1, order[:, :-1], ordered[:, 1:] != ordered[:, :-1])
        luck = torch.rand(rows, pairs, generator=generator, dtype=torch.float64)
        asked = torch.where(final, luck, -1.0).argmax(1, keepdim=True)

        length, start = self.segment_length, self.key_length + 1
        segments = torch.full((rows, pairs + 1, length), EOS)
        segments[:, :, : self.key_length] = spelt(torch.cat([keys, keys.gather(1, asked)], 1), self.key_length, SYMBOLS)
        segments[:, :, self.key_length] = SEP
        segments[:, -1, self.key_length] = GEN
        segments[:, :, start:-1] = spelt(torch.cat([values, values.gather(1, asked)], 1), self.value_length, SYMBOLS)
        ids = segments.flatten(1)
        labels, answer = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        first = pairs * length + start
        here = slice(first, first + self.value_length)
        labels[:, here], answer[:, here] = ids[:, here], 0
        rewrites = (keys == keys.gather(1, asked)).sum(1, keepdim=True) - 1
        return Examples(
            input_ids=ids,
            labels=labels,
            answer=answer,
            evidence=(asked * length)[:, :, None],
            facts=torch.full((rows,), pairs),
            extra={"age": pairs - asked, "rewrites": rewrites},
        )

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The last value of the key that is seen; what is not seen of it at random."""
        said = torch.randint(SYMBOLS, ids.shape, generator=generator)
        told, wanted = self._told(ids, seen)
        last = torch.where(wanted, torch.arange(wanted.shape[1]), -1).amax(1)
        return self._say(said, told, last, ids, seen)

    def _told(self, ids: Tensor, seen: Tensor) -> tuple[Int[Tensor, "b s l"], Bool[Tensor, "b s"]]:
        """The stream as segments, and which of them are seen to tell the key of the last one."""
        segments, visible = (each.unflatten(1, (-1, self.segment_length)) for each in (ids, seen))
        length = self.key_length
        known = visible[:, :, : length + 1].all(2)
        same = (segments[:, :, :length] == segments[:, -1:, :length]).all(2)
        wanted = same & known & known[:, -1:] & (segments[:, :, length] == SEP)
        return segments, wanted

    def _say(self, said: Tensor, told: Tensor, which: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
        """The values of segments `which [b]` in the answer's place, where there is one (not -1) and it is seen."""
        row, start = torch.arange(len(ids)), self.key_length + 1
        value = told[row, which.clamp(min=0), start:-1]
        visible = seen.unflatten(1, (-1, self.segment_length))[row, which.clamp(min=0), start:-1]
        here = slice(ids.shape[1] - self.value_length - 1, ids.shape[1] - 1)
        said[:, here] = torch.where(visible & (which >= 0)[:, None], value, said[:, here])
        return said

    def candidates(self, examples: Examples) -> Candidates | None:
        """The values of all pairs."""
        if self.pairs == 1:
            return None
        segments = examples.input_ids.unflatten(1, (-1, self.segment_length))[:, :-1, self.key_length + 1 : -1]
        return Candidates(numbers(segments, SYMBOLS).flip(1), examples.extra["age"][:, 0] - 1)

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """Memories that lack one thing: which value belongs to the key ("a told value"), and with `rewrite` that the
        last value counts ("a value of the key", at random, and the "first value of the key").
        """
        ids, seen = examples.input_ids.masked_fill(examples.asked, 0), ~examples.asked
        told, wanted = self._told(ids, seen)
        chance = torch.rand(wanted.shape, generator=luck, dtype=torch.float64)
        chosen = {"a told value": chance[:, :-1].argmax(1)}
        if self.rewrite:
            chosen |= {
                "a value of the key": torch.where(wanted, chance, -1.0).argmax(1),
                "first value of the key": wanted.long().argmax(1),
            }
        made = {name: self._say(ids.clone(), told, which, ids, seen) for name, which in chosen.items()}
        return {name: self.score(said, examples) for name, said in made.items()}

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Where the answers come from, as shares of all: "last" value of the key, an "earlier" one, that of "another"
        key, or "never" told. Exact match for keys "written once" and "rewritten", and the newer and the older half of
        the pairs, where there are any.
        """
        told, wanted = self._told(examples.input_ids, torch.ones_like(examples.asked))
        start = self.key_length + 1
        said = predicted[:, -self.value_length - 1 : -1]
        same = (told[:, :-1, start:-1] == said[:, None]).all(2)
        right = self.right(predicted, examples)
        earlier = ~right & (same & wanted[:, :-1]).any(1)
        another = ~right & ~earlier & same.any(1)
        never = ~right & ~earlier & ~another
        shares = {"last": right, "earlier": earlier, "another": another, "never": never}
        age, rewrites = examples.extra["age"][:, 0], examples.extra["rewrites"][:, 0]
        groups = {
            "written once": rewrites == 0,
            "rewritten": rewrites > 0,
            "newer half": age <= self.pairs // 2,
            "older half": age > self.pairs // 2,
        }
        groups = {name: group for name, group in groups.items() if bool(group.any())}
        return {
            **{name: share.double().mean().item() for name, share in shares.items()},
            **{f"exact match, {name}": right[group].double().mean().item() for name, group in groups.items()},
        }


# --- embedded --------------------------------------------------------------------------------------------------------

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
"""Keys, values and filler are the tokens 0 .. 61."""

BANG, COLON, BAR, ASK, PAD = range(len(CHARACTERS), len(CHARACTERS) + 5)
"""The marks `!`, `:`, `|` and `?`, and what follows the question."""


@dataclass(frozen=True)
class EmbeddedTask(Task):
    """`pairs` pairs of different keys at random places of `segments` segments of random characters (by default as many
    as make four pairs a segment), one question.

    `extra["age"]` is the number of segments since the pair that is asked for.

    Raises:
        ValueError: a number below 1, more keys than random text can avoid, or pairs that do not fit.
    """

    pairs: int = 16
    segments: int | None = None
    segment_length: int = 64
    key_length: int = 2
    value_length: int = 2

    name = "embedded"
    axis = "pairs"
    card = TaskCard(
        title="Pairs embedded in random characters",
        asks="Find the pairs of key and value in random text, store them, and recall the value of one key.",
        paper="GradMem, https://arxiv.org/abs/2603.13875",
    )

    def __post_init__(self) -> None:
        if self.segments is not None and self.segments < 1:
            raise ValueError(f"segments is {self.segments}; use 1 or more, or None")
        for name in ("pairs", "key_length", "value_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if max(self.key_length, self.value_length) > 8:
            raise ValueError(f"key_length is {self.key_length} and value_length {self.value_length}; use 8 or less")
        most = len(CHARACTERS) ** self.key_length // 8
        if self.pairs > most:
            raise ValueError(f"pairs is {self.pairs}; use 1 .. {most}, or a key_length above {self.key_length}")
        question = self.key_length + self.value_length + 5
        if self.segment_length < question:
            raise ValueError(f"segment_length is {self.segment_length}; the question needs {question} tokens")
        if self.pairs > self._room * self.segment_count:
            raise ValueError(
                f"pairs is {self.pairs}; {self.segment_count} segments of {self.segment_length} hold "
                f"{self._room * self.segment_count}, use more segments"
            )

    @property
    def segment_count(self) -> int:
        """Segments before the question."""
        return -(-self.pairs // min(4, max(1, self._room))) if self.segments is None else self.segments

    @property
    def _size(self) -> int:
        """Tokens of `!K:V!`."""
        return self.key_length + self.value_length + 3

    @property
    def _room(self) -> int:
        """Pairs that a segment can hold."""
        return (self.segment_length - 1) // self._size

    @property
    def vocabulary(self) -> int:
        """62 characters, four marks, padding."""
        return PAD + 1

    @property
    def uniform(self) -> float:
        """Any value."""
        return float(len(CHARACTERS)) ** -self.value_length

    @property
    def unit(self) -> int:
        """A segment: a pair may begin anywhere in one, and a part of it is of no use."""
        return self.segment_length

    def text(self, ids: Sequence[int]) -> list[str]:
        """The characters."""
        return [CHARACTERS[token] if token < BANG else ["!", ":", "|", "?", "<pad>"][token - BANG] for token in ids]

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """Streams of `segment_count + 1` segments."""
        pairs, count, length, size = self.pairs, self.segment_count, self.segment_length, self._size
        symbols = len(CHARACTERS)
        keys = spelt(distinct(rows, pairs, symbols**self.key_length, generator), self.key_length, symbols)
        values = torch.randint(symbols, (rows, pairs, self.value_length), generator=generator)
        place = self._places(rows, generator)
        mark = keys.new_full((rows, pairs, 1), BANG)
        told = torch.cat([mark, keys, torch.full_like(mark, COLON), values, mark], 2)

        ids = torch.randint(symbols, (rows, count * length), generator=generator)
        ids[:, length - 1 :: length] = BAR
        where = (place[:, :, None] + torch.arange(size)).flatten(1)
        ids.scatter_(1, where, told.flatten(1))
        free = torch.ones_like(ids, dtype=torch.bool).scatter_(1, where, False)
        free[:, length - 1 :: length] = False
        self._clear(ids, free, keys, generator)

        asked = torch.randint(pairs, (rows, 1), generator=generator)
        last = torch.full((rows, length), PAD)
        last[:, 0], last[:, size + 1] = ASK, BAR
        last[:, 1 : size + 1] = told[torch.arange(rows), asked[:, 0]]
        ids = torch.cat([ids, last], 1)
        labels, answer = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        first = count * length + self.key_length + 3
        here = slice(first, first + self.value_length)
        labels[:, here], answer[:, here] = ids[:, here], 0
        evidence = place.gather(1, asked)
        return Examples(
            input_ids=ids,
            labels=labels,
            answer=answer,
            evidence=evidence[:, :, None],
            facts=torch.full((rows,), pairs),
            extra={"age": count - evidence // length},
        )

    def _places(self, rows: int, generator: Generator) -> Int[Tensor, "b pairs"]:
        """Where the pairs begin: in each segment every arrangement that fits is equally likely."""
        count, length, size = self.segment_count, self.segment_length, self._size
        cells = distinct(rows, self.pairs, count * self._room, generator) // self._room
        held = torch.zeros(rows, count, dtype=torch.long).scatter_add_(1, cells, torch.ones_like(cells))
        # a segment is a row of items, pairs and single characters; which items are pairs is drawn
        items = length - 1 - (size - 1) * held[:, :, None]
        luck = torch.rand(rows, count, length - 1, generator=generator, dtype=torch.float64)
        luck = torch.where(torch.arange(length - 1) < items, luck, 2.0)
        most = luck.sort(2).values.gather(2, (held[:, :, None] - 1).clamp(min=0))
        is_pair = (luck <= most) & (held[:, :, None] > 0)
        start = torch.arange(length - 1) + (size - 1) * (is_pair.cumsum(2) - is_pair.long())
        start = start + length * torch.arange(count)[:, None]
        # places in order of the stream; the keys' order is random already
        return start[is_pair].view(rows, self.pairs)

    def _clear(self, ids: Tensor, free: Tensor, keys: Tensor, generator: Generator) -> None:
        """Draw filler anew, in place, until none of it spells a key."""
        length, symbols = self.key_length, len(CHARACTERS)
        power = symbols ** torch.arange(length - 1, -1, -1)
        if ids.shape[1] < length:
            return
        total = ids.shape[1]
        filler = F.pad(free.unfold(1, length, 1).all(2), (0, length - 1)).flatten()
        # keys of every row as numbers of their own, so that one search serves all rows
        shift = symbols**length * torch.arange(len(ids))
        names = ((keys * power).sum(2) + shift[:, None]).flatten().sort().values
        flat, begins = ids.view(-1), filler.nonzero()[:, 0]
        inside, around = torch.arange(length), torch.arange(1 - length, length)
        while True:
            spells = (flat[begins[:, None] + inside] * power).sum(1) + shift[begins // total]
            bad = begins[names[torch.searchsorted(names, spells).clamp(max=len(names) - 1)] == spells]
            if not len(bad):
                return
            redo = (bad[:, None] + inside).flatten().unique()
            flat[redo] = torch.randint(symbols, (len(redo),), generator=generator)
            # only what overlaps the new characters can have become a key
            begins = (bad[:, None] + around).flatten().unique()
            begins = begins[(begins >= 0) & (begins < len(flat))]
            begins = begins[filler[begins]]

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The value behind `!K:` where that is seen; what is not seen of it at random."""
        said = torch.randint(len(CHARACTERS), ids.shape, generator=generator)
        start = ids.shape[1] - self.segment_length
        head = self.key_length + 2
        question = ids[:, None, start + 1 : start + 1 + head]
        window, visible = (each[:, :start].unfold(1, head, 1) for each in (ids, seen))
        known = seen[:, start + 1 : start + 1 + head].all(1, keepdim=True)
        found = (window == question).all(2) & visible.all(2) & known
        place = found.long().argmax(1, keepdim=True)
        value = (place + head + torch.arange(self.value_length)).clamp(max=start - 1)
        here = slice(start + 1 + head, start + 1 + head + self.value_length)
        told = seen.gather(1, value) & found.any(1, keepdim=True)
        said[:, here] = torch.where(told, ids.gather(1, value), said[:, here])
        return said

    def candidates(self, examples: Examples) -> Candidates | None:
        """The values of all pairs."""
        if self.pairs == 1:
            return None
        context = examples.input_ids[:, : -self.segment_length]
        begins = (context[:, : -self._size] == BANG) & (
            context[:, self.key_length + 1 : -self.value_length - 2] == COLON
        )
        place = begins.nonzero()[:, 1].view(len(context), self.pairs).flip(1)
        where = place[:, :, None] + self.key_length + 2 + torch.arange(self.value_length)
        values = context.gather(1, where.flatten(1)).view_as(where)
        return Candidates(numbers(values, len(CHARACTERS)), (place == examples.evidence[:, 0]).long().argmax(1))

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """A memory that knows which values were told but not whose they are, in closed form."""
        return {"a told value": 1 / self.pairs + (1 - 1 / self.pairs) * self.uniform}
