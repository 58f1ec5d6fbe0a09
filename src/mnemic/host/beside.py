"""Memory tokens beside the words of a call: joining them, telling their columns apart, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.host.anatomy import COUNTS_FROM_PADDING
from mnemic.host.arguments import by_row
from mnemic.host.release import ModelOutput
from mnemic.memory import MemoryTokens


@dataclass
class Beside:
    """The memory tokens of one pass: `before` and `behind` its words, in columns of their own.

    `keep [b, n + t + m]` marks what is there, for the rows whose segment begins and ends in this pass; None for all.
    """

    before: MemoryTokens | None
    behind: MemoryTokens | None
    time: int
    keep: Tensor | None = None
    apart: bool = False
    """Whether the blocks make keys of the tokens before on their own, and from the first block on see words alone."""

    @property
    def first(self) -> int:
        """How many stand before the words."""
        return 0 if self.before is None else self.before.embeddings.shape[1]

    @property
    def words(self) -> slice:
        """The columns of the words."""
        return slice(self.first, self.first + self.time)

    @property
    def width(self) -> int:
        """All columns."""
        return self.words.stop + (0 if self.behind is None else self.behind.embeddings.shape[1])

    def words_in(self, hidden_btd: Tensor) -> slice:
        """The columns of the words in hidden states of some block."""
        return slice(0, self.time) if self.apart and hidden_btd.shape[1] == self.time else self.words

    @staticmethod
    def join(
        words_btd: Tensor,
        keep_bt: Tensor,
        before: tuple[MemoryTokens | None, Tensor],
        behind: tuple[MemoryTokens | None, Tensor],
    ) -> tuple[Beside, Tensor]:
        """Words and memory tokens as one sequence of embeddings; with the tokens, the rows `[b]` that they are there
        for.
        """
        (first, begins), (last, ends) = before, behind
        if first is not None and first.keep is not None and not bool(first.keep.all()):
            first = flush_right(first, first.keep)
        parts, kept = [words_btd], [keep_bt]
        for tokens, rows in ((first, begins), (last, ends)):
            if tokens is not None:
                there = rows[:, None].expand(-1, tokens.embeddings.shape[1])
                place = 0 if tokens is first else len(parts)
                parts.insert(place, tokens.embeddings.to(words_btd))
                kept.insert(place, there if tokens.keep is None else there & tokens.keep)
        keep = torch.cat(kept, 1)
        beside = Beside(first, last, words_btd.shape[1], None if bool(keep.all()) else keep)
        return beside, torch.cat(parts, 1)

    def enter(self, layer: int, hidden_btd: Tensor) -> Tensor:
        """What enters a block, with the memory's own hidden states in the places it gives them for."""
        own = None if self.before is None else self.before.inputs.get(layer)
        return hidden_btd if own is None else torch.cat([own.to(hidden_btd), hidden_btd[:, self.first :]], 1)


@dataclass(frozen=True)
class Wordless:
    """A pass of memory tokens alone, for the rows that begin a segment and for those that end one."""

    beginning: tuple[int, ...] = ()
    ending: tuple[int, ...] = ()


def flush_right(tokens: MemoryTokens, keep_bn: Tensor) -> MemoryTokens:
    """The same tokens, each row's own next to the words: layers that count keys as they lie bear no gap."""
    order = torch.argsort(keep_bn.long(), dim=1, stable=True)

    def moved(hidden_bnd: Tensor) -> Tensor:
        return hidden_bnd.gather(1, order[..., None].expand(-1, -1, hidden_bnd.shape[-1]))

    inputs = {layer: moved(hidden_bnd) for layer, hidden_bnd in tokens.inputs.items()}
    return MemoryTokens(moved(tokens.embeddings), keep_bn.gather(1, order), inputs)


def encoder_positions(trunk: Any, arguments: dict[str, Any], time: int, count: int) -> Tensor:
    """The positions `[b, t + count]` of an encoder's words, and of memory tokens at the end of its table."""
    ids, given, config = arguments.get("input_ids"), arguments.get("position_ids"), trunk.config
    words = ids if ids is not None else arguments["inputs_embeds"][..., 0]
    if given is not None:
        positions = given.expand(len(words), -1)
    elif config.model_type in COUNTS_FROM_PADDING:
        real = torch.ones_like(words, dtype=torch.long) if ids is None else (ids != config.pad_token_id).long()
        positions = real.cumsum(1) * real + config.pad_token_id
    else:
        positions = torch.arange(time, device=words.device).expand(len(words), -1)
    last = torch.arange(config.max_position_embeddings - count, config.max_position_embeddings, device=words.device)
    return torch.cat([positions, last.expand(len(words), -1)], 1)


def for_queries(arguments: dict[str, Any], queries: slice, held: int, hidden_btd: Tensor) -> dict[str, Any]:
    """The arguments of a block for some of a call's columns, whose keys come after `held` ones and all before them."""
    chosen = dict(arguments)
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor):
        chosen["attention_mask"] = mask[:, :, queries, : held + queries.stop] if mask.ndim == 4 else mask
    elif queries.start:
        # none was needed for the whole call, as it was causal; these columns begin in the middle of it
        place = torch.arange(held + queries.stop, device=hidden_btd.device)
        seen = place <= held + torch.arange(queries.start, queries.stop, device=hidden_btd.device)[:, None]
        lowest = torch.finfo(hidden_btd.dtype).min
        chosen["attention_mask"] = torch.zeros_like(seen, dtype=hidden_btd.dtype).masked_fill(~seen, lowest)[None, None]
    if (positions := arguments.get("position_ids")) is not None:
        chosen["position_ids"] = positions[..., queries]
    if (rotations := arguments.get("position_embeddings")) is not None:
        chosen["position_embeddings"] = tuple(rotation[..., queries, :] for rotation in rotations)
    return chosen


def words_of(output: Any, words: Callable[[Tensor], slice]) -> Any:
    """The output of a call without the columns of memory tokens."""
    if not isinstance(output, ModelOutput):
        return (output[0][:, words(output[0])], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, words(output["last_hidden_state"])]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(hidden[:, words(hidden)] for hidden in output["hidden_states"])
    if output.get("router_logits") is not None:
        layers = (by_row(logits, len(output["last_hidden_state"])) for logits in output["router_logits"])
        output["router_logits"] = tuple(layer[:, words(layer)].flatten(0, 1) for layer in layers)
    return output
