"""What is Memoria's own: its settings, forgetting, its tables and the search.

That the fast path equals plain loops is in `test_memoria_streams.py`; here stands what the paper says must hold.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import mnemic
from engram_streams import SMALL, WIDTH, built, fired_in, ids_of, pairs, steps
from helpers import CONFIGS, SEGMENT, assert_near, call, host, stream, tokens
from mnemic.memories.memoria import MemoriaConfig
from mnemic.memories.memoria.graph import COLUMNS, counts
from mnemic.memory import Site
from mnemic.state import read_file

# --- settings and layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"working": 0}, "working is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"stm_capacity": 0}, "stm_capacity is 0; it must be at least 1"),
        ({"reminded_stm": -1}, "reminded_stm is -1; it must be at least 0"),
        ({"reminded_ltm": -1}, "reminded_ltm is -1; it must be at least 0"),
        ({"depth": -1}, "depth is -1; it must be at least 0"),
        ({"random_ltm_seeds": -2}, "random_ltm_seeds is -2; it must be at least 0"),
        ({"grad_segments": -1}, "grad_segments is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"lifespan": 0.0}, "lifespan is 0.0 and alpha 8.0; use a lifespan above 0, alpha from 0"),
        ({"alpha": -1.0}, "lifespan is 9.0 and alpha -1.0; use a lifespan above 0, alpha from 0"),
        ({"correlation": "dot"}, "correlation is 'dot'; use 'exp' or 'distance'"),
        ({"edges": "sum"}, "edges is 'sum'; use 'conditional' or 'lift'"),
        ({"ties": "newest"}, "ties is 'newest'; use 'random' or 'oldest'"),
        ({"dim": 60, "heads": 7}, "dim 60 is not divisible by 7 heads; set heads= to a divisor"),
        ({"read_layers": []}, "read_layers is empty; name at least one block, or leave it out for all"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MemoriaConfig(**changes)


def test_the_papers_settings():
    # section 4.2 and appendix C: language models
    config = MemoriaConfig()
    assert (config.segment_length, config.working, config.reminded_stm, config.reminded_ltm) == (150, 50, 50, 50)
    assert (config.stm_capacity, config.depth, config.lifespan, config.alpha) == (400, 10, 9.0, 8.0)
    assert (config.correlation, config.edges, config.positive_edges, config.grad_segments) == (
        "exp",
        "conditional",
        False,
        0,
    )


def test_the_published_code():
    published = MemoriaConfig.published()
    assert (published.correlation, published.random_ltm_seeds) == ("distance", 350)
    assert published.replace(correlation="exp", random_ltm_seeds=0) == MemoriaConfig()
    assert MemoriaConfig.published(stm_capacity=30, alpha=2.0).random_ltm_seeds == 0
    assert MemoriaConfig.published(stm_capacity=70, alpha=2.0) == MemoriaConfig(
        stm_capacity=70, alpha=2.0, correlation="distance", random_ltm_seeds=20
    )
    assert MemoriaConfig.published(correlation="exp").correlation == "exp"


def test_configs_go_to_plain_values_and_back():
    for config in [*MemoriaConfig.tiny(), MemoriaConfig.published(read_layers=[0, -1])]:
        assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config


def test_a_decoder_reads_everywhere_and_writes_last():
    memory = SMALL.build(WIDTH, 6)
    assert (memory.reads, memory.writes) == (tuple(map(Site, range(6))), (Site(5),))
    assert memory.writes_see_reads
    assert not memory.reads_own_segment
    assert memory.starts_empty
    memory = SMALL.replace(read_layers=[-3, 1], write_layer=-2).build(WIDTH, 6)
    assert (memory.reads, memory.writes) == ((Site(1), Site(3)), (Site(4),))
    assert set(memory.readers) == {"1", "3"}
    # at the write layer itself it still reads first
    assert SMALL.replace(read_layers=[2], write_layer=2).build(WIDTH, 6).writes_see_reads
    message = "read layer 5 lies above write_layer 2: a decoder's segment is written after all its reads"
    with pytest.raises(ValueError, match=message):
        SMALL.replace(write_layer=2).build(WIDTH, 6)


@pytest.mark.parametrize(("depth", "write"), [(2, 0), (3, 1), (4, 2), (8, 5), (12, 8)])
def test_an_encoder_reads_above_where_it_writes(depth, write):
    memory = SMALL.build(WIDTH, depth, causal=False)
    assert (memory.writes, memory.reads) == ((Site(write),), tuple(map(Site, range(write + 1, depth))))
    assert memory.reads_own_segment
    assert not memory.starts_empty
    memory = SMALL.replace(write_layer=0, read_layers=[-1]).build(WIDTH, depth, causal=False)
    assert (memory.writes, memory.reads) == ((Site(0),), (Site(depth - 1),))


@pytest.mark.parametrize(
    ("changes", "depth"),
    [({"write_layer": 3}, 4), ({"write_layer": 2, "read_layers": [2, 3]}, 4), ({"read_layers": [0]}, 4), ({}, 1)],
)
def test_an_encoder_that_could_not_read(changes, depth):
    with pytest.raises(
        ValueError, match=rf"an encoder reads above the block that writes, here \d of {depth}: set write_"
    ):
        SMALL.replace(**changes).build(WIDTH, depth, causal=False)


def test_layers_and_widths_the_model_does_not_have():
    for causal in (True, False):
        for changes in ({"write_layer": 6}, {"read_layers": [-7], "write_layer": 3}):
            with pytest.raises(ValueError, match=r"_layers? is -?\d, but the model has 6 blocks; use -6 \.\. 5"):
                SMALL.replace(**changes).build(WIDTH, 6, causal)
    with pytest.raises(ValueError, match="dim 9 is not divisible by 2 heads; set heads= to a divisor"):
        SMALL.build(9, 2)
    assert SMALL.replace(dim=4).build(9, 2).readers["0"].output.weight.shape == (9, 4)


# --- forgetting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("edges", "ties"), [("conditional", "random"), ("lift", "oldest")])
def test_long_term_memory_is_bounded(edges, ties):
    """Appendix E: N_ltm settles at no more than alpha times the number reminded.

    A step hands out R alpha of lifespan, and an engram lives as many steps as it was given, rounded up. Where
    short-term memory holds more segments than the first lifespan lasts, every step lived in long-term memory was
    earned, so those lived up to any time are no more than was handed out by then: no slack for the mean from the
    beginning on.
    """
    config = SMALL.replace(stm_capacity=2 * 5, edges=edges, ties=ties)
    long, alive, handed_out = [], [], []
    for state in steps(built(config), 360, rows=3):
        long.append(state["levels"][:, 0])
        alive.append(state["levels"].sum(1))
        handed_out.append((state["recalled"] >= 0).sum(1) * config.alpha)
    long, alive, handed_out = (torch.stack(values).float() for values in (long, alive, handed_out))
    limit = config.alpha * (config.reminded_stm + config.reminded_ltm)
    assert (handed_out <= limit).all()
    assert (long.cumsum(0)[1:] <= handed_out.cumsum(0)[:-1]).all()
    # all engrams: besides, the `working` new ones of a step live their first lifespan, rounded up
    first = config.working * (config.lifespan + 1)
    assert (alive.cumsum(0)[1:] <= handed_out.cumsum(0)[:-1] + first * torch.arange(2, 361)[:, None]).all()
    # it has settled: the mean of the last 120 steps is near that of the 120 before, below the limit and not idly so.
    # A window's mean may exceed it by what was earned before the window, and steps differ, so by a tenth.
    last, before = long[-120:].mean(0), long[-240:-120].mean(0)
    assert (last <= 1.1 * limit).all()
    assert (last >= 0.4 * limit).all()
    assert ((last - before).abs() <= 0.25 * limit).all()


def test_without_use_everything_is_forgotten():
    memory = built()
    *_, state = steps(memory, 20)
    assert int(state["levels"][0, 0]) > 0
    for _ in range(60):
        state = memory.write(torch.randn(1, 4, WIDTH), {**state, "use": torch.zeros_like(state["use"])})
    # the last four segments are younger than a lifespan of 4
    newest = int(state["step"][0]) * 2
    assert ids_of(state) == list(range(newest - 7, newest + 1))


@pytest.mark.parametrize(("count", "reminded"), [(12, 5), (3, 2)])
def test_use_lengthens_life_by_its_share(count, reminded):
    memory = built()
    *_, state = steps(memory, count)
    real = state["recalled"][0] >= 0
    assert int(real.sum()) == reminded
    use = torch.tensor([[3.0, 1.0, 0.0, 4.0, 2.0]]) * real
    after = memory.write(torch.randn(1, 4, WIDTH), {**state, "use": use})
    expected = dict(zip(ids_of(state), state["lifespan"][0].tolist(), strict=False))
    for place, slot in enumerate(state["recalled"][0].tolist()):
        if slot >= 0:
            expected[int(state["id"][0, slot])] += float(use[0, place] / use.sum()) * reminded * 3.0
    expected = {number: life - 1 for number, life in expected.items() if life - 1 > 0}
    found = dict(zip(ids_of(after), after["lifespan"][0].tolist(), strict=False))
    newest = ids_of(after)[-2:]
    assert [found.pop(number) for number in newest] == [4.0, 4.0]
    assert found == pytest.approx(expected, abs=1e-5)
    # twice as much of everything is the same
    again = memory.write(torch.randn(1, 4, WIDTH), {**state, "use": 2 * use})
    assert_near(again["lifespan"], after["lifespan"])


# --- the tables ------------------------------------------------------------------------------------------------------


class Tally:
    """Who fired with whom, counted by hand from ids."""

    def __init__(self, most):
        self.table = np.zeros((most + 1, most + 1), np.int64)

    def add(self, state, row=0):
        fired = sorted(fired_in(state, row))
        self.table[np.ix_(fired, fired)] += 1

    def check(self, state, row=0):
        ids = ids_of(state, row)
        found = counts(state)[row].numpy()
        assert (found[: len(ids), : len(ids)] == self.table[np.ix_(ids, ids)]).all()
        assert not found[len(ids) :].any()
        assert not found[:, len(ids) :].any()


def test_counts_equal_a_tally_through_folding():
    # nothing dies of the few that are reminded again and again, so counts from folded columns matter
    count = 2 * COLUMNS + 24
    memory = built(SMALL.replace(alpha=12.0, ties="oldest"))
    tally, largest = Tally(2 * count), 0
    for before, after in pairs(steps(memory, count)):
        tally.add(before)
        tally.check(after)
        largest = max(largest, int(counts(after).max()))
    assert after["elders"].shape[1] > 0
    assert largest > COLUMNS, "no engram fired more often than the ring has columns"
    assert int(after["elders"].max()) < largest


def test_rows_that_start_apart_fold_apart():
    # rows 0 and 1 are 5 steps apart, so their bytes leave the ring at different writes
    count, tallies = 2 * COLUMNS, [Tally(4 * COLUMNS + 10) for _ in range(2)]
    memory = built(SMALL.replace(alpha=12.0, ties="oldest"))
    (*_, ahead) = steps(memory, 5)
    ahead_alone = list(steps(memory, 5))
    for state in ahead_alone[:-1]:
        tallies[0].add(state)
    state = mnemic.state.concatenate([ahead, memory.init_state(1)])
    for before, after in pairs([state, *steps(memory, count, rows=2, state=state)]):
        for row in range(2):
            tallies[row].add(before, row)
            tallies[row].check(after, row)
    assert after["step"].tolist() == [count + 5, count]
    assert after["elders"].diagonal(dim1=1, dim2=2).any(1).all()


def assert_nothing_in_free_slots(state):
    """Slots beyond a row's engrams are zero everywhere; those before hold each its own."""
    for row, taken in enumerate(state["levels"].sum(1).tolist()):
        for name in ("engram", "lifespan", "id", "fired"):
            assert not state[name][row, taken:].any(), name
        elders = state["elders"][row]
        assert not elders[taken:].any()
        assert not elders[:, taken:].any()
        ids = state["id"][row, :taken]
        assert bool((ids.diff() > 0).all())
        assert bool((state["lifespan"][row, :taken] > 0).all())
        recalled = state["recalled"][row]
        assert bool((recalled < taken).all())
        assert not state["use"][row][recalled < 0].any()


