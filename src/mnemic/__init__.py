"""mnemic: persistent memory for any Hugging Face transformer, measured with its controls."""

from typing import TYPE_CHECKING, Any

from mnemic.attachment import Attachment, attach, attached, from_pretrained, memory_cache
from mnemic.batching import SessionBatch, batch
from mnemic.checkpoints import FetchError, fetch
from mnemic.data import SegmentCollator, Streams, collate
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
from mnemic.store import Conflict, NotStored, SessionStore, StoreError
from mnemic.training import Batch, calibrate, train
from mnemic.unrolling import read_segments, unroll

if TYPE_CHECKING:
    from mnemic.trainer import SegmentCurriculum, Trainer

__version__ = "0.1.0"

__all__ = [
    "CONFIGS",
    "ARMTConfig",
    "Attachment",
    "Batch",
    "CompressiveConfig",
    "Conflict",
    "EMTConfig",
    "FastWeightsConfig",
    "FetchError",
    "InfinityFormerConfig",
    "KNNConfig",
    "MemoriaConfig",
    "Memory",
    "MemoryCache",
    "MemoryConfig",
    "MemoryPromptConfig",
    "NotStored",
    "PersistentConfig",
    "RMTConfig",
    "SegmentCollator",
    "SegmentCurriculum",
    "Session",
    "SessionBatch",
    "SessionStore",
    "State",
    "StateError",
    "StoreError",
    "Streams",
    "TitansConfig",
    "Trainer",
    "TransformerXLConfig",
    "attach",
    "attached",
    "batch",
    "calibrate",
    "collate",
    "fetch",
    "from_pretrained",
    "memory_cache",
    "read_segments",
    "train",
    "unroll",
]


def __getattr__(name: str) -> Any:
    """`Trainer` and its callback on first use: the Hugging Face Trainer takes long to import, and wants accelerate."""
    if name not in ("SegmentCurriculum", "Trainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"mnemic.{name} needs accelerate: pip install 'mnemic[train]'") from error
    from mnemic import trainer

    return getattr(trainer, name)
