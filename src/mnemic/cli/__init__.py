"""The command line: `mnemic chat | fetch | demo | list | bench | analyse | inspect | store | report`."""

from mnemic.cli.main import app

__all__ = ["app"]