def test_nothing_stays_in_free_slots():
    memory, shrunk = built(SMALL.replace(alpha=12.0, ties="oldest")), 0
    for before, after in pairs(steps(memory, COLUMNS + 40, rows=3)):
        assert_nothing_in_free_slots(after)
        shrunk += int((after["levels"].sum(1) < before["levels"].sum(1)).sum())
    assert shrunk, "no row ever had fewer engrams than before"
    # then nothing is used: most of what was is forgotten, tables shrink
    size, elders = after["id"].shape[1], after["elders"].shape[1]
    for _ in range(int(after["lifespan"].max()) + 1):
        after = memory.write(torch.randn(3, 4, WIDTH), {**after, "use": torch.zeros_like(after["use"])})
        assert_nothing_in_free_slots(after)
    assert after["id"].shape[1] < size
    assert after["elders"].shape[1] < elders


@torch.no_grad()
def test_ragged_batches_leave_nothing_in_free_slots():
    model, time = host("llama", CONFIGS["memoria-0"]), 20 * SEGMENT
    cache = mnemic.memory_cache(model, SEGMENT)
    ids, mask = tokens(3, time), torch.ones(3, time, dtype=torch.long)
    mask[0, : 7 * SEGMENT + 3] = mask[1, 45:70] = 0
    for part, kept in zip(ids.split(7, 1), mask.split(7, 1), strict=True):
        call(model, part, cache, kept)
        assert_nothing_in_free_slots(stream(cache).state)
    assert stream(cache).written == (12, 16, 20)
    cache.memory.stream = stream(cache).reset(mnemic.attached(model).memory, [2])
    assert_nothing_in_free_slots(stream(cache).state)
    assert not stream(cache).state["engram"][2].any()


