"""What one turn adds to a conversation whose past is in a session: the new message's tokens and nothing before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mnemic.host.choosing import setting
from mnemic.texts import plain, token_ids

Messages = str | Sequence[Mapping[str, Any]]
"""What is said to a model: a user's text, or messages with a `role` and a `content` each."""
MOST_NEW_TOKENS = 512
"""Most tokens of an answer, unless another number is asked for."""
ASKED, ANSWERED = "What was asked before?", "This was answered before."
_BEFORE = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]


class Turns:
    """Turns in the words of a tokenizer's chat template, or as they are where it has none.

    A template writes whole conversations. What a later turn adds is found as the difference that it makes to one with
    an answer before it, so what a template says once, at the beginning, is said once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = bool(getattr(tokenizer, "chat_template", None))

    def message(self, said: Messages, *, first: bool) -> Int[Tensor, "1 t"]:
        """What is new in a conversation, and what begins the answer to it.

        Raises:
            ValueError: no message, or messages that the template does not take.
        """
        if isinstance(said, str) and not self.template:
            return token_ids(said, self.tokenizer, start=first, end=False)
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
        if not messages or not all(isinstance(each, Mapping) and "role" in each for each in messages):
            raise ValueError("messages are a text or a list of {'role': ..., 'content': ...}, at least one")
        if not self.template:
            raise ValueError("the tokenizer has no chat template to write messages with; pass a text, or give it one")
        if first:
            return self._ids(self._written(messages, begin=True))
        later = self._after_answer(self._written([*_BEFORE, *messages], begin=True))
        return self._ids(later.removeprefix(self._closing()))

    def closing(self, answer: list[int]) -> Int[Tensor, "1 t"] | None:
        """What ends an answer, but for what the model ended it with itself; None where nothing is left."""
        text = self._closing() if self.template else "\n"
        ids = plain(self.tokenizer, text) if text else []
        for count in range(len(ids), 0, -1):
            if answer[-count:] == ids[:count]:
                ids = ids[count:]
                break
        else:
            # some end with another token than the template's
            if answer and answer[-1] in self.tokenizer.all_special_ids and ids[:1] == [self.tokenizer.eos_token_id]:
                ids = ids[1:]
        return torch.tensor([ids]) if ids else None

    def ways(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` for an answer: these, and what makes it end where nothing else says it."""
        own, missing = self.tokenizer.eos_token_id, {}
        if setting(model, kwargs, "eos_token_id") is None and own is not None:
            missing["eos_token_id"] = own
        if setting(model, kwargs, "pad_token_id") is None:
            ids = (self.tokenizer.pad_token_id, own, 0)
            missing["pad_token_id"] = next(each for each in ids if each is not None)
        if not {"max_new_tokens", "max_length", "generation_config"} & kwargs.keys():
            missing["max_new_tokens"] = MOST_NEW_TOKENS
        return {**missing, **kwargs}

    def _closing(self) -> str:
        return self._after_answer(self._written(_BEFORE, begin=False))

    def _after_answer(self, text: str) -> str:
        _, found, after = text.partition(ANSWERED)
        if not found:
            raise ValueError("the tokenizer's chat template does not repeat what was answered; it cannot be continued")
        return after

    def _written(self, messages: Sequence[Mapping[str, Any]], *, begin: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begin)
        except Exception as error:  # a template is a program of its own
            raise ValueError(f"the tokenizer's chat template does not take these messages: {error}") from error

    def _ids(self, text: str) -> Int[Tensor, "1 t"]:
        return torch.tensor([plain(self.tokenizer, text)])
