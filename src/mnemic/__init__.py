"""mnemic: persistent memory for any Hugging Face transformer, measured with its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnemic.lazy import lazily

if TYPE_CHECKING:
    from mnemic.attachment import Attachment, attach, attached, from_pretrained, memory_cache
    from mnemic.batching import SessionBatch, batch
    from mnemic.checkpoints import FetchError, fetch
    from mnemic.data import SegmentCollator, Streams, collate
    from mnemic.host.cache import MemoryCache
    from mnemic.inspect.show import show
    from mnemic.memories.armt import ARMTConfig
    from mnemic.memories.compact import CompactConfig
    from mnemic.memories.compressive import CompressiveConfig
    from mnemic.memories.emt import EMTConfig
    from mnemic.memories.fast_weights import FastWeightsConfig
    from mnemic.memories.infinity_former import InfinityFormerConfig
    from mnemic.memories.knn import KNNConfig
    from mnemic.memories.knn_lm import KNNLMConfig
    from mnemic.memories.memoria import MemoriaConfig
    from mnemic.memories.memory_prompt import MemoryPromptConfig
    from mnemic.memories.persistent import PersistentConfig
    from mnemic.memories.recall import RecallConfig
    from mnemic.memories.registry import CONFIGS
    from mnemic.memories.rmt import RMTConfig
    from mnemic.memories.several import SeveralConfig
    from mnemic.memories.titans import TitansConfig
    from mnemic.memories.transformer_xl import TransformerXLConfig
    from mnemic.memory import Memory, MemoryConfig, Site
    from mnemic.session import Session
    from mnemic.state import State, StateError
    from mnemic.store import Conflict, NoRoom, NotStored, SessionStore, StoreError
    from mnemic.trainer import SegmentCurriculum, Trainer
    from mnemic.training import Batch, calibrate, train
    from mnemic.unrolling import read_segments, unroll

__version__ = "0.1.0"

__all__ = [
    "CONFIGS",
    "ARMTConfig",
    "Attachment",
    "Batch",
    "CompactConfig",
    "CompressiveConfig",
    "Conflict",
    "EMTConfig",
    "FastWeightsConfig",
    "FetchError",
    "InfinityFormerConfig",
    "KNNConfig",
    "KNNLMConfig",
    "MemoriaConfig",
    "Memory",
    "MemoryCache",
    "MemoryConfig",
    "MemoryPromptConfig",
    "NoRoom",
    "NotStored",
    "PersistentConfig",
    "RMTConfig",
    "RecallConfig",
    "SegmentCollator",
    "SegmentCurriculum",
    "Session",
    "SessionBatch",
    "SessionStore",
    "SeveralConfig",
    "Site",
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
    "show",
    "train",
    "unroll",
]

_HOMES = {
    "attachment": ("Attachment", "attach", "attached", "from_pretrained", "memory_cache"),
    "batching": ("SessionBatch", "batch"),
    "checkpoints": ("FetchError", "fetch"),
    "data": ("SegmentCollator", "Streams", "collate"),
    "host.cache": ("MemoryCache",),
    "inspect.show": ("show",),
    "memories": ("CONFIGS", "Memory", "Site", *(name for name in __all__ if name.endswith("Config"))),
    "session": ("Session",),
    "state": ("State", "StateError"),
    "store": ("Conflict", "NoRoom", "NotStored", "SessionStore", "StoreError"),
    "trainer": ("SegmentCurriculum", "Trainer"),
    "training": ("Batch", "calibrate", "train"),
    "unrolling": ("read_segments", "unroll"),
}
_find = lazily(__name__, {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names})


if not TYPE_CHECKING:  # a name that is not there stays an error to type checkers

    def __getattr__(name: str) -> Any:
        """Everything on first use: nobody waits for what they do not need, such as databases or the Trainer."""
        if name in _HOMES["trainer"]:
            try:
                import accelerate  # noqa: F401
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(f"mnemic.{name} needs accelerate: pip install 'mnemic[train]'") from error
        return _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
