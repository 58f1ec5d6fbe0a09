"""What others put around a model and its weights: DDP, FSDP2, `torch.compile`, PEFT, offloading."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mnemic.host.release import GradientCheckpointingLayer

Result = TypeVar("Result")

MEMORY_NAME = "mnemic"
"""The attribute of the trunk under which an attached memory lives."""

ADAPTED = ("base_layer", "original_module", "token_adapter")
"""Under these names PEFT keeps the module that it wraps."""


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


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before FSDP2 made it one of its own."""
    return next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))


def refuse_late(model: nn.Module) -> None:
    """Raises `ValueError` where a memory that is attached now would be left out of what was prepared before."""
    wrapper = None
    if isinstance(model, DistributedDataParallel):
        wrapper = "DistributedDataParallel"
    elif isinstance(model, OptimizedModule) or any(module._compiled_call_impl for module in model.modules()):
        wrapper = "torch.compile"
    elif any(isinstance(module, FSDPModule) for module in model.modules()):
        wrapper = "fully_shard"
    if wrapper is not None:
        raise ValueError(f"{wrapper} has prepared the model without a memory; attach it before")


def compiled_inside(trunk: nn.Module) -> bool:
    """Whether parts of a trunk's blocks, smaller than a block, are compiled by themselves."""
    blocks = [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
    return any(
        isinstance(part, OptimizedModule) or part._compiled_call_impl is not None
        for block in blocks
        for part in block.modules()
        if part is not block
    )


# --- as one forward pass ---------------------------------------------------------------------------------------------


def inner_of(model: nn.Module) -> nn.Module:
    """What calls inside of `as_forward` go to: the module that DDP wraps, or the model itself."""
    eager = model._orig_mod if isinstance(model, OptimizedModule) else model
    return eager.module if isinstance(eager, DistributedDataParallel) else model


def as_forward(model: nn.Module, function: Callable[..., Result], *given: Any) -> Result:
    """`function(*given)`, which calls the model many times or in parts, as one forward pass of what wraps it.

    DDP and FSDP2 prepare the exchange of weights and gradients around the forward of the module that they wrap.
    """
    if isinstance(model, OptimizedModule):  # what runs instead is not what was compiled
        model = model._orig_mod
    if not isinstance(model, DistributedDataParallel | FSDPModule):
        return function(*given)
    inner = inner_of(model)
    own = vars(inner).get("forward")  # accelerate's, where it casts outputs or loads offloaded weights

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            vars(inner)["forward"] = own

    def forward(*given: Any) -> Result:
        restore()
        return function(*given)

    vars(inner)["forward"] = forward
    try:
        return model(*given)
    finally:
        restore()


def gather_for_gradient(block: nn.Module, hidden_btd: Tensor) -> None:
    """Lets FSDP2 gather a block's weights when a gradient reaches what the block itself put out.

    FSDP2 does so when one reaches what left the block after all hooks. A gradient through the memory alone comes from
    what was written, which left before.
    """
    if isinstance(block, FSDPModule) and hidden_btd.requires_grad:

        def gather(gradient: Tensor) -> None:
            block.unshard()

        hidden_btd.register_hook(gather)


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A parameter of the base, and where accelerate keeps its values where it offloaded them."""

    parameter: nn.Parameter
    read: Callable[[], Tensor] | None

    def value(self) -> Tensor:
        """The whole of it: read from where it was offloaded, gathered where it is sharded (on every process at once).

        Raises:
            ValueError: it is on the meta device, and nothing knows its values.
        """
        if not self.parameter.is_meta:
            return whole(self.parameter)
        if self.read is None:
            raise ValueError("the model's weights are on the meta device and nowhere else; load the model first")
        return self.read()


def weights(module: nn.Module, without: str) -> dict[str, Weight]:
    """A module's parameters by the names they have without adapters and compiling; not those of children `without`."""
    found: dict[str, Weight] = {}
    seen: set[nn.Parameter] = set()

    def visit(module: nn.Module, path: str, stored: list[tuple[str, Mapping[str, Tensor]]]) -> None:
        for name in (*ADAPTED, "_orig_mod"):  # the last is torch.compile's
            if (inner := module._modules.get(name)) is not None:
                visit(inner, path, stored)
                return
        stored = stored + [(path, hook.weights_map) for hook in _hooks(module) if getattr(hook, "weights_map", None)]
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                full = path + name
                places = [(map_, full[len(start) :]) for start, map_ in stored]
                known = next((functools.partial(map_.__getitem__, key) for map_, key in places if key in map_), None)
                found[full] = Weight(parameter, known)
        for name, child in module._modules.items():
            if child is not None and name != without:
                visit(child, f"{path}{name}.", stored)

    visit(module, "", [])
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor without a gradient, gathered from all processes where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate reports offloaded weights on `meta` and names their device in a hook."""
    for part in module.modules():
        for hook in _hooks(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
    return next(module.parameters()).device


def _hooks(module: nn.Module) -> Sequence[Any]:
    """What accelerate hangs on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))


# --- what they did to a memory ---------------------------------------------------------------------------------------


def check_whole(memory: nn.Module) -> None:
    """Raises `ValueError` where PEFT put adapters into a memory, or accelerate offloaded its weights."""
    check_present(memory)
    for name, module in memory.named_modules():
        if any(inner in module._modules for inner in ADAPTED):
            raise ValueError(
                f"PEFT put {type(module).__name__} around the memory's {name}, as it takes all it finds in a model; "
                rf'wrap the model first and attach then, or set exclude_modules=r".*\b{MEMORY_NAME}\b.*"'
            )


def misplaced(found: nn.Module | None) -> RuntimeError:
    """The error where something else stands in a memory's place."""
    return RuntimeError(
        f"a {type(found).__name__} stands in the memory's place, as PEFT puts one there with modules_to_save; leave "
        f'"{MEMORY_NAME}" out of them and save the memory with its own save_pretrained'
    )


def check_present(memory: nn.Module) -> None:
    """Raises `ValueError` where accelerate offloaded a memory's weights."""
    first = next(memory.parameters(), None)
    if first is not None and first.is_meta:
        raise ValueError(
            "the memory's weights were offloaded, but a memory is used in every call; attach after the model is "
            f'dispatched, or give "{MEMORY_NAME}" a device in the device_map'
        )


def warn_frozen(memory: nn.Module, trunk: nn.Module) -> None:
    """Warns where others train and nothing of the memory does: what PEFT wraps, it freezes."""
    own = list(memory.parameters())
    if own and not any(p.requires_grad for p in own) and any(p.requires_grad for p in trunk.parameters()):
        warnings.warn(
            "the memory is frozen while other weights train, as PEFT leaves it when it wraps a model that has one; "
            "mnemic.attached(model).memory.requires_grad_(True) lets it train, or attach after wrapping",
            stacklevel=2,
        )
