"""Recall: keys and values of all that was read, found again inside attention. Nothing is trained.

After InfLLM (Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
NeurIPS 2024, arXiv 2402.04617), section 3: keys that leave the window are kept without their positions, in blocks; a
query finds the blocks that concern it, and attends to them and to the window in one softmax.

For one block of the model and one head of keys, with its query heads h, the keys k_i that were kept, blocks B of `unit`
tokens, R the rotation by positions and D a distance of `window` tokens,

    p_h,i = softmax_i(s R_D q_h . k_i)          over all that is kept
    m_B   = max_h  sum_{i in B} p_h,i           the mass that a block gets
    chosen: the first `sinks` tokens, and the blocks of the greatest m, `budget` tokens of them at most and none whose m
            is below `least`, in order of time

and the chosen keys stand in line before the window, whose first key stands at f: the last of M at f - 1, the first at
f - M. Every token chooses for itself, or every `refresh`-th of a segment for those that follow it, from what was kept
when its segment began, so nothing depends on what comes later nor on how calls are cut.

To score every key costs more than the model does. With `search="candidates"` the mass is that among candidates C alone,
which mean keys find; these are made once, of whole `LEAST` tokens, and are not saved:

    c_B    = max_h  softmax_B(s R_D q_h . mean_{i in B} k_i)    over all blocks
    C      = the first `sinks` tokens, the blocks of the greatest c, `wider x budget` tokens of them, and those so new
             that they have no mean yet
    p_h,i  = softmax_i(s R_D q_h . k_i)                         over C

The more is chosen, the more draws attention away from what was asked for: what hardly anybody attends to is left out.

Where we depart. InfLLM's blocks have a few keys each that stand for them, a block's score is the mean of its products,
one choice serves all heads and a chunk of 512 queries (tokens early in a chunk choose by later ones), and all that is
retrieved stands at one distance. `choice="mean"`, `by="layer"`, `layout="capped"` and `refresh` are these, but that a
block's mean key stands for it and that the first token of a chunk chooses. Choosing by mass is near TokenSelect (arXiv
2411.02886), in line is ReAttention's (arXiv 2407.15176); `choice="bounds"` is Quest's (arXiv 2406.10774).

While a session reads, only the sinks are seen before the window (`recall_in_reading=False`): reading costs what the
window costs, and the keys are those of a base with that window.

What is trained: nothing. What is forgotten: nothing.
State: `2 x layers x heads of keys x their width` numbers a token, in the base's dtype or packed, in the stream's bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.bank import LEAST, Bank
from mnemic.memories.layers import distinct_layers
from mnemic.memory import Asked, Card, Further, Memory, MemoryConfig, Site, Stored
from mnemic.state import State

# Shapes: h heads of queries, k heads of keys, g = h / k, t tokens, n kept, m chosen, s width of a head, u blocks.

SCORES_AT_ONCE = 2**24
"""How many products of query and key are held at a time."""


@dataclass
class RecallConfig(MemoryConfig):
    """Settings of recall.

    `budget` is how many kept tokens a token attends to at most, beside the first `sinks` of the stream, `unit` how many
    of them stand or fall together, and `least` the share of the attention to all that is kept that a block must get to
    be among them. `choice` says how blocks are scored: by probability "mass", by the product with the "mean"
    key, or by "bounds" of its channels; `by` whether each "head" of keys chooses for itself or a "layer" as one. In
    `layout` "line" chosen keys stand one behind another before the window; "capped", all at the distance of the window.
    `recall_in_reading` lets a session retrieve while it reads, too. `search` says whose mass is known: that of all that
    is kept ("exact") or of "candidates", `wider` times the budget, which costs a fraction of it and may miss some.
    `refresh` tokens of a segment share one choice, that of the first of them. `read_layers` are the blocks that recall,
    by default all; the others see the window and its sinks. `stored` is as in `mnemic.packing`.
    """

    kind: ClassVar[str] = "recall"
    card: ClassVar[Card] = Card(
        title="Recall",
        seam="inside attention",
        trains="nothing",
        bytes_law="tokens x layers x key heads x width x 2",
        paper="Xiao et al., NeurIPS 2024, arXiv 2402.04617",
        citation="@inproceedings{xiao2024infllm, title = {{InfLLM}: Training-Free Long-Context Extrapolation for "
        "{LLMs} with an Efficient Context Memory}, author = {Xiao, Chaojun and Zhang, Pengle and Han, Xu and Xiao, "
        "Guangxuan and Lin, Yankai and Zhang, Zhengyan and Liu, Zhiyuan and Sun, Maosong}, booktitle = {NeurIPS}, "
        "year = {2024}}",
    )

    segment_length: int = 256
    window: int | None = 1024
    budget: int = 512
    sinks: int = 16
    unit: int = 16
    least: float = 0.01
    choice: Literal["mass", "mean", "bounds"] = "mass"
    by: Literal["head", "layer"] = "head"
    layout: Literal["line", "capped"] = "line"
    recall_in_reading: bool = False
    search: Literal["exact", "candidates"] = "exact"
    wider: int = 4
    refresh: int = 1
    read_layers: list[int] | None = None
    stored: Stored = "base"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit < 1 or LEAST % self.unit:
            raise ValueError(f"unit is {self.unit}; use a power of 2 up to {LEAST}")
        for name in ("budget", "sinks"):
            if (value := getattr(self, name)) < 0 or value % self.unit:
                raise ValueError(f"{name} is {value}; use a multiple of unit={self.unit}, or 0")
        if not 0 <= self.least < 1:
            raise ValueError(f"least is {self.least}; use a share of the attention from 0 to less than 1")
        if self.wider < 1:
            raise ValueError(f"wider is {self.wider}; use 1 or more")
        if not 1 <= self.refresh <= self.segment_length:
            raise ValueError(f"refresh is {self.refresh}; use 1 to segment_length={self.segment_length}")
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for all")
        if self.refresh > 1 and self.layout == "capped":
            raise ValueError(f"refresh is {self.refresh}, but 'capped' places keys for each token; use layout='line'")

    def unused(self) -> dict[str, str]:
        """How candidates are found, where none are."""
        if self.choice != "mass":
            return dict.fromkeys(("search", "wider", "least"), "set choice='mass'")
        return {"wider": "set search='candidates'"} if self.search == "exact" else {}

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """Two blocks of 4 and 4 sinks, in reading, too; InfLLM's choices; a choice for 5 tokens, of what gets a fifth;
        one block reads.
        """
        small = cls(segment_length=8, window=16, budget=8, sinks=4, unit=4, recall_in_reading=True)
        infllm = small.replace(choice="mean", by="layer", layout="capped")
        return [small, infllm, small.replace(refresh=5, least=0.2), small.replace(read_layers=[0])]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> RecallConfig:
        """A window of one segment, blocks of 4 tokens, of which a token chooses `size`, by default 8."""
        return cls(segment_length=segment_length, window=None, unit=4, sinks=4, budget=4 * (size or 8))

    def build(self, width: int, depth: int, causal: bool = True) -> Recall:
        """The module; raises `ValueError` for an encoder, and for a block that the host does not have."""
        if not causal:
            raise ValueError("an encoder has no keys that recall could keep for it; use another mechanism")
        layers = range(depth) if self.read_layers is None else distinct_layers(self.read_layers, depth, "read_layers")
        return Recall(self, layers)


class Recall(Memory):
    """The module: no parameters."""

    def __init__(self, config: RecallConfig, layers: Iterable[int]) -> None:
        super().__init__()
        self.config, self.stored = config, config.stored
        self.reads, self.writes = tuple(Site(layer, "attention") for layer in layers), ()

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """Nothing: what is kept is in the bank."""
        return {}

    def write(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> State:
        """Nothing."""
        return state

    def naive(
        self, hidden_btd: Float[Tensor, "b t d"], state: State, keep_bt: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """As `read` and `write`; of what happens in attention see `recall_naive`."""
        return hidden_btd, state

    def further(self, site: Site, asked: Asked) -> Further | None:
        """What is seen before the window: all that is kept where it fits, else what each token chooses."""
        config, bank, chosen = self.config, asked.bank, ()
        only_sinks = self._only_sinks(asked.reading)
        if only_sinks or bank.length <= config.sinks + config.budget:
            count = min(bank.length, config.sinks) if only_sinks else bank.length
            if not count:
                return None
            keys, values = (part[:, None] for part in bank.first(asked.place, count))
        else:
            start_ktu = self._chosen(asked) if asked.chosen_ktc is None else asked.chosen_ktc
            some_ktu, keep_ktm = seen_once(start_ktu, config.unit)
            keys, values = (bank.runs(name, asked.place, some_ktu, config.unit) for name in ("keys", "values"))
            there_ktm = bank.there(some_ktu, config.unit)
            chosen = keep_ktm if there_ktm is None else keep_ktm & there_ktm, start_ktu
        if chosen and config.layout == "capped":  # at one distance from each token
            turned = asked.turn(keys.transpose(1, 2), asked.position_t - asked.window).transpose(1, 2)
        else:
            turned = asked.turn(keys, torch.arange(asked.first - keys.shape[2], asked.first, device=keys.device))
        return Further(turned, values, *chosen)

    def sharing(self, reading: bool) -> int:
        """As many tokens as one choice is for."""
        return 1 if self._only_sinks(reading) else self.config.refresh

    def _only_sinks(self, reading: bool) -> bool:
        return not self.config.budget or (reading and not self.config.recall_in_reading)

    @torch.no_grad()
    def _chosen(self, asked: Asked) -> Int[Tensor, "k t u"]:
        """Where the chosen blocks begin, in order of time; what is left out repeats the first of them."""
        config, bank = self.config, asked.bank
        query_kgts = self._far(asked).unflatten(0, (bank.heads, -1)) * asked.scale
        choose, at_once = self._among_all, len(asked.turned_hts) * bank.length
        if config.choice == "mass" and config.search == "candidates":
            choose, at_once = self._among_candidates, query_kgts[:, 0, 0].numel() * config.wider * config.budget
        parts = query_kgts.split(max(1, SCORES_AT_ONCE // at_once), 2)
        return torch.cat([choose(asked, query) for query in parts], 1) * config.unit

    def _among_all(self, asked: Asked, query_kgts: Float[Tensor, "k g t s"]) -> Int[Tensor, "k t u"]:
        """The blocks that some tokens choose."""
        worth_knu = SCORES[self.config.choice](query_kgts.flatten(1, 2), asked.bank, asked.place, self.config.unit)
        return self._best(self._voted(worth_knu.unflatten(1, query_kgts.shape[1:3])), least=True)

    def _among_candidates(self, asked: Asked, query_kgts: Float[Tensor, "k g t s"]) -> Int[Tensor, "k t u"]:
        """The same, where few keys are looked at."""
        bank, unit = asked.bank, self.config.unit
        mean_ksu = bank.means(asked.place, unit)
        worth_ktu = self._voted((query_kgts.flatten(1, 2) @ mean_ksu).softmax(-1).unflatten(1, query_kgts.shape[1:3]))
        if behind := -(-bank.length // unit) - mean_ksu.shape[-1]:
            worth_ktu = F.pad(worth_ktu, (0, behind), value=torch.inf)
        block_ktc = self._best(worth_ktu, self.config.wider, behind)
        keys_ktns = bank.runs("keys", asked.place, block_ktc * unit, unit)
        product_ktgn = query_kgts.transpose(1, 2) @ keys_ktns.float().transpose(-1, -2)
        if (there_ktn := bank.there(block_ktc * unit, unit)) is not None:
            product_ktgn = product_ktgn.masked_fill(~there_ktn[:, :, None], -torch.inf)
        share_ktgc = product_ktgn.softmax(-1).unflatten(-1, (-1, unit)).sum(-1)
        return block_ktc.gather(-1, self._best(self._voted(share_ktgc.transpose(1, 2)), least=True))

    def _best(
        self, worth_ktu: Float[Tensor, "k t u"], times: int = 1, more: int = 0, least: bool = False
    ) -> Int[Tensor, "k t m"]:
        """In order of time the first blocks of the stream, and the best others: `times` the budget and `more`. Where
        `least` counts, the first of all stands in place of those that do not get as much.
        """
        first, total = self.config.sinks // self.config.unit, worth_ktu.shape[-1]
        worth_ktu[..., :first] = torch.inf
        worth_ktm, block_ktm = worth_ktu.topk(min(first + times * self.config.budget // self.config.unit + more, total))
        if least and self.config.choice == "mass":
            little_ktm = worth_ktm < worth_ktm[..., :1].clamp(max=self.config.least)
            first_kt1 = block_ktm.masked_fill(little_ktm, total).amin(-1, keepdim=True)
            block_ktm = torch.where(little_ktm, first_kt1, block_ktm)
        return block_ktm.sort(-1).values

    def _voted(self, worth_kgtu: Float[Tensor, "k g t u"]) -> Float[Tensor, "k t u"]:
        """Of all heads of queries together: InfLLM adds up products; of probabilities the greatest counts."""
        vote = torch.sum if self.config.choice == "mean" else torch.amax
        worth_ktu = vote(worth_kgtu, 1)
        return worth_ktu if self.config.by == "head" else vote(worth_ktu, 0).repeat(len(worth_ktu), 1, 1)

    def _far(self, asked: Asked) -> Float[Tensor, "h t s"]:
        """R_D q: queries as they meet keys without positions."""
        # by the difference, as some kinds of scaling make what is turned longer, and keys would be turned to 0
        return asked.turn(asked.turned_hts, asked.window - asked.position_t)


def seen_once(start_ktu: Int[Tensor, "k t u"], unit: int) -> tuple[Int[Tensor, "k t u"], Bool[Tensor, "k t m"]]:
    """The blocks that any head and token sees, and which of their tokens are no repetition."""
    once_ktu = F.pad(start_ktu[..., 1:] != start_ktu[..., :-1], (0, 1), value=True)
    most = int(once_ktu.sum(-1).max()) if once_ktu.numel() else 0
    start_ktu, once_ktu = start_ktu[..., -most:], once_ktu[..., -most:]
    return start_ktu, once_ktu.repeat_interleave(unit, -1)


def by_mass(query_kns: Float[Tensor, "k n s"], bank: Bank, place: int, unit: int) -> Float[Tensor, "k n u"]:
    """The share of each block in the attention over all that is kept."""
    product = F.pad(bank.products(query_kns, place), (0, -bank.length % unit), value=-torch.inf)
    return product.softmax(-1).unflatten(-1, (-1, unit)).sum(-1)


def by_mean(query_kns: Float[Tensor, "k n s"], bank: Bank, place: int, unit: int) -> Float[Tensor, "k n u"]:
    """The product with a block's mean key."""
    return query_kns @ torch.cat([part.mean(2) for part in _blocks(bank.keys(place), unit)], 1).mT


def by_bounds(query_kns: Float[Tensor, "k n s"], bank: Bank, place: int, unit: int) -> Float[Tensor, "k n u"]:
    """The most that a product with any key of the block can be, by the least and the greatest of each channel."""
    ends = zip(*(part.aminmax(dim=2) for part in _blocks(bank.keys(place), unit)), strict=True)
    low, high = (torch.cat(parts, 1).mT for parts in ends)
    return query_kns.clamp_min(0) @ high + query_kns.clamp_max(0) @ low


SCORES = {"mass": by_mass, "mean": by_mean, "bounds": by_bounds}


def _blocks(keys: list[Tensor], unit: int) -> Iterator[Float[Tensor, "k u unit s"]]:
    """Keys block by block; the last one's are repeated where it is not full."""
    for part in keys:
        last = part[:, -1:].expand(-1, -part.shape[1] % unit, -1)
        yield torch.cat([part, last], 1).float().unflatten(1, (-1, unit))
