"""Rotary positions taken out of keys and put in again, by the base's own functions.

Which rotation a block applies is found out by looking: one token is run at two positions, and its keys must differ by
that rotation, or not at all. A base of which this cannot be shown is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mnemic.host.anatomy import Anatomy, attention_of
from mnemic.host.arguments import with_cache
from mnemic.host.call import thread
from mnemic.host.evaluating import evaluating
from mnemic.host.release import DynamicCache, newer
from mnemic.host.ropes import length_dependent
from mnemic.memory import Inside

PLACES = (0, 1, 5)
"""Positions at which a token is looked at."""
NEAR = 2e-2
"""Most difference of keys that are the same but for rounding, in bfloat16 too, as a share of their length."""


@dataclass(frozen=True)
class Turning:
    """How a block turns queries and keys by their positions; `apply` is None where it does not."""

    rotary: nn.Module | None = None
    apply: Callable[..., Any] | None = None
    kind: str | None = None

    def __call__(
        self,
        x: Float[Tensor, "... n s"],
        position: Int[Tensor, " n"],
        back: bool = False,
        memo: dict[Any, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """`x` turned to (or back from) its positions, which may be any whole numbers, in float32. A `memo` keeps the
        angles for blocks that turn alike.
        """
        x = x.float()
        if self.apply is None or self.rotary is None or not x.numel():
            return x
        memo = {} if memo is None else memo
        key = self.rotary, self.kind, x.device, position.cpu().numpy().tobytes()
        if key not in memo:
            more = {} if self.kind is None else {"layer_type": self.kind}
            memo[key] = self.rotary(x.new_zeros(1, 1, 1), position[None], **more)
        cos, sin = memo[key]
        width = cos.shape[-1]
        flat = x.reshape(1, -1, *x.shape[-2:])
        # it turns queries and keys, of which there are none here
        turned, _ = self.apply(flat[..., :width], flat[:, :0, :, :width], cos, -sin if back else sin)
        if back:  # some kinds of scaling make cosines and sines longer than 1
            turned = turned / (cos[0, 0, 0] ** 2 + sin[0, 0, 0] ** 2)
        if width < flat.shape[-1]:
            turned = torch.cat([turned, flat[..., width:]], -1)
        return turned.view(x.shape)


def candidates(trunk: nn.Module, attention: nn.Module) -> list[Turning]:
    """The rotations that a block's attention may apply: none, or any that the trunk has a module for."""
    apply = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
    found = [Turning()]
    if apply is None or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return found
    for module in trunk.modules():
        if "Rotary" in type(module).__name__ and not length_dependent(module):
            kinds = [None]
            if "layer_type" in inspect.signature(module.forward).parameters:
                kinds = list(getattr(module, "layer_types", kinds))
            found += [Turning(module, apply, kind) for kind in kinds]
    return found


def turning_of(found: list[Turning], keys: list[Float[Tensor, "k 1 s"]]) -> Turning | None:
    """The one that makes the keys of one token at `PLACES` the same, best of all; None where there is none."""
    errors = [_error(turning, keys) for turning in found]
    best = min(range(len(found)), key=errors.__getitem__)
    return found[best] if errors[best] <= NEAR else None


def _error(turning: Turning, keys: list[Float[Tensor, "k 1 s"]]) -> float:
    """By how much they differ, as a share of their length; infinite for a rotation of another width."""
    try:
        plain = [
            turning(key, torch.tensor([place], device=key.device), back=True)
            for key, place in zip(keys, PLACES, strict=True)
        ]
    except RuntimeError:
        return torch.inf
    length = float(plain[0].norm())
    return max(float((each - plain[0]).norm()) for each in plain) / length if length else torch.inf


# --- looking at a base ------------------------------------------------------------------------------------------------


def _token(anatomy: Anatomy) -> Int[Tensor, "1 1"]:
    """A token that is not zero, as that of padding is."""
    embeddings: Any = anatomy.trunk.get_input_embeddings()
    return embeddings.weight[:256].float().norm(dim=1).argmax().view(1, 1)


