"""The sites of a forward pass, a file each: what is installed there and what happens. What is named is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mnemic.memory import Memory, Site

if TYPE_CHECKING:
    from mnemic.host.router import Router

SERVED = ("input", "attention", "output", "logits")
"""Where a memory can read and write."""


class Hook(nn.Module):
    """What stands at a site of one block: a module, so that copies and pickles of a model keep their own."""

    router: Router

    def __init__(self, site: Site, router: Router) -> None:
        super().__init__()
        self.site = site
        object.__setattr__(self, "router", router)  # not a submodule: the router owns the hook


def check(memory: Memory, depth: int) -> None:
    """Raises `ValueError` for a site that a host of `depth` blocks does not have or does not serve."""
    if memory.takes_ids and (memory.writes_tokens_behind or not memory.writes):
        raise ValueError(
            f"{type(memory).__name__} takes the ids of tokens that are written, and writes none; set takes_ids=False"
        )
    if memory.writes_inside and any(site.at != "attention" for site in (*memory.reads, *memory.writes)):
        raise ValueError(
            f"{type(memory).__name__} writes inside attention, when keys leave the window, and has other sites; name "
            '"attention" sites alone'
        )
    if memory.hidden_reads and type(memory).read is Memory.read:
        raise ValueError(f"{type(memory).__name__} reads {memory.hidden_reads[0]} and has no way to; write its read()")
    for doing, sites in (("reads", memory.reads), ("writes", memory.writes)):
        for before, site in zip((*sites[:1], *sites), sites, strict=False):
            said = f"{type(memory).__name__} {doing} {site}"
            if site.at not in SERVED:
                raise ValueError(
                    f"{said}, which is not served: no mechanism needs it yet; there are {', '.join(SERVED)}"
                )
            if not 0 <= site.layer < depth:
                raise ValueError(f"{said}, but the model has blocks 0 .. {depth - 1}")
            if site.at == "logits" and site.layer != depth - 1:
                raise ValueError(f"{said}, but those stand behind the last block, {depth - 1}")
            if site < before:
                raise ValueError(f"{said} after {before}; name sites in their order in a forward pass")


def named(memory: Memory, depth: int) -> list[Site]:
    """The sites between blocks where something has to be installed."""
    sites = {site for site in (*memory.hidden_reads, *memory.writes) if site.at not in ("attention", "logits")}
    if memory.beside:  # memory tokens enter every block, and leave with the last
        sites |= {*(Site(block, "input") for block in range(depth)), Site(depth - 1)}
    return sorted(sites)
