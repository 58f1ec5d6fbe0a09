"""The command line: `mnemic demo | list | bench | analyse | inspect | report`."""

from mnemic.cli.main import app

__all__ = ["app"]
