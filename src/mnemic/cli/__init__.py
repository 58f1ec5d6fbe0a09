"""The command line: `mnemic demo | list | bench | report`."""

from mnemic.cli.main import app

__all__ = ["app"]
