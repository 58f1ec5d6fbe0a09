"""Perplexity with recall (`benchmarks/recall_perplexity.py`), on a tiny host: the same tokens under each condition."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from mnemic.bench.experiments import Silent
from mnemic.bench.results import Record, problems
from mnemic.memories.recall import RecallConfig
from runs import characters, prose

WINDOW, BLOCK = 32, 16
TEXTS = [("one", prose(3_000, 1)), ("two", prose(3_000, 2)), ("short", prose(100, 3))]


@pytest.fixture
def perplexity(monkeypatch):
    module = importlib.import_module("recall_perplexity")
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    return module


@pytest.fixture
def bench(perplexity):
    """A tiny host with recall, which retrieves while it reads."""
    config = RecallConfig(segment_length=16, window=WINDOW, budget=32, sinks=4, unit=4, recall_in_reading=True)
    torch.manual_seed(0)
    model = make("llama").eval()
    settings = {"default": config, "layer": config.replace(by="layer")}
    return perplexity.Bench(model, characters(), mnemic.attach(model, config), settings)


def run(perplexity, bench, folder, lengths=(128, 272), documents=2):
    return perplexity.run(bench, TEXTS, lengths, documents, 0, "tiny", folder, Silent())


def test_a_run_writes_a_record_that_checks(perplexity, bench, tmp_path, monkeypatch):
    """Every condition with its interval, everything in the window where the positions reach; and nothing read twice."""
    record = run(perplexity, bench, tmp_path)
    for score in record.scores:
        everything = {perplexity.EVERYTHING} if score.length == 128 else set()
        assert set(score.controls) == {"recall, layer", perplexity.SINKS, perplexity.WINDOW} | everything
        above = record.measures["nats above recall"][str(score.length)]
        assert set(above) == set(score.controls)
        assert score.examples == 2 * (score.length - WINDOW)
        for each in above.values():
            assert each["low"] <= each["mean"] <= each["high"]
            assert each["of"] == score.examples // BLOCK
    path = record.save(tmp_path / "records")
    assert problems(path) == []
    assert Record.load(path).scores == record.scores
    assert perplexity.table(record).row_count == 2
    monkeypatch.setattr(perplexity, "nats", lambda *_: pytest.fail("a novel was read again"))
    assert run(perplexity, bench, tmp_path).scores == record.scores


def test_blocks_are_those_behind_the_window(perplexity, bench):
    """With everything in the window what the model itself predicts, token by token; where all that left is found
    again, recall says the same.
    """
    ids = perplexity.novel(TEXTS, bench.tokenizer, 128, 0, 0, WINDOW).ids
    whole = perplexity.nats(bench, ids, perplexity.EVERYTHING, bench.config, lambda count: None)
    wide = bench.config.replace(budget=128)
    recalled = perplexity.nats(bench, ids, "recall, default", wide, lambda count: None)
    narrow = perplexity.nats(bench, ids, "recall, default", bench.config, lambda count: None)
    bench.attachment.detach()
    with torch.no_grad():
        logits = bench.model(input_ids=ids).logits[0]
    each = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[WINDOW - 1 :]
    torch.testing.assert_close(whole, each.unflatten(0, (-1, BLOCK)).mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recalled, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(narrow, whole, atol=1e-5)


def test_novels(perplexity, bench):
    """Different ones, the bytes of what counts, and an error where there are too few or a length does not fit."""
    one, two = (perplexity.novel(TEXTS, bench.tokenizer, 128, number, 0, WINDOW) for number in (0, 1))
    assert one.ids.shape == (1, 128)
    assert not torch.equal(one.ids, two.ids)
    assert one.bytes == 128 - WINDOW  # a character a token
    with pytest.raises(ValueError, match="2 novels held out have 128 tokens, and 3 are asked for"):
        perplexity.novel(TEXTS, bench.tokenizer, 128, 2, 0, WINDOW)
    with pytest.raises(ValueError, match="multiple of 16"):
        perplexity.novel(TEXTS, bench.tokenizer, 120, 0, 0, WINDOW)
