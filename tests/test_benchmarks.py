"""The scripts under `benchmarks/`, on a tiny host: what they train, what they write down, and how they go on."""

from __future__ import annotations

import functools

import pytest
import torch

import copying
import kept
import mnemic
import recall_blocks
import recall_events as events
import recall_perplexity
import recall_speed as speed
import window_sinks as sinks
from families import make
from helpers import tokens
from mnemic.bench.experiments import Silent
from mnemic.bench.results import Record, problems
from mnemic.memories import MemoryConfig
from mnemic.memories.recall import RecallConfig
from mnemic.tasks.told import pool_of
from runs import characters, prose, tiny_host


@pytest.mark.parametrize("name", ["emt", "emt-block-content", "emt-untied", "fast-weights"])
def test_copying(name, tmp_path, monkeypatch):
    """A record with the curve and every control, its table, and the same again from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    host = str(tiny_host(tmp_path / "host"))
    ids = torch.tensor(characters()(prose(30_000), add_special_tokens=False)["input_ids"])
    pool = pool_of(ids, copying.LENGTH)
    settings = {"write_layer": 0, "read_layers": [0, 1], "dim": 16}
    settings |= {"slots": 16} if name.startswith("emt") else {}
    known = (copying.MEMORIES | copying.ABLATIONS)[name]
    config = MemoryConfig.from_dict({"segment_length": copying.LENGTH, **known, **settings})
    record = copying.run(name, config, host, pool[:600], pool[600:], 12, 1e-3, 0, Silent())
    assert [step for step, _ in record.measures["nats by step"]] == [10, 12]
    assert set(record.scores[0].controls) == {"other stream", "zeroed", "fresh", "no memory"}
    again = copying.run(name, config, host, pool[:600], pool[600:], 12, 1e-3, 0, Silent())
    assert again.measures == record.measures
    assert again.scores[0].score == pytest.approx(record.scores[0].score, abs=1e-5)
    path = record.save(tmp_path, "copying.json")
    assert problems(path) == []
    assert f"`{name}`" in copying.table([Record.load(path)])


def test_every_memory_of_the_bench_can_be_built():
    """On a host of SmolLM2's size: the settings name layers that are there."""
    for name, settings in (copying.MEMORIES | copying.ABLATIONS).items():
        config = MemoryConfig.from_dict({"segment_length": copying.LENGTH, **settings})
        with torch.device("meta"):
            if name not in ("infinity-former",):  # it computes its basis when it is built
                config.build(576, 30)


def test_an_untied_reader_begins_elsewhere():
    settings = {"kind": "emt", "segment_length": 8, **copying.ALLOCATION, "write_layer": 0, "read_layers": [0]}
    config = MemoryConfig.from_dict(settings)
    memory = config.build(64, 2)
    query = memory.readers["0"][0].query.weight.clone()
    copying.changed("emt-untied", memory)
    reader = memory.readers["0"][0]
    assert not torch.equal(reader.query.weight, query)
    assert reader.alpha.item() == 1
    assert not reader.output.weight.any()


def test_what_recall_costs():
    """Every side decodes and reads beside as many tokens as were asked for."""
    model = make("llama")
    config = RecallConfig(segment_length=16, window=16, budget=8, sinks=4, unit=4)
    found = speed.measured(model, config, {"few": [0], "ten": [1]}, tokens(1, 64), [24, 100], 16, 1, 20)
    for length in ("24", "100"):
        assert found[length]["clock / base"].keys() == speed.SIDES.keys()
        assert found[length]["reading"]["clock / base"].keys() == {"recall", "few blocks"}
        assert found[length]["bytes"]["all"] == 2 * found[length]["bytes"]["few"]
    assert found["100"]["bytes"]["all"] * 24 == found["24"]["bytes"]["all"] * 100


def test_what_keeping_costs(tmp_path):
    """A turn writes a fraction of the session into a store and a folder, and all of it into a file."""
    model = make("llama")
    config = RecallConfig(segment_length=16, window=16, budget=8, sinks=4, unit=4, stored="int8")
    found = kept.measured(model, config, tokens(1, 80), 1500, 2, 16, tmp_path, 60)
    assert 0 < found["bytes of what left the window"] < found["bytes of the session"]
    for way, share in {"store": 0.5, "folder": 0.5, "file": 1.1}.items():
        its = found["ways"][way]
        assert found["bytes of what left the window"] < its["first"]["bytes"]
        assert share - 0.4 < its["turn"]["bytes"] / its["first"]["bytes"] < share
        assert its["restore"]["clock"] > 0 < its["reading / restoring"]["processor"]
    record = Record("kept", "recall", "tiny", 0, {"length": 1500, "turns": 2, "said": 16, "threads": 1}, measures=found)
    record.config["memory"] = config.to_dict()
    record.command = "python benchmarks/kept.py"
    path = record.save(tmp_path, "kept.json")
    assert problems(path) == []
    assert "| store | " in kept.table([Record.load(path)])


