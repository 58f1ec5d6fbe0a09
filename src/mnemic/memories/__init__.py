"""The mechanisms, one file each, imported when they are first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnemic.lazy import lazily

if TYPE_CHECKING:
    from mnemic.memories.registry import CONFIGS, Card
    from mnemic.memory import Attribution, Memory, MemoryConfig, MemoryTokens, Site

MECHANISMS = {
    "armt": "ARMTConfig",
    "compact": "CompactConfig",
    "compressive": "CompressiveConfig",
    "emt": "EMTConfig",
    "fast-weights": "FastWeightsConfig",
    "infinity-former": "InfinityFormerConfig",
    "knn": "KNNConfig",
    "knn-lm": "KNNLMConfig",
    "memoria": "MemoriaConfig",
    "memory-prompt": "MemoryPromptConfig",
    "persistent": "PersistentConfig",
    "recall": "RecallConfig",
    "rmt": "RMTConfig",
    "several": "SeveralConfig",
    "titans": "TitansConfig",
    "transformer-xl": "TransformerXLConfig",
}
"""The mechanisms of this package: their kinds, after which their files are named, and their configs."""

__all__ = ["CONFIGS", "MECHANISMS", "Attribution", "Card", "Memory", "MemoryConfig", "MemoryTokens", "Site"]

_find = lazily(
    __name__,
    {
        **dict.fromkeys(("Attribution", "Memory", "MemoryConfig", "MemoryTokens", "Site"), "mnemic.memory"),
        **dict.fromkeys(("CONFIGS", "Card"), "mnemic.memories.registry"),
        **{config: f"{__name__}.{kind.replace('-', '_')}" for kind, config in MECHANISMS.items()},
    },
)


def __getattr__(name: str) -> Any:
    """Classes and files on first use."""
    return _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *MECHANISMS.values()})
