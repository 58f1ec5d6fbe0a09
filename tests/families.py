"""Tiny random models of the families that the matrix runs over: width 64, 2 blocks, 97 tokens, 256 positions."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

VOCABULARY, WIDTH, DEPTH, POSITIONS = 97, 64, 2, 256

COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # the usual 0.02 makes a model this narrow all but blind to order: wrong positions would pass unseen
    "initializer_range": 0.125,
}
# the older configs name the same things their own way
GPT = {
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_positions": POSITIONS,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.125,
}
GROUPED = {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """How one family is built, and what its model can be asked to do.

    `positions`: "rotary", "learned" or "alibi". `packs`: packed documents are kept apart by the base itself.
    `sliding`: the base has layers that see only a part of the window.
    """

    config: type
    model: type
    settings: dict[str, Any]
    positions: str = "rotary"
    packs: bool = True
    sliding: int | None = None
    static: bool = True


ENCODERS = {
    "bert": Family(hf.BertConfig, hf.BertForMaskedLM, COMMON, positions="learned"),
    # RoBERTa counts positions from padding_idx + 1, so it needs one more than padding_idx + its length
    "roberta": Family(hf.RobertaConfig, hf.RobertaForMaskedLM, COMMON, positions="learned"),
}
DECODERS = {
    "gpt2": Family(hf.GPT2Config, hf.GPT2LMHeadModel, GPT, positions="learned"),
    "llama": Family(hf.LlamaConfig, hf.LlamaForCausalLM, COMMON | GROUPED),
    "mistral": Family(hf.MistralConfig, hf.MistralForCausalLM, COMMON | GROUPED | {"sliding_window": 16}, sliding=16),
    "qwen2": Family(hf.Qwen2Config, hf.Qwen2ForCausalLM, COMMON | GROUPED),
    "qwen3": Family(hf.Qwen3Config, hf.Qwen3ForCausalLM, COMMON | GROUPED | {"head_dim": 16}),
    "gpt_neox": Family(hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, COMMON),
    "opt": Family(
        hf.OPTConfig,
        hf.OPTForCausalLM,
        COMMON | {"ffn_dim": 128, "word_embed_proj_dim": WIDTH, "init_std": 0.125},
        positions="learned",
        packs=False,
    ),
    "gemma2": Family(
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        COMMON | GROUPED | {"head_dim": 16, "sliding_window": 16},
        sliding=16,
    ),
    "gemma3": Family(
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        COMMON
        | GROUPED
        | {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        sliding=16,
    ),
    "phi": Family(hf.PhiConfig, hf.PhiForCausalLM, COMMON),
    "mixtral": Family(
        hf.MixtralConfig,
        hf.MixtralForCausalLM,
        COMMON | GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "phi3": Family(hf.Phi3Config, hf.Phi3ForCausalLM, COMMON | GROUPED),
    "stablelm": Family(hf.StableLmConfig, hf.StableLmForCausalLM, COMMON | GROUPED),
    "olmo2": Family(hf.Olmo2Config, hf.Olmo2ForCausalLM, COMMON | GROUPED),
    "granite": Family(hf.GraniteConfig, hf.GraniteForCausalLM, COMMON | GROUPED),
    "starcoder2": Family(
        hf.Starcoder2Config, hf.Starcoder2ForCausalLM, COMMON | GROUPED | {"sliding_window": 16}, sliding=16
    ),
    "cohere": Family(hf.CohereConfig, hf.CohereForCausalLM, COMMON | GROUPED | {"logit_scale": 1.0}),
    # its first block rotates and its second has no positions at all
    "smollm3": Family(hf.SmolLM3Config, hf.SmolLM3ForCausalLM, COMMON | GROUPED | {"no_rope_layers": [1, 0]}),
    "qwen3_moe": Family(
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        COMMON | GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "falcon": Family(hf.FalconConfig, hf.FalconForCausalLM, COMMON, packs=False),
    # GPT-J rotates by a table of sines with `n_positions` rows
    "gptj": Family(hf.GPTJConfig, hf.GPTJForCausalLM, GPT | {"rotary_dim": 8}, positions="learned"),
    # Bloom builds its biases from the 2-D mask, which a static cache does not give
    "bloom": Family(hf.BloomConfig, hf.BloomForCausalLM, GPT, positions="alibi", packs=False, static=False),
}
FAMILIES = DECODERS | ENCODERS


@functools.cache
def _built(name: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> torch.nn.Module:
    family = FAMILIES[name]
    torch.manual_seed(seed)
    changed = {key: list(value) if isinstance(value, tuple) else value for key, value in changes}
    return family.model(family.config(**{**family.settings, **changed})).eval()


def make(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of the family, in eval mode, its config changed (tuples for lists); every call returns a copy."""
    return copy.deepcopy(_built(name, seed, tuple(sorted(changes.items()))))
