"""What mnemic stands on in `transformers`, in one place: the parts it takes, and what releases call the cache.

From 5.24 on a cache is passed as `cache=` and comes back as `.cache`; before, and in models whose code comes with a
checkpoint, the name is `past_key_values`.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import transformers
from torch import nn

KNOWN = (5, 24)
"""The newest release (major, minor) that the tests have seen."""
VERSION = transformers.__version__
RELEASE = tuple(int(number) for number in re.findall(r"\d+", VERSION)[:2])


def newer(problem: str) -> str:
    """A problem in words; where `transformers` is newer than any release known, with that and what to do."""
    if RELEASE <= KNOWN:
        return problem
    known = ".".join(map(str, KNOWN))
    return (
        f"{problem}. transformers {VERSION} is newer than {known}, the newest that this mnemic was "
        f"tested with: take a newer mnemic, or pip install 'transformers=={known}.*'"
    )


try:
    from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.generation.utils import GenerationMixin
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError(newer(f"mnemic needs a part of transformers that is not there: {error}")) from error

CACHE_NAMES = ("cache", "past_key_values")
"""What a cache is called, newest first."""
KEEP = "logits_to_keep"
"""The argument by which a model computes some logits only."""
_prepare: Any = vars(GenerationMixin)["prepare_inputs_for_generation"]
_generates = inspect.signature(_prepare).parameters
GENERATE_CACHE = next((name for name in CACHE_NAMES if name in _generates), CACHE_NAMES[0])
"""The name under which `generate` takes it."""
OUTPUT_CACHE = next(
    (name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__), CACHE_NAMES[0]
)
"""The field of a model's output that holds it."""
CHECKPOINTS_WITHOUT_GRADIENT = RELEASE < (5, 24)
"""Whether gradient checkpointing drops a base's keys in training mode when no gradient is asked for, too."""


@functools.cache
def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of a module class's forward arguments, in their order, without `self`."""
    return tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)[1:]


def cache_name(module: nn.Module) -> str | None:
    """Under which name a module's own forward takes a cache; None where it takes none."""
    names = parameter_names(type(module))
    return next((name for name in CACHE_NAMES if name in names), None)


def renamed(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with the cache under the name that the module has for it, whatever the caller called it."""
    own = cache_name(module)
    given = [name for name in CACHE_NAMES if name in arguments and name != own]
    if own is None or not given:
        return arguments
    arguments = dict(arguments)
    caches = [cache for name in given if (cache := arguments.pop(name)) is not None]
    return {**arguments, own: arguments.get(own) if arguments.get(own) is not None else next(iter(caches), None)}


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "Cache",
    "DummyLayer",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GradientCheckpointingLayer",
    "ModelOutput",
]
