"""The mechanisms, one file each; importing this package registers them all."""

from mnemic.memories.armt import ARMT, ARMTConfig
from mnemic.memories.base import CONFIGS, Attribution, Card, Memory, MemoryConfig, MemoryTokens
from mnemic.memories.compressive import Compressive, CompressiveConfig
from mnemic.memories.emt import EMT, EMTConfig
from mnemic.memories.fast_weights import FastWeights, FastWeightsConfig
from mnemic.memories.infinity_former import InfinityFormer, InfinityFormerConfig
from mnemic.memories.knn import KNN, KNNConfig
from mnemic.memories.memoria import Memoria, MemoriaConfig
from mnemic.memories.memory_prompt import MemoryPrompt, MemoryPromptConfig
from mnemic.memories.persistent import Persistent, PersistentConfig
from mnemic.memories.rmt import RMT, RMTConfig
from mnemic.memories.titans import Titans, TitansConfig
from mnemic.memories.transformer_xl import TransformerXL, TransformerXLConfig

__all__ = [
    "ARMT",
    "CONFIGS",
    "EMT",
    "KNN",
    "RMT",
    "ARMTConfig",
    "Attribution",
    "Card",
    "Compressive",
    "CompressiveConfig",
    "EMTConfig",
    "FastWeights",
    "FastWeightsConfig",
    "InfinityFormer",
    "InfinityFormerConfig",
    "KNNConfig",
    "Memoria",
    "MemoriaConfig",
    "Memory",
    "MemoryConfig",
    "MemoryPrompt",
    "MemoryPromptConfig",
    "MemoryTokens",
    "Persistent",
    "PersistentConfig",
    "RMTConfig",
    "Titans",
    "TitansConfig",
    "TransformerXL",
    "TransformerXLConfig",
]
