"""What `peers.py` compares: training steps of public packages, and of the same or a similar mechanism here.

Both sides do a forward pass and a backward pass over the same tokens, with hosts of one width, depth, number of heads
and feed-forward, the same segments and the same size of memory as far as the package lets it be chosen; every weight
trains, and the gradient passes through all segments. Where the package differs otherwise, it is set to what costs it
least. A pair says what stays different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mnemic.attachment import attach
from mnemic.memories import CONFIGS, MemoryConfig
from mnemic.memories.emt import EMTConfig
from mnemic.memories.fast_weights import FastWeightsConfig, read_pairs, write_pairs
from mnemic.memories.rules import elu_plus_one
from mnemic.memories.titans import TitansConfig
from mnemic.memory import Site
from mnemic.unrolling import unroll

# Shapes: b batch, t time, d width, h heads, k keys' width.


@dataclass(frozen=True)
class Shape:
    """What both sides are given. `slots` is the number of memory slots or tokens, where a mechanism has any."""

    batch: int = 4
    segments: int = 4
    segment: int = 128
    width: int = 256
    depth: int = 4
    heads: int = 4
    vocabulary: int = 256
    slots: int = 16

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    def tokens(self) -> Tensor:
        """`[b, segments * segment + 1]`: the last is only a target."""
        source = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (self.batch, self.segments * self.segment + 1), generator=source)

    def hidden(self) -> Tensor:
        """Hidden states `[b, segments * segment, d]` that want a gradient."""
        source = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, self.segments * self.segment, self.width, generator=source).requires_grad_()


SHAPES = {
    "small": Shape(batch=8, segments=8, segment=64, width=128),
    "wide": Shape(),
}
"""What is measured: the scale of the suites, and twice the width with segments twice as long."""

TINY = Shape(batch=2, segments=3, segment=16, width=32, depth=2, heads=2, vocabulary=32, slots=4)
"""Small enough for tests, and to load what is loaded late before memory is measured."""


@dataclass(frozen=True)
class Side:
    """One side of a pair. `step` does forward and backward, and returns the loss."""

    step: Callable[[], Tensor]
    parameters: Sequence[nn.Parameter]
    config: MemoryConfig | None = None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters)


@dataclass(frozen=True)
class Pair:
    """A package and a mechanism of ours. `scope` is a training step of a model, or the memory alone."""

    package: str
    module: str
    kind: str
    scope: str
    mechanism: str
    differs: str
    theirs: Callable[[Shape], Side]
    ours: Callable[[Shape], Side]

    def obstacle(self) -> str | None:
        """Why this pair cannot be measured; None if it can."""
        if find_spec(self.module) is None:
            return f"{self.package} is not installed: pip install mnemic[peers]"
        if self.kind not in CONFIGS:
            return f"mnemic has no mechanism {self.kind!r}"
        return None

    def version(self) -> str | None:
        """The package's version; None when it is not installed."""
        with suppress(PackageNotFoundError):
            return version(self.package)
        return None


# --- ours ------------------------------------------------------------------------------------------------------------


def llama(shape: Shape) -> nn.Module:
    """A host with rotary positions and a gated feed-forward of 8/3 of its width, as most of the packages have."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.width * 8 // 3,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2(shape: Shape) -> nn.Module:
    """A host with a feed-forward of 4 times its width without gates, and its activation as the packages have it."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=3 * shape.segment + 2 * shape.slots,  # memory takes positions, too
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            activation_function="gelu",
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def model_with(make: Callable[[Shape], MemoryConfig], host: Callable[[Shape], nn.Module]) -> Callable[[Shape], Side]:
    """A training step of a host together with its memory."""

    def side(shape: Shape) -> Side:
        model, config, ids = host(shape), make(shape), shape.tokens()
        attach(model, config, freeze=False)
        # the last token is a target of the package's alone
        ids = ids[:, :-1]

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = unroll(model, ids, ids).loss
            loss.backward()
            return loss.detach()

        return Side(step, list(model.parameters()), config)

    return side


def titans_config(shape: Shape, chunk: int) -> TitansConfig:
    """Two layers with hidden units twice as many as a key is wide, gradients taken every `chunk` tokens."""
    return TitansConfig(segment_length=shape.segment, dim=shape.width, heads=shape.heads, expansion=2, chunk=chunk)


def infini_config(shape: Shape, delta: bool) -> FastWeightsConfig:
    """Infini-attention's own update, linear or with its delta rule."""
    size: dict[str, Any] = {"segment_length": shape.segment, "dim": shape.width, "heads": shape.heads}
    if delta:
        return FastWeightsConfig.infini_attention(**size)
    return FastWeightsConfig(rule="infini", features="elu1", shift=False, **size)


