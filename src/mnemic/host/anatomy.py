"""Finding the parts of a Hugging Face model that a memory needs, or refusing the model by name."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

COMPUTED_ROTARY_LIMIT = 2**17
"""Rotary angles are computed in float32: past this position neighbours are no longer told apart to 0.01 rad."""

COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "mpnet")
"""Encoders whose first position is `pad_token_id + 1`, so that their table holds fewer."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    `positions` is how many positions the host has (None where positions are relative to the keys at hand, ALiBi);
    `takes_positions` whether its forward accepts `position_ids`; `causal` is False for encoders;
    `slides` is True where some layers see only the latest keys, counted as they lie.
    """

    trunk: PreTrainedModel
    blocks: nn.ModuleList
    width: int
    dtype: torch.dtype
    causal: bool
    positions: int | None
    takes_positions: bool
    slides: bool


def examine(model: nn.Module) -> Anatomy:
    """Finds the trunk (the stack without its head) and its blocks; raises `ValueError` for a family not served."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ValueError(f"{name} is not a Hugging Face transformer; attach to a PreTrainedModel")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, which mnemic does not serve yet; use a decoder or an encoder")
    base = unwrapped(model)
    trunk = base.get_decoder() if isinstance(base, PreTrainedModel) else None
    if not isinstance(trunk, PreTrainedModel):
        trunk = base.base_model  # some encoders name their head a decoder
    assert isinstance(trunk, PreTrainedModel)
    text = trunk.config.get_text_config()
    if not isinstance(trunk.get_input_embeddings(), nn.Embedding):
        raise ValueError(f"{name} does not read tokens; mnemic serves text models")
    lists = [
        module
        for module in trunk.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == text.num_hidden_layers
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(lists) != 1:
        raise ValueError(f"{name} has {len(lists)} stacks of {text.num_hidden_layers} blocks where mnemic expects one")
    arguments = inspect.signature(inspect.unwrap(type(trunk).forward)).parameters
    causal = _is_causal(trunk, text.model_type)
    attends = [any("Attention" in type(module).__name__ for module in block.modules()) for block in lists[0]]
    if not all(attends) or (causal and "past_key_values" not in arguments):
        raise ValueError(f"{name} has blocks without attention, whose recurrent cache mnemic does not serve yet")
    takes_positions = "position_ids" in arguments
    if getattr(text, "alibi", False) or not takes_positions:
        positions = None
    elif any("Rotary" in type(module).__name__ for module in trunk.modules()):
        positions = COMPUTED_ROTARY_LIMIT
    else:
        positions = text.max_position_embeddings
    slides = getattr(text, "sliding_window", None) is not None
    return Anatomy(trunk, lists[0], text.hidden_size, trunk.dtype, causal, positions, takes_positions, slides)


def _is_causal(trunk: PreTrainedModel, model_type: str) -> bool:
    said = [module.is_causal for module in trunk.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if said:
        return all(said)
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def trained_positions(model: nn.Module) -> int | None:
    """The length the base was trained for, from its config; None when the config names none."""
    text = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    positions = getattr(text, "max_position_embeddings", None)
    if text.model_type in COUNTS_FROM_PADDING and positions is not None:
        positions -= text.pad_token_id + 1
    return positions


def fingerprint(model: nn.Module) -> str:
    """A short hash that tells one base model from another: its class, parameter names, shapes and a sample of values.

    Values enter in bfloat16, 32 from each parameter, so a model loaded in float32 and in bfloat16 is the same base,
    and a memory or an adapter attached to it changes nothing. Parameters offloaded to `meta` enter by name and shape.
    """
    digest = hashlib.sha256(type(unwrapped(model)).__name__.encode())
    for name, parameter in sorted(base_parameters(model).items()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 32)][:32].to(torch.bfloat16).view(torch.uint8)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue, reportReturnType]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters under their own names: without the memory's, without adapters'."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in unwrapped(model).named_parameters()
        if f"{MEMORY_NAME}." not in name and "lora_" not in name
    }


MEMORY_NAME = "mnemic"
"""The attribute of the trunk under which an attached memory lives."""
