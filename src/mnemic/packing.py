"""How keys and values are stored: as they came, or in a byte a number, with a scale for each token and head.

With x the numbers of one token in one head and m the greatest |x|,

    "int8"   scale = m / 127,  codes = round(x / scale)            at most scale / 2 off
    "fp8"    scale = m / 448,  codes = x / scale as float8_e4m3fn  at most 1/16 of itself off, or scale / 1024
    x ~ codes * scale

so "fp8" is for numbers of which few are large. The codes of "fp8" are kept as bytes, with which more can be done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Stored = Literal["base", "int8", "fp8"]
"""How a bank stores keys and values: as the base gives them, or packed."""

CODES = {"int8": torch.int8, "fp8": torch.uint8}
"""What packed numbers are kept as."""
MOST = {"int8": 127, "fp8": 448}
"""The greatest number that has a code."""
AT_ONCE = 2048
"""Tokens that a processor unpacks at a time to multiply them: what they are unpacked into stays in its cache."""


def parts(name: str, stored: Stored) -> tuple[str, ...]:
    """Names of the tensors that `name` is stored as: its numbers or codes `[..., s]`, the scales `[..., 1]` float32."""
    return (name,) if stored == "base" else (name, f"{name}_scale")


def pack(name: str, numbers: Float[Tensor, "... s"], stored: Stored) -> dict[str, Tensor]:
    """The tensors that `name` is stored as."""
    if stored == "base":
        return {name: numbers}
    numbers, most = numbers.float(), MOST[stored]
    scale = numbers.abs().amax(-1, keepdim=True) / most
    # 0 / 0 is 0 here; and a quotient may come out a little above the greatest
    codes = (numbers / scale).nan_to_num(0, most, -most).clamp(-most, most)
    codes = codes.round().to(torch.int8) if stored == "int8" else codes.to(torch.float8_e4m3fn).view(torch.uint8)
    return dict(zip(parts(name, stored), (codes, scale), strict=True))


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Float[Tensor, "... s"]:
    """The numbers again: in float32, or as they came where they are not packed."""
    if (scale := tensors.get(f"{name}_scale")) is None:
        return tensors[name]
    numbers, factor = _numbers(tensors[name])
    return numbers.mul_(scale if factor == 1 else scale * factor)


def products(query_kms: Float[Tensor, "k m s"], name: str, tensors: Mapping[str, Tensor]) -> Float[Tensor, "k m n"]:
    """Queries times what is stored `[k, n, s]`, in float32; scales join behind the product, where they are few."""
    stored, scale = tensors[name], tensors.get(f"{name}_scale")
    if stored.dtype == torch.float32:
        return query_kms @ stored.mT
    count, factor = stored.shape[1], 1
    found = query_kms.new_empty(*query_kms.shape[:2], count)
    step = AT_ONCE if stored.device.type == "cpu" else max(1, count)
    for begin in range(0, count, step):
        numbers, factor = _numbers(stored[:, begin : begin + step])
        found[:, :, begin : begin + step] = query_kms @ numbers.mT
    return found if scale is None else found.mul_((scale if factor == 1 else scale * factor).mT)


def _numbers(stored: Tensor) -> tuple[Tensor, int]:
    """What is stored as numbers in float32, and by how much they are too small."""
    if stored.dtype != torch.uint8:
        return stored.float(), 1
    # sign, exponent and mantissa at their places in a float16, whose exponents begin 8 lower: much faster than a cast
    return ((stored.view(torch.int8).to(torch.int16) << 7) & -0x4080).view(torch.float16).float(), 2**8
