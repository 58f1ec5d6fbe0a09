"""The comparison with public packages: both sides run, and where they should compute the same, they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import peers
import peers_pairs as pairs
from mnemic.bench.results import Record

SHAPE = pairs.TINY


def pair_of(name: str) -> pairs.Pair:
    pair = pairs.PAIRS[name]
    if obstacle := pair.obstacle():
        pytest.skip(obstacle)
    return pair


@pytest.mark.parametrize("side", ["theirs", "ours"])
@pytest.mark.parametrize("name", pairs.PAIRS)
def test_every_step_has_a_loss_and_gradients_and_repeats(name: str, side: str):
    torch.manual_seed(0)
    made = getattr(pair_of(name), side)(SHAPE)
    first = made.step()
    assert torch.isfinite(first)
    assert torch.equal(first, made.step())
    # a step of ours trains whatever the package's does: nothing is frozen
    missing = [parameter.shape for parameter in made.parameters if parameter.grad is None]
    assert len(missing) < max(1, len(made.parameters) // 4), missing


@pytest.mark.parametrize("delta", [False, True])
def test_infini_attention_computes_what_the_package_does(delta: bool):
    pair_of("infini-delta-alone" if delta else "infini-alone")
    theirs, ours = pairs.their_fastweight_memory(SHAPE, delta), pairs.our_infini(SHAPE, delta)
    torch.testing.assert_close(ours.step(), theirs.step(), rtol=1e-4, atol=0)


def test_hosts_have_the_size_of_the_package_without_its_memory():
    pair = pair_of("infini")
    theirs = pair.theirs(SHAPE).size
    host = sum(parameter.numel() for parameter in pairs.llama(SHAPE).parameters())
    assert abs(host - theirs) < 0.02 * theirs


def test_a_pair_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setitem(pairs.PAIRS, "gone", replace(pairs.PAIRS["titans-alone"], module="no_such_module"))
    monkeypatch.setitem(
        pairs.PAIRS, "unknown", replace(pairs.PAIRS["titans-alone"], module="torch", kind="no-such-kind")
    )
    record = peers.peers(said.append, ["gone", "unknown"], ["small"])
    assert record.measures["pairs"] == {}
    assert "pip install mnemic[peers]" in record.measures["skipped"]["gone"]
    assert "no-such-kind" in record.measures["skipped"]["unknown"]
    assert [line.split(":")[0] for line in said] == ["gone", "unknown"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'nobody' is not one of titans"):
        peers.peers(print, ["nobody"])
    with pytest.raises(ValueError, match="'huge' is not one of small, wide"):
        peers.peers(print, [], ["huge"])


def fake(steps: list[str], name: str) -> pairs.Side:
    def step() -> Tensor:
        steps.append(name)
        return torch.zeros(())

    return pairs.Side(step, [torch.nn.Parameter(torch.zeros(3))])


def test_sides_alternate_and_the_first_step_is_not_counted():
    steps: list[str] = []
    pair = replace(pairs.PAIRS["titans-alone"], theirs=lambda _: fake(steps, "t"), ours=lambda _: fake(steps, "o"))
    before = torch.get_num_threads()
    found = peers.compare(pair, SHAPE, threads=[1], runs=3)
    assert steps == ["t", "o"] * 4
    assert torch.get_num_threads() == before
    assert found["parameters"] == {"package": 3, "ours": 3}
    assert found["threads"]["1"]["package / ours"].keys() == {"median", "least", "most"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
def test_the_peak_of_memory_is_that_of_a_step(monkeypatch: pytest.MonkeyPatch):
    def side(count: int) -> Callable[[pairs.Shape], pairs.Side]:
        return lambda _: pairs.Side(lambda: torch.ones(count).sum(), [])

    for name, count in (("large", 2**26), ("little", 2**20)):
        monkeypatch.setitem(pairs.PAIRS, name, replace(pairs.PAIRS["titans-alone"], ours=side(count)))
    assert 0.95 * 2**28 < peers.peak_bytes("large", "ours", SHAPE) < 1.05 * 2**28
    assert peers.peak_bytes("little", "ours", SHAPE) < 2**24


def test_the_record_becomes_two_tables():
    ratio = {"median": 2.0, "least": 1.5, "most": 2.5}
    times = {"ms": {"package": 20.0, "ours": 10.0}, "package / ours": ratio, "package / ours, processor": ratio}
    found = {
        "parameters": {"package": 2_000_000, "ours": 1_000_000},
        "threads": {"2": times, "1": times},
        "peak bytes": {"package": 2**21, "ours": 2**20, "ours / package": 0.5},
    }
    pair = {"package": "some-package", "version": "1.2", "kind": "emt", "scope": pairs.STEP, "mechanism": "EMT"}
    config = {"shapes": {"small": vars(SHAPE)}, "threads": [2, 1], "runs": 9}
    record = Record("peers", "all", "host", 0, config, command="python benchmarks/peers.py")
    record.measures = {
        "pairs": {"it": {**pair, "differs": "All.", "shapes": {"small": found}}},
        "skipped": {"rmt": "not here"},
    }
    record.machine, record.versions = {"cores": 2, "processor": "x"}, {"torch": "2", "transformers": "5"}
    text = peers.table([record])
    assert "| it | small | 2.00 / 1.00 | 20 / 10 | **2.00** (1.50-2.50) | **2.00** (1.50-2.50) | 2 / 1 | 0.50 |" in text
    assert "`rmt` was skipped: not here." in text
    assert "| it | some-package 1.2 | EMT; training step | All. |" in peers.table_of_pairs([record])
    assert "Not measured yet" in peers.table([])
