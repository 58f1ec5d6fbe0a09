"""Models that memories are compared on: small ones made on the spot, or any pretrained one, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SMALL = ("tiny-gpt2", "tiny-llama")


@dataclass(frozen=True)
class Host:
    """`name` is "tiny-gpt2" or "tiny-llama", made with `depth` blocks of `width` and trained together with its memory;
    or the folder or hub id of a pretrained causal model, which stays frozen and brings its tokenizer.

    `deviation` starts a small GPT-2 from a normal distribution of that width instead, input and output embeddings tied.
    """

    name: str = "tiny-gpt2"
    width: int = 64
    depth: int = 2
    heads: int = 4
    deviation: float | None = None

    @property
    def trains(self) -> bool:
        """Whether the host's own weights train."""
        return self.name in SMALL

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Width and number of blocks."""
        if self.trains:
            return self.width, self.depth
        config = AutoConfig.from_pretrained(self.name)
        return config.hidden_size, config.num_hidden_layers

    def described(self) -> dict[str, Any]:
        """For records: a folder by its name alone, since where it lay on one machine means nothing on another."""
        width, depth = self.shape
        known = {"name": self.name if self.trains else self.title, "width": width, "depth": depth}
        return known | ({"heads": self.heads, "deviation": self.deviation} if self.trains else {})

    @property
    def title(self) -> str:
        """For records."""
        if not self.trains:
            return self.name.rstrip("/").rpartition("/")[2]
        return f"{self.name}, {self.depth} blocks, width {self.width}, trained with its memory"

    def make(self, vocabulary: int, positions: int) -> nn.Module:
        """The model; a small one draws its weights from torch's global generator.

        Raises:
            ValueError: a pretrained model with fewer tokens than `vocabulary`.
        """
        if self.name == "tiny-gpt2":
            return tiny_gpt2(vocabulary, positions, self.width, self.depth, self.heads, self.deviation)
        if self.name == "tiny-llama":
            return tiny_llama(vocabulary, self.width, self.depth, self.heads)
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32).eval()
        if model.config.vocab_size < vocabulary:
            raise ValueError(f"{self.name} has {model.config.vocab_size} tokens, the task needs {vocabulary}")
        return model

    def tokenizer(self) -> Any:
        """That of a pretrained model; None for the small ones, which use a task's own vocabulary."""
        return None if self.trains else AutoTokenizer.from_pretrained(self.name)


def tiny_gpt2(
    vocabulary: int, positions: int, width: int, depth: int, heads: int, deviation: float | None = None
) -> GPT2LMHeadModel:
    """A GPT-2 whose embeddings start larger, and whose matrices start as `nn.Linear` does: so small a model then leaves
    the plateau of guessing sooner. With `deviation` it starts as GPT-2 does, but that wide.
    """
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            tie_word_embeddings=deviation is not None,
            initializer_range=deviation or 0.02,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    if deviation is not None:
        return model
    nn.init.normal_(model.transformer.wte.weight, std=0.5)
    nn.init.normal_(model.transformer.wpe.weight, std=0.2)
    for parameter in model.transformer.h.parameters():
        if parameter.ndim == 2:
            bound = parameter.shape[0] ** -0.5  # GPT-2 stores its matrices input first
            nn.init.uniform_(parameter, -bound, bound)
    model.lm_head.reset_parameters()
    return model


def tiny_llama(vocabulary: int, width: int, depth: int, heads: int) -> LlamaForCausalLM:
    """A Llama, with rotary positions, started likewise."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    for module in [*model.model.layers.modules(), model.lm_head]:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


def make_room(model: nn.Module, positions: int, seed: int) -> None:
    """Gives a small GPT-2 places for memory tokens beside its segments. Its other weights, and the places it has, stay
    as they are, so that hosts of several mechanisms begin alike; the new ones are drawn likewise, from `seed`.
    """
    if not isinstance(model, GPT2LMHeadModel) or positions <= model.config.n_positions:
        return
    old = model.transformer.wpe.weight.data
    source = torch.Generator().manual_seed(seed)
    new = old.std() * torch.randn(positions - len(old), old.shape[1], generator=source)
    model.transformer.wpe = nn.Embedding(positions, old.shape[1])
    model.transformer.wpe.weight.data = torch.cat([old, new])
    model.config.n_positions = positions
