"""What others put around a model and its weights: DDP, FSDP2, `torch.compile`, PEFT, offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model under DDP, `torch.compile` and PEFT, or the model itself."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # pyright: ignore[reportCallIssue, reportAssignmentType]
        else:
            return model


def synchronises(model: nn.Module) -> bool:
    """Whether processes exchange weights or gradients when this module is called, and only then."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return isinstance(model, DistributedDataParallel | FSDPModule)


def called(model: nn.Module, function: Callable[[nn.Module, Tensor, Tensor], Result], *inputs: Tensor) -> Result:
    """`function(inner, *inputs)` as if it were the forward pass of `model`, so that what wraps it sees one call.

    DDP and FSDP2 prepare the exchange of weights and gradients around the forward of the module that they wrap. What
    calls it more than once, or calls parts of it, has to stand inside.
    """
    while isinstance(model, OptimizedModule):  # what is run inside is no longer what was compiled
        model = model._orig_mod
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    own = vars(inner).get("forward")  # accelerate's, where it casts outputs or loads offloaded weights

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            inner.forward = own

    def forward(*inputs: Tensor) -> Result:
        restore()
        return function(inner, *inputs)

    inner.forward = forward
    try:
        return model(*inputs)
    finally:
        restore()