@torch.no_grad()
def turnings(
    anatomy: Anatomy, layers: list[int], alone: Callable[[], contextlib.AbstractContextManager[None]]
) -> tuple[list[Turning], Inside]:
    """How the blocks `layers` turn their keys, where the base runs by itself within `alone`, and what their attention
    is like. Raises `ValueError` for a block whose rotation is not found, or whose attention is not over its keys.
    """
    trunk = anatomy.trunk
    ids = _token(anatomy)
    with alone():
        looked, insides = zip(*(keys_at(anatomy, layers, ids, torch.full_like(ids, p)) for p in PLACES), strict=True)
    rotates = any("Rotary" in type(module).__name__ for module in trunk.modules())
    found = []
    for layer in layers:
        attention = attention_of(anatomy.blocks[layer])
        assert attention is not None
        turning = turning_of(candidates(trunk, attention), [keys[layer] for keys in looked]) if rotates else Turning()
        if turning is None:
            raise ValueError(
                newer(
                    f"{type(trunk).__name__} turns the keys of block {layer} in a way that mnemic cannot undo; this "
                    "memory needs keys without their positions"
                )
            )
        found.append(turning)
    return found, insides[0]


@torch.no_grad()
def movable(
    anatomy: Anatomy, alone: Callable[[], contextlib.AbstractContextManager[None]]
) -> dict[int, Turning] | None:
    """How each block that keeps keys turns them, where that is all that moves what a cache holds; None elsewhere."""
    ids, looked = _token(anatomy), []
    for place in PLACES:
        cache, position = DynamicCache(), torch.full_like(ids, place)
        with alone(), evaluating(anatomy.trunk):
            anatomy.trunk(input_ids=ids, position_ids=position, **with_cache(anatomy.trunk, cache))
        looked.append(cache.layers)
    found: dict[int, Turning] = {}
    for layer, block in enumerate(anatomy.blocks):
        held: list[Any] = [layers[layer] for layers in looked if layer < len(layers)]
        if not held or getattr(held[0], "keys", None) is None:
            continue  # a block that sees those of another
        attention, still = attention_of(block), turning_of([Turning()], [each.values[0] for each in held])
        if attention is None or still is None:
            return None
        turning = turning_of(candidates(anatomy.trunk, attention), [each.keys[0] for each in held])
        if turning is None:
            return None
        found[layer] = turning
    return found


def keys_at(anatomy: Anatomy, layers: list[int], ids: Tensor, position_ids: Tensor) -> tuple[list[Tensor], Inside]:
    """The keys `[k, t, s]` that each block makes of tokens at some positions, and what the attention of `layers` is
    like.
    """
    cache = DynamicCache()
    thread.probe = []
    try:
        with evaluating(anatomy.trunk):
            anatomy.trunk(input_ids=ids, position_ids=position_ids, **with_cache(anatomy.trunk, cache))
        return keys_seen(anatomy, layers, cache, thread.probe)
    finally:
        thread.probe = None


def keys_seen(
    anatomy: Anatomy, layers: list[int], cache: Any, seen: list[tuple[int, Tensor, Tensor, dict[str, Any], Tensor]]
) -> tuple[list[Tensor], Inside]:
    """The keys `[k, t, s]` of every block, and what the attention of `layers` is like. Raises `ValueError` unless the
    attention of each of `layers` was called once, over the keys and values that the cache has of it, and these are of
    one shape.
    """
    shapes, scales = set(), []
    for layer in layers:
        its, held = [each for each in seen if each[0] == layer], cache.layers[layer]
        plain = len(its) == 1 and all(
            kept is not None and kept.shape == used.shape and torch.equal(kept, used)
            for kept, used in zip((held.keys, held.values), its[0][1:3], strict=True)
        )
        if not plain or its[0][3].get("s_aux") is not None:
            raise ValueError(
                newer(
                    f"{type(anatomy.trunk).__name__} has an attention of its own in block {layer} (latent keys, two of "
                    "them, sinks among its weights), inside which this memory cannot work"
                )
            )
        _, _, _, more, query = its[0]
        shapes |= {(query.shape[1], held.keys.shape[1], held.keys.shape[3], held.values.shape[3])}
        scales.append(float(more.get("scaling") or query.shape[-1] ** -0.5))
    if len(shapes) > 1:
        raise ValueError(f"{type(anatomy.trunk).__name__} has blocks with heads of different shapes, {sorted(shapes)}")
    keys = [layer.keys[0] for layer in cache.layers if getattr(layer, "keys", None) is not None]
    ((queries, heads, key_width, value_width),) = shapes
    return keys, Inside(len(layers), queries, heads, key_width, value_width, tuple(scales))
