"""How `language.py` trains: a memory on a frozen base, or both together, with streams carried from step to step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mnemic.attachment import Attachment
from mnemic.memories.memoria import Memoria
from mnemic.state import StateError, read_file, write_file
from mnemic.stream import Stream
from mnemic.tasks.documents import DocumentBatch, DocumentStream, Tokens
from mnemic.training import hold_then_fall
from mnemic.unrolling import IGNORED, unroll

CHECKPOINT_SECONDS = 60.0


@dataclass
class Recipe:
    """How model or memory are trained: `steps` of AdamW on `rows` streams, `chunk` segments a step.

    The base is first trained for `alone` steps without a memory: one that predicts nothing yet has no use for what it
    cannot see. `sharp` is how sharply the abstractor attends when its training begins (see `spread`); 0 leaves it as it
    is made. Streams read excerpts of `excerpt` segments. Their memory is carried from step to step and begins again
    with every excerpt; gradients stay within a step. Rates rise over `warm` steps, hold and fall.
    """

    steps: int
    rows: int = 16
    chunk: int = 4
    excerpt: int = 64
    learning_rate: float = 2e-3
    warm: int = 50
    hold: float = 0.5
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    alone: int = 0
    sharp: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * min(1.0, (step + 1) / self.warm) * hold_then_fall(step / self.steps, self.hold)


def small_model(vocabulary: int, length: int, seed: int, layers: int, width: int) -> nn.Module:
    """A Llama with random weights, for one segment. They begin larger than usual, as it has few steps to learn."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
    )


def fit(
    model: nn.Module,
    excerpts: Sequence[Tokens],
    length: int,
    recipe: Recipe,
    seed: int,
    attachment: Attachment | None = None,
    advance: Callable[..., None] = lambda steps, **values: None,
    checkpoint: Path | None = None,
) -> float:
    """Trains everything of the model that is not frozen; with the memory, if it has one. Returns seconds.

    Without an attachment segments are rows of their own, and the same tokens are predicted. A run that was stopped goes
    on from `checkpoint`, with the streams as they stood.
    """
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=recipe.betas, weight_decay=recipe.weight_decay)
    chunks = DocumentStream(excerpts, recipe.rows, recipe.chunk * length, seed)
    first, spent, stream = resume(checkpoint, parameters, optimizer) if checkpoint else (0, 0.0, None)
    begun = saved = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        if attachment is None:
            loss = alone(model, chunks[step], length)
        else:
            loss, stream = carried(attachment, chunks[step], stream)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower learning_rate or clip")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        advance(1, loss=loss.item())
        if checkpoint and (time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == recipe.steps):
            saved = time.monotonic()
            keep(checkpoint, parameters, optimizer, stream, step + 1, spent + saved - begun)
    return spent + time.monotonic() - begun


def keep(
    path: Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    stream: Stream | None,
    step: int,
    seconds: float,
) -> None:
    """Writes what `resume` needs to go on behind `step` steps."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(parameters):
        tensors[f"parameter.{i}"] = parameter
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[parameter].items()}
    meta: dict[str, Any] = {"content": "language training", "step": step, "seconds": seconds}
    if stream is not None:
        tensors |= {f"stream.{name}": tensor for name, tensor in stream.tensors().items()}
        meta["stream"] = {"counts": stream.counts, "written": stream.written, "seen": stream.seen}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, meta)


def resume(
    path: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float, Stream | None]:
    """Steps and seconds of the checkpoint and its streams; nothing done where there is none."""
    if not path.is_file():
        return 0, 0.0, None
    tensors, meta = read_file(path)
    shapes = [tuple(tensors[f"parameter.{i}"].shape) for i in range(len(parameters)) if f"parameter.{i}" in tensors]
    if meta.get("content") != "language training" or shapes != [tuple(each.shape) for each in parameters]:
        raise StateError(f"{path} is not a checkpoint of this training; remove it to start anew")
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            optimizer.state[parameter] = {name: tensors[f"{name}.{i}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    stream = None
    if "stream" in meta:
        named = {name.removeprefix("stream."): tensor for name, tensor in tensors.items() if name.startswith("stream.")}
        state = {name.removeprefix("state."): named[name] for name in named if name.startswith("state.")}
        ledgers = {name: tuple(values) for name, values in meta["stream"].items()}
        stream = Stream(state, named["waiting"], **ledgers, ids=named.get("ids"))
    return meta["step"], meta["seconds"], stream


@torch.no_grad()
def spread(attachment: Attachment, excerpts: Sequence[Tokens], sharp: float) -> None:
    """Scales a new Memoria's abstractor until its attention has scores of deviation `sharp` within a segment and its
    engrams entries of deviation 1 over segments.

    With usual weights its attention is even: all engrams are the mean of their segment, and small beside the biases of
    those who read them, so that a training this short finds next to nothing there.
    """
    memory, length = attachment.memory, attachment.router.segment_length
    assert isinstance(memory, Memoria)
    ids = torch.cat([excerpt.ids[: 16 * length] for excerpt in excerpts[:16]]).view(-1, length)
    made = memory.abstractor
    hidden = attachment.router.watch(attachment.anatomy, ids, memory.writes)[memory.writes[-1]]
    normal = made.norm(hidden)
    made.query.mul_(sharp / (made.query @ made.key.weight @ normal.transpose(1, 2)).std(-1).mean())
    weight = (made.query @ made.key.weight @ normal.transpose(1, 2)).softmax(-1)
    made.value.weight.div_(made.value(weight @ normal).std(0).mean())
    made.contract.bias.zero_()
    made.contract.weight.div_(made(hidden, None).std(0).mean())


def alone(model: nn.Module, batch: DocumentBatch, length: int) -> Tensor:
    """The loss without a memory, of the tokens that `carried` predicts."""
    ids = batch.input_ids.unflatten(1, (-1, length)).flatten(0, 1)
    targets = batch.targets.clone()
    targets[:, -1] = IGNORED  # `unroll` is not told the token behind its last
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def carried(attachment: Attachment, batch: DocumentBatch, stream: Stream | None) -> tuple[Tensor, Stream]:
    """The loss with the memory that `stream` carries, and the stream behind the batch."""
    begins = batch.fresh.nonzero().flatten().tolist()
    if stream is not None and begins:
        stream = stream.reset(attachment.memory, begins)
    unrolled = unroll(attachment.model, batch.input_ids, batch.input_ids, stream=stream)
    return unrolled.loss, unrolled.stream.detach()
