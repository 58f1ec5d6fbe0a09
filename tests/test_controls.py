"""The controls: one definition for every measurement and mechanism, also where a batch has no other stream."""

from __future__ import annotations

import math

import pytest
import torch

import mnemic
import sorting
from helpers import CACHE, CONFIGS, SEGMENT, assert_differ, assert_near, every_kind_that_writes, host, tokens
from mnemic import controls
from mnemic.bench import asking, recall
from mnemic.controls import CONDITIONS, CONTROLS, apart, conditions, measure, others, parts, verdict, zeroed
from mnemic.stream import Stream
from mnemic.tasks.recall import SymbolStreams
from mnemic.unrolling import IGNORED

FILLS = (1, 4, 2)
"""Segments that the rows of a batch have read."""


def read(model, ids):
    """The stream behind rows of whole segments."""
    cache = mnemic.memory_cache(model, SEGMENT)
    for part in ids.split(SEGMENT, 1):
        model(part, **{CACHE: cache})
    return cache.memory.stream


def answer(model, ids, state):
    """The logits of a segment that begins with `state`."""
    cache = mnemic.memory_cache(model, SEGMENT)
    cache.memory.stream = mnemic.attached(model).router.new_stream(len(ids), state)
    return model(ids, **{CACHE: cache}).logits


@every_kind_that_writes
@torch.no_grad()
def test_each_condition_is_what_it_says(config):
    """Rows of different fill in one batch: the state of every control answers as it would by itself."""
    model = host("llama", config)
    attachment = mnemic.attached(model)
    lone = [read(model, tokens(1, fill * SEGMENT, fill)) for fill in FILLS]
    state, asked = Stream.concatenate(lone).state, tokens(3, SEGMENT, 9)
    found = conditions(attachment, state)
    assert tuple(found) == CONDITIONS
    assert found["memory"] is state
    for row, place in enumerate((2, 0, 1)):
        expected = answer(model, asked[row : row + 1], lone[place].state)
        assert_near(answer(model, asked, found["other stream"])[row], expected[0], 2e-5)
    assert_differ(answer(model, asked, found["other stream"]), answer(model, asked, state), 1e-5)
    for name, tensor in found["zeroed"].items():
        kept = torch.zeros_like(tensor) if tensor.is_floating_point() else state[name]
        assert torch.equal(tensor, kept), name
    assert answer(model, asked, found["zeroed"]).isfinite().all()
    assert_near(answer(model, asked, found["fresh"]), answer(model, asked, None), 0)
    assert found["no memory"] is None


@torch.no_grad()
def test_controls_of_what_left_the_window():
    model = host("llama", CONFIGS["recall-0"])
    router, ids = mnemic.attached(model).router, tokens(2, 6 * SEGMENT)
    stream = read(model, ids)
    other, zero, fresh = (controls.changed(router, stream, name, [1, 0]) for name in CONTROLS[:3])
    assert other.banks == stream.banks[::-1]
    assert not any(bank.tensors()["keys"].any() for bank in zero.banks)
    assert fresh.banks == (None, None)
    found = measure(model, ids, ids, window=SEGMENT)
    assert (found.nats[:, 1:] - found.nats[:, :1]).abs().min() > 1e-3


def test_every_measurement_takes_them_from_one_place():
    assert sorting.conditions is recall.conditions is controls.conditions
    assert asking.changed is controls.changed
    assert asking.CONDITIONS is recall.CONDITIONS is CONDITIONS
    assert CONDITIONS == ("memory", "other stream", "zeroed", "fresh", "no memory")
    assert CONTROLS == ("other_stream", "zeroed", "fresh", "no_memory")


# --- which stream is another -----------------------------------------------------------------------------------------


def test_another_stream_has_read_something_else():
    a, b, c = torch.arange(12).view(3, 4)
    assert others(torch.stack([a, b, c])) == [2, 0, 1]
    assert others(torch.stack([a, a, b])) == [2, 2, 1], "an equal row is the same stream twice"
    assert others(torch.stack([a, b, a, a])) == [1, 0, 1, 1]
    assert others(torch.stack([a, a])) == [None, None]
    assert others(a[None]) == [None]
    assert others({"one": torch.stack([a, a, a]), "two": torch.tensor([1, 1, 2])}) == [2, 2, 1]


def test_a_stream_is_never_its_own_control():
    assert apart([1, 2, 0]) == [1, 2, 0]
    for order, row in ([1, None], 1), ([1, 1], 1), ([0], 0), ([None, 0], 0):
        with pytest.raises(ValueError, match=f"row {row} of {len(order)} has no other stream.*at least 2 streams"):
            apart(order)
    model = host("llama", CONFIGS["emt-0"])
    attachment = mnemic.attached(model)
    alone = read(model, tokens(1, SEGMENT))
    for state in (alone.state, alone.repeat(2).state):
        with pytest.raises(ValueError, match=r"row 0 of \d has no other stream"):
            conditions(attachment, state)
    both = conditions(attachment, alone.repeat(2).state, [1, 0])
    assert torch.equal(both["other stream"]["slots"][0], alone.state["slots"][0]), "who names rows is believed"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("batch", [1, 2, 4, 64])
