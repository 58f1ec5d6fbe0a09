"""What a session generates, and that each token of it reaches the session once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import StoppingCriteriaList

from mnemic.host.cache import MemoryCache
from mnemic.host.choosing import (
    Choosing,
    Counting,
    TextPieces,
    check_taken,
    one_by_one,
    refuse_prompts,
    rows_of,
    setting,
    ways,
)
from mnemic.host.evaluating import evaluating
from mnemic.host.release import GENERATE_CACHE
from mnemic.host.wrappers import as_forward

if TYPE_CHECKING:
    from mnemic.session import Session


def take_steps(session: Session, ids: Int[Tensor, "1 t"], choosing: Choosing) -> Iterator[Int[Tensor, "1 1"]]:
    """Token after token, each taken in before it is given out."""
    output = session._feed(session.model, ids, **choosing.forward)
    while not choosing.done:
        token = choosing.choose(output.logits[:, -1])
        output = session._feed(session.model, token)
        yield token


def generate(
    session: Session, ids: Int[Tensor, "1 t"], *, streamer: Any = None, **kwargs: Any
) -> tuple[Any, Int[Tensor, "1 n"]]:
    """What `model.generate` returns, prompt included, and the first row of it without padding, which the session has
    taken in.

    Raises:
        RuntimeError: `generate` fed the model other tokens than those it returned.
    """
    refuse_prompts(session.model)
    if one_by_one(session.model, kwargs):
        choosing = Choosing(session.model, ids, session.cache, **kwargs)
        if streamer is not None:
            streamer.put(ids.cpu())
        for token in take_steps(session, ids, choosing):
            if streamer is not None:
                streamer.put(token[0].cpu())
        if streamer is not None:
            streamer.end()
        return choosing.ids, choosing.ids
    # generate works on a fork: it leaves out its last token, and with beams or several sequences it has many rows; the
    # session then reads what was said, once
    cache, counting = session.cache.fork(), Counting()
    if cache.window is not None:
        cache.batch_repeat_interleave(rows_of(session.model, kwargs))
    before = _taken(cache)
    # every token of the prompt is one, also where it is the padding token's
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), counting])
    more = {GENERATE_CACHE: cache, "stopping_criteria": criteria, "streamer": streamer}
    output = session.model.generate(ids, **more, **ways(session.model, kwargs))  # pyright: ignore[reportCallIssue]
    if counting.length is not None:
        check_taken(session.model, _taken(cache) - before, counting.length - 1)
    said = _without_padding((output if isinstance(output, Tensor) else output.sequences)[:1], ids, session, kwargs)
    as_forward(session.model, session._take_in, said)
    return output, said


def _without_padding(
    row: Int[Tensor, "1 n"], prompt: Int[Tensor, "1 t"], session: Session, kwargs: dict[str, Any]
) -> Int[Tensor, "1 n"]:
    """The row up to the first token that ends it: where others go on, `generate` pads it."""
    ends = setting(session.model, kwargs, "eos_token_id")
    ends = torch.as_tensor([] if ends is None else ends, device=row.device).flatten()
    over = torch.isin(row[0, prompt.shape[1] :], ends).nonzero().flatten()
    return row if not len(over) else row[:, : prompt.shape[1] + int(over[0]) + 1]


def answer(
    session: Session, ids: Int[Tensor, "1 t"], choosing: Choosing, text: TextPieces | None
) -> Iterator[int | str]:
    """Piece after piece. Nobody else may use the session from now on until the last one."""
    return _pieces(session, take_steps(session, ids, choosing), choosing, text, session._standing())


def _pieces(
    session: Session, steps: Iterator[Tensor], choosing: Choosing, text: TextPieces | None, stood: tuple[Any, ...]
) -> Iterator[int | str]:
    restore = session._snapshot()
    while not choosing.done:
        with session.lock.use():
            if any(now is not then for now, then in zip(session._standing(), stood, strict=True)):
                raise RuntimeError("the session was used while it answers; leave the loop first, or use session.fork()")
            try:
                with evaluating(session.model), torch.no_grad():
                    token = next(steps)
                piece = int(token) if text is None else text.more(choosing.answer[0], last=choosing.done)
            except BaseException:
                restore()
                raise
            stood = session._standing()
            if piece != "":
                restore = session._snapshot()
        if piece != "":  # between two pieces nothing is held: the loop may be left here for good
            yield piece


def _taken(cache: MemoryCache) -> int:
    return cache.window.taken[0] if cache.window is not None else 0
