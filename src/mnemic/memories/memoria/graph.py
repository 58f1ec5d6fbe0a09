"""The Hebbian graph: how often two engrams fired together, without a table of all pairs.

The counts are a Gram matrix: with A the 0/1 table of which engram fired at which step, Count = A A^T. So A is what is
kept, one bit an engram and step, and a row of counts is a product when a search asks for it. A ring holds the last
`COLUMNS` steps; a byte of steps that leaves it is folded into `elders`, the counts among the engrams alive that had
fired then. Slots are in order of birth, so those are the first ones, and few: what is quadratic is bounded by how many
engrams outlive `COLUMNS` steps, and the whole by the number alive, however long the stream.

Ties between counts are broken at random by `tie_vectors`: a score is count + <p_i, q_j> / 2^14 with vectors of small
integers drawn from (seed, step, id). So a tie is broken the same way in any batch, at no cost beyond the product, and
exactly: every term is a multiple of 2^-14, which float32 holds without rounding for counts below 1,024.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.state import State

# Shapes: b batch, n slots, h columns (steps kept), f slots searched from, l slots of long-term memory, e elders.

COLUMNS = 128
TIE_WIDTH, TIE_SCALE = 16, 2.0**-14
RATIO_TIE_SCALE = 2.0**-40
NEVER = -1e9
"""The score of what cannot be reached."""


def empty(batch: int, device: torch.device | None = None) -> State:
    """`fired [b, 0, h / 8]` and `elders [b, 0, 0]`: nobody has fired."""
    return {
        "fired": torch.zeros(batch, 0, COLUMNS // 8, dtype=torch.uint8, device=device),
        "elders": torch.zeros(batch, 0, 0, dtype=torch.int32, device=device),
    }


def fire(state: State, activated_bn: Bool[Tensor, "b n"], step_b: Int[Tensor, " b"], rows_b: Tensor) -> State:
    """Count_ij += 1 for all pairs that fire at `step_b`, in the rows of `rows_b` (paper 3.4)."""
    fired, elders = state["fired"], state["elders"]
    byte_b11 = ((step_b.clamp_min(0) % COLUMNS) // 8)[:, None, None]
    byte_bn1 = byte_b11.expand(-1, fired.shape[1], -1)
    before = fired.gather(2, byte_bn1).squeeze(2)
    begins = rows_b & (step_b % 8 == 0)
    leaving = before.masked_fill(~begins[:, None], 0)
    if bool(leaving.any()):
        elders = _fold(elders, leaving)
        before = before.masked_fill(begins[:, None], 0)
    bit = (1 << (step_b.clamp_min(0) % 8)).to(torch.uint8)
    after = torch.where(activated_bn & rows_b[:, None], before | bit[:, None], before)
    return {"fired": fired.scatter(2, byte_bn1, after[..., None]), "elders": elders}


def _fold(elders: Int[Tensor, "b e e"], leaving_bn: Int[Tensor, "b n"]) -> Int[Tensor, "b e e"]:
    """`elders` with the counts of one byte of columns added."""
    most = max(_extent(leaving_bn > 0), elders.shape[1])
    bits = unpack(leaving_bn[:, :most, None])
    elders = torch.nn.functional.pad(elders, (0, most - elders.shape[1]) * 2)
    return elders + (bits @ bits.transpose(1, 2)).int()


def move(state: State, order_bn: Int[Tensor, "b n"], free_bn: Bool[Tensor, "b n"]) -> State:
    """The graph when slot s holds what `order_bn[:, s]` held; slots of `free_bn` begin anew."""
    fired, elders = state["fired"], state["elders"]
    batch, slots = order_bn.shape
    if fired.shape[1] == 0:
        return {"fired": fired.new_zeros(batch, slots, fired.shape[2]), "elders": elders}
    moved = fired.gather(1, order_bn[..., None].expand(-1, -1, fired.shape[2])).masked_fill(free_bn[..., None], 0)
    size = elders.shape[1]
    if size:
        front = order_bn[:, :size]
        gone = free_bn[:, :size] | (front >= size)
        front = front.clamp_max(size - 1)
        elders = elders.gather(1, front[..., None].expand(-1, -1, size))
        elders = elders.gather(2, front[:, None, :].expand(-1, front.shape[1], -1))
        elders = elders.masked_fill(gone[..., None] | gone[:, None], 0)
        most = _extent(elders.diagonal(dim1=1, dim2=2) > 0)
        elders = elders[:, :most, :most]
    return {"fired": moved, "elders": elders}


def _extent(mask_bn: Bool[Tensor, "b n"]) -> int:
    """One more than the last True column, over all rows."""
    columns = mask_bn.any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 0


def unpack(fired: Int[Tensor, "*n bytes"]) -> Float[Tensor, "*n h"]:
    """The rows of A as 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=fired.device)
    return ((fired[..., None] >> shifts) & 1).flatten(-2).float()


