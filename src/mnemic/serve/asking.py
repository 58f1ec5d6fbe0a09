"""From what a client asks for to what the engine continues. All of it may wait for the database: it is for threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mnemic.serve.again import NOTE, Given, Once
from mnemic.serve.errors import Refused
from mnemic.serve.heard import Heard, Message
from mnemic.serve.schemas import Old, Sampling
from mnemic.serve.settings import Settings
from mnemic.serve.turn import Asked
from mnemic.session import Session
from mnemic.turns import MOST_NEW_TOKENS, Turns


class Penalties(LogitsProcessor):
    """What was said in this answer is less probable: by `frequency` for each time, and by `presence` once. The formula
    is that of OpenAI's API reference.
    """

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Any:
        """The scores without the penalties of each token."""
        said = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def chat(
    load: Callable[[], Session],
    messages: Sequence[Message],
    asked: Sampling,
    settings: Settings,
    once: Once | None = None,
) -> Asked:
    """A session that goes on with what is new of these messages."""
    session = load()
    if once is not None and (given := once.given(session.notes)) is not None:
        return Asked(session, given=given)
    heard, turns = Heard.of(session.notes), Turns(session.tokenizer)
    new = heard.new(messages)
    if turns.template:
        prompt = turns.message(new, first=session.is_new)
    elif len(new) == 1 and new[0]["role"] == "user" and new[0]["content"]:
        prompt = turns.message(new[0]["content"], first=session.is_new)
    else:
        raise ValueError("the model has no chat template: send one message of the user, or use /v1/completions")

    found = completion(lambda: session, prompt, asked, settings, once)
    noted = found.heard

    def heard_too(given: Given) -> None:
        noted(given)
        session.notes |= heard.after(new, given.text).note()

    found.closing, found.heard = turns.closing, heard_too
    return found


def completion(
    load: Callable[[], Session], prompt: Any, asked: Sampling, settings: Settings, once: Once | None = None
) -> Asked:
    """A session that goes on with a text, or with token ids."""
    session = load()
    if once is not None and (given := once.given(session.notes)) is not None:
        return Asked(session, given=given)
    if not isinstance(prompt, str | Tensor):
        prompt = torch.tensor([prompt])
    ids = session.ids(prompt)
    if not 0 < ids.shape[1] <= settings.prompt_tokens:
        raise Refused(
            400,
            "context_length_exceeded",
            f"the request has {ids.shape[1]:,} new tokens, and this server reads 1 to {settings.prompt_tokens:,}",
        )
    stop = asked.stops if isinstance(asked, Old) else []

    def noted(given: Given) -> None:
        session.notes.pop(NOTE, None)
        session.notes |= {} if once is None else once.note(given)

    return Asked(session, ids, _ways(session, asked, settings, ids.shape[1]), stop, heard=noted, seed=asked.seed)


def _ways(session: Session, asked: Sampling, settings: Settings, prompt: int) -> dict[str, Any]:
    """Arguments of `generate`."""
    most = asked.most or min(MOST_NEW_TOKENS, settings.new_tokens)
    if most > settings.new_tokens:
        raise Refused(
            400, "too_many_tokens", f"{most:,} tokens are asked for, and answers have {settings.new_tokens:,} at most"
        )
    ways: dict[str, Any] = {"max_new_tokens": most}
    if asked.temperature == 0:
        ways["do_sample"] = False
    elif asked.temperature is not None or asked.top_p is not None:
        ways |= {"do_sample": True, "temperature": 1.0 if asked.temperature is None else asked.temperature}
        ways |= {"top_p": asked.top_p} if asked.top_p is not None else {}
    if isinstance(asked, Old) and (asked.frequency_penalty or asked.presence_penalty):
        penalties = Penalties(prompt, asked.frequency_penalty or 0, asked.presence_penalty or 0)
        ways["logits_processor"] = LogitsProcessorList([penalties])
    return Turns(session.tokenizer).ways(session.model, ways)
