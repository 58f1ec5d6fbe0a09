"""What belongs to a call stays with it: whoever else calls the model at the same time, and however the call ends."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import threading

import pytest
import torch

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_near, feed, host, tokens, trained
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.host.release import GradientCheckpointingLayer
from mnemic.memory import Site

EMT = CONFIGS["emt-0"]
ENDS = (KeyboardInterrupt, SystemExit, RuntimeError)


def meanwhile(function):
    """Runs `function` in another thread, to its end, and gives what it returned."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


# --- other threads and tasks -----------------------------------------------------------------------------------------


def test_disabling_holds_for_its_own_thread_alone():
    model = host("llama", EMT)
    ids = tokens(1, 3 * SEGMENT)
    expected = feed(model, ids)
    with mnemic.attached(model).disabled():
        assert_near(meanwhile(lambda: feed(model, ids)), expected, 0.0)
        assert not torch.equal(feed(model, ids), expected)
    assert torch.equal(feed(model, ids), expected)


def test_disabling_holds_for_its_own_task_alone():
    model = host("llama", EMT)
    ids = tokens(1, 3 * SEGMENT)
    expected = feed(model, ids)

    async def without(inside: asyncio.Event, done: asyncio.Event):
        with mnemic.attached(model).disabled():
            inside.set()
            await done.wait()
            return feed(model, ids)

    async def both():
        inside, done = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(without(inside, done))
        await inside.wait()
        own = feed(model, ids)
        done.set()
        return own, await other

    own, other = asyncio.run(both())
    assert torch.equal(own, expected)
    assert not torch.equal(other, expected)


def test_disabling_nests_and_ends_with_an_error():
    model = host("llama", EMT)
    memory = mnemic.attached(model)
    with memory.disabled():
        with contextlib.suppress(KeyboardInterrupt), memory.disabled():
            raise KeyboardInterrupt
        assert not memory.router.enabled
    assert memory.router.enabled


def test_watching_the_base_leaves_calls_of_other_threads_alone():
    model = host("llama", EMT)
    memory = mnemic.attached(model)
    ids, strange = tokens(1, SEGMENT), tokens(1, SEGMENT, seed=5)
    (site,) = memory.memory.writes
    expected, alone = feed(model, strange), memory.router.watch(memory.anatomy, ids, [site])[site]
    found = []

    def stop_and_look(*_):
        # in the middle of the watched call another thread makes one of its own
        handle.remove()
        found.append(meanwhile(lambda: feed(model, strange)))

    handle = memory.anatomy.blocks[0].register_forward_pre_hook(stop_and_look)
    seen = memory.router.watch(memory.anatomy, ids, [site])[site]
    assert torch.equal(seen, alone)
    assert torch.equal(found[0], expected)


def test_a_block_that_the_memory_does_not_touch_cannot_be_watched():
    model = host("llama", EMT)
    memory = mnemic.attached(model)
    (other,) = {Site(0), Site(1)} - {*memory.memory.writes, *memory.memory.reads}
    with pytest.raises(ValueError, match=f"{other} cannot be watched"):
        memory.router.watch(memory.anatomy, tokens(1, SEGMENT), [other])


def test_memory_tokens_leave_the_process_compiling_as_it_did(monkeypatch):
    def refused(*_):
        raise AssertionError("the stance is the whole process's")

    monkeypatch.setattr(torch.compiler, "set_stance", refused)
    feed(host("llama", CONFIGS["transformer-xl-0"]), tokens(1, 3 * SEGMENT))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["emt-0", "rmt-0", "recall-0"])
def test_a_call_inside_of_another_is_one_of_its_own(kind):
    model, ids = host("llama", CONFIGS[kind]), tokens(2, 3 * SEGMENT + 1)
    inner = [tokens(1, 4 * SEGMENT, seed=5), ids]
    expected, its = feed(model, ids), [feed(model, each) for each in inner]
    found, busy = [], []

    def ask(*_):
        if not busy:
            busy.append(True)
            found.append([feed(model, each) for each in inner])
            busy.clear()

    handle = mnemic.attached(model).anatomy.blocks[1].register_forward_hook(ask)
    assert torch.equal(feed(model, ids), expected)
    handle.remove()
    assert found
    assert all(torch.equal(one, other) for each in found for one, other in zip(each, its, strict=True))
    assert mnemic.attached(model).router.calls == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ["emt-0", "emt-1", "rmt-0", "transformer-xl-0", "recall-0"])
