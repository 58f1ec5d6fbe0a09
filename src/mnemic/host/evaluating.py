"""A call as in evaluation, of a model that may be training: no dropout, whatever mode its modules are in.

The mode is a mark on modules that everybody shares: to change it would change what another thread trains. So dropout is
left out of what this thread asks of torch, and nothing is marked. What some modules do in training besides (they skip
layers, add noise, drop keys to compute them again) is in their own code: there, and only while they train, the setting
that asks for it is 0 for the time of the call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_TRAINING = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
DROPOUT: dict[Callable[..., Any], tuple[str, int, Any]] = {
    torch.dropout: ("train", 2, False),
    F.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
    **dict.fromkeys(_TRAINING, ("training", 2, False)),
}
"""Functions that drop out: the argument that asks for it, its place, and the value that does not."""
BESIDES = (
    "gradient_checkpointing",
    "layerdrop",
    "jitter_noise",
    "router_jitter_noise",
    "input_jitter_noise",
    "moe_jitter_eps",
)
"""Settings of modules that ask for something else than dropout in training."""


class WithoutDropout(TorchFunctionMode):
    """Within it, dropout in this thread is the identity."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function, told that nothing trains."""
        given = {**(kwargs or {})}
        if func in DROPOUT:
            name, place, value = DROPOUT[func]
            if len(args) > place:
                args = (*args[:place], value, *args[place + 1 :])
            else:
                given[name] = value
        return func(*args, **given)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, this thread runs `model` as in evaluation."""
    modules = list(model.modules())
    if not any(module.training for module in modules):
        yield
        return
    with WithoutDropout(), _set_aside(modules):
        yield


_lock = threading.Lock()
_aside: dict[tuple[int, str], tuple[int, Any]] = {}
"""Of every setting that is 0 now, by module and name: how many calls want it so, and its value."""


@contextlib.contextmanager
def _set_aside(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the `BESIDES` of these modules are 0; the last of several calls at once puts them back."""
    held: list[tuple[nn.Module, str]] = []
    try:
        with _lock:
            for module in modules:
                for name in BESIDES:
                    if (own := vars(module).get(name)) or (id(module), name) in _aside:
                        count, value = _aside.get((id(module), name), (0, own))
                        _aside[id(module), name] = count + 1, value
                        held.append((module, name))
                        setattr(module, name, type(value)(0))
        yield
    finally:
        with _lock:
            for module, name in held:
                count, value = _aside.pop((id(module), name))
                if count > 1:
                    _aside[id(module), name] = count - 1, value
                else:
                    setattr(module, name, value)
