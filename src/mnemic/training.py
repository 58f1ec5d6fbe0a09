"""A small trainer for memories, and fitting what does not train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mnemic.attachment import router_of
from mnemic.host.anatomy import base_parameters, examine
from mnemic.memory import Memory, Site
from mnemic.state import StateError, read_file, write_file
from mnemic.unrolling import IGNORED, TOKENS_AT_ONCE, FeatureMemo, unroll


def calibrate(model: nn.Module, batch: Batch) -> None:
    """Fits what a memory does not train (EMT's `whiten`) to the host, before training, on streams like those to come.

    Writes are fitted to all tokens of the segments without labels, reads to the positions from which a labelled token
    is predicted. The base runs alone, every segment on its own. Of most memories there is nothing to fit.
    """
    router = router_of(model)
    if type(router.memory).calibrate is Memory.calibrate:
        return
    ids = batch.input_ids.unflatten(1, (-1, router.segment_length)).flatten(0, 1)
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).unflatten(1, (-1, router.segment_length)).flatten(0, 1)
    asked = targets != IGNORED
    silent = ~asked.any(1)
    memory = router.memory
    parts: dict[Site, list[Tensor]] = {site: [] for site in {*memory.writes, *memory.hidden_reads}}
    with torch.no_grad():
        for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
            for site, hidden in router.watch(examine(model), part, parts).items():
                parts[site].append(hidden)
    hidden = {site: torch.cat(found) for site, found in parts.items()}
    written = torch.cat([hidden[site] for site in memory.writes], -1)
    written = written[silent] if bool(silent.any()) else written
    memory.calibrate(written.flatten(0, 1), {site: hidden[site][asked] for site in memory.hidden_reads})


@dataclass
class Batch:
    """Streams to learn from: `input_ids` and `labels`, both `[b, s * segment_length]`."""

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]

    def __repr__(self) -> str:
        return f"Batch({len(self.input_ids):,} streams of {self.input_ids.shape[1]:,} tokens)"


@dataclass
class Step:
    """What happened in a training step: its number from 0, loss, share of labelled tokens right, lr, seconds so far.

    `correct [n]` and `rows [n]` tell the same token by token: whether it was right, and the stream it belongs to.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    correct: Bool[Tensor, " n"] = field(repr=False)
    rows: Int[Tensor, " n"] = field(repr=False)

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.4f}, {self.accuracy:.1%} right, {self.seconds:.1f} s"


def hold_then_fall(progress: float, hold: float = 0.5, floor: float = 0.01) -> float:
    """Learning-rate factor at `progress` in [0, 1]: 1 up to `hold`, then in a straight line down to `floor`."""
    return 1.0 if progress < hold else max(floor, (1 - progress) / (1 - hold))