def counts(state: State) -> Int[Tensor, "b n n"]:
    """All counts, for looking at and for tests: `Count_ij`, int32."""
    bits = unpack(state["fired"])
    table = (bits @ bits.transpose(1, 2)).int()
    size = state["elders"].shape[1]
    table[:, :size, :size] += state["elders"]
    return table


def fires(state: State) -> Int[Tensor, "b n"]:
    """How often each engram fired: `Count_ii`."""
    total = unpack(state["fired"]).sum(-1).int()
    size = state["elders"].shape[1]
    total[:, :size] += state["elders"].diagonal(dim1=1, dim2=2)
    return total


class Edges:
    """The edges into long-term memory for one step: `scores(slots)` gives those of some engrams.

    `open_bl` says which of the first l slots are long-term memory. `lift` divides by how often the target fires at all.
    """

    def __init__(self, state: State, open_bl: Bool[Tensor, "b l"], seed: int, ties: str, lift: bool) -> None:
        size = open_bl.shape[1]
        self.elders_bee = state["elders"]
        self.bias_b1l = torch.zeros(open_bl.shape, device=open_bl.device).masked_fill(~open_bl, NEVER)[:, None]
        # in float64, where equal ratios are equal numbers and ties are smaller than any difference of ratios
        self.fires_b1l = fires(state)[:, None, :size].clamp_min(1).double() if lift else None
        # what tells a count of 1 from none: ties move a score by at most 16^3 of their unit
        self.least_edge = 16**3 * RATIO_TIE_SCALE if lift else 0.5
        bits_bnh = unpack(state["fired"])
        source, target = bits_bnh[..., :0], bits_bnh[:, :size, :0]
        if ties == "random":
            source = tie_vectors(seed, state["step"], state["id"], role=0)
            target = tie_vectors(seed, state["step"], state["id"][:, :size], role=1)
            target = target * (RATIO_TIE_SCALE if lift else TIE_SCALE)
        # one product gives counts and ties at once
        self.from_bnr = torch.cat([bits_bnh, source], -1)
        self.into_brl = torch.cat([bits_bnh[:, :size], target], -1).transpose(1, 2)

    def scores(self, slots_bf: Int[Tensor, "b f"]) -> Float[Tensor, "b f l"]:
        """Edge from each slot to each engram of long-term memory, ties broken; `NEVER` where there is none."""
        from_bfr = self.from_bnr.gather(1, _wide(slots_bf, self.from_bnr.shape[2]))
        if self.fires_b1l is None:
            return self._add_elders(torch.baddbmm(self.bias_b1l, from_bfr, self.into_brl), slots_bf)
        score_bfl = self._add_elders(from_bfr[..., :COLUMNS] @ self.into_brl[:, :COLUMNS], slots_bf)
        ratio_bfl = score_bfl.double() / self.fires_b1l + self.bias_b1l
        return torch.baddbmm(ratio_bfl, from_bfr[..., COLUMNS:].double(), self.into_brl[:, COLUMNS:].double())

    def _add_elders(self, score_bfl: Tensor, slots_bf: Tensor) -> Tensor:
        size = self.elders_bee.shape[1]
        if size:
            known = min(size, score_bfl.shape[2])
            rows = self.elders_bee.gather(1, _wide(slots_bf.clamp_max(size - 1), size))[..., :known]
            score_bfl[..., :known] += rows.masked_fill((slots_bf >= size)[..., None], 0)
        return score_bfl


def _wide(slots_bf: Tensor, width: int) -> Tensor:
    return slots_bf[..., None].expand(-1, -1, width)


# --- chance ----------------------------------------------------------------------------------------------------------


def tie_vectors(seed: int, step: Int[Tensor, " b"], ids: Int[Tensor, "b n"], role: int) -> Float[Tensor, "b n r"]:
    """Vectors of `TIE_WIDTH` integers in -16 .. 15 for each engram: p (role 0) or q (role 1) of this step."""
    key = _hash(seed, step, ids, role)
    shifts = 5 * torch.arange(TIE_WIDTH // 2, device=ids.device)
    halves = [((_mix(key + half)[..., None] >> shifts) & 31) - 16 for half in (1, 2)]
    return torch.cat(halves, -1).float()


def seed_keys(seed: int, step: Int[Tensor, " b"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """A random number in [0, 1) for each engram and step, float64: those of the highest are drawn."""
    return (_hash(seed, step, ids, 2) & (2**52 - 1)).double() / 2**52


def token_keys(seed: int, number_bt: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """A random number in (0, 1] for each token of a stream by its number, float32."""
    key = _mix(_mix(number_bt + (seed + 1) * 0x632BE5AB) + 3)
    return ((key & (2**24 - 1)) + 1).float() / 2**24


def _hash(seed: int, step: Tensor, ids: Tensor, role: int) -> Tensor:
    return _mix(_mix(_mix(step + (seed + 1) * 0x632BE5AB)[:, None] + ids.long()) + role)


def _mix(x: Tensor) -> Tensor:
    """Spreads the bits of int64 numbers, by shifts and products that wrap around (the finaliser of splitmix64)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