def test_a_tuple_holds_what_an_output_with_names_does(kind):
    model, ids = host("llama", CONFIGS[kind]), tokens(2, 3 * SEGMENT + 1)

    def outputs(**settings):
        ways = {"use_cache": False}, {CACHE: mnemic.memory_cache(model, 2 * SEGMENT)}
        return [model.model(ids, output_hidden_states=True, **way, **settings) for way in ways]

    for named, found in zip(outputs(), outputs(return_dict=False), strict=True):
        assert isinstance(found, tuple)
        assert torch.equal(found[0], named.last_hidden_state)
        assert len(found) == 2 + (named.get(CACHE) is not None)
        assert {hidden.shape[1] for hidden in found[-1]} == {ids.shape[1]}
        assert all(torch.equal(one, other) for one, other in zip(found[-1], named.hidden_states, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["emt-0", "emt-1", "rmt-0", "transformer-xl-0"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_what_routers_of_experts_put_out_is_that_of_all_tokens(name, kind):
    model, ids = make(name), tokens(2, 3 * SEGMENT + 1)
    mnemic.attach(model, CONFIGS[kind])
    output = model(ids, attention_mask=torch.ones_like(ids), labels=ids, output_router_logits=True)
    rows = [model(ids[row : row + 1], labels=ids[:1], output_router_logits=True) for row in range(2)]
    for place, logits in enumerate(output.router_logits):
        assert_near(logits, torch.cat([row.router_logits[place] for row in rows]), 1e-5)
    # in calls of a segment each they come as they do without a memory
    cache = mnemic.memory_cache(model)
    parts = [
        model(part, output_router_logits=True, **{CACHE: cache}).router_logits[0].view(2, -1, logits.shape[-1])
        for part in ids.split(SEGMENT, 1)
    ]
    window = {CACHE: mnemic.memory_cache(model)}
    whole = model(ids, output_router_logits=True, **window).router_logits[0]
    assert_near(torch.cat(parts, 1).flatten(0, 1), whole, 1e-5)


# --- however it ends -------------------------------------------------------------------------------------------------


def interrupted(model, place, error):
    """Makes the model raise at its last block, or where its stack ends or begins, once."""
    memory = mnemic.attached(model)
    module = memory.anatomy.blocks[-1] if place == "block" else memory.anatomy.trunk.get_input_embeddings()

    def strike(*_):
        handle.remove()
        raise error

    handle = module.register_forward_pre_hook(strike)


@pytest.mark.parametrize("error", ENDS)
@pytest.mark.parametrize("place", ["block", "embeddings"])
@pytest.mark.parametrize("kind", ["emt-0", "rmt-0", "transformer-xl-0", "memoria-0"])
def test_whatever_ends_a_call_leaves_nothing_behind(kind, place, error):
    model, ids = host("llama", CONFIGS[kind]), tokens(1, 3 * SEGMENT)
    cache = mnemic.memory_cache(model, SEGMENT)
    model(ids, **{CACHE: cache})
    copied = cache.fork()
    expected = model(ids, **{CACHE: copied}).logits
    session = mnemic.Session(model, window=SEGMENT)
    session.read(ids)
    for call in (lambda: model(ids, **{CACHE: cache}), lambda: model(ids), lambda: session.forward(ids)):
        interrupted(model, place, error)
        with pytest.raises(error):
            call()
        assert mnemic.attached(model).router.calls == []
    assert session.stream.seen[0] == ids.shape[1]
    assert cache.get_seq_length() == 0
    assert_near(model(ids, **{CACHE: cache}).logits, expected, 1e-5)
    assert_near(session.forward(ids).logits, expected, 1e-5)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_guarded_too_and_detached_ones_are_free(way):
    model = way(host("llama", EMT))
    interrupted(model, "block", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, SEGMENT))
    memory = mnemic.attached(model)
    assert memory.router.calls == []
    memory.detach()
    assert "forward" not in vars(model.model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_any_handle_gives_back_exactly_what_attaching_froze():
    model = make("llama")
    model.lm_head.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    mnemic.attach(model, EMT)
    mnemic.attached(copy.deepcopy(model)).detach()
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mnemic." not in n)
    mnemic.attached(model).detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    mnemic.attach(model, EMT, freeze=False)
    mnemic.attached(model).detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_what_stood_in_place_of_forward_stands_there_again():
    model = make("llama")
    inner, called = model.model.forward, []

    def moved(*args, **kwargs):
        called.append(1)
        return inner(*args, **kwargs)

    model.model.forward = moved
    expected = model(tokens(1, SEGMENT)).logits
    memory = mnemic.attach(model, EMT)
    assert torch.equal(model(tokens(1, SEGMENT)).logits, expected)
    assert len(called) == 2
    memory.detach()
    assert model.model.forward is moved


@torch.no_grad()
@pytest.mark.parametrize("kind", ["emt-0", "recall-0"])
def test_what_was_put_around_forward_since_outlives_the_memory(kind):
    model, ids = make("llama"), tokens(1, 4 * SEGMENT + 1)
    expected = model(ids).logits
    remembers = feed(host("llama", CONFIGS[kind]), ids)
    trained(model, CONFIGS[kind])
    inner = model.model.forward
    model.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    for _ in range(2):
        assert torch.equal(feed(model, ids), remembers)
        mnemic.attached(model).detach()
        assert torch.equal(model(ids).logits, expected)
        trained(model, CONFIGS[kind])


@torch.no_grad()
def test_a_session_says_so_where_calls_pass_its_memory_by():
    model = make("llama")
    model.model.forward = model.model.forward
    trained(model, EMT)
    session = mnemic.Session(model)
    session.read(tokens(1, 3 * SEGMENT))
    expected, guard = session.fork().forward(tokens(1, 5)).logits, model.model.forward
    del model.model.forward  # as accelerate does where its hook was there before the memory
    for call in (lambda: session.read(tokens(1, 5)), lambda: session.generate(tokens(1, 5), max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="runs without its memory"):
            call()
    model.model.forward = guard
    assert torch.equal(session.forward(tokens(1, 5)).logits, expected)


# --- paged generation ------------------------------------------------------------------------------------------------


def test_paged_generation_is_refused_until_the_memory_is_gone():
    model = make("llama")
    for _ in range(2):
        trained(model, EMT)
        with pytest.raises(ValueError, match=r"paged cache .* carries no memory; use mnemic\.batch"):
            model.generate_batch([tokens(1, 5)[0].tolist()])
        with pytest.raises(ValueError, match=r"a list carries no memory"):
            model(tokens(1, 5), **{CACHE: [1]})
        mnemic.attached(model).detach()
    assert "init_continuous_batching" not in vars(model)


def test_blocks_are_what_the_release_calls_them():
    assert all(isinstance(block, GradientCheckpointingLayer) for block in make("llama").model.layers)
