"""How commands name a model."""

from __future__ import annotations

import typer

from mnemic.checkpoints import FetchError, folder_of

CAUSAL = "A causal model: local folder, hub id, or a name that mnemic fetch knows."


def found(model: str | None) -> str | None:
    """What `from_pretrained` reads of a model: a checkpoint that `mnemic fetch` knows by name is brought if need be."""
    if model is None:
        return None
    try:
        return folder_of(model)
    except (OSError, ValueError, ImportError, FetchError) as error:
        raise typer.BadParameter(str(error)) from error
