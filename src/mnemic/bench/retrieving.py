"""Retrieval of text, which a user would try before a memory: which pieces of a text a question is about."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def bm25(texts: Sequence[str], queries: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[list[float]]:
    """Okapi BM25 (Robertson, Walker, Jones, Hancock-Beaulieu, Gatford, TREC-3, 1994) on words in small letters."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    sizes = [bag.total() for bag in bags]
    mean = max(1.0, sum(sizes) / len(sizes))
    scores = [[0.0] * len(texts) for _ in queries]
    for query, row in zip(queries, scores, strict=True):
        for word in set(re.findall(r"\w+", query.lower())):
            holding = sum(word in bag for bag in bags)
            weight = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
            for place, (bag, size) in enumerate(zip(bags, sizes, strict=True)):
                row[place] += weight * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * size / mean))
    return scores