@torch.no_grad()
def test_a_saved_session_holds_nothing_forgotten(tmp_path):
    model = host("llama", CONFIGS["memoria-0"])
    session, known, forgotten = mnemic.Session(model, window=SEGMENT), {}, 0
    for number, part in enumerate(tokens(1, 30 * SEGMENT).split(SEGMENT, 1)):
        session.read(part)
        state = session.stream.state
        known |= {number: state["engram"][0, slot].clone() for slot, number in enumerate(ids_of(state))}
        if number % 10 != 9:
            continue
        session.save(tmp_path / "one.memory")
        content, alive = (tmp_path / "one.memory").read_bytes(), set(ids_of(state))
        for number, engram in known.items():
            assert (engram[:4].numpy().tobytes() in content) == (number in alive)
        forgotten = len(known) - len(alive)
        tensors, _ = read_file(tmp_path / "one.memory")
        assert_nothing_in_free_slots({name[6:]: t for name, t in tensors.items() if name.startswith("state.")})
    assert forgotten > 20


# --- the search and its chances --------------------------------------------------------------------------------------


def shelf(memory, long=12, fired=()):
    """A row of `long` long-term engrams and one short-term one; those of each group of `fired` fired together once."""
    state = memory.init_state(1)
    slots = long + 1
    bits = torch.zeros(1, slots, COLUMNS // 8, dtype=torch.uint8)
    for step, group in enumerate(fired):
        for slot in group:
            bits[0, slot, step // 8] |= 1 << step % 8
    return {
        **state,
        "engram": torch.randn(1, slots, WIDTH, generator=torch.Generator().manual_seed(1)),
        "lifespan": torch.full((1, slots), 9.0),
        "id": torch.arange(1, slots + 1, dtype=torch.int32)[None],
        "levels": torch.tensor([[long, 1, 0]]),
        "fired": bits,
        "step": torch.tensor([long + 1]),
    }


SEARCH = SMALL.replace(reminded_ltm=12, stm_capacity=20, lifespan=9.0)


def found(config, fired=(), seed=0, long=12):
    """The slots that the search finds from the one short-term engram."""
    memory = built(config)
    hidden = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(seed))
    state = memory.write(hidden, shelf(memory, long, fired))
    assert state["levels"].tolist() == [[long, 1, 2]]
    short, longs = state["recalled"][0].split([config.reminded_stm, config.reminded_ltm])
    assert short.tolist() == [long, -1]
    return {slot for slot in longs.tolist() if slot >= 0}


@pytest.mark.parametrize("edges", ["conditional", "lift"])
def test_ties_of_the_oldest(edges):
    # where nothing ever fired together every count is 0: the lowest slot is the start, and then the next, and the next
    for depth in (0, 1, 4):
        config = SEARCH.replace(ties="oldest", depth=depth, edges=edges)
        assert found(config) == set(range(depth + 1))
    assert found(SEARCH.replace(ties="oldest", depth=40, edges=edges)) == set(range(12))


@pytest.mark.parametrize("edges", ["conditional", "lift"])
def test_ties_at_random(edges):
    config = SEARCH.replace(depth=2, edges=edges)
    drawn = [found(config.replace(seed=seed)) for seed in range(60)]
    assert drawn == [found(config.replace(seed=seed)) for seed in range(60)], "not the same for the same seed"
    assert all(len(slots) == 3 for slots in drawn)
    assert drawn == [found(config.replace(seed=seed), seed=5) for seed in range(60)], "it depends on the hidden states"
    # of 220 sets of three: all the same, or a few, would be no chance
    assert len({frozenset(slots) for slots in drawn}) > 40
    often = np.bincount([slot for slots in drawn for slot in slots], minlength=12)
    assert (often > 3).all()
    assert (often < 35).all()


def test_streams_differ_by_seed_only():
    def recalled(seed):
        return torch.cat([state["recalled"] for state in steps(built(SMALL.replace(seed=seed)), 20)])

    assert torch.equal(recalled(1), recalled(1))
    assert not torch.equal(recalled(1), recalled(2))


@pytest.mark.parametrize("edges", ["conditional", "lift"])
@pytest.mark.parametrize("ties", ["random", "oldest"])
def test_the_search_follows_the_strongest_ties(edges, ties):
    # slot 12 is short-term; 12 - 7 twice, 12 - 3 once, 7 - 4 three times, 4 - 9 once, 9 - 5 once
    fired = [(12, 7), (12, 7), (12, 3), (7, 4), (7, 4), (7, 4), (4, 9), (9, 5)]
    config = SEARCH.replace(edges=edges, ties=ties, positive_edges=True)
    if edges == "conditional":
        for depth, slots in enumerate([{7}, {7, 4}, {7, 4, 9}, {7, 4, 9, 5}, {7, 4, 9, 5}]):
            assert found(config.replace(depth=depth), fired) == slots
    else:
        # of the one time that 3 fired 12 did too; 7 fired twice with it, of five times
        assert found(config.replace(depth=9), fired) == {3}
    # a literal arg max goes on to what never fired with it
    assert len(found(config.replace(depth=9, positive_edges=False), fired)) == 10
    assert found(config.replace(depth=9)) == set()


def test_searches_that_start_at_random_find_more():
    fired = [(12, 7)]
    config = SEARCH.replace(positive_edges=True)
    assert found(config, fired) == {7}
    drawn = [found(config.replace(random_ltm_seeds=2, seed=seed), fired) for seed in range(40)]
    assert all(7 in slots and 2 <= len(slots) <= 3 for slots in drawn)
    assert len({frozenset(slots) for slots in drawn}) > 20
    assert set.union(*drawn) == set(range(12))
    assert found(config.replace(random_ltm_seeds=99), fired) == set(range(12))


def test_only_the_most_alike_are_reminded():
    config = SEARCH.replace(ties="oldest", depth=40, reminded_ltm=3)
    memory = built(config)
    state = memory.write(torch.randn(1, 4, WIDTH), shelf(memory))
    working, long = state["engram"][0, 13:15], state["engram"][0, :12]
    alike = torch.cdist(long[None].double(), working[None].double())[0].square().neg().exp().mean(1)
    assert state["recalled"][0, 2:].tolist() == alike.topk(3).indices.tolist()


@pytest.mark.parametrize("correlation", ["exp", "distance"])
def test_of_equal_engrams_the_oldest_are_reminded_in_any_batch(correlation):
    # a text that says the same again and again: all engrams are one vector, whatever the other row holds
    changes = {"working": 1, "reminded_stm": 5, "stm_capacity": 40, "lifespan": 60.0, "correlation": correlation}
    memory = built(SMALL.replace(**changes))
    same = torch.randn(1, 4, WIDTH)
    alone, (*_, full) = memory.init_state(1), steps(memory, 35)
    both = mnemic.state.concatenate([alone, full])
    for _ in range(50):
        alone = memory.write(same, {**alone, "use": (alone["recalled"] >= 0).float()})
        both = memory.write(same.expand(2, -1, -1), {**both, "use": (both["recalled"] >= 0).float()})
        assert torch.equal(both["recalled"][0], alone["recalled"][0])
        first, short, _ = alone["levels"][0].tolist()
        expected = list(range(first, first + min(5, short)))
        assert alone["recalled"][0, :5].tolist() == expected + [-1] * (5 - len(expected))
    assert first > 5
