"""The tables and pictures of suites, which `mnemic bench NAME` runs."""

from __future__ import annotations

from pathlib import Path

from mnemic.analysis.suite_pictures import draw_suite
from mnemic.analysis.suite_tables import suites, tables

__all__ = ["pictures", "tables"]


def pictures(results: Path, images: Path) -> None:
    """Draws every suite that there are records of."""
    for name, found in suites(results).items():
        draw_suite(found, images, name)