def test_no_batch_is_left_with_a_single_stream(rows, batch):
    found = [range(part.start, part.stop) for part in parts(rows, batch)]
    assert [row for part in found for row in part] == list(range(rows))
    assert all(len(part) <= max(batch, 2) + 1 for part in found)
    assert all(len(part) >= min(2, rows) for part in found)


def test_zeroing_leaves_the_state_alone():
    state = {"values": torch.ones(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "count": torch.ones(2).long()}
    found = zeroed(state)
    assert [found[name].sum().item() for name in state] == [0, 0, 2]
    assert [found[name].dtype for name in state] == [tensor.dtype for tensor in state.values()]
    assert state["values"].sum() == 6


# --- in measurements -------------------------------------------------------------------------------------------------


def measured(model, ids, **options):
    labels = ids.clone()
    labels[:, : 2 * SEGMENT] = IGNORED
    return measure(model, ids, labels, **options)


def test_a_row_without_another_has_no_number_under_that_control_alone():
    model = host("llama", CONFIGS["emt-0"])
    one, two, three = tokens(3, 4 * SEGMENT).split(1)
    late = torch.cat([one[:, : 3 * SEGMENT], two[:, 3 * SEGMENT :]], 1)
    place = 1 + CONTROLS.index("other_stream")
    for rows in ([one], [one, one], [one, late]):  # the last two differ only where nothing is asked any more
        found = measured(model, torch.cat(rows))
        for numbers in (found.nats, found.right):
            assert numbers[:, place].isnan().all()
            assert numbers.isnan().sum() == len(rows)
    found, apart_ = measured(model, torch.cat([one, one, three])), measured(model, torch.cat([one, three]))
    assert not found.nats.isnan().any()
    assert_near(found.nats[1], apart_.nats[0], 1e-4)
    assert_near(found.nats[0], found.nats[1], 1e-4)
    assert_differ(found.nats[:, place], found.nats[:, 0], 1e-3)


def test_fresh_begins_with_every_segment():
    model = host("llama", CONFIGS["emt-0"])
    ids = tokens(2, 3 * SEGMENT)
    found = measured(model, ids, controls=("fresh", "zeroed"))
    targets = ids[:, 2 * SEGMENT + 1 :]
    logp = answer(model, ids[:, 2 * SEGMENT :], None)[:, :-1].log_softmax(-1).detach()
    before = answer(model, ids[:, SEGMENT : 2 * SEGMENT], None)[:, -1].log_softmax(-1).detach()
    nats = -logp.gather(2, targets[..., None]).sum((1, 2)) - before.gather(1, ids[:, 2 * SEGMENT, None])[:, 0]
    assert_near(found.nats[:, 1].float(), nats, 1e-4)


def test_a_stream_that_is_left_over_is_asked_with_another_streams_memory():
    task = SymbolStreams(segment_length=SEGMENT, pairs=2)
    attachment = mnemic.attached(host("llama", CONFIGS["emt-0"], vocab_size=task.vocabulary))
    test = task.examples(3, "test", 0)
    whole = asking.predict(attachment, test.input_ids, test.labels)
    for row in range(3):
        asked = test.asked[row]
        assert_differ(whole.nats["other stream"][row][asked], whole.nats["memory"][row][asked], 1e-4)
    score = asking.evaluate(attachment, task, 3, batch=2)
    right = {name: task.right(whole.tokens[name], test) for name in CONDITIONS}
    assert score.outcomes == {name: "".join("1" if each else "0" for each in found) for name, found in right.items()}
    with pytest.raises(ValueError, match=r"row 0 of \d has no other stream"):
        asking.evaluate(attachment, task, 1)


def test_the_verdict_is_about_the_difference_to_another_stream():
    labelled, own = torch.tensor([10.0, 20.0, 10.0, 0.0]), torch.tensor([20.0, 44.0, 18.0, 0.0])
    better = verdict(labelled, own, own + labelled * 0.5)
    assert better.startswith("the own memory is better than another stream's by +0.5000 nats a token over 4 rows")
    assert better.endswith("something is remembered")
    for other in (own, own - 5, own + torch.tensor([9.0, -8.0, 0.0, 0.0])):
        assert "no better than another stream's" in verdict(labelled, own, other)
        assert verdict(labelled, own, other).endswith("nothing is remembered")
    # few rows of noise say nothing: of 400 tests about 10 are above chance
    luck = torch.randn(400, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    ones = torch.ones(4).double()
    assert sum(verdict(ones, own, other).endswith("something is remembered") for own, other in luck) < 25
    # a single row has no spread to compare with
    assert verdict(labelled[:1], own[:1], own[:1] + 1).endswith("nothing is remembered")


def test_the_verdict_leaves_out_rows_without_another_stream():
    labelled, own = torch.tensor([10.0, 20.0, 10.0]), torch.tensor([20.0, 44.0, 18.0])
    some = torch.tensor([21.0, math.nan, 19.0])
    assert "by +0.1000 nats a token over 2 rows" in verdict(labelled, own, some)
    assert verdict(labelled, own, some * math.nan).endswith("cannot be told; use batches of 2")