def emt_config(shape: Shape, every_block: bool) -> EMTConfig:
    """Slots of the host's width, read in the middle or in every block; then written from the last one."""
    config = EMTConfig(segment_length=shape.segment, slots=shape.slots, dim=shape.width, heads=shape.heads)
    return config.replace(read_layers=list(range(shape.depth)), write_layer=-1) if every_block else config


def small_config(kind: str) -> Callable[[Shape], MemoryConfig]:
    """A mechanism's own settings for comparisons, with as many slots as the shape says."""

    def make(shape: Shape) -> MemoryConfig:
        return CONFIGS[kind].small(shape.segment, shape.width, shape.slots)

    return make


def compressive_config(shape: Shape) -> MemoryConfig:
    """As many tokens as a segment has and a quarter as many states, of a convolution that learns from attention."""
    settings = {"size": shape.segment, "compressed": shape.segment // 4, "rate": 4, "compression": "convolution"}
    return CONFIGS["compressive"](segment_length=shape.segment, **settings)


def our_titans(shape: Shape, chunk: int) -> Side:
    """Reads and writes of hidden states, segment after segment."""
    config, hidden = titans_config(shape, chunk), shape.hidden()
    memory = config.build(shape.width, 1)

    def step() -> Tensor:
        _clear(memory.parameters(), hidden)
        state, reads = memory.init_state(shape.batch), []
        for segment in hidden.split(shape.segment, 1):
            reads.append(memory.read(Site(0), segment, state))
            state = memory.write(segment, state)
        loss = torch.stack([read.square().mean() for read in reads]).mean()
        loss.backward()
        return loss.detach()

    return Side(step, list(memory.parameters()), config)


def our_infini(shape: Shape, delta: bool) -> Side:
    """Infini-attention's update of given keys and values, and its reads by given queries."""
    inputs = _heads(shape)
    step = _recurrence(inputs, shape, lambda query, key, value, state: _infini_segment(query, key, value, state, delta))
    return Side(step, [], infini_config(shape, delta))


def _infini_segment(query: Tensor, key: Tensor, value: Tensor, state: Any, delta: bool) -> tuple[Tensor | None, Any]:
    read = None
    if state is None:
        state = {"matrix": key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])}
        state["normaliser"] = key.new_zeros(*key.shape[:2], key.shape[-1])
    else:
        read = read_pairs(state, elu_plus_one(query))
    return read, write_pairs(state, elu_plus_one(key), value, delta=delta, correct="segment")


# --- theirs ----------------------------------------------------------------------------------------------------------


