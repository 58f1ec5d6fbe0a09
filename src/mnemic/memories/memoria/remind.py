"""Reminding (paper 3.2): what resembles the working memory, and what once fired with that."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.memories.memoria import engrams
from mnemic.memories.memoria.config import MemoriaConfig
from mnemic.memories.memoria.graph import NEVER, Edges, seed_keys
from mnemic.state import State

# Shapes: b batch, n slots, w working memory, d width, f paths of the search, l slots of long-term memory, k reminded.


def advance(
    state: State, working_bwd: Float[Tensor, "b w d"], config: MemoriaConfig, kept_bn: Tensor | None = None
) -> State:
    """One step: the running one is memorised and forgotten, the next begins with `working_bwd` and its reminding."""
    state = engrams.finish(state, config.alpha, config.stm_capacity)
    return remind(engrams.renew(state, working_bwd, config.lifespan, kept_bn), config)


def remind(state: State, config: MemoriaConfig) -> State:
    """The state with `recalled`: short-term engrams by correlation, long-term ones found along the strongest ties."""
    if not state["id"].shape[1]:
        return state
    with torch.no_grad():
        long_bn, short_bn, _ = engrams.level_masks(state)
        engram_bnd = state["engram"].detach()
        working_bwd = engrams.gather(engram_bnd, engrams.working_slots(state, config.working))
        fewest, most = (int(value) for value in state["levels"][:, 0].aminmax())
        if config.interference or config.graded:
            fewest = 0
        # no row's short-term memory begins below `fewest`
        score_bn = correlate(engram_bnd[:, fewest:], working_bwd, config.correlation)
        if config.interference:
            share_bn = score_bn.masked_fill(~(long_bn | short_bn), -torch.inf).softmax(1).nan_to_num()
            lost = config.interference * config.working * share_bn
            state = {**state, "lifespan": state["lifespan"] - lost.to(state["lifespan"].dtype)}
        strength_bn = state["lifespan"].clamp_min(1e-6).log() * config.graded
        if config.graded:
            short_bn, most = long_bn | short_bn, int(state["levels"][:, :2].sum(1).max())
            score_bn = score_bn + strength_bn
        short_bk = best(score_bn, short_bn[:, fewest:], config.reminded_stm)
        short_bk = torch.where(short_bk < 0, short_bk, short_bk + fewest)
        if config.graded:
            long_bn = short_bn & ~_mark(short_bk, short_bk >= 0, short_bn.shape[1])
        long_bk = short_bk.new_full((len(short_bk), config.reminded_ltm), -1)
        if most and config.reminded_ltm:
            slots_bf, real_bf = _compact(search(state, long_bn[:, :most], short_bk, config))
            if slots_bf.shape[1]:
                found_bf = correlate(engrams.gather(engram_bnd, slots_bf), working_bwd, config.correlation)
                place_bk = best(found_bf + strength_bn.gather(1, slots_bf), real_bf, config.reminded_ltm)
                long_bk = slots_bf.gather(1, place_bk.clamp_min(0)).masked_fill(place_bk < 0, -1)
        recalled = torch.cat([short_bk, long_bk], 1)
    return {**state, "recalled": recalled, "use": torch.zeros_like(state["use"])}


def correlate(
    engram_bnd: Float[Tensor, "b n d"], working_bwd: Float[Tensor, "b w d"], rule: str
) -> Float[Tensor, "b n"]:
    """C_i: "exp" is `log mean_j exp(-|e_i - wm_j|^2)`, whose logarithm keeps the order and does not underflow where the
    exponential does; "distance" is `mean_j -|e_i - wm_j|^2`, one product with the centroid.
    """
    # around the centre of working memory, where differences of large squares lose least
    centre_b1d = working_bwd.mean(1, keepdim=True)
    engram_bnd, working_bwd = engram_bnd - centre_b1d, working_bwd - centre_b1d
    spread_bw = working_bwd.square().sum(-1)
    if rule == "distance":
        return -engram_bnd.square_().sum(-1) - spread_bw.mean(1, keepdim=True)
    distance_bnw = torch.baddbmm(spread_bw[:, None], engram_bnd, working_bwd.transpose(1, 2), alpha=-2)
    distance_bnw += engram_bnd.square_().sum(-1)[..., None]
    return distance_bnw.neg_().logsumexp(-1) - math.log(working_bwd.shape[1])


def best(score_bn: Float[Tensor, "b n"], among_bn: Bool[Tensor, "b n"], count: int) -> Int[Tensor, "b k"]:
    """The `count` slots of highest score among some, best first, the lowest of equals, -1 where there are fewer."""
    values, slots = score_bn.masked_fill(~among_bn, -torch.inf).sort(dim=1, descending=True, stable=True)
    slots = slots.masked_fill(values == -torch.inf, -1)[:, :count]
    return torch.nn.functional.pad(slots, (0, count - slots.shape[1]), value=-1)


def search(
    state: State, long_bl: Bool[Tensor, "b l"], short_bk: Int[Tensor, "b k"], config: MemoriaConfig
) -> Bool[Tensor, "b l"]:
    """Which long-term engrams the search finds (paper 3.2.4): from each reminded short-term engram to the one that
    fired with it most, and on from there, `depth` times, each time to the strongest that no path had found.

    All paths go abreast; two that meet go on as one. Where paths times depth outnumber the long-term memory, all its
    counts are made at once instead of row by row.
    """
    edges = Edges(state, long_bl, config.seed, config.ties, config.edges == "lift")
    least = edges.least_edge if config.positive_edges else NEVER / 2
    value, slot = edges.scores(short_bk.clamp_min(0)).max(-1)
    found_bl = _mark(slot, (short_bk >= 0) & (value > least), long_bl.shape[1])
    if config.random_ltm_seeds:
        keys = seed_keys(config.seed, state["step"], state["id"][:, : long_bl.shape[1]])
        drawn = best(keys, long_bl, config.random_ltm_seeds)
        found_bl = found_bl | _mark(drawn, drawn >= 0, long_bl.shape[1])
    frontier_bf, going_bf = _compact(found_bl)
    table_bll = None
    if frontier_bf.shape[1] * config.depth > long_bl.shape[1]:
        table_bll = edges.scores(torch.arange(long_bl.shape[1], device=slot.device).expand(len(slot), -1))
    for _ in range(config.depth):
        if not frontier_bf.shape[1]:
            break
        scores = edges.scores(frontier_bf) if table_bll is None else engrams.gather(table_bll, frontier_bf)
        value, slot = scores.masked_fill_(found_bl[:, None], 2 * NEVER).max(-1)
        next_bl = _mark(slot, going_bf & (value > least), long_bl.shape[1])
        found_bl = found_bl | next_bl
        frontier_bf, going_bf = _compact(next_bl)
    return found_bl


def _mark(slots_bf: Int[Tensor, "b f"], valid_bf: Bool[Tensor, "b f"], size: int) -> Bool[Tensor, "b l"]:
    """A mask of `size` slots with the valid ones set."""
    marked = torch.zeros(slots_bf.shape[0], size + 1, dtype=torch.bool, device=slots_bf.device)
    return marked.scatter_(1, slots_bf.masked_fill(~valid_bf, size), True)[:, :size]


def _compact(mask_bl: Bool[Tensor, "b l"]) -> tuple[Int[Tensor, "b f"], Bool[Tensor, "b f"]]:
    """The set slots of each row, lowest first, as wide as the fullest row needs, and which of them are real."""
    count = mask_bl.sum(1)
    slots = torch.argsort(~mask_bl, dim=1, stable=True)[:, : int(count.max())]
    return slots, torch.arange(slots.shape[1], device=slots.device) < count[:, None]
