"""The mechanisms, one file each; importing this package registers them all."""

from mnemic.memories.base import CONFIGS, Card, Memory, MemoryConfig
from mnemic.memories.emt import EMT, EMTConfig
from mnemic.memories.fast_weights import FastWeights, FastWeightsConfig
from mnemic.memories.memoria import Memoria, MemoriaConfig
from mnemic.memories.titans import Titans, TitansConfig

__all__ = [
    "CONFIGS",
    "EMT",
    "Card",
    "EMTConfig",
    "FastWeights",
    "FastWeightsConfig",
    "Memoria",
    "MemoriaConfig",
    "Memory",
    "MemoryConfig",
    "Titans",
    "TitansConfig",
]
