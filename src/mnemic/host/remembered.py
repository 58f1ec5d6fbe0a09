"""What was computed from a module's weights, remembered while they are the same.

Hashes of weights stand in every session, and to hash a model takes longer than to load one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLE = 8
"""Values of each tensor that are looked at, from its middle, side by side: each place costs a wait for memory."""


@dataclass(frozen=True)
class Seen:
    """How the weights looked when `answer` was computed.

    `marks` are the tensors' names, identities, versions (which count writes) and places. Writes through `.data` count
    for none of these, so the bytes `values` of the views `samples`, joined on each device, are compared too. The views
    keep no tensor alive, but where its `.data` is replaced they keep what was there until somebody asks again.
    """

    answer: str
    marks: list[str | int]
    samples: list[list[Tensor]]
    values: list[Tensor]
    alive: list[weakref.ref[Tensor]]


_seen: weakref.WeakKeyDictionary[nn.Module, Seen] = weakref.WeakKeyDictionary()


def remembered(module: nn.Module, compute: Callable[[], str], without: str = "") -> str:
    """`compute()`, or what it gave before if no parameter and no buffer of `module` has changed since.

    Submodules named `without` are left out. Weights that are not simply in memory (sharded, offloaded, packed) are not
    remembered.
    """
    (names, tensors), seen = _tensors(module, without), _seen.get(module)
    try:
        marks: list[str | int] = [*names, *map(id, tensors)]
        marks += [tensor._version for tensor in tensors]
        marks += [tensor.data_ptr() for tensor in tensors]
    except RuntimeError:  # inference tensors count no writes
        return compute()
    if seen is not None and seen.marks == marks and all(map(torch.equal, _values(seen.samples), seen.values)):
        return seen.answer
    if not all(map(_simple, tensors)):
        return compute()
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(_sample(tensor))
    samples = list(groups.values())
    values = _values(samples)
    answer = compute()
    forget = functools.partial(_forget, weakref.ref(module))
    _seen[module] = Seen(answer, marks, samples, values, [weakref.ref(tensor, forget) for tensor in tensors])
    return answer


def _tensors(module: nn.Module, without: str) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of all modules. It is asked for every session, and a model has hundreds of them."""
    names: list[str] = []
    found: list[Tensor | None] = []
    todo: list[nn.Module | None] = [module]
    for each in todo:  # which grows on the way
        if each is None:
            continue
        inside = each._modules
        for held in (each._parameters, each._buffers):
            if held:
                names += held
                found += held.values()
        if inside:
            todo += [inside[name] for name in inside if name != without] if without in inside else inside.values()
    return names, [tensor for tensor in found if tensor is not None]


def _simple(tensor: Tensor) -> bool:
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided
    return plain and tensor.device.type != "meta" and tensor.is_contiguous()


def _sample(tensor: Tensor) -> Tensor:
    few = tensor.detach().flatten()[max(0, tensor.numel() - SAMPLE) // 2 :][:SAMPLE]
    return few.view(torch.uint8)  # not every dtype can be compared, and NaN equals nothing


def _values(samples: list[list[Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.cat(group) for group in samples]


def _forget(module: weakref.ref[nn.Module], _: object) -> None:
    # a tensor is gone: another may get its identity, and views of it must not keep its values
    if (found := module()) is not None:
        _seen.pop(found, None)
