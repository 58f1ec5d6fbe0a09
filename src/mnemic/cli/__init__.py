"""The command line: `mnemic chat | train | fetch | demo | list | bench | tasks | inspect | store | report`."""

from mnemic.cli.main import app

__all__ = ["app"]
