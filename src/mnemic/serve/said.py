"""The text of an answer as it comes, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mnemic.host.choosing import TextPieces


class Said:
    """What was said so far (`text`). A stop string ends it (`stopped`) and is not part of it, so what may be the
    beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stop, self.text, self.stopped = tuple(stop), "", False
        self._pieces, self._held = TextPieces(tokenizer), ""

    def more(self, ids: Int[Tensor, " n"], *, last: bool) -> str:
        """What `ids`, all of the answer so far, adds to the text."""
        self._held += self._pieces.more(ids, last=last)
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - (0 if last else self._begun())
        piece, self._held = self._held[:end], "" if found else self._held[end:]
        self.text += piece
        return piece

    def _begun(self) -> int:
        """How many of the last letters may be the beginning of a stop string."""
        lengths = (n for stop in self.stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
