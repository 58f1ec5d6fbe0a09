"""What scripts of this folder share: a real model as they run it, tokens of a novel, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemic.checkpoints import folder_of
from mnemic.tasks.documents import novels, tokenize

Result = TypeVar("Result")


class Clock(NamedTuple):
    """Seconds on the clock, and of the processor."""

    clock: float
    processor: float


def opened(model: str) -> tuple[Any, Any, str]:
    """A causal model by folder or by a name that `mnemic fetch` knows, in float32 and on one thread, its tokenizer, and
    how records name it.
    """
    torch.set_num_threads(1)
    folder = folder_of(model)
    host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return host, AutoTokenizer.from_pretrained(folder), Path(folder).name


def ids_of(data: Path, tokenizer: Any) -> Int[Tensor, "1 t"]:
    """Tokens of 60,000 characters of the first novel, from its second quarter on."""
    text = novels(data)[0][1]
    return tokenize(text[len(text) // 4 :][:60_000], tokenizer).ids[None]


def timed(step: Callable[[], Result]) -> tuple[Clock, Result]:
    """What a step takes, and what comes of it."""
    clock, processor = time.perf_counter(), time.process_time()
    found = step()
    return Clock(time.perf_counter() - clock, time.process_time() - processor), found
