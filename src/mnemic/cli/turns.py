"""What one turn adds to a conversation whose past is in a session: the new message's tokens and nothing before them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

ASKED, ANSWERED = "What was asked before?", "This was answered before."


class Turns:
    """Turns in the words of a tokenizer's chat template, or as they are where it has none.

    A template writes whole conversations. What a later turn adds is found as the difference that it makes to one with
    an answer before it, so what a template says once, at the beginning, is said once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = bool(getattr(tokenizer, "chat_template", None))

    def message(self, text: str, *, first: bool) -> Int[Tensor, "1 t"]:
        """A message, and what begins the answer to it."""
        if not self.template:
            return self._ids((self._start() if first else "") + text)
        if first:
            return self._ids(self._written([("user", text)], begin=True))
        conversation = [("user", ASKED), ("assistant", ANSWERED), ("user", text)]
        later = self._after_answer(self._written(conversation, begin=True))
        return self._ids(later.removeprefix(self._closing()))

    def closing(self, answer: list[int]) -> Int[Tensor, "1 t"] | None:
        """What ends an answer, but for what the model ended it with itself; None where nothing is left."""
        text = self._closing() if self.template else "\n"
        ids = self._ids(text)[0].tolist() if text else []
        for count in range(len(ids), 0, -1):
            if answer[-count:] == ids[:count]:
                ids = ids[count:]
                break
        else:
            # some end with another token than the template's
            if answer and answer[-1] in self.tokenizer.all_special_ids and ids[:1] == [self.tokenizer.eos_token_id]:
                ids = ids[1:]
        return torch.tensor([ids]) if ids else None

    def _closing(self) -> str:
        return self._after_answer(self._written([("user", ASKED), ("assistant", ANSWERED)], begin=False))

    def _after_answer(self, text: str) -> str:
        _, found, after = text.partition(ANSWERED)
        if not found:
            raise ValueError("the tokenizer's chat template does not repeat what was answered; it cannot be continued")
        return after

    def _written(self, conversation: list[tuple[str, str]], *, begin: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in conversation]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin)

    def _start(self) -> str:
        """What the tokenizer puts before every text, if it is the token for that."""
        ids = self.tokenizer("a")["input_ids"]
        return self.tokenizer.bos_token if ids and ids[0] == self.tokenizer.bos_token_id else ""

    def _ids(self, text: str) -> Int[Tensor, "1 t"]:
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