def train(
    model: nn.Module,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    learning_rate: float = 2e-3,
    schedule: Callable[[float], float] = hold_then_fall,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float = 1.0,
    window: int | None = None,
    bptt_segments: int | None = None,
    average: float = 0.0,
    notes: dict[str, float] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Iterator[Step]:
    """Trains the memory of `model` for `steps` steps of AdamW, yielding after each; stop by leaving the loop.

    The base's own weights train too where it was attached with `freeze=False`.

    `batches(step)` makes the batch of a step: the same step, the same batch, so that a run resumed from `checkpoint`
    (a file, written every `checkpoint_seconds` and at the end) equals one that was not interrupted. What else batches
    depend on, such as the stage of a curriculum, belongs in `notes`, which is kept in the checkpoint.

    With `average` > 0 the memory ends as the running average of its weights over the last fifth of the steps, with
    that decay a step.

    Raises:
        ValueError: nothing trains, neither in the memory nor in the model.
        FloatingPointError: the loss became NaN or infinite.
        StateError: `checkpoint` belongs to another memory.
    """
    memory = router_of(model).memory
    named = {name: parameter for name, parameter in memory.named_parameters() if parameter.requires_grad}
    scales = [memory.rate_scale(name) for name in named]
    # the base's own weights, where it was attached with freeze=False
    base = [parameter for parameter in base_parameters(model).values() if parameter.requires_grad]
    parameters, scales = [*named.values(), *base], [*scales, *[1.0] * len(base)]
    if not parameters:
        raise ValueError(
            "nothing trains: this memory has no weights and the model's own are frozen; attach with freeze=False"
        )
    groups = [{"params": [parameter], "scale": scale} for parameter, scale in zip(parameters, scales, strict=True)]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=betas, weight_decay=weight_decay)
    averages: list[Tensor] = []
    notes = {} if notes is None else notes
    first, spent = _resume(checkpoint, parameters, optimizer, averages, notes) if checkpoint else (0, 0.0)
    memo = FeatureMemo(model)
    begun = saved = time.monotonic()
    for step in range(first, steps):
        rate = learning_rate * schedule(step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = batches(step)
        unrolled = unroll(
            model, batch.input_ids, batch.labels, window=window, bptt_segments=bptt_segments, memo=memo, advance=False
        )
        if not torch.isfinite(unrolled.loss):
            raise FloatingPointError(f"the loss is {unrolled.loss.item()} at step {step}; lower learning_rate or clip")
        optimizer.zero_grad(set_to_none=True)
        (unrolled.loss + unrolled.auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if average and step >= int(0.8 * steps):
            _average(averages, parameters, average)
        if average and step + 1 == steps:
            with torch.no_grad():
                for parameter, mean in zip(parameters, averages, strict=True):
                    parameter.copy_(mean)
        correct, seconds = unrolled.correct, spent + time.monotonic() - begun
        accuracy = correct.float().mean().item()
        yield Step(step, unrolled.loss.item(), accuracy, rate, seconds, correct, unrolled.rows)
        # after the yield, so that the notes tell of this step
        if checkpoint and (time.monotonic() - saved > checkpoint_seconds or step + 1 == steps):
            saved = time.monotonic()
            _save(checkpoint, parameters, optimizer, averages, notes, step + 1, spent + saved - begun)


@torch.no_grad()
def _average(averages: list[Tensor], parameters: list[nn.Parameter], decay: float) -> None:
    if not averages:
        averages += [parameter.detach().clone() for parameter in parameters]
    for mean, parameter in zip(averages, parameters, strict=True):
        mean.lerp_(parameter, 1 - decay)


def _save(
    path: str | Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averages: list[Tensor],
    notes: dict[str, float],
    step: int,
    seconds: float,
) -> None:
    tensors: dict[str, Tensor] = {f"average.{i}": mean for i, mean in enumerate(averages)}
    for i, parameter in enumerate(parameters):
        tensors[f"parameter.{i}"] = parameter
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[parameter].items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, {"content": "training", "step": step, "seconds": seconds, "notes": notes})


def _resume(
    path: str | Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averages: list[Tensor],
    notes: dict[str, float],
) -> tuple[int, float]:
    if not Path(path).is_file():
        return 0, 0.0
    tensors, meta = read_file(path)
    shapes = [tuple(tensors[f"parameter.{i}"].shape) for i in range(len(parameters)) if f"parameter.{i}" in tensors]
    if meta.get("content") != "training" or shapes != [tuple(parameter.shape) for parameter in parameters]:
        raise StateError(f"{path} is not a checkpoint of this memory's training; remove it to start anew")
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            if f"step.{i}" not in tensors:
                continue  # it has had no gradient yet, such as a memory's that is switched off
            moments = {name: tensors[f"{name}.{i}"].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step.{i}"], **moments}
    averages += [tensors[f"average.{i}"].to(p.device) for i, p in enumerate(parameters) if f"average.{i}" in tensors]
    notes.update(meta["notes"])
    return meta["step"], meta["seconds"]
