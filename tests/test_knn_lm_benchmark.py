"""The kNN-LM on a novel (`benchmarks/knn_lm.py`), on a tiny host: what is compared, and that nothing is read twice."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from helpers import assert_near
from mnemic.bench.experiments import Silent
from mnemic.bench.results import Record, problems
from mnemic.memories.knn_lm import KNNLMConfig
from runs import characters, prose

BLOCK, LENGTH = 16, 128
TEXTS = [("one", prose(3_000, 1)), ("two", prose(3_000, 2)), ("three", prose(3_000, 3))]
CONFIG = KNNLMConfig(segment_length=BLOCK, window=2 * BLOCK, size=LENGTH, top_k=8)


@pytest.fixture
def bench(monkeypatch):
    module = importlib.import_module("knn_lm")
    for its in (module, sys.modules["recall_perplexity"]):
        monkeypatch.setattr(its, "BLOCK", BLOCK)
    for name, few in (("RATES", [0.2, 0.5]), ("TEMPERATURES", [0.05, 0.5]), ("SENTINELS", [0.1, 0.5])):
        monkeypatch.setattr(module, name, few)
    return module


def run(bench, folder):
    return bench.run(make("llama"), characters(), TEXTS, CONFIG, LENGTH, 2, "tiny", 0, folder, Silent())


def test_a_run_writes_a_record_that_checks(bench, tmp_path, monkeypatch):
    record = run(bench, tmp_path)
    (score,) = record.scores
    names = {bench.SENTINEL, bench.NONE, bench.FRESH, bench.ZEROED, bench.OTHER}
    assert set(score.controls) == names == set(record.measures["nats above memory"])
    assert score.examples == 2 * LENGTH // 2
    for above in record.measures["nats above memory"].values():
        assert above["low"] <= above["mean"] <= above["high"]
        assert above["of"] == score.examples // BLOCK
    assert record.config["memory"]["sentinel"] is None
    assert record.config["sentinel"]["sentinel"] in bench.SENTINELS
    path = record.save(tmp_path / "records")
    assert problems(path) == []
    assert Record.load(path).scores == record.scores
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("a novel was read again"))
    assert run(bench, tmp_path).scores == record.scores


@torch.no_grad()
def test_conditions_are_what_they_are_called(bench):
    """The memory is what a session says, no memory what it says switched off, fresh what a new memory says."""
    model, ids = make("llama"), bench.novel(TEXTS, characters(), LENGTH, 0, 0, LENGTH // 2).ids
    attachment = mnemic.attach(model, CONFIG)
    half = LENGTH // 2
    reading = bench.Reading(attachment, ids)
    found = bench.measured(reading, CONFIG.replace(sentinel=0.3), reading.state, Silent())
    assert "mix" not in vars(attachment.memory)

    def nats(fresh=False, off=False):
        session = mnemic.Session(model)
        session.read(ids[:, :half])
        if fresh:
            state = session.stream.state
            new = attachment.memory.init_state(1) | {name: state[name] for name in ("last", "waits")}
            session._layer.stream = session.stream.with_tensors(
                session.stream.tensors() | {f"state.{name}": tensor for name, tensor in new.items()}
            )
        if off:
            with attachment.disabled():
                logits = session.forward(ids[:, half:]).logits
        else:
            logits = session.forward(ids[:, half:]).logits
        first = F.cross_entropy(reading_logits, ids[:, half], reduction="none")
        rest = F.cross_entropy(logits[0, :-1], ids[0, half + 1 :], reduction="none")
        return torch.cat([first, rest]).unflatten(0, (-1, BLOCK)).mean(1)

    reading_logits = reading.logits[0, -1:]
    for name, expected in ((bench.OWN, nats()), (bench.NONE, nats(off=True)), (bench.FRESH, nats(fresh=True))):
        assert_near(torch.tensor(found[name]), expected, 1e-4)
    assert_near(torch.tensor(found[bench.OTHER]), torch.tensor(found[bench.OWN]), 1e-5)
    assert found[bench.SENTINEL] != found[bench.OWN] != found[bench.FRESH] != found[bench.ZEROED]


@torch.no_grad()
def test_settings_are_chosen_by_what_the_memory_would_say(bench):
    model, ids = make("llama"), bench.novel(TEXTS, characters(), LENGTH, 0, 0, LENGTH // 2).ids
    attachment = mnemic.attach(model, CONFIG)
    for sentinel in (None, 0.3):
        config = CONFIG.replace(rate=0.4, temperature=0.2, sentinel=sentinel)
        memory, reading = config.build(64, 2), bench.Reading(attachment, ids)
        part = ids[:, 64:80]
        logits, hidden, state, _ = reading.forward(part)
        away, token = attachment.memory.nearest(hidden[:, :-1], state)
        hits, plain = token[0] == part[0, 1:, None], logits[0, :-1].log_softmax(-1).gather(-1, part[0, 1:, None])[:, 0]
        mixed = memory.mix(memory.reads[0], logits, hidden, state)[0, :-1]
        assert bench.nats_of(config, away[0], hits, plain) == pytest.approx(float(F.cross_entropy(mixed, part[0, 1:])))
    chosen = bench.choose(bench.Reading(attachment, ids), Silent())
    assert chosen[bench.OWN].sentinel is None
    assert chosen[bench.SENTINEL].sentinel in bench.SENTINELS