def test_events_beside_even_blocks(tmp_path, monkeypatch):
    """All that is kept is all of the attention, and a greater budget leaves more of it; cuts are in order."""
    model = make("llama")
    small = {"segment_length": 16, "window": 16, "budget": 8, "sinks": 4, "unit": 4}
    monkeypatch.setattr(events, "RecallConfig", functools.partial(RecallConfig, **small))
    monkeypatch.setattr(events, "SIZES", (4, 8))
    cases = [events.Case(0, tokens(1, 5, 2), tokens(1, 3, 3), slice(20, 24))]
    found = events.measured(model, [tokens(1, 96)], cases, [8, 16, 96])
    assert len(found) == 2 * 3 * 3
    for cut in ("even, 4", "surprise, 8", "surprise, refined, 4"):
        few, more, every = (found[f"{cut} tokens, budget {budget}"] for budget in (8, 16, 96))
        assert 0 < few < more < every == 1
    begin = events.events(torch.randn(200, generator=torch.Generator().manual_seed(0)).abs(), 4, 8)
    assert 20 < len(begin) < 40
    assert begin[0] == 4
    keys = torch.ones(1, 40, 4)
    keys[:, 17:] *= torch.tensor([1.0, -1.0, 1.0, -1.0])  # likeness ends at 17, so a cut near it moves there
    assert events.refined(events.likeness(keys), torch.tensor([0, 20])).tolist() == [0, 17]
    record = Record("recall-events", "recall", "tiny", 0, {"documents": 1, "length": 96}, measures=found)
    record.command = "python benchmarks/recall_events.py"
    path = record.save(tmp_path, "recall-events.json")
    assert problems(path) == []
    assert "| 8 | surprise, refined | " in events.table([Record.load(path)])


def test_which_blocks_recall(tmp_path, monkeypatch):
    """Every block has a share for each of its heads, and the first few of them are read with anew."""
    model = make("llama")
    small = {"segment_length": 16, "window": 16, "budget": 8, "sinks": 4, "unit": 4}
    monkeypatch.setattr(recall_blocks, "RecallConfig", functools.partial(RecallConfig, **small))
    told = [tokens(1, 64), tokens(1, 64, 1)]
    cases = [
        recall_blocks.Case(document, tokens(1, 5, 2), tokens(1, 3, 3), slice(20, 24)) for document in range(len(told))
    ]
    shares, scores = recall_blocks.measured(model, told, cases, [1])
    assert shares.keys() == {"0", "1"}
    assert all(len(share) == 2 and 0 <= min(share) <= max(share) <= 1 for share in shares.values())
    best = max(shares, key=lambda block: max(shares[block]))
    assert (scores["2"]["blocks"], scores["1"]["blocks"]) == ([0, 1], [int(best)])
    assert scores["1"]["bytes"] < scores["2"]["bytes"]
    record = recall_blocks.recorded("tiny", 0, 64, 2, shares, scores)
    record.command = "python benchmarks/recall_blocks.py"
    path = record.save(tmp_path, "recall-blocks.json")
    assert problems(path) == []
    assert f"| 1 | {best} | " in recall_blocks.table([Record.load(path)])


def test_sinks_of_a_window(tmp_path, monkeypatch):
    """All windows are one until they are full; then each counts, and the record checks."""
    model = make("llama")
    small = {"WINDOW": 32, "SEGMENT": 8, "BLOCK": 16, "CONDITIONS": {"4 sinks": (4, {}), "no sinks": (0, {})}}
    for name, value in small.items():
        monkeypatch.setattr(sinks, name, value)
    monkeypatch.setattr(recall_perplexity, "BLOCK", 16)
    attachment = mnemic.attach(model, mnemic.EMTConfig(segment_length=8, slots=4, dim=16))
    record = sinks.run(attachment, sinks.Novel(tokens(1, 96), 64), "tiny", Silent())
    (score,) = record.scores
    assert score.examples == 64
    assert set(score.controls) == {"no sinks", sinks.RECOMPUTED}
    path = record.save(tmp_path, "window-sinks.json")
    assert problems(path) == []
    assert "| no sinks | " in sinks.table([Record.load(path)])
    with attachment.disabled():
        ids = tokens(1, 32)
        one, two = sinks.windowed(model, 4, {}), sinks.recomputed(model)
        for part in ids.split(8, 1):
            torch.testing.assert_close(one(part), two(part))