def their_mac(shape: Shape, chunk: int) -> Side:
    """`MemoryAsContextTransformer` with a neural memory in one block, without its further residual streams."""
    model = import_module("titans_pytorch").MemoryAsContextTransformer(
        num_tokens=shape.vocabulary,
        dim=shape.width,
        depth=shape.depth,
        dim_head=shape.head,
        heads=shape.heads,
        segment_len=shape.segment,
        neural_memory_segment_len=chunk,
        neural_memory_batch_size=chunk,
        neural_memory_layers=((shape.depth + 1) // 2,),
        neural_memory_kwargs=_neural_memory(shape),
        num_residual_streams=1,
    )
    ids = shape.tokens()
    return _side(model, lambda: model(ids, return_loss=True))


def _neural_memory(shape: Shape) -> dict[str, Any]:
    network = {"depth": 2, "expansion_factor": 2.0}
    return {"dim_head": shape.head, "heads": shape.heads, "default_model_kwargs": network}


def their_neural_memory(shape: Shape, chunk: int) -> Side:
    """`NeuralMemory` over the whole sequence."""
    memory = import_module("titans_pytorch").NeuralMemory(
        dim=shape.width, chunk_size=chunk, batch_size=chunk, **_neural_memory(shape)
    )
    hidden = shape.hidden()

    def forward() -> Tensor:
        hidden.grad = None
        return memory(hidden)[0].square().mean()

    return _side(memory, forward)


def their_infini(shape: Shape, delta: bool) -> Side:
    """`InfiniTransformerWrapper`, its gradient through all segments."""
    package = import_module("infini_transformer_pytorch")
    model = package.InfiniTransformer(
        num_tokens=shape.vocabulary,
        dim=shape.width,
        depth=shape.depth,
        dim_head=shape.head,
        heads=shape.heads,
        use_mem_delta_rule=delta,
    )
    wrapper = package.InfiniTransformerWrapper(
        model, segment_length=shape.segment, detach_mems_every_num_segments=shape.segments
    )
    ids = shape.tokens()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        return wrapper(ids, backward=True).detach()

    return Side(step, list(model.parameters()))


def their_fastweight_memory(shape: Shape, delta: bool) -> Side:
    """`retrieve_from_kv_memories` and `FastweightMemory.create_new_memories` of given queries, keys and values."""
    package = import_module("infini_transformer_pytorch.infini_transformer")
    memory, inputs = package.FastweightMemory(shape.heads, use_mem_delta_rule=delta), _heads(shape)

    def segment(query: Tensor, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor | None, Any]:
        read = None if state is None else package.retrieve_from_kv_memories(F.elu(query) + 1, state)
        return read, memory.create_new_memories(key, value, state)

    return Side(_recurrence(inputs, shape, segment), [])


def their_memformer(shape: Shape) -> Side:
    """`Memformer`, its encoder alone, with a linear head for labels of tokens."""
    model = import_module("memformer").Memformer(
        dim=shape.width,
        num_memory_slots=shape.slots,
        encoder_only=True,
        enc_num_tokens=shape.vocabulary,
        enc_max_seq_len=shape.segment,
        enc_depth=shape.depth,
        enc_heads=shape.heads,
        mem_update_attn_heads=shape.heads,
    )
    head, ids = nn.Linear(shape.width, shape.vocabulary), shape.tokens()

    def forward() -> Tensor:
        memory, losses = None, []
        for part, target in _segments(ids, shape):
            encoded, memory = model(part, mems=memory)
            losses.append(F.cross_entropy(head(encoded).flatten(0, 1), target.flatten()))
        return torch.stack(losses).mean()

    return _side(nn.ModuleList([model, head]), forward)


def their_rmt(shape: Shape) -> Side:
    """`RecurrentMemoryTransformer`, without its further residual streams and keys of the segment before."""
    package = import_module("recurrent_memory_transformer_pytorch")
    model = package.RecurrentMemoryTransformer(
        shape.width,
        num_tokens=shape.vocabulary,
        depth=shape.depth,
        num_memory_tokens=shape.slots,
        seq_len=shape.segment,
        dim_head=shape.head,
        heads=shape.heads,
        use_flash_attn=True,
        use_xl_memories=False,
        num_residual_streams=1,
    )
    wrapper, ids = package.RecurrentMemoryTransformerWrapper(model), shape.tokens()
    return _side(model, lambda: wrapper(ids, return_loss=True)[0])


def their_compressive(shape: Shape) -> Side:
    """`CompressiveTransformer`, without its gated residuals; memories of one segment, compressed by 4."""
    package = import_module("compressive_transformer_pytorch")
    model = package.CompressiveTransformer(
        num_tokens=shape.vocabulary,
        dim=shape.width,
        seq_len=shape.segment,
        depth=shape.depth,
        mem_len=shape.segment,
        cmem_len=shape.segment // 4,
        heads=shape.heads,
        gru_gated_residual=False,
    )
    wrapper, ids = package.AutoregressiveWrapper(model), shape.tokens()
    parameters = list(model.parameters())

    def step() -> Tensor:
        # the package stops the gradient of its keys and values by a call that never lets it start again
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for loss, auxiliary, _ in wrapper(ids, return_loss=True):
            part = (loss + auxiliary).sum() / shape.segments
            part.backward()
            total += part.detach()
        return total

    return Side(step, parameters)


# --- what both are made of -------------------------------------------------------------------------------------------


def _side(model: nn.Module, forward: Callable[[], Tensor]) -> Side:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        return loss.detach()

    return Side(step, list(model.parameters()))


def _segments(ids: Tensor, shape: Shape) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(ids[:, :-1].split(shape.segment, 1), ids[:, 1:].split(shape.segment, 1), strict=True)


def _heads(shape: Shape) -> list[Tensor]:
    """Queries, keys and values `[b, h, t, k]`."""
    source = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.heads, shape.segments * shape.segment, shape.head)
    return [torch.randn(size, generator=source).requires_grad_() for _ in range(3)]


def _recurrence(
    inputs: list[Tensor], shape: Shape, segment: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor | None, Any]]
) -> Callable[[], Tensor]:
    """A step over segments of queries, keys and values; the first has nothing to read."""

    def step() -> Tensor:
        _clear((), *inputs)
        state, reads = None, []
        for query, key, value in zip(*(each.split(shape.segment, 2) for each in inputs), strict=True):
            read, state = segment(query, key, value, state)
            if read is not None:
                reads.append(read)
        # a segment at a time: joining them would cost more than reading them
        loss = torch.stack([read.square().mean() for read in reads]).mean()
        loss.backward()
        return loss.detach()

    return step


def _clear(parameters: Iterable[nn.Parameter], *inputs: Tensor) -> None:
    for tensor in (*parameters, *inputs):
        tensor.grad = None


