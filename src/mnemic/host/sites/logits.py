"""The output distribution: what the head of a model puts out, changed before anything else sees it.

The trunk runs first, in as many passes as it takes, and the head once, over all tokens of the call or some of them. So
what each token reads is noted while the trunk runs and waits for the head, in the call of the model around both. A loss
that the model computes itself is that of the changed distribution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mnemic.host.arguments import bound
from mnemic.host.call import Ahead, aside, eager, thread
from mnemic.host.evaluating import evaluating
from mnemic.host.release import KEEP, ModelOutput, newer
from mnemic.host.sites import Hook
from mnemic.host.wrappers import execution_device
from mnemic.memory import Memory, Site

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from mnemic.host.anatomy import Anatomy
    from mnemic.host.router import Router

RAMP = 1024.0
"""The greatest logit that a head is made to put out, to see what becomes of it: beyond any cap."""
NEAR = 2e-2
"""Most difference of two ratios that are the same but for rounding, in bfloat16 too."""


def check(memory: Memory, anatomy: Anatomy) -> None:
    """Raises `ValueError` where a memory names the output distribution of a model that has none of its own."""
    if not any(site.at == "logits" for site in (*memory.reads, *memory.writes)):
        return
    name, memory_name = type(anatomy.model).__name__, type(memory).__name__
    if not anatomy.causal:
        raise ValueError(
            f"{name} is an encoder, and {memory_name} is about the next token's distribution; use a decoder"
        )
    if memory.logits_reads and anatomy.head is None:
        raise ValueError(
            f"{name} has no head that makes logits of tokens, at which {memory_name} reads; load the model with one "
            "(AutoModelForCausalLM)"
        )
    entering = getattr(anatomy.head, "in_features", anatomy.width)
    if entering != anatomy.width:
        raise ValueError(
            f"the head of {name} takes {entering} values of a token, its blocks have {anatomy.width}: {memory_name} "
            "needs a model in which they are the same"
        )


@aside
def around(
    router: Router, model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One call of a model, trunk and head. What ends it early takes back what the trunk did to a cache.

    Raises:
        ValueError: the head did not run, as in a loss that is computed without logits.
    """
    ahead, waiting = Ahead(bound(model, args, kwargs).get(KEEP, 0)), thread.ahead.setdefault(id(router), [])
    waiting.append(ahead)
    try:
        output = forward(*args, **kwargs)
        if ahead.reads and not ahead.met:
            if _head_replaced(router, model):
                raise ValueError(
                    f"{type(model).__name__} has another head than when its memory was attached, which reads there; "
                    "detach the memory, and attach it again"
                )
            raise ValueError(
                f"{type(model).__name__} ran without calling its head, where {type(router.memory).__name__} reads; "
                "turn off what computes a loss without logits (fused losses)"
            )
    except BaseException:
        ahead.undo.close()
        raise
    finally:
        waiting.remove(ahead)
    return output


def _head_replaced(router: Router, model: Any) -> bool:
    head = model.get_output_embeddings()
    hooks = () if head is None else head._forward_hooks.values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return not any(isinstance(owner, Logits) and owner.router is router for owner in owners)


def ahead_of(router: Router) -> Ahead | None:
    """What this thread's innermost call of the whole model has for its head; None where the trunk runs by itself."""
    waiting = thread.ahead.get(id(router))
    return waiting[-1] if waiting else None


class Logits(Hook):
    """The hook of the head."""

    def install(self, head: nn.Module) -> RemovableHandle:
        """Registers it, before those of others."""
        return head.register_forward_hook(self.leave, with_kwargs=True, prepend=True)

    @eager
    def leave(self, head: nn.Module, args: Any, kwargs: Any, logits_btv: Tensor) -> Tensor:
        """The logits, when the memory has read."""
        ahead = ahead_of(self.router)
        if ahead is None or not ahead.reads:
            return logits_btv
        ahead.met = True
        return mixed(self.router, self.site, ahead, logits_btv)


def mixed(router: Router, site: Site, ahead: Ahead, logits_btv: Float[Tensor, "b t v"]) -> Float[Tensor, "b t v"]:
    """The logits with what the memory adds: each token reads the state of its segment's start."""
    assert ahead.hidden_btd is not None
    place, scale = places(ahead, logits_btv.shape[1]), router.logits_scale
    hidden_btd = ahead.hidden_btd.to(router.device)
    found, columns = [], []
    for start, stop, state in ahead.reads:
        here = ((place >= start) & (place < stop)).nonzero().flatten()
        if not len(here):
            continue
        whole = len(here) == len(place)
        raw = (logits_btv if whole else logits_btv[:, here.to(logits_btv.device)]).to(router.device)
        given = raw if scale == 1 else raw * scale
        read = router.memory.mix(site, given, hidden_btd[:, place[here].to(hidden_btd.device)], state)
        if scale != 1:
            read = torch.where(read == given, raw, read / scale)
        found.append(read.to(logits_btv.device))
        columns.append(here)
    if len(found) == 1:
        return found[0]
    return torch.cat(found, 1)[:, torch.cat(columns).argsort().to(logits_btv.device)]


def places(ahead: Ahead, count: int) -> Int[Tensor, " k"]:
    """Which tokens of the call the `count` columns of logits are of; raises `ValueError` where that is not known."""
    assert ahead.hidden_btd is not None
    every, kept = torch.arange(ahead.hidden_btd.shape[1]), ahead.kept
    place = every[kept.cpu()] if isinstance(kept, Tensor) else every[-(kept or 0) :]
    if len(place) != count:
        raise ValueError(
            f"the head got {count} of {len(every)} tokens, and {KEEP}={kept!r} does not say which; this memory reads "
            "there and has to know"
        )
    return place


@torch.no_grad()
def scale_of(anatomy: Anatomy, alone: Callable[[], contextlib.AbstractContextManager[None]]) -> float:
    """By what a model multiplies the logits of its head (Cohere, Granite), found out by looking: its head is made to
    put out a ramp. The base runs by itself within `alone`.

    Raises:
        ValueError: what comes out is no multiple of it (Gemma 2's caps), or the head is not called.
    """
    model, head, ramp = anatomy.model, anatomy.head, []
    assert head is not None

    def say(head: nn.Module, args: Any, output: Tensor) -> Tensor:
        ramp.append(torch.linspace(-RAMP, RAMP, output.shape[-1]).to(output).expand_as(output))
        return ramp[0]

    handle = head.register_forward_hook(say)
    try:
        with alone(), evaluating(model):
            ids = torch.zeros(1, 1, dtype=torch.long, device=execution_device(anatomy.blocks[0]))
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    name = type(model).__name__
    if len(ramp) != 1:
        raise ValueError(newer(f"{name} called its head {len(ramp)} times for one token; this memory reads there"))
    said: Tensor = output["logits"] if isinstance(output, ModelOutput) else output[0]
    there, came = ramp[0].flatten().double().cpu(), said.flatten().double().cpu()
    scale = float(came @ there / (there @ there)) if came.shape == there.shape else 0.0
    if scale <= 0 or not bool(((came - scale * there).abs() <= NEAR * scale * there.abs()).all()):
        raise ValueError(
            newer(
                f"{name} bends the logits that its head puts out (a softcap, as Gemma 2 has), so the distribution that "
                "this memory makes there would not be the model's; use a model without (final_logit_softcapping=None)"
            )
        )
    return 1.0 if torch.equal(came, there) else scale
