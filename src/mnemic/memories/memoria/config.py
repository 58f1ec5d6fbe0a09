"""The settings of Memoria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mnemic.memory import Card, MemoryConfig

if TYPE_CHECKING:
    from mnemic.memories.memoria.memoria import Memoria


RULES = ("paper", "seeds", "lift")
"""Three ways to find long-term engrams, see `MemoriaConfig.with_rule`."""


@dataclass
class MemoriaConfig(MemoryConfig):
    """Settings of Memoria, by default those of the paper's language models; lengths count engrams.

    Each segment makes `working` engrams (N_wm); `reminded_stm` and `reminded_ltm` are how many are reminded at most,
    `stm_capacity` how many short-term memory holds, `depth` the steps of the search (N_depth), `lifespan` what an
    engram begins with and `alpha` how much a use extends it.

    `correlation` is "exp" (the paper's, compared by its logarithm) or "distance" (the published code's). `edges` is
    "conditional" (the paper's Count_ij / Count_ii) or "lift" (Count_ij / Count_jj, which does not favour what fires
    always). `positive_edges` leaves out edges of count 0; `random_ltm_seeds` starts that many searches more at random
    long-term engrams, as the published code does by accident with `stm_capacity - reminded_stm`. `ties` are broken at
    random from `seed`, or "oldest" first.

    `dim` is the inner width of the cross-attention, the host's if None; `feed_forward` that of the abstractor, four
    times the host's if None. `read_layers` default to all blocks of a decoder, which writes after its last, and to
    those above `write_layer` in an encoder, which by default writes after three quarters of its blocks.
    `grad_segments=0` is the paper's: hidden states and stored engrams are constants to the gradient, and the abstractor
    learns through working memory alone. `grad_segments=k` keeps the gradient through the hidden states and through the
    engrams of k segments before the last: backpropagation through time, as far as training unrolls it.

    Not in the paper, and off by default: `interference` lets new engrams take lifespan from stored ones that resemble
    them, that much for each new one in all; `graded` drops the border between short and long term: all stored engrams
    are reminded by similarity and by ties, and the longer their lifespan the more easily; `reservoir` is the size of an
    unbiased sample of all tokens that is read beside them; `null` gives each attention one more key, learned, with
    nothing behind it, so that it can choose to read little: without, working memory weighs as much as all that is
    reminded.
    """

    kind: ClassVar[str] = "memoria"
    card: ClassVar[Card] = Card(
        title="Memoria",
        seam="after block",
        trains="abstractor, cross-attention",
        bytes_law="engrams x (4 width + 24) + 4 elders^2",
        paper="Park & Bak, ICML 2024, arXiv 2310.03052",
        citation=(
            "@inproceedings{memoria, title = {Memoria: Resolving Fateful Forgetting Problem through Human-Inspired "
            "Memory Architecture}, author = {Park, Sangjun and Bak, JinYeong}, booktitle = {ICML}, year = {2024}}"
        ),
    )

    segment_length: int = 150
    working: int = 50
    reminded_stm: int = 50
    reminded_ltm: int = 50
    stm_capacity: int = 400
    depth: int = 10
    lifespan: float = 9.0
    alpha: float = 8.0
    heads: int = 4
    dim: int | None = None
    feed_forward: int | None = None
    read_layers: list[int] | None = None
    write_layer: int | None = None
    correlation: Literal["exp", "distance"] = "exp"
    edges: Literal["conditional", "lift"] = "conditional"
    positive_edges: bool = False
    random_ltm_seeds: int = 0
    ties: Literal["random", "oldest"] = "random"
    seed: int = 0
    grad_segments: int = 0
    interference: float = 0.0
    graded: bool = False
    reservoir: int = 0
    null: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("working", 1),
            ("heads", 1),
            ("stm_capacity", 1),
            ("dim", 1),
            ("feed_forward", 1),
            ("reminded_stm", 0),
            ("reminded_ltm", 0),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("depth", "random_ltm_seeds", "grad_segments", "seed", "interference", "reservoir"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.lifespan <= 0 or self.alpha < 0:
            raise ValueError(
                f"lifespan is {self.lifespan} and alpha {self.alpha}; use a lifespan above 0, alpha from 0"
            )
        if self.dim is not None and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads; set heads= to a divisor")
        if self.read_layers is not None and not self.read_layers:
            raise ValueError("read_layers is empty; name at least one block, or leave it out for all")

    def unused(self) -> dict[str, str]:
        """The settings of a search that finds or returns nothing; a seed of what is not drawn asks for nothing."""
        found: dict[str, str] = {}
        if not self.reminded_ltm:
            searching = ("depth", "edges", "positive_edges", "random_ltm_seeds", "ties")
            found |= dict.fromkeys(searching, "set reminded_ltm above 0")
        return found

    def with_rule(self, rule: str) -> MemoriaConfig:
        """The same settings under one of three rules of reminding: how the search begins and by which edges it goes on.

        "paper" is the paper's letter; "seeds" starts `stm_capacity - reminded_stm` searches more at random long-term
        engrams, as the published code does by accident; "lift" divides a count by how often its target fires at all.
        """
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}; use {', '.join(RULES)}")
        accident = max(0, self.stm_capacity - self.reminded_stm)
        return self.replace(
            edges="lift" if rule == "lift" else "conditional", random_ltm_seeds=accident if rule == "seeds" else 0
        )

    @classmethod
    def published(cls, **changes: Any) -> MemoriaConfig:
        """The published code's rules where they are a setting: mean distance, and searches that start at random."""
        return cls(**{"correlation": "distance", **changes}).with_rule("seeds")

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """The paper's rule, and one with the other choice everywhere."""
        small: dict[str, Any] = {"segment_length": 8, "working": 2, "reminded_stm": 2, "reminded_ltm": 3, "heads": 2}
        small |= {"stm_capacity": 4, "depth": 2, "lifespan": 4.0, "alpha": 3.0}
        return [
            cls(**small),
            cls(
                **small,
                correlation="distance",
                edges="lift",
                random_ltm_seeds=1,
                ties="oldest",
                grad_segments=1,
                interference=0.1,
                graded=True,
                reservoir=3,
                null=True,
                dim=32,
                feed_forward=16,
            ),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> MemoriaConfig:
        """`size` engrams a segment, by default a quarter of its tokens but 4 to 8; four segments of them in
        short-term memory, all reminded, and eight segments' of long-term ones. Gradients go one segment back and each
        attention may read little, as where sorting was learned.
        """
        working = size or max(4, min(8, segment_length // 4))
        return cls(
            segment_length=segment_length,
            working=working,
            reminded_stm=4 * working,
            reminded_ltm=8 * working,
            stm_capacity=4 * working,
            lifespan=5.0,
            heads=1,
            grad_segments=1,
            null=True,
        )

    def build(self, width: int, depth: int, causal: bool = True) -> Memoria:
        """The module; raises `ValueError` naming a layer or width that the host does not have."""
        from mnemic.memories.memoria.memoria import Memoria

        return Memoria(self, width, depth, causal)
