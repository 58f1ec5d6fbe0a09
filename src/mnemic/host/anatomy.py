"""Finding the parts of a Hugging Face model that a memory needs, or refusing the model by name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from mnemic.host.release import (
    CACHE_NAMES,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    GradientCheckpointingLayer,
    cache_name,
    newer,
    parameter_names,
)
from mnemic.host.remembered import remembered
from mnemic.host.wrappers import MEMORY_NAME, own_class, unwrapped, weights

SAMPLE = 32
"""Values of each parameter in a base's fingerprint."""
COMPUTED_ROTARY_LIMIT = 2**17
"""Rotary angles are computed in float32: past this position neighbours are no longer told apart to 0.01 rad."""

COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "mpnet")
"""Encoders whose first position is `pad_token_id + 1`, so that their table holds fewer."""

FIRST_TOKENS = 32
"""Rows of embeddings and heads that tell a base: what is added to them comes behind."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    `positions` is how many positions the host has (None where positions are relative to the keys at hand, ALiBi);
    `takes_positions` whether its forward accepts `position_ids`; `causal` is False for encoders;
    `slides` is True where some layers see only the latest keys, counted as they lie; `cache_name` is what the trunk
    calls the cache that it takes ("" for an encoder that takes none). `head` makes logits of what leaves the trunk, in
    the forward of `model`; None where there is none.
    """

    model: PreTrainedModel
    head: nn.Module | None
    trunk: PreTrainedModel
    blocks: nn.ModuleList
    width: int
    dtype: torch.dtype
    causal: bool
    positions: int | None
    takes_positions: bool
    slides: bool
    cache_name: str


def examine(model: nn.Module) -> Anatomy:
    """Finds the trunk (the stack without its head) and its blocks; raises `ValueError` for a family not served."""
    base, name = unwrapped(model), type(model).__name__
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{name} is not a Hugging Face transformer; attach to a PreTrainedModel")
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, which mnemic does not serve yet; use a decoder or an encoder")
    trunk = base.get_decoder()
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
        and all(isinstance(getattr(block, "_orig_mod", block), GradientCheckpointingLayer) for block in module)
    ]
    if len(lists) != 1:
        stacks = f"{name} has {len(lists)} stacks of {text.num_hidden_layers} blocks where mnemic expects one"
        raise ValueError(newer(stacks))
    causal = _is_causal(trunk, text.model_type)
    _check_attention(name, lists[0])
    if causal:
        _check_keys(name, text)
    if causal and cache_name(trunk) is None:
        looked_for = " or ".join(CACHE_NAMES)
        raise ValueError(newer(f"{type(trunk).__name__} takes no cache of keys ({looked_for}), which a memory rides"))
    takes_positions = "position_ids" in parameter_names(type(trunk))
    if getattr(text, "alibi", False) or not takes_positions:
        positions = None
    elif any(_computes_rotations(module) for module in trunk.modules()):
        positions = COMPUTED_ROTARY_LIMIT
    else:
        positions = text.max_position_embeddings
    slides = getattr(text, "sliding_window", None) is not None
    return Anatomy(
        base,
        base.get_output_embeddings() if base is not trunk else None,
        trunk,
        lists[0],
        text.hidden_size,
        trunk.dtype,
        causal,
        positions,
        takes_positions,
        slides,
        cache_name(trunk) or "",
    )


def _check_attention(name: str, blocks: nn.ModuleList) -> None:
    """Raises `ValueError` where some block has no attention."""
    lacking = [i for i, block in enumerate(blocks) if not any("Attention" in type(m).__name__ for m in block.modules())]
    if lacking:
        raise ValueError(
            f"{name} has blocks without attention (block {lacking[0]} is the first), whose recurrent cache mnemic does "
            "not serve yet"
        )


def attention_of(block: nn.Module) -> nn.Module | None:
    """The module of a block that calls the attention function; None where there is not exactly one."""
    found = [
        m for m in block.modules() if "Attention" in type(m).__name__ and isinstance(m.__dict__.get("layer_idx"), int)
    ]
    return found[0] if len(found) == 1 else None


def _check_keys(name: str, config: Any) -> None:
    """Raises `ValueError` where some block keeps something other than keys and values from call to call."""
    for place, layer in enumerate(DynamicCache(config=config).layers):
        # subclasses of these keep a recurrent state or an index beside the keys
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise ValueError(
                newer(f"{name} keeps a {type(layer).__name__} for block {place}; mnemic serves keys and values only")
            )


def _computes_rotations(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding for any position, not one that looks them up in a table (GPT-J)."""
    return "Rotary" in type(module).__name__ and any("inv_freq" in name for name in module._buffers)


def _is_causal(trunk: PreTrainedModel, model_type: str) -> bool:
    said = [module.is_causal for module in trunk.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if said:
        return all(said)
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def trained_positions(model: nn.Module) -> int | None:
    """The length the base was trained for, from its config; None when the config names none."""
    text = unwrapped(model).config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    positions = getattr(text, "max_position_embeddings", None)
    if text.model_type in COUNTS_FROM_PADDING and positions is not None:
        positions -= text.pad_token_id + 1
    return positions


def fingerprint(model: nn.Module) -> str:
    """A short hash that tells one base model from another: its class, parameter names, shapes and a sample of values.

    Values enter in bfloat16, 32 from each parameter, so a model loaded in float32 and in bfloat16 is the same base,
    and a memory or an adapter attached to it changes nothing. One whose wider weights were rounded to float16 is
    another: what float16 rounds, bfloat16 rounds again. Of what has a row for each token, the first rows count: one
    with tokens added (`resize_token_embeddings`) is the same base. Offloaded weights are read from where they are;
    sharded ones are gathered one by one, so all processes must ask at once.

    Raises:
        ValueError: weights on the meta device that were never loaded.
    """
    return fingerprints(model)[0]


def fingerprints(model: nn.Module) -> tuple[str, str]:
    """Those that a file of this model may have: `fingerprint`, and the one that was written while every row counted."""
    base = unwrapped(model)
    first, second = remembered(base, lambda: " ".join(_fingerprints(base)), without=MEMORY_NAME).split()
    return first, second


def _fingerprints(base: nn.Module) -> tuple[str, str]:
    kind = own_class(base).__name__.encode()
    first, second = hashlib.sha256(kind), hashlib.sha256(kind)
    assert isinstance(base, PreTrainedModel)
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    by_token = {id(parameter) for end in ends for parameter in end.parameters()}
    tied = getattr(base, "all_tied_weights_keys", {})  # offloading unties them
    for name, weight in sorted(weights(base, MEMORY_NAME).items()):
        if name not in tied:
            value, shape = weight.value(), tuple(weight.parameter.shape)
            whole = f"{name}{shape}".encode(), _sample(value)
            few = whole
            if id(weight.parameter) in by_token:
                few = f"{name}{shape[1:]}".encode(), _sample(value[:FIRST_TOKENS])
            for digest, parts in ((first, few), (second, whole)):
                for part in parts:
                    digest.update(part)
    return first.hexdigest()[:16], second.hexdigest()[:16]


def _sample(tensor: Tensor) -> bytes:
    """Values from all over a tensor of any dtype and strides, in bfloat16 where torch can compute with them."""
    flat = tensor.flatten()
    try:
        few = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to(torch.bfloat16)
    except NotImplementedError:  # several numbers packed into a byte
        flat = flat.view(torch.uint8)
        few = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
    return few.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters under their own names: without the memory's, without adapters'."""
    return {name: weight.parameter for name, weight in weights(unwrapped(model), MEMORY_NAME).items()}
