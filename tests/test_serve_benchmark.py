"""`benchmarks/serve.py`, on a tiny host."""

from __future__ import annotations

import copy

import serve
from mnemic.bench.results import Record, problems
from serving import TOKENIZER, model_of


def test_what_sharing_steps_gives(tmp_path, file_store):
    """Every session is asked in turn and at once, and a record of it checks."""
    model, tokenizer = model_of(), copy.deepcopy(TOKENIZER)
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    found = serve.measured(model, tokenizer, file_store, sessions=2, tokens=3, rounds=1)
    assert found["at once / in turn, clock"] > 0 < found["at once / in turn, processor"]
    for way in ("in turn", "at once"):
        assert found[way]["first piece, s"]["p50"] <= found[way]["first piece, s"]["p95"]
    assert [entry.version for entry in file_store.list()] == [2] * 4
    record = Record("serve", "emt", "tiny", 0, {"sessions": 2}, measures=found)
    record.command = "python benchmarks/serve.py"
    assert problems(record.save(tmp_path, "serve.json")) == []
