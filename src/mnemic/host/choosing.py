"""What `model.generate` chooses, a token at a time: its own processors and criteria in a loop that its caller owns."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.generation.configuration_utils import GenerationMode

from mnemic.host.cache import MemoryCache
from mnemic.host.release import GENERATE_CACHE


def ways(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` on a session's cache, which no config may leave out or replace."""
    kwargs = dict(kwargs)
    if (config := kwargs.get("generation_config")) is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.use_cache = True
    else:
        kwargs["use_cache"] = True
    if setting(model, kwargs, "cache_implementation") is not None:
        kwargs["cache_implementation"] = None
    return kwargs


def setting(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """What `generate` goes by: its argument, else that of the config it is given, else that of the model's."""
    if name in kwargs:
        return kwargs[name]
    configs = kwargs.get("generation_config"), getattr(model, "generation_config", None)
    return next((found for config in configs if (found := getattr(config, name, None)) is not None), None)


def rows_of(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of one prompt."""
    return max(setting(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def one_by_one(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether `generate` chooses one token after another, and returns nothing else."""
    more = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "return_dict_in_generate")
    more += ("dola_layers", "penalty_alpha", "constraints", "force_words_ids")
    return rows_of(model, kwargs) == 1 and not any(setting(model, kwargs, name) for name in more)


def refuse_prompts(model: nn.Module) -> None:
    """Raises `RuntimeError` for a PEFT model that puts tokens or keys of its own before every call: a session would
    read them again and again, or they would stand beside its window unseen.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise RuntimeError(
            f"{type(model).__name__} puts tokens of its own before every call (prompt or prefix tuning), and a session "
            "goes on from one call to the next; nothing was read. Use the model without that"
        )


def check_taken(model: nn.Module, taken: int, expected: int) -> None:
    """Raises `RuntimeError` where a model gave a session other tokens than those it was called with."""
    if taken != expected:
        raise RuntimeError(
            f"{type(model).__name__} gave the session {taken:,} token(s) where {expected:,} were to be read: it fed "
            "some again, added some, or left the cache that it was given; nothing was read"
        )


class Counting(StoppingCriteria):
    """Ends nothing: it notes how long the rows of `generate` are, the last token included; None before the first."""

    length: int | None = None

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Any, **kwargs: Any) -> Any:
        """No row is done."""
        self.length = input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Choosing:
    """The tokens of one stream. `generate` is asked to prepare everything and to hand it over instead of looping.

    `ids [1, t]` are the prompt's and those chosen since; `done` is True when a criterion of `generate` ends the answer.
    `forward` are arguments that the model takes in every step.
    """

    def __init__(self, model: nn.Module, ids: Int[Tensor, "1 t"], cache: MemoryCache, **kwargs: Any) -> None:
        """Raises `ValueError` for ways of generating that do not choose one token after another, and for arguments that
        would have no part here.
        """
        refuse_prompts(model)
        if kwargs.get("streamer") is not None:
            raise ValueError("a streamer is for Session.generate; here the tokens come to the caller as they are made")
        caught: dict[str, Any] = {}

        def catch(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **rest: Any,
        ) -> Tensor:
            caught.update(
                processors=logits_processor, criteria=stopping_criteria, config=generation_config, arguments=rest
            )
            return input_ids

        if kwargs.get("custom_generate") is not None:
            raise ValueError("custom_generate is for Session.generate; here one token is chosen after another")
        # the cache is looked at and not written to: what is prepared depends on what generate finds there
        own = {GENERATE_CACHE: cache.fork(), "custom_generate": catch}
        model.generate(ids, **own, **ways(model, kwargs))  # pyright: ignore[reportCallIssue]
        config = caught["config"]
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        several = max(config.num_beams or 1, config.num_return_sequences or 1)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or several > 1:
            name = mode.value.replace("_", " ")
            raise ValueError(
                f"{name} with {several} sequence(s) does not choose one token after another; use Session.generate, or "
                "num_beams=1, num_return_sequences=1 and no assistant"
            )
        if config.return_dict_in_generate:
            raise ValueError("return_dict_in_generate is for Session.generate; here tokens alone come back")
        self.ids, self.done = ids, False
        self.forward = {name: value for name, value in caught["arguments"].items() if name == "logits_to_keep"}
        self._processors, self._criteria, self._samples = caught["processors"], caught["criteria"], config.do_sample
        self._prompt = ids.shape[1]

    @property
    def answer(self) -> Int[Tensor, "1 n"]:
        """What was chosen so far."""
        return self.ids[:, self._prompt :]

    def choose(self, logits: Float[Tensor, "1 v"], generator: torch.Generator | None = None) -> Int[Tensor, "1 1"]:
        """The next token, from what the model put out at the last one. Samples from `generator`, or the global one."""
        scores = self._processors(self.ids, logits.to(dtype=torch.float32, device=self.ids.device, copy=True))
        token = (
            torch.multinomial(scores.softmax(-1), 1, generator=generator)
            if self._samples
            else scores.argmax(-1, keepdim=True)
        )
        self.ids = torch.cat([self.ids, token], 1)
        self.done = bool(self._criteria(self.ids, None).all())
        return token


class TextPieces:
    """The text of an answer as it grows. Bytes that do not make a character yet are held back."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before, self._shown = 0, 0

    def more(self, ids: Int[Tensor, " n"], *, last: bool = False) -> str:
        """What `ids`, all of the answer so far, adds to the text that was given out; "" for nothing."""
        # decoded from the piece before on, as whether a token begins with a space depends on what stands before it
        shown = self._decode(ids[self._before : self._shown])
        text = self._decode(ids[self._before :])
        if len(text) <= len(shown) or (text.endswith("\ufffd") and not last):
            return ""
        self._before, self._shown = self._shown, len(ids)
        return text[len(shown) :]

    def _decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if len(ids) else ""
