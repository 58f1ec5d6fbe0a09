"""Arithmetic whose result for one row does not depend on what else is in the batch, nor on padding.

The libraries' own products do not have that property: how a sum is split depends on the shapes of the call, so the same
row gives other last bits in another batch, or behind other padding. Here every sum is taken in order, one term after
another, so that zeros in front, between and behind change nothing, and every function of single values is taken on
whole vectors. What differs in a single bit under this arithmetic differs in what was computed, not in how.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
VECTOR = 64
"""Elements in a step of the vectorised loops, at most: what is left over after whole ones is computed otherwise."""


@contextlib.contextmanager
def ordered() -> Iterator[None]:
    """Within it sums are taken in order."""
    with sdpa_kernel(SDPBackend.MATH), Ordered():
        yield


class Ordered(TorchDispatchMode):
    """Replaces what sums, and pads what computes value by value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (own := OWN.get(func)) is not None:
            return own(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in BY_VECTORS:
            return by_vectors(func, args, kwargs)
        if name.removesuffix("_") in BY_VECTORS:  # in place
            return args[0].copy_(by_vectors(getattr(aten, name.removesuffix("_")), args, kwargs))
        return func(*args, **kwargs)


def by_vectors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """A function of single values, its arguments laid out in whole vectors."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    count = math.prod(shape)
    if len(shape) == 0 or count == 0:
        return func(*args, **kwargs)

    def laid_out(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return torch.nn.functional.pad(value.expand(shape).reshape(-1), (0, -count % VECTOR), value=1)

    return func(*map(laid_out, args), **kwargs)[:count].view(shape)


def in_order(terms: Tensor, dims: Sequence[int] | int | None, keepdim: bool = False) -> Tensor:
    """The sum over `dims`, the first term first, as `cumsum` takes it."""
    dims = range(terms.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    for dim in dims:
        padded = terms if terms.shape[dim] else terms.new_zeros([*terms.shape[:dim], 1, *terms.shape[dim:][1:]])
        terms = padded.cumsum(dim).narrow(dim, -1, 1)
    if keepdim:
        return terms
    gone = {dim % terms.ndim for dim in dims}
    return terms.reshape([size for dim, size in enumerate(terms.shape) if dim not in gone])


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of matrices or batches of them."""
    return in_order(left[..., :, None, :] * right.mT[..., None, :, :], -1)


def total(x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if dtype is not None:
        x = x.to(dtype)
    elif not x.is_floating_point():
        x = x.long()
    return in_order(x, dims, keepdim)


def mean(x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    summed = total(x, dims, keepdim, dtype=dtype)
    return summed / (x.numel() / max(1, summed.numel()))


def softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    # a row that may see nothing is a row of zeros
    most = x.amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    shifted = by_vectors(aten.exp.default, [x - most], {})
    summed = in_order(shifted, dim, keepdim=True)
    return shifted / torch.where(summed > 0, summed, 1)


def log_softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    shifted = x - x.amax(dim, keepdim=True)
    each = by_vectors(aten.exp.default, [shifted], {})
    return shifted - by_vectors(aten.log.default, [in_order(each, dim, keepdim=True)], {})


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    middle = mean(x, dims, True)
    deviation = by_vectors(aten.rsqrt.default, [mean((x - middle) * (x - middle), dims, True) + eps], {})
    normed = (x - middle) * deviation
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias, middle, deviation


def norm(x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    assert order == 2
    return by_vectors(aten.sqrt.default, [total(x * x, dims, keepdim, dtype=dtype)], {})


BY_VECTORS = (
    *("exp", "log", "log1p", "expm1", "pow", "rsqrt", "sin", "cos", "tanh", "erf", "sigmoid", "silu", "gelu"),
    *("softplus", "logaddexp", "elu", "addcmul", "addcdiv", "lerp"),
)
"""What vectorised loops compute otherwise at their ends: functions that are not rounded exactly, and fused ones."""

OWN: dict[Any, Callable[..., Any]] = {
    aten.mm.default: product,
    aten.bmm.default: product,
    aten.addmm.default: lambda bias, left, right, *, beta=1, alpha=1: beta * bias + alpha * product(left, right),
    aten.baddbmm.default: lambda bias, left, right, *, beta=1, alpha=1: beta * bias + alpha * product(left, right),
    aten.sum.default: total,
    aten.sum.dim_IntList: total,
    aten.mean.default: mean,
    aten.mean.dim: mean,
    aten._softmax.default: softmax,
    aten._safe_softmax.default: softmax,
    aten._log_softmax.default: log_softmax,
    aten.native_layer_norm.default: layer_norm,
    aten.linalg_vector_norm.default: norm,
}
