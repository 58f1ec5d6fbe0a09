"""The whitepaper's zero-shot mode measured: an untrained memory with random projections on a pretrained model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemic.attachment import Attachment, attach, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record
from mnemic.controls import zeroed
from mnemic.host.arguments import with_cache
from mnemic.memories.emt import EMTConfig


@torch.no_grad()
def bits(
    attachment: Attachment, ids: Tensor, condition: str, advance: Callable[[int], object] = lambda windows: None
) -> float:
    """Bits a token of one stream read window by window. Conditions: `written`, `never written`, `zeroed`, `none`."""
    model, router = attachment.model, attachment.router
    length, total = router.segment_length, 0.0
    cache = memory_cache(model, length)
    for part in ids.split(length, 1):
        if condition == "never written":
            cache.memory.stream = router.new_stream(1)
        elif condition == "zeroed" and cache.memory.stream is not None:
            stream = cache.memory.stream
            cache.memory.stream = router.new_stream(1, zeroed(stream.state))
        logits = model(input_ids=part, **with_cache(model, cache)).logits[0, :-1]
        total += F.cross_entropy(logits.float(), part[0, 1:], reduction="sum").item()
        advance(1)
    return total / (ids.shape[1] - len(ids.split(length, 1))) / math.log(2)


def measure(
    name: str, text: Path, tokens: int, seeds: int = 3, length: int = 256, reporter: Reporter | None = None
) -> Record:
    """The whitepaper's setting after the last block, over several random initialisations, beside its controls."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"][:tokens]])
    ids = ids[:, : ids.shape[1] - ids.shape[1] % length]
    config = EMTConfig.whitepaper(segment_length=length)
    results: dict[str, float] = {}
    reporter = reporter or Silent()
    reporter.phase("windows read", (1 + 3 * seeds) * (ids.shape[1] // length))
    for seed in range(seeds):
        torch.manual_seed(seed)
        attachment = attach(model, config)
        if not results:
            with attachment.disabled():
                results["no memory"] = bits(attachment, ids, "none", reporter.advance)
        for condition in ("written", "never written", "zeroed"):
            results[f"zero-shot, {condition}, seed {seed}"] = bits(attachment, ids, condition, reporter.advance)
        attachment.detach()
    results["what writing moves, at most"] = max(
        abs(results[f"zero-shot, written, seed {s}"] - results[f"zero-shot, never written, seed {s}"])
        for s in range(seeds)
    )
    return Record(
        task="zero-shot",
        mechanism=config.kind,
        host=f"{Path(name).name}, frozen, windows of {length} tokens of {text.name}",
        seed=0,
        config=config.to_dict(),
        measures={"bits per token": results, "tokens": ids.shape[1]},
    )