STEP, ALONE = "training step", "memory alone"
ONE_BLOCK = (
    "Theirs keeps a memory in every block, ours in one; ours has its own projections, theirs takes those of attention."
)
NEURAL = (
    "Theirs reads what the chunk before has left, ours what the segment's start has; momentum, rate and forgetting are "
    "the mean of a chunk's tokens there and each token's own here; their network has a norm and a residual connection."
)

PAIRS: dict[str, Pair] = {
    "titans": Pair(
        "titans-pytorch",
        "titans_pytorch",
        "titans",
        STEP,
        "Titans, chunks of 16",
        f"Memory as context, in one block of each, without memory tokens and further residual streams. {NEURAL}",
        lambda shape: their_mac(shape, 16),
        model_with(lambda shape: titans_config(shape, 16), llama),
    ),
    "titans-segment": Pair(
        "titans-pytorch",
        "titans_pytorch",
        "titans",
        STEP,
        "Titans, a chunk a segment",
        "As above; gradients are taken once a segment by both, and every token reads the segment's start.",
        lambda shape: their_mac(shape, shape.segment),
        model_with(lambda shape: titans_config(shape, shape.segment), llama),
    ),
    "titans-alone": Pair(
        "titans-pytorch",
        "titans_pytorch",
        "titans",
        ALONE,
        "Titans, chunks of 16",
        f"Hidden states in, what is read out. {NEURAL}",
        lambda shape: their_neural_memory(shape, 16),
        lambda shape: our_titans(shape, 16),
    ),
    "titans-segment-alone": Pair(
        "titans-pytorch",
        "titans_pytorch",
        "titans",
        ALONE,
        "Titans, a chunk a segment",
        "As above; gradients are taken once a segment by both, and every token reads the segment's start.",
        lambda shape: their_neural_memory(shape, shape.segment),
        lambda shape: our_titans(shape, shape.segment),
    ),
    "infini": Pair(
        "infini-transformer-pytorch",
        "infini_transformer_pytorch",
        "fast-weights",
        STEP,
        "Infini-attention, linear",
        ONE_BLOCK,
        lambda shape: their_infini(shape, False),
        model_with(lambda shape: infini_config(shape, False), llama),
    ),
    "infini-delta": Pair(
        "infini-transformer-pytorch",
        "infini_transformer_pytorch",
        "fast-weights",
        STEP,
        "Infini-attention, linear and delta",
        ONE_BLOCK,
        lambda shape: their_infini(shape, True),
        model_with(lambda shape: infini_config(shape, True), llama),
    ),
    "infini-alone": Pair(
        "infini-transformer-pytorch",
        "infini_transformer_pytorch",
        "fast-weights",
        ALONE,
        "Infini-attention, linear",
        "Nothing: the same equations of the same queries, keys and values, as the tests check.",
        lambda shape: their_fastweight_memory(shape, False),
        lambda shape: our_infini(shape, False),
    ),
    "infini-delta-alone": Pair(
        "infini-transformer-pytorch",
        "infini_transformer_pytorch",
        "fast-weights",
        ALONE,
        "Infini-attention, linear and delta",
        "Nothing: the same equations of the same queries, keys and values, as the tests check.",
        lambda shape: their_fastweight_memory(shape, True),
        lambda shape: our_infini(shape, True),
    ),
    "memformer": Pair(
        "memformer",
        "memformer",
        "emt",
        STEP,
        "EMT, read in the middle block",
        "Another mechanism with the same parts: slots, attention and a GRU cell. Theirs is an encoder that reads its "
        "slots in every block; ours a decoder that reads them in one, with a feed-forward of its own.",
        their_memformer,
        model_with(lambda shape: emt_config(shape, False), gpt2),
    ),
    "memformer-every-block": Pair(
        "memformer",
        "memformer",
        "emt",
        STEP,
        "EMT, read in every block",
        "As above, but ours reads in every block, too, and so has a second feed-forward in every block.",
        their_memformer,
        model_with(lambda shape: emt_config(shape, True), gpt2),
    ),
    "rmt": Pair(
        "recurrent-memory-transformer-pytorch",
        "recurrent_memory_transformer_pytorch",
        "rmt",
        STEP,
        "RMT",
        "Without further residual streams and keys of the segment before. Theirs has a gated feed-forward with as many "
        "weights, and mixes values of the first block into the others'; both have learned positions.",
        their_rmt,
        model_with(small_config("rmt"), gpt2),
    ),
    "compressive": Pair(
        "compressive-transformer-pytorch",
        "compressive_transformer_pytorch",
        "compressive",
        STEP,
        "Compressive Transformer",
        "Without gated residuals. In theirs no gradient passes between segments, and after the first compression keys "
        "and values train no more: it detaches their weights in place; here they are set to train before each step.",
        their_compressive,
        model_with(compressive_config, gpt2),
    ),
}
"""What is compared, by name."""
