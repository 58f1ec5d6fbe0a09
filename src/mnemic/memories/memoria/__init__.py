"""Memoria: engrams in working, short-term and long-term memory, tied by Hebbian counts (see `memoria.py`)."""

from mnemic.memories.memoria.config import MemoriaConfig
from mnemic.memories.memoria.memoria import Memoria

__all__ = ["Memoria", "MemoriaConfig"]
