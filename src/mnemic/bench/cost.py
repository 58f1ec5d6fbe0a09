"""What a memory costs: time beside the base's own forward, bytes a session, and memory over an endless stream.

Times are medians over runs that alternate base and memory, so that a machine's drift touches both; what is reported is
their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mnemic.attachment import attach, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record
from mnemic.host.arguments import with_cache
from mnemic.memories.emt import EMTConfig
from mnemic.memory import Site
from mnemic.session import Session

Progress = Callable[[str], None]


def gpt2_small(device: str = "cpu", dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """The shape of GPT-2 small (12 blocks, width 768, 124 M parameters) with random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval().to(device=device, dtype=dtype)  # pyright: ignore


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of one call, the accelerator's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def alternate(
    functions: dict[str, Callable[[], Any]], runs: int, advance: Callable[[int], object] = lambda runs: None
) -> dict[str, list[float]]:
    """Times of each function, called in turn `runs` times after one call that is not counted; `advance` is told of
    every turn, that one too.
    """
    for function in functions.values():
        function()
    advance(1)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(seconds_of(function))
        advance(1)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and spread of `name / base`, pair by pair."""
    ratios = sorted(a / b for a, b in zip(times[name], times[base], strict=True))
    return {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


@torch.no_grad()
def overhead(
    config: EMTConfig,
    name: str,
    *,
    batch: int,
    tokens: int,
    runs: int = 9,
    device: str = "cpu",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Record:
    """Forward of a GPT-2-small shape with a memory, against the same model without: one segment of `tokens` tokens.

    `with memory / base` times whole forwards; `memory alone / base` only the memory's read and write of that segment.
    """
    model = gpt2_small(device)
    torch.manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    attachment = attach(model, config.replace(segment_length=tokens))
    memory, width = attachment.memory, model.config.hidden_size
    hidden = torch.randn(batch, tokens, width, device=device)
    state = memory.init_state(batch, torch.device(device))

    def base() -> Any:
        with attachment.disabled():
            return model(ids, use_cache=True)

    def alone() -> None:
        for site in memory.hidden_reads:
            memory.read(site, hidden, state)
        memory.write(hidden, state)

    reporter = reporter or Silent()
    reporter.phase(f"{name} write", runs + 1)
    functions = {"base": base, "with memory": lambda: model(ids, use_cache=True), "alone": alone}
    times = alternate(functions, runs, reporter.advance)
    session = Session(model, window=tokens)
    session.read(ids[:1])
    return Record(
        task=f"overhead-{name}",
        mechanism=config.kind,
        host=f"GPT-2 small shape, random weights, {device}, float32",
        seed=seed,
        config=config.to_dict(),
        measures={
            "batch": batch,
            "tokens": tokens,
            "runs": runs,
            "with memory / base": ratio(times, "with memory", "base"),
            "memory alone / base": ratio(times, "alone", "base"),
            "base tokens per second": batch * tokens / statistics.median(times["base"]),
            "tokens per second with memory": batch * tokens / statistics.median(times["with memory"]),
            "parameters": sum(parameter.numel() for parameter in attachment.parameters()),
            "session bytes at a segment's end": session.nbytes,
        },
        state_bytes=session.nbytes,
        seconds={key: statistics.median(values) for key, values in times.items()},
    )


@torch.no_grad()
def against_naive(seed: int = 0) -> Record:
    """The token write's fast path against the equations in plain loops, two stacked memories on a GPT-2-small width."""
    torch.manual_seed(seed)
    config = EMTConfig.whitepaper(segment_length=8)
    memory = config.build(768, 12)
    hidden, state = torch.randn(2, 8, 768), memory.init_state(2)
    times = {}
    begun = time.perf_counter()
    read, written = memory.read(Site(11), hidden, state), memory.write(hidden, state)
    times["fast"] = time.perf_counter() - begun
    begun = time.perf_counter()
    naive_read, naive_written = memory.naive(hidden, state)
    times["naive"] = time.perf_counter() - begun
    differences = {name: float((written[name] - naive_written[name]).abs().max()) for name in written}
    differences["read"] = float((read - naive_read).abs().max())
    return Record(
        task="naive-token",
        mechanism=config.kind,
        host="width 768, batch 2, 8 tokens, 64 slots x 256, stack 2, float32",
        seed=seed,
        config=config.to_dict(),
        measures={"largest difference": differences},
        seconds=times,
    )


def resident_bytes() -> int | None:
    """What the process holds in memory now; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return None


@torch.no_grad()
def endless(
    tokens: int = 1_000_000, *, window: int = 512, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Record:
    """One session reads `tokens` tokens call after call; what it and the process hold is noted along the way."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=window,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    config = EMTConfig(slots=64, dim=256, segment_length=window // 4)
    attach(model, config)
    cache, source = memory_cache(model, window), torch.Generator().manual_seed(seed)
    trail, begun, call = [], time.perf_counter(), window + 37
    seen = finite = 0
    while seen < tokens:
        count = min(call, tokens - seen)
        ids = torch.randint(0, 256, (1, count), generator=source)
        logits = model(input_ids=ids, **with_cache(model, cache), logits_to_keep=1).logits
        finite += int(bool(torch.isfinite(logits).all()))
        seen += count
        stream = cache.memory.stream
        assert stream is not None
        if len(trail) < 20 * seen // tokens:
            keys = sum(layer.keys.numel() * 8 for layer in cache.layers if getattr(layer, "keys", None) is not None)  # pyright: ignore
            trail.append({"tokens": seen, "session_bytes": stream.nbytes + keys, "resident_bytes": resident_bytes()})
        if progress is not None:
            progress(count)
    stream = cache.memory.stream
    assert stream is not None
    return Record(
        task="endless-stream",
        mechanism=config.kind,
        host=f"Llama, 3 blocks, width 64, random weights, window {window}",
        seed=seed,
        config=config.to_dict(),
        measures={
            "tokens": seen,
            "calls": -(-seen // call),
            "calls with finite logits": finite,
            "state finite": all(bool(torch.isfinite(tensor).all()) for tensor in stream.state.values()),
            "trail": trail,
        },
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in stream.state.values()),
        seconds={"all": time.perf_counter() - begun},
    )
