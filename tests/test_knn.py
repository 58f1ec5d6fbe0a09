"""What is Memorizing Transformer's own: attention over the memory, the nearest entries, what a FIFO keeps, FAISS."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_differ, host, shake, tokens
from mnemic.memories import knn
from mnemic.memories.knn import Indexes, KNNConfig, nearest, nearest_by_faiss
from mnemic.memory import Site
from mnemic.state import concatenate, nbytes

pytestmark = pytest.mark.small  # what is tested of the oldest and newest faiss

FORMS = [{}, {"shift": False}, {"heads": 1, "top_k": 3}]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())) or "default")


def build(width=32, depth=2, dim=16, heads=2, size=5 * SEGMENT, shaken=True, **settings):
    memory = KNNConfig(segment_length=SEGMENT, dim=dim, heads=heads, size=size, **settings).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def written(memory, *segments, state=None):
    """The state after segments `[b, t, d]`."""
    state = memory.init_state(len(segments[0])) if state is None else state
    for segment in segments:
        state = memory.write(segment, state)
    return state


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(memory, hidden, state, count, chosen=None):
    """h' of one row by torch's own attention over its first `count` entries, or those `chosen [h, t, n]`."""
    split = lambda flat: flat.unflatten(-1, (memory.config.heads, -1)).transpose(0, 1)  # noqa: E731
    query = F.normalize(split(memory.query(memory.norm(hidden))), dim=-1) * memory.log_scale.exp()[:, None, None]
    key, value = (split(state[name][:count]) for name in ("keys", "values"))
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=chosen, scale=1.0)
    read = torch.sigmoid(memory.gate)[:, None, None] * read
    return hidden + memory.output(read.transpose(0, 1).flatten(1))


# --- what is read ----------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("exact_up_to", [10_000, 0])
@torch.no_grad()
def test_it_is_full_attention_over_the_memory_when_it_may_attend_to_all(form, exact_up_to):
    if not exact_up_to:
        pytest.importorskip("faiss")
    memory = build(**{**form, "top_k": 3 * SEGMENT, "exact_up_to": exact_up_to})
    short = written(memory, draw(1, 5, 32, seed=1))
    state = concatenate([written(memory, *draw(3, 1, SEGMENT, 32)), short, written(memory, *draw(2, 1, SEGMENT, 32))])
    hidden = draw(3, 11, 32, seed=2)
    read = memory.read(Site(0), hidden, state)
    for row, count in enumerate((3 * SEGMENT, 5, 2 * SEGMENT)):
        assert state["count"][row] == count
        mine = {name: tensor[row] for name, tensor in state.items()}
        torch.testing.assert_close(read[row], attended(memory, hidden[row], mine, count), atol=1e-5, rtol=0)
    # and where entries are searched for, rows with fewer than top_k still attend to all of theirs
    fewer = build(**{**form, "top_k": 2 * SEGMENT, "exact_up_to": exact_up_to})
    fewer.load_state_dict(memory.state_dict())
    again = fewer.read(Site(0), hidden, state)
    torch.testing.assert_close(again[1:], read[1:], atol=1e-5, rtol=0)
    assert_differ(again[0], read[0], 1e-4)


@pytest.mark.parametrize("top_k", [1, 3, 7])
@torch.no_grad()
def test_only_the_nearest_are_attended_to(top_k):
    memory = build(top_k=top_k)
    state, hidden = written(memory, *draw(3, 1, SEGMENT, 32)), draw(1, 5, 32, seed=2)
    query = F.normalize(memory.query(memory.norm(hidden[0])).unflatten(-1, (2, -1)), dim=-1)
    product = torch.einsum("ths,nhs->htn", query, state["keys"][0].unflatten(-1, (2, -1)))
    chosen = product >= product.sort(-1, descending=True).values[..., top_k - 1, None]
    assert bool((chosen.sum(-1) == top_k).all())
    mine = {name: tensor[0] for name, tensor in state.items()}
    expected = attended(memory, hidden[0], mine, 3 * SEGMENT, chosen)
    torch.testing.assert_close(memory.read(Site(0), hidden, state)[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_entry_is_found_by_its_own_key_and_gives_its_value():
    memory = build(width=64, dim=64, heads=1, top_k=4, scale=1000.0, shift=False)
    torch.nn.init.constant_(memory.gate, 50.0)
    memory.output.weight.copy_(torch.eye(64))
    memory.query.load_state_dict(memory.key.state_dict())
    segments = draw(3, 1, SEGMENT, 64)
    state = written(memory, *segments)
    for segment in segments:
        value = memory.value(memory.norm(segment))
        torch.testing.assert_close(memory.read(Site(0), segment, state) - segment, value, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scale_and_gate():
    memory = build(top_k=3)
    state, hidden = written(memory, *draw(3, 2, SEGMENT, 32)), draw(2, 5, 32, seed=2)
    torch.nn.init.constant_(memory.gate, 0.0)
    added = memory.read(Site(0), hidden, state) - hidden
    torch.nn.init.constant_(memory.gate, 50.0)
    torch.testing.assert_close(memory.read(Site(0), hidden, state) - hidden, 2 * added, atol=1e-5, rtol=1e-4)
    torch.nn.init.constant_(memory.gate, -200.0)
    assert torch.equal(memory.read(Site(0), hidden, state), hidden)
    # a scale of next to nothing is the mean of the nearest
    torch.nn.init.constant_(memory.gate, 50.0)
    torch.nn.init.constant_(memory.log_scale, -50.0)
    found = nearest(F.normalize(queries(memory, hidden), dim=-1), state["keys"], state["count"], 3)
    values = state["values"].unflatten(-1, (2, -1)).transpose(1, 2)
    mean = torch.stack([torch.stack([values[b, h, found[b, h]].mean(1) for h in (0, 1)]) for b in (0, 1)])
    expected = hidden + memory.output(mean.transpose(1, 2).flatten(2))
    torch.testing.assert_close(memory.read(Site(0), hidden, state), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(build(shaken=False, scale=7.0).log_scale.exp().round(decimals=4), torch.full((2,), 7.0))


def queries(memory, hidden):
    return memory.query(memory.norm(hidden)).unflatten(-1, (memory.config.heads, -1)).transpose(1, 2)


@torch.no_grad()
def test_keys_and_queries_have_length_one():
    memory = build()
    segment, hidden = draw(2, SEGMENT, 32), draw(2, 5, 32, seed=2)
    state, read = written(memory, segment), memory.read(Site(0), hidden, written(memory, segment))
    norms = state["keys"].unflatten(-1, (2, -1)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(2, SEGMENT, 2))
    for projection in (memory.key, memory.previous, memory.query):
        projection.weight.mul_(3)
    again = written(memory, segment)
    assert all(torch.allclose(again[name], state[name], atol=1e-6, rtol=1e-5) for name in ("keys", "values", "count"))
    torch.testing.assert_close(memory.read(Site(0), hidden, state), read)


@torch.no_grad()
def test_a_token_asks_for_what_followed_it_before_anything_is_learned():
    words = draw(1, 8, 64)
    for shift, expected in ((True, [1, 3, 5, 7]), (False, [0, 2, 4, 6])):
        memory = build(width=64, dim=64, heads=1, shaken=False, shift=shift)
        state = written(memory, words)
        query = F.normalize(queries(memory, words[:, 0::2]), dim=-1)
        assert nearest(query, state["keys"], state["count"], 1).flatten().tolist() == expected


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [8, 16, 20, 31, 40])
def test_an_entry_is_read_for_exactly_as_many_segments_as_fit(size, shift):
    # recall by the size of the memory: all of what is no older than size // segment_length segments, none of the rest
    # but the token before the oldest key
    memory = build(size=size, top_k=size, shift=shift)
    segments = draw(7, 1, SEGMENT, 32).requires_grad_()
    state, fits = memory.init_state(1), size // SEGMENT
    asked = draw(1, 3, 32, seed=2)
    for age in range(1, 8):
        state = memory.write(segments[age - 1], state)
        gradient = torch.autograd.grad(memory.read(Site(0), asked, state).sum(), segments, retain_graph=True)[0]
        readable = [bool(each.abs().sum() > 0) for each in gradient]
        assert readable == [written_at >= age - fits - shift for written_at in range(age)] + [False] * (7 - age)
        assert state["count"].tolist() == [min(age, fits) * SEGMENT]
        assert state["keys"].shape[1] == state["values"].shape[1] == min(age, fits) * SEGMENT
    assert memory.reach == fits + shift
    encoder = KNNConfig(segment_length=SEGMENT, size=size, shift=shift).build(32, 2, causal=False)
    assert encoder.reach == fits + shift - 1


@torch.no_grad()
def test_recall_by_size():
    # what is asked for is found where the memory still has it, and nowhere else
    segments = draw(8, 1, SEGMENT, 64)
    for fits in (1, 2, 4, 8, 9):
        memory = build(width=64, dim=64, heads=1, top_k=1, size=fits * SEGMENT, shift=False, shaken=False)
        state = written(memory, *segments)
        query = F.normalize(queries(memory, segments.flatten(0, 1).flatten(0, 1)[None]), dim=-1)
        found = nearest(query, state["keys"], state["count"], 1)[0, 0, :, 0]
        oldest = max(0, 8 - fits) * SEGMENT
        right = found + oldest == torch.arange(8 * SEGMENT)
        assert right.tolist() == [token >= oldest for token in range(8 * SEGMENT)]


@every_form
@torch.no_grad()
def test_padding_leaves_no_trace(form):
    memory = build(**form)
    plain, state = draw(1, 5, 32), written(memory, draw(1, SEGMENT, 32, seed=1))
    spread, keep = draw(1, SEGMENT, 32, seed=2), torch.zeros(1, SEGMENT, dtype=torch.bool)
    keep[0, [1, 2, 4, 6, 7]] = True
    spread[keep] = plain[0]
    torch.testing.assert_close(memory.write(spread, state, keep), memory.write(plain, state), atol=1e-6, rtol=1e-5)
    nothing = memory.write(spread, state, torch.zeros_like(keep))
    assert all(torch.equal(nothing[name], state[name]) for name in state)


@torch.no_grad()
def test_bytes_law():
    memory = build(size=20)
    assert nbytes(memory.init_state(3)) == 3 * memory.most_bytes(0) == 3 * (8 + 16 * 4)
    for segments in (1, 2, 3):
        state = written(memory, *draw(segments, 2, SEGMENT, 32))
        assert nbytes(state) == 2 * (8 + 16 * 4 + min(segments, 2) * SEGMENT * 16 * 8)
        assert nbytes(state) <= 2 * memory.most_bytes(segments)
    assert memory.most_bytes(3) == 8 + 16 * 4 + 20 * 16 * 8
    session = mnemic.Session(host("llama", CONFIGS["knn-0"]), window=SEGMENT)
    session.read(tokens(1, 10 * SEGMENT))
    assert session.nbytes == 8 + 16 * 4 + 24 * 16 * 8
    sizes = [KNNConfig.small(SEGMENT, 64, size).build(64, 2).most_bytes(9) for size in (1, 2, 3, 500, 512)]
    assert sizes == sorted(set(sizes))
    assert KNNConfig.small(SEGMENT, 64).build(64, 2).most_bytes(9) == sizes[-1]
    assert KNNConfig.small(5000, 64).size == 5000


# --- the search ------------------------------------------------------------------------------------------------------


def found_both_ways(rows=2, heads=2, time=5, entries=40, size=8, counts=(40, 3), top_k=4):
    query = F.normalize(draw(rows, heads, time, size), dim=-1)
    keys = F.normalize(draw(rows, entries, heads, size, seed=1), dim=-1).flatten(2)
    count = torch.tensor(counts)
    return query, keys, count, top_k


@torch.no_grad()
def test_the_search_in_parts_is_the_search_at_once(monkeypatch):
    case = found_both_ways()
    expected = nearest(*case)
    assert expected[1, ..., 3].eq(-1).all()
    assert expected[1, ..., :3].sort(-1).values.flatten(0, 1).eq(torch.arange(3)).all()
    for most in (1, 400, 161):
        monkeypatch.setattr(knn, "SCORES_AT_ONCE", most)
        assert torch.equal(nearest(*case), expected)


def test_faiss_finds_the_same_entries():
    pytest.importorskip("faiss")
    for counts in ((40, 3), (40, 40), (0, 40)):
        case = found_both_ways(counts=counts)
        torch.testing.assert_close(nearest_by_faiss(*case), nearest(*case))


@torch.no_grad()
def test_the_default_searches_64k_entries_in_tensors_and_more_with_faiss(monkeypatch):
    pytest.importorskip("faiss")
    memory, hidden, used = build(dim=8, heads=1, size=70_000, top_k=8), draw(1, 3, 32), []
    both = (knn.nearest, knn.nearest_by_faiss)
    for search in both:
        monkeypatch.setattr(knn, search.__name__, lambda *given, search=search: used.append(search) or search(*given))
    for entries, search in ((65_536, both[0]), (65_537, both[1])):
        keys = F.normalize(draw(1, entries, 8), dim=-1)
        state = {"keys": keys, "values": draw(1, entries, 8, seed=1), "count": torch.tensor([entries])}
        read = memory.read(Site(0), hidden, state)
        assert used.pop() is search
        exact = build(dim=8, heads=1, size=70_000, top_k=8, exact_up_to=70_000)
        exact.load_state_dict(memory.state_dict())
        torch.testing.assert_close(read, exact.read(Site(0), hidden, state), atol=1e-5, rtol=1e-5)
        assert used.pop() is both[0]


def test_faiss_and_torch_give_the_same_reads_and_gradients():
    pytest.importorskip("faiss")
    results, same = [], build(top_k=4).state_dict()
    for exact_up_to in (10_000, 0):
        memory = build(top_k=4, exact_up_to=exact_up_to)
        memory.load_state_dict(same)
        segments, hidden = draw(3, 2, SEGMENT, 32).requires_grad_(), draw(2, 5, 32, seed=2).requires_grad_()
        read = memory.read(Site(0), hidden, written(memory, *segments))
        gradients = torch.autograd.grad(read.square().sum(), [segments, hidden, *memory.parameters()])
        results.append((read, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert one.abs().sum() > 0


def test_an_index_is_built_once_and_never_used_for_other_keys():
    pytest.importorskip("faiss")
    keys, kept = found_both_ways()[1], Indexes(most=2)
    first = kept.of(keys, [40, 40], 2)
    assert kept.of(keys, [40, 40], 2) is first
    assert kept.built == 1
    assert [index.ntotal for index in kept.of(keys, [40, 7], 2)] == [40, 40, 7, 7]  # fewer are there
    assert kept.of(keys.clone(), [40, 7], 2) is not first  # others, equal ones
    gc.collect()
    assert len(kept.kept) == 1  # the clone is gone, and so is its index
    before = kept.built
    keys.mul_(-1)
    assert kept.of(keys, [40, 7], 2)
    assert kept.built == before + 1
    others = [keys.clone() for _ in range(3)]
    for each in others:
        kept.of(each, [40, 40], 2)
    assert list(kept.kept) == [id(each) for each in others[1:]]
    with torch.inference_mode():
        still = keys.clone()
        assert kept.of(still, [40, 40], 2) is kept.of(still, [40, 40], 2)


@torch.no_grad()
def test_reading_token_by_token_builds_one_index_a_segment(monkeypatch):
    pytest.importorskip("faiss")
    kept = Indexes()
    monkeypatch.setattr(knn, "INDEXES", kept)
    config = CONFIGS["knn-0"].replace(exact_up_to=0)
    plain, searched = (mnemic.Session(host("llama", each), window=SEGMENT) for each in (CONFIGS["knn-0"], config))
    ids = tokens(1, 4 * SEGMENT)
    for part in ids.split(1, 1):
        torch.testing.assert_close(searched.forward(part).logits, plain.forward(part).logits, atol=1e-4, rtol=1e-4)
    assert kept.built == 3


def test_without_faiss_the_error_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "faiss" else find(name, *more))
    monkeypatch.setitem(sys.modules, "faiss", None)
    KNNConfig(size=65_536).build(64, 2)
    with pytest.raises(
        ModuleNotFoundError, match=r"70000 entries needs FAISS .* exact_up_to=65536: pip install mnemic"
    ):
        KNNConfig(size=70_000, segment_length=10).build(64, 2)
    with pytest.raises(ModuleNotFoundError, match=r"40 entries are searched with FAISS, which is not installed"):
        nearest_by_faiss(*found_both_ways())


# --- training and the seam -------------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_an_empty_memory_adds_nothing(form):
    memory, hidden = build(**form), draw(2, SEGMENT, 32)
    assert torch.equal(memory.read(Site(0), hidden, memory.init_state(2)), hidden)
    # nor an empty row beside a full one
    state = concatenate([memory.init_state(1), written(memory, hidden[1:])])
    read = memory.read(Site(0), hidden, state)
    assert torch.equal(read[0], hidden[0])
    assert_differ(read[1], hidden[1])
    # nor what stands where a row's count says that nothing is
    state["keys"][0], state["values"][0] = draw(SEGMENT, 16), draw(SEGMENT, 16)
    assert torch.equal(memory.read(Site(0), hidden, state), read)
    # and an untrained one not either
    new = build(**form, shaken=False)
    assert torch.equal(new.read(Site(0), hidden, written(new, hidden)), hidden)


@every_form
def test_every_parameter_gets_a_gradient_through_the_entries(form):
    memory, hidden = build(**form), draw(2, SEGMENT, 32)
    memory.read(Site(0), hidden, written(memory, *draw(2, 2, SEGMENT, 32, seed=1))).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in memory.parameters())
    # entries that are constants, as in the paper, teach neither keys nor values
    memory.zero_grad(set_to_none=True)
    with torch.no_grad():
        state = written(memory, *draw(2, 2, SEGMENT, 32, seed=1))
    memory.read(Site(0), hidden, state).square().sum().backward()
    silent = {name for name, parameter in memory.named_parameters() if parameter.grad is None}
    assert silent == {"key.weight", "value.weight"} | ({"previous.weight"} if memory.previous is not None else set())


def test_it_can_be_added_to_a_trained_model_and_tuned_with_it():
    model, ids = make("gpt2"), tokens(2, 3 * SEGMENT)
    with torch.no_grad():
        expected = model.eval()(ids).logits
    attachment = mnemic.attach(model, CONFIGS["knn-0"], freeze=False)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    shake(attachment.memory)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_low_precision_is_for_the_projections_only():
    memory, hidden = build(top_k=3 * SEGMENT), draw(2, SEGMENT, 32)
    state, plain = written(memory, hidden), memory.read(Site(0), hidden, written(memory, hidden))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after, read = memory.write(hidden, memory.init_state(2)), memory.read(Site(0), hidden, state)
    lowered = copy.deepcopy(memory).bfloat16()
    for found in (after, lowered.write(hidden.bfloat16(), lowered.init_state(2))):
        for name in ("keys", "values"):
            assert found[name].dtype == torch.float32
            assert (found[name] - state[name]).norm() < 0.05 * state[name].norm()
        norms = found["keys"].unflatten(-1, (2, -1)).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones(2, SEGMENT, 2))
    torch.testing.assert_close(read, plain, atol=0.1, rtol=0.1)
    assert lowered.read(Site(0), hidden.bfloat16(), state).dtype == torch.bfloat16


def test_placement():
    for depth, layer in ((1, 0), (2, 0), (4, 2), (12, 8), (32, 23)):
        memory = KNNConfig().build(64, depth)
        assert memory.reads == memory.writes == (Site(layer),)
        assert not memory.writes_see_reads
        assert memory.starts_empty
    memory = KNNConfig(layer=-1).build(64, 12)
    assert memory.reads == memory.writes == (Site(11),)
    encoder = KNNConfig().build(64, 2, causal=False)
    assert encoder.reads_own_segment
    assert not encoder.starts_empty


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 500}, "size 500 holds no whole segment of 512 tokens; set size to at least that"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"dim": 10}, "dim 10 is not divisible by 4 heads; set heads= to a divisor"),
        ({"scale": 0.0}, "scale is 0.0; a factor of scores is above 0"),
        ({"exact_up_to": -1}, "exact_up_to is -1; use 0 or more entries"),
        ({"segment_length": 0}, "segment_length is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KNNConfig(**settings)


def test_layers_that_the_host_lacks_are_refused():
    with pytest.raises(ValueError, match="layer is 2, but the model has 2 blocks"):
        KNNConfig(layer=2).build(64, 2)


@every_form
def test_configs_go_to_plain_values_and_back(form):
    config = KNNConfig(**form)
    assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config
