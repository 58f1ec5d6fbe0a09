"""What was saved before loads, and goes on as it would have then (`saved_before.py` says how it was made)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import mnemic
from saved_before import EXPECTED, READ, SAVED, load, said

FOLDERS = sorted(path.parent for path in SAVED.glob("*/memory_config.json"))


def test_every_mechanism_was_saved():
    kinds = {mnemic.attached(load(folder)[0]).config.kind for folder in FOLDERS}
    assert kinds == set(mnemic.CONFIGS), "run tests/saved_before.py and commit what it adds"
    assert load_file(EXPECTED).keys() == {folder.name for folder in FOLDERS}


@pytest.mark.small
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_saved_session_goes_on_as_before(folder):
    model, session = load(folder)
    assert session.stream is not None
    assert session.stream.seen == (READ,)
    fork, expected = session.fork(), load_file(EXPECTED)[folder.name]
    torch.testing.assert_close(said(session), expected, atol=1e-4, rtol=1e-4)
    # without the memory it would say something else
    with torch.no_grad(), mnemic.attached(model).disabled():
        without = said(fork)
    assert (without - expected).abs().max() > 1e-3
