"""`mnemic serve`: sessions behind the HTTP API that clients of language models speak."""

from __future__ import annotations

from mnemic.serve.app import make_app
from mnemic.serve.settings import Settings

__all__ = ["Settings", "make_app"]
