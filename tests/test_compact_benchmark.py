"""Compact on a real model (`benchmarks/compact.py`), on a tiny host: what is read and asked under each condition."""

from __future__ import annotations

import importlib

import pytest
import torch
from tokenizers import decoders

from families import make
from mnemic.bench.experiments import Silent
from mnemic.bench.results import Record, problems
from mnemic.memories.compact import CompactConfig
from runs import characters
from test_needles import TEXTS

LENGTH, WINDOW, BLOCK = 704, 32, 32


@torch.no_grad()
def test_a_run_writes_a_record_that_checks_and_goes_on(tmp_path, monkeypatch):
    module, tokenizer = importlib.import_module("compact"), characters()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    monkeypatch.setattr(module, "RESERVOIR", 8)
    torch.manual_seed(0)
    model = make("llama", max_position_embeddings=2048).eval()
    config = CompactConfig(segment_length=BLOCK, window=WINDOW)

    def run() -> Record:
        given = (TEXTS, config, LENGTH, [16, 8], ["recent"], 1, 0, "tiny", tmp_path)
        return module.run(model, tokenizer, *given, Silent())

    record = run()
    told, asked = record.scores
    reservoir = "matching, with a reservoir of 8, 16 x"
    others = {"matching, 8 x", "recent, 16 x", reservoir, module.SINKS_AND_WINDOW, module.EVERYTHING}
    assert set(told.controls) == others
    found = {f"{module.OTHER}, {name}" for name in ("matching, 16 x", "matching, 8 x", reservoir)}
    assert set(asked.controls) == others | {module.RETRIEVED} | found
    assert told.examples == LENGTH - 2 * WINDOW
    assert asked.examples == 5
    keys = {name: settings["keys"] for name, settings in record.config["settings"].items()}
    # 16 wide: 33 numbers of a key with a mass are 32 of one without
    assert keys["matching, 16 x"] == (LENGTH - WINDOW) // 16
    assert keys["recent, 16 x"] == keys["matching, 16 x"] * 33 // 32
    size = record.measures["bytes"]
    assert 0.9 * size["matching, 16 x"] < size[reservoir] <= size["matching, 16 x"] + 8 * 9  # which tokens they are
    assert size["matching, 8 x"] == 2 * size["matching, 16 x"] < size[module.EVERYTHING]
    path = record.save(tmp_path / "records")
    assert problems(path) == []
    assert Record.load(path).scores == record.scores
    assert module.table(record).row_count == module.page([record]).count("\n|") - 1
    monkeypatch.setattr(module.Reading, "under", lambda *_: pytest.fail("a document was read again"))
    assert run().scores == record.scores
