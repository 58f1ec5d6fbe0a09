"""The engrams of a batch of streams: tables with a slot for each, kept in order of birth.

A row's slots hold first its long-term memory, then its short-term memory, then its working memory, each oldest first,
then nothing: promotion takes the oldest, so the three levels stay blocks and three numbers say which is which. The dead
are squeezed out once a step, in the same copy that makes a new state of an old one. Free slots are zero everywhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.memories.memoria import graph
from mnemic.state import State

# Shapes: b batch, n slots, d width, w working memory, k reminded engrams.


def capacity(most: int, working: int) -> int:
    """Slots of a table whose fullest row holds `most` engrams: the next multiple of `working`."""
    return -(-most // working) * working


def empty(batch: int, width: int, reminded: int, device: torch.device | None = None) -> State:
    """The state of new streams: no engrams, nothing reminded."""
    return {
        "engram": torch.zeros(batch, 0, width, device=device),
        "lifespan": torch.zeros(batch, 0, device=device),
        "id": torch.zeros(batch, 0, dtype=torch.int32, device=device),
        "levels": torch.zeros(batch, 3, dtype=torch.long, device=device),
        "recalled": torch.full((batch, reminded), -1, device=device),
        "use": torch.zeros(batch, reminded, device=device),
        "step": torch.zeros(batch, dtype=torch.long, device=device),
        **graph.empty(batch, device),
    }


def gather(table: Float[Tensor, "b n d"], slots_bk: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Rows of a table by slot; slots of -1 give some row, to be masked."""
    batch, slots, width = table.shape
    base = torch.arange(batch, device=table.device)[:, None] * slots
    flat = (slots_bk.clamp_min(0) + base).flatten()
    return table.reshape(-1, width).index_select(0, flat).view(*slots_bk.shape, width)


def working_slots(state: State, working: int) -> Int[Tensor, "b w"]:
    """Slots of the working memory, -1 in rows that have none yet."""
    total, _, first = _ranges(state)
    slots = first[:, None] + torch.arange(working, device=total.device)
    return slots.masked_fill((state["levels"][:, 2] == 0)[:, None], -1)


def level_masks(state: State) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Which slots hold long-term, short-term and working memory."""
    total, short, working = _ranges(state)
    slot = torch.arange(state["id"].shape[1], device=total.device)
    below = slot < short[:, None]
    middle = (slot >= short[:, None]) & (slot < working[:, None])
    return below, middle, (slot >= working[:, None]) & (slot < total[:, None])


def _ranges(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: the number of engrams, the first slot of short-term and of working memory."""
    long, short, working = state["levels"].unbind(1)
    return long + short + working, long, long + short


def activated(state: State) -> Bool[Tensor, "b n"]:
    """The engrams that fire together in this step: working memory and what was reminded."""
    recalled = state["recalled"]
    slots = state["id"].shape[1]
    fired = torch.zeros(recalled.shape[0], slots + 1, dtype=torch.bool, device=recalled.device)
    fired.scatter_(1, recalled.masked_fill(recalled < 0, slots), True)
    return fired[:, :slots] | level_masks(state)[2]


def extend_lifespans(state: State, alpha: float) -> Float[Tensor, "b n"]:
    """Lifespans after a step: reminded engrams share alpha for each of them by their use, then all grow a step older.

    Paper 3.4: `lifespan_i += w_i / sum_k w_k * N_rem * alpha`, then `lifespan_i -= 1`.
    """
    recalled, use, lifespan = state["recalled"], state["use"].detach(), state["lifespan"].detach()
    real = recalled >= 0
    share = use / use.sum(1, keepdim=True).clamp_min(torch.finfo(use.dtype).tiny)
    gain = (share * real.sum(1, keepdim=True) * alpha).masked_fill(~real, 0)
    taken = state["id"] > 0
    return lifespan.scatter_add(1, recalled.clamp_min(0), gain) - taken.to(lifespan.dtype)


def finish(state: State, alpha: float, stm_capacity: int) -> State:
    """Memorise and forget (paper 3.4): what fired together is wired together, lifespans change, working memory becomes
    short-term, the oldest of that beyond its capacity long-term. The dead stay in their slots for `renew`, with no
    lifespan left.
    """
    slots = state["id"].shape[1]
    if slots == 0:
        return state
    begun = state["step"] > 0
    state = {**state, **graph.fire(state, activated(state), state["step"] - 1, begun)}
    lifespan = extend_lifespans(state, alpha)
    alive = (state["id"] > 0) & (lifespan > 0)
    long = level_masks(state)[0]
    survivors, rest = (alive & long).sum(1), (alive & ~long).sum(1)
    promoted = (rest - stm_capacity).clamp_min(0)
    levels = torch.stack([survivors + promoted, rest - promoted, torch.zeros_like(rest)], 1)
    return {**state, "lifespan": lifespan.masked_fill(~alive, 0), "levels": levels}


def renew(
    state: State, new_bwd: Float[Tensor, "b w d"], lifespan: float, kept_bn: Bool[Tensor, "b n"] | None = None
) -> State:
    """The state with the dead squeezed out and `new_bwd` as working memory, each engram with its initial `lifespan`.

    Engrams stored earlier are constants to the gradient, but for those of `kept_bn`.
    """
    batch, working, width = new_bwd.shape
    device = new_bwd.device
    alive = (state["lifespan"] > 0) & (state["id"] > 0)
    count = alive.sum(1)
    slots = capacity(int(count.max()) + working, working)
    order = torch.argsort(~alive, dim=1, stable=True)[:, :slots]
    order = torch.nn.functional.pad(order, (0, slots - order.shape[1]))
    free = torch.arange(slots, device=device) >= count[:, None]
    place = count[:, None] + torch.arange(working, device=device)

    old = state["engram"]
    stored = old.detach() if kept_bn is None else torch.where(kept_bn[..., None], old, old.detach())
    engram = gather(stored, order).flatten(0, 1) if old.shape[1] else old.new_zeros(batch * slots, width)
    # in place on what was just made: a table is copied once a step
    engram = engram.index_fill_(0, free.flatten().nonzero().flatten(), 0)
    flat = (place + torch.arange(batch, device=device)[:, None] * slots).flatten()
    engram = engram.index_copy_(0, flat, new_bwd.to(engram.dtype).flatten(0, 1)).view(batch, slots, width)

    number = state["step"][:, None] * working + torch.arange(1, working + 1, device=device)

    def carry(table: Tensor, value: Tensor | float) -> Tensor:
        kept = table.gather(1, order).masked_fill(free, 0) if table.shape[1] else table.new_zeros(batch, slots)
        value = torch.as_tensor(value, dtype=table.dtype, device=device).expand(batch, working)
        return kept.scatter(1, place, value)

    long, short, _ = state["levels"].unbind(1)
    return {
        **state,
        "engram": engram,
        "lifespan": carry(state["lifespan"], lifespan),
        "id": carry(state["id"], number.int()),
        "levels": torch.stack([long, short, torch.full_like(long, working)], 1),
        "step": state["step"] + 1,
        **graph.move(state, order, free),
    }
