"""N-gram models that count on while they read: what remembering word for word is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor


class Ngram:
    """Counts of what follows each context of up to `order - 1` tokens, mixed as Witten and Bell (1991) do: a context
    that was followed by `t` different tokens in `n` places gives the shorter one `t / (n + t)`.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        # the number of places stands under -1
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, history: Sequence[int], token: int) -> None:
        """Counts a token behind its history."""
        for length in range(min(self.order, len(history) + 1)):
            after = self.counts.setdefault(tuple(history[len(history) - length :]), {-1: 0})
            after[token] = after.get(token, 0) + 1
            after[-1] += 1

    def probability(self, history: Sequence[int], token: int, base: float) -> tuple[float, int]:
        """Probability of a token, where `base` is its probability without any count; how many contexts were known."""
        length = 0
        for length in range(min(self.order, len(history) + 1)):
            after = self.counts.get(tuple(history[len(history) - length :]))
            if after is None:
                return base, length
            types, places = len(after) - 1, after[-1]
            base = (after.get(token, 0) + types * base) / (places + types)
        return base, length + 1


class Learned:
    """An n-gram model of training text, and how far to trust counts of the document itself.

    The counts of what may be looked at of a document (`earlier`, and the segment so far) begin where the learned model
    ends, and both are mixed: the weight of the counts depends on how long a context they know, and is learned on other
    streams than those that are scored.
    """

    def __init__(self, order: int, vocabulary: int, streams: Int[Tensor, "b t"]) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.learned = Ngram(order)
        for row in streams.tolist():
            for place, token in enumerate(row):
                self.learned.add(row[max(0, place - order + 1) : place], token)

    def base(self, row: Sequence[int], order: int | None = None) -> list[float]:
        """Probabilities of each token from training alone, with contexts of fewer than `order` tokens."""
        reach = (self.order if order is None else order) - 1
        return [
            self.learned.probability(row[max(0, place - reach) : place], token, 1 / self.vocabulary)[0]
            for place, token in enumerate(row)
        ]

    def bits(
        self,
        row: Sequence[int],
        base: Sequence[float],
        length: int,
        earlier: Sequence[Sequence[int]],
        trust: list[list[float]],
        learn: bool = False,
    ) -> float:
        """Bits of all tokens but the first, in segments of `length`. `trust` has for each length of known context the
        sum of weights and their number; `learn` changes it.
        """
        total, reach = 0.0, self.order - 1
        own, read = Ngram(self.order), []
        for here in range(len(row) // length):
            if list(earlier[here]) != read:
                own, read = Ngram(self.order), list(earlier[here])
                for segment in read:
                    start = segment * length
                    for place in range(start, start + length):
                        own.add(row[max(0, place - reach, start) : place], row[place])
            for place in range(here * length, (here + 1) * length):
                history, token = row[max(0, place - reach) : place], row[place]
                counted, known = own.probability(history, token, base[place])
                weight = trust[known][0] / trust[known][1]
                chance = weight * counted + (1 - weight) * base[place]
                total -= math.log2(chance) if place else 0.0
                if learn:
                    trust[known][0] += weight * counted / chance
                    trust[known][1] += 1
                own.add(history, token)
            read.append(here)
        return total
