"""What a session is given to read: text, token ids, or what a tokenizer returns; and the ids that it takes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mnemic.host.wrappers import unwrapped

Text = str | Tensor | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or a tokenizer's dictionary of them."""
ENCODED = ("input_ids", "attention_mask", "token_type_ids")
"""What a tokenizer returns for a text, and what therefore may also be given by keyword."""
OWN = ("inputs_embeds", "position_ids", "past_key_values", "cache", "cache_implementation")
"""Arguments of a model that a session has values of its own for."""
WANTED = "expected a text, token ids [1, T], or what a tokenizer returns for one text"


def given(text: Any, kwargs: dict[str, Any]) -> Any:
    """What is to be read, taken out of the keywords where it stands there; `use_cache` goes too, as it is always on.

    Raises:
        ValueError: nothing or two things to read, and arguments that a session has values of its own for.
    """
    for name in OWN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is the session's own; leave it out")
    kwargs.pop("use_cache", None)
    encoded = {name: kwargs.pop(name) for name in ENCODED if name in kwargs}
    if encoded.get("input_ids") is None:
        if text is None:
            raise ValueError(f"nothing to read: {WANTED}")
        encoded.pop("input_ids", None)
        return {"input_ids": text, **encoded} if encoded and not isinstance(text, str) else text
    if text is not None:
        raise ValueError("a text and input_ids=: which of them is to be read? Pass one")
    return encoded


def token_ids(text: Any, tokenizer: Any, *, start: bool, end: bool) -> Int[Tensor, "1 t"]:
    """Token ids of a text, which may be empty; ids as they are, without what their mask leaves out.

    A text gets what its tokenizer puts at the `start` of one ("<s>") and at the `end`, but for what it brings itself.

    Raises:
        ValueError: anything else than one text or one row of ids.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("text needs a tokenizer: Session(model, tokenizer); or pass token ids [1, T]")
        ids = plain(tokenizer, text)
        before, after = around(tokenizer) if ids and (start or end) else ([], [])
        if start and ids[: len(before)] != before:
            ids = before + ids
        if end and after and ids[-len(after) :] != after:
            ids = ids + after
        return torch.tensor([ids], dtype=torch.long)
    if isinstance(text, Mapping):
        return _unmasked(text)
    if isinstance(text, Sequence) and text and isinstance(text[0], str):
        raise ValueError(f"a session is one stream, this is a list of {len(text)} text(s); join them, or {BATCH}")
    if isinstance(text, Sequence) and text and isinstance(text[0], Mapping):
        raise ValueError("messages are for Session.chat(messages), which writes them with the chat template")
    return _row(text)


BATCH = "use mnemic.batch(sessions) with one for each"


def plain(tokenizer: Any, text: str) -> list[int]:
    """A text's own tokens, with nothing around them."""
    # a session takes texts of any length: without the reminder of the model's
    quiet: dict[str, Any] = {"verbose": False} if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
    return list(tokenizer(text, add_special_tokens=False, **quiet)["input_ids"])


def check_known(ids: Int[Tensor, "1 t"], model: nn.Module) -> None:
    """Raises `ValueError` for ids that the model has no embedding for."""
    embeddings: Any = unwrapped(model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    known = embeddings.weight.shape[0]
    for extreme in (int(ids.min()), int(ids.max())) if ids.numel() else ():
        if not 0 <= extreme < known:
            raise ValueError(
                f"token {extreme} is none of the model's, which are 0 .. {known - 1}; use its own tokenizer"
            )


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and behind every text."""
    whole, own = list(tokenizer("a")["input_ids"]), plain(tokenizer, "a")
    for first in range(len(whole) - len(own) + 1):
        if whole[first : first + len(own)] == own:
            return whole[:first], whole[first + len(own) :]
    return [], []


def _row(ids: Any, name: str = "token ids") -> Int[Tensor, "1 t"]:
    """One row of whole numbers."""
    try:
        row = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{WANTED}; this is {_named(ids)}") from error
    row = row[None] if row.ndim == 1 else row
    if row.ndim != 2 or row.shape[0] != 1:
        raise ValueError(f"a session is one stream: expected {name} [1, T], got {list(row.shape)}; {BATCH}")
    if row.numel() and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool):
        raise ValueError(f"{WANTED}; this is of {row.dtype}, and token ids are whole numbers")
    return row.long()


def _unmasked(encoded: Mapping[str, Any]) -> Int[Tensor, "1 t"]:
    """The real tokens of a tokenizer's dictionary."""
    if unknown := sorted(str(name) for name in encoded if name not in ENCODED):
        raise ValueError(f"a session reads {', '.join(ENCODED)}, not {', '.join(unknown)[:200]}; leave it out")
    if encoded.get("input_ids") is None:
        raise ValueError(f"nothing to read: {WANTED}")
    ids = _row(encoded["input_ids"], "input_ids")
    rows: dict[str, Tensor] = {}
    for name in ENCODED[1:]:
        if encoded.get(name) is not None:
            row = torch.as_tensor(encoded[name]).reshape(1, -1).to(ids.device)
            if row.shape != ids.shape:
                raise ValueError(
                    f"{name} is of {row.shape[1]} tokens, input_ids of {ids.shape[1]}; pass that of the new tokens "
                    "alone, or none"
                )
            rows[name] = row.bool()
    keep = rows.get("attention_mask", torch.ones_like(ids, dtype=torch.bool))
    if "token_type_ids" in rows and bool((rows["token_type_ids"] & keep).any()):
        raise ValueError("token_type_ids are not all 0, and a session's texts have one type; leave it out")
    return ids[:, keep[0]]


def _named(value: Any) -> str:
    if isinstance(value, Sequence):
        return f"a {type(value).__name__} of {', '.join(sorted({type(each).__name__ for each in value}))}"[:200]
    return f"a {type(value).__name__}"
