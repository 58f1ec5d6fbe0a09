"""mnemic: persistent memory for any Hugging Face transformer, measured with its controls."""

from mnemic.attachment import Attachment, attach, attached, from_pretrained, memory_cache
from mnemic.host.cache import MemoryCache
from mnemic.memories import (
    CONFIGS,
    ARMTConfig,
    CompressiveConfig,
    EMTConfig,
    FastWeightsConfig,
    InfinityFormerConfig,
    KNNConfig,
    MemoriaConfig,
    Memory,
    MemoryConfig,
    MemoryPromptConfig,
    PersistentConfig,
    RMTConfig,
    TitansConfig,
    TransformerXLConfig,
)
from mnemic.session import Session
from mnemic.state import State, StateError
from mnemic.training import Batch, calibrate, train
from mnemic.unrolling import read_segments, unroll

__version__ = "0.1.0"

__all__ = [
    "CONFIGS",
    "ARMTConfig",
    "Attachment",
    "Batch",
    "CompressiveConfig",
    "EMTConfig",
    "FastWeightsConfig",
    "InfinityFormerConfig",
    "KNNConfig",
    "MemoriaConfig",
    "Memory",
    "MemoryCache",
    "MemoryConfig",
    "MemoryPromptConfig",
    "PersistentConfig",
    "RMTConfig",
    "Session",
    "State",
    "StateError",
    "TitansConfig",
    "TransformerXLConfig",
    "attach",
    "attached",
    "calibrate",
    "from_pretrained",
    "memory_cache",
    "read_segments",
    "train",
    "unroll",
]
