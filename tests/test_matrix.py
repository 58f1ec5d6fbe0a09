"""The invariants every mechanism keeps on every family: one matrix, which a new mechanism joins by being registered.

Invariant 10 (generate, Trainer, compile, PEFT ...) is in `test_compatibility.py`, over the same matrix.
"""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import DECODERS, make
from helpers import (
    SEGMENT,
    assert_differ,
    assert_effect,
    assert_equal_stream,
    assert_near,
    assert_same_stream,
    call,
    carrier,
    every_config_that_writes,
    feed,
    host,
    known,
    matrix,
    other,
    over_all,
    over_all_that_write,
    over_decoders,
    over_decoders_that_write,
    over_encoders,
    positions_of,
    random_cuts,
    shake,
    stream,
    tokens,
    trained,
    trains,
)
from mnemic.checks import key_shapes
from mnemic.host.call import carrying
from mnemic.state import level, nbytes
from mnemic.stream import Stream

# experts gather their tokens from all rows, so what one row routes changes the shapes that another is computed in
EXPERTS = {"mixtral", "qwen3_moe"}


def assert_bits(name, actual, expected):
    if name in EXPERTS:
        assert_near(actual, expected, 1e-5)
    else:
        assert torch.equal(actual, expected)


def changed(ids, start, stop=None):
    """Ids that differ from `start` to `stop` only."""
    ids = ids.clone()
    part = slice(start, start + 1 if stop is None else stop)
    ids[:, part] = other(ids[:, part])
    return ids


# --- 1. identity -----------------------------------------------------------------------------------------------------


@over_all
@torch.no_grad()
def test_identity_at_initialisation(config, name):
    model, ids = make(name), tokens(2, SEGMENT)
    longer = tokens(2, 3 * SEGMENT - 3)
    expected, expected_longer = model(ids).logits, model(longer).logits
    attachment = mnemic.attach(model, config)
    if attachment.memory.beside:
        # memory tokens are seen, and segments do not see each other's words: the base's own logits only as long as
        # there is neither a token nor a second segment
        if attachment.memory.starts_empty:
            assert_near(model(ids).logits, expected, 1e-5)
        assert_differ(model(longer).logits, expected_longer)
        return
    assert torch.equal(model(ids).logits, expected)
    if not trains(model) and attachment.memory.logits_reads:
        # what nobody has to train speaks as soon as it was written
        assert torch.equal(model(longer).logits[:, :SEGMENT], expected_longer[:, :SEGMENT])
        assert_effect(model, longer, expected_longer)
        return
    # where a read lies below the write the host runs a longer call segment by segment, in other shapes: equal in
    # exact arithmetic only
    assert_near(model(longer).logits, expected_longer, 1e-5)
    if not attachment.memory.writes_see_reads:
        assert torch.equal(model(longer).logits, expected_longer)
    shake(attachment.memory)
    assert_effect(model, longer, expected_longer)


@over_all
@torch.no_grad()
def test_identity_when_disabled(config, name):
    model, ids = make(name), tokens(2, 3 * SEGMENT - 3)
    expected = model(ids).logits
    attachment = trained(model, config)
    with attachment.disabled():
        assert torch.equal(model(ids).logits, expected)
    assert_effect(model, ids, expected)


@over_all
@torch.no_grad()
def test_identity_when_detached(config, name):
    model, ids = make(name), tokens(2, 3 * SEGMENT - 3)
    names, expected = list(model.state_dict()), model(ids).logits
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    attachment = trained(model, config)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mnemic." not in n)
    assert_effect(model, ids, expected)
    attachment.detach()
    assert torch.equal(model(ids).logits, expected)
    assert list(model.state_dict()) == names
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@over_all
def test_base_weights_never_change(config, name):
    model, ids = make(name), tokens(2, 3 * SEGMENT)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attachment = trained(model, config)
    memory_before = [parameter.clone() for parameter in attachment.parameters()]
    if not trains(model):
        assert not model(ids, labels=ids).loss.requires_grad
        return
    # weight decay would move weights that get no gradient, were they given to the optimiser
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert any(not torch.equal(p, b) for p, b in zip(attachment.parameters(), memory_before, strict=True))


# --- 2. causality ----------------------------------------------------------------------------------------------------


@over_decoders
@pytest.mark.parametrize("window", [None, 2 * SEGMENT])
def test_causality(config, name, window):
    model, ids = host(name, config), tokens(2, 3 * SEGMENT)
    expected = feed(model, ids, carried=carrier(model, window))
    for t in (3, SEGMENT - 1, SEGMENT, 20):
        logits = feed(model, changed(ids, t), carried=carrier(model, window))
        assert_bits(name, logits[:, :t], expected[:, :t])
        assert_differ(logits[:, t:], expected[:, t:])


@over_all_that_write
def test_causality_of_writes(config, name, monkeypatch):
    model, ids = host(name, config), tokens(2, 2 * SEGMENT)
    expected = feed(model, ids, [SEGMENT] * 2)
    write = type(mnemic.attached(model).memory).write

    def another_write(self, hidden_btd, state, keep_bt=None, **known):
        # not a constant: mechanisms may normalise what they hold
        after = write(self, hidden_btd, state, keep_bt, **known)
        return {k: t + torch.rand_like(t) if t.is_floating_point() else t for k, t in after.items()}

    monkeypatch.setattr(type(mnemic.attached(model).memory), "write", another_write)
    logits = feed(model, ids, [SEGMENT] * 2)
    if mnemic.attached(model).memory.reads_own_segment:
        assert_differ(logits[:, :SEGMENT], expected[:, :SEGMENT])
    else:
        assert torch.equal(logits[:, :SEGMENT], expected[:, :SEGMENT])
    assert_differ(logits[:, SEGMENT:], expected[:, SEGMENT:])


# --- 3. call invariance ----------------------------------------------------------------------------------------------


@over_decoders
@pytest.mark.parametrize("window", [None, SEGMENT, 2 * SEGMENT])
def test_call_invariance(config, name, window):
    model, time = host(name, config), 21
    ids = tokens(2, time)
    whole = carrier(model, window)
    expected = feed(model, ids, carried=whole)
    for lengths in ([1] * time, random_cuts(time, 1)):
        parts = carrier(model, window)
        assert_near(feed(model, ids, lengths, carried=parts), expected)
        assert_same_stream(stream(parts), stream(whole))


@over_decoders
@pytest.mark.parametrize("window", [None, 2 * SEGMENT])
def test_call_invariance_over_left_padding(config, name, window):
    model, time = host(name, config), 21
    ids, mask = tokens(2, time), torch.ones(2, time, dtype=torch.long)
    mask[0, :5] = 0
    real = mask.bool()
    whole = carrier(model, window)
    expected = feed(model, ids, mask=mask, carried=whole)
    # a call of padding alone, then cuts at which a segment ends in one row, in the other, in neither
    for lengths in ([5, *[3] * 5, 1], random_cuts(time, 1)):
        parts = carrier(model, window)
        assert_near(feed(model, ids, lengths, mask, parts)[real], expected[real])
        assert_same_stream(stream(parts), stream(whole))


@over_decoders_that_write
def test_call_invariance_without_a_cache(config, name):
    # use_cache=False gives the memory nowhere to stay after the call, but inside it segments follow one another
    model, ids = host(name, config), tokens(2, 21)
    with torch.no_grad():
        assert_near(model(ids, use_cache=False).logits, feed(model, ids))


# --- 4. the state carries --------------------------------------------------------------------------------------------


@over_all
def test_state_carries(config, name):
    model = host(name, config)
    attachment = mnemic.attached(model)
    reach = attachment.memory.reach
    far = 2 if reach is None else reach
    ids = tokens(2, (far + 2) * SEGMENT)
    # the base's own keys reach no further back than the running segment
    window = SEGMENT if attachment.anatomy.causal else None

    def outputs(given):
        return feed(model, given, carried=carrier(model, window)).unflatten(1, (-1, SEGMENT))

    expected, logits = outputs(ids), outputs(changed(ids, 0, SEGMENT))
    assert_differ(logits[:, far], expected[:, far], 1e-4)
    if reach is not None:
        assert_bits(name, logits[:, far + 1], expected[:, far + 1])
    with attachment.disabled():
        expected, logits = outputs(ids), outputs(changed(ids, 0, SEGMENT))
    assert_differ(logits[:, 0], expected[:, 0])
    assert_bits(name, logits[:, 1:], expected[:, 1:])


@over_encoders
def test_state_carries_in_a_session_only(config, name):
    model, ids = host(name, config), tokens(1, 2 * SEGMENT)
    with torch.no_grad():
        alone = model(ids[:, SEGMENT:]).logits
        session = mnemic.Session(model)
        session.read(ids[:, :SEGMENT])
        assert_differ(session.forward(ids[:, SEGMENT:]).logits, alone)
        assert torch.equal(model(ids[:, SEGMENT:]).logits, alone)


# --- 5. row isolation ------------------------------------------------------------------------------------------------


@over_all
def test_rows_permute(config, name):
    model, ids, order = host(name, config), tokens(3, 3 * SEGMENT), [2, 0, 1]
    kept, permuted = carrier(model), carrier(model)
    # rows stand elsewhere in the same matrices, whose products are blocked by position: equal but for rounding
    assert_near(feed(model, ids[order], carried=permuted), feed(model, ids, carried=kept)[order], 1e-5)
    assert_same_stream(stream(permuted), stream(kept).select(order), 1e-5)


@over_all
def test_rows_do_not_see_each_other(config, name):
    model, ids = host(name, config), tokens(3, 3 * SEGMENT)
    ids_changed = ids.clone()
    ids_changed[1] = other(ids[1])
    for window in (None, SEGMENT) if name in DECODERS else (None,):
        kept, touched = carrier(model, window), carrier(model, window)
        expected, logits = feed(model, ids, carried=kept), feed(model, ids_changed, carried=touched)
        assert_bits(name, logits[[0, 2]], expected[[0, 2]])
        assert_differ(logits[1], expected[1])
        tolerance = 1e-5 if name in EXPERTS else 0
        assert_same_stream(stream(touched).select([0, 2]), stream(kept).select([0, 2]), tolerance)


@over_all
def test_padding_a_row_leaves_the_others(config, name):
    model, time = host(name, config), 3 * SEGMENT
    ids, mask = tokens(3, time), torch.ones(3, time, dtype=torch.long)
    mask[1, 11:] = 0
    carried, padded = carrier(model), carrier(model)
    expected, logits = feed(model, ids, carried=carried), feed(model, ids, mask=mask, carried=padded)
    # a mask takes another attention kernel, and row 1 ends its segments elsewhere: other shapes, other rounding
    assert_near(logits[[0, 2]], expected[[0, 2]], 2e-5)
    assert_same_stream(stream(padded).select([0, 2]), stream(carried).select([0, 2]), 2e-5)
    assert stream(padded).seen == (time, 11, time)


@over_all
def test_resetting_a_row_leaves_the_others(config, name):
    model, ids = host(name, config), tokens(3, 2 * SEGMENT)
    memory = mnemic.attached(model).memory
    window = SEGMENT if name in DECODERS else None
    kept, reset = carrier(model, window), carrier(model, window)
    for carried in (kept, reset):
        feed(model, ids[:, :SEGMENT], carried=carried)
    layer = reset if name not in DECODERS else reset.memory
    layer.stream = stream(reset).reset(memory, [1])
    expected, logits = (feed(model, ids[:, SEGMENT:], carried=carried) for carried in (kept, reset))
    fresh = feed(model, ids[:, SEGMENT:], carried=carrier(model, window))
    if memory.beside and memory.starts_empty:
        # rows with memory tokens and a row without share a masked attention, whose kernel rounds otherwise
        assert_near(logits[[0, 2]], expected[[0, 2]], 2e-5)
        assert_near(logits[1], fresh[1], 2e-5)
    else:
        assert_bits(name, logits[[0, 2]], expected[[0, 2]])
        assert_bits(name, logits[1], fresh[1])
    assert_differ(logits[1], expected[1])


@over_all
def test_two_sessions_in_one_batch(config, name):
    model = host(name, config)
    window = SEGMENT if name in DECODERS else None
    alone = [carrier(model, window) for _ in range(2)]
    for row, (carried, segments) in enumerate(zip(alone, (1, 3), strict=True)):
        feed(model, tokens(1, segments * SEGMENT, row), carried=carried)
    together = carrier(model, window)
    layer = together if name not in DECODERS else together.memory
    layer.stream = Stream.concatenate([stream(carried) for carried in alone])
    ids = tokens(2, 2 * SEGMENT, 7)
    logits = feed(model, ids, carried=together)
    expected = torch.cat([feed(model, ids[row : row + 1], carried=carried) for row, carried in enumerate(alone)])
    # two rows are multiplied at once, so rounding differs from one row alone
    assert_near(logits, expected, 2e-5)
    assert_same_stream(stream(together), Stream.concatenate([stream(carried) for carried in alone]), 2e-5)
    assert_differ(expected[0], feed(model, ids, carried=carrier(model, window))[0])


# --- 6. padding and packing ------------------------------------------------------------------------------------------


@over_all
def test_padding_invariance(config, name):
    model, decoder, short, time = host(name, config), name in DECODERS, 19, 3 * SEGMENT
    plain, sides = tokens(1, short), {0: slice(time - short, None), 1: slice(0, short)}
    # RoBERTa finds its positions by the padding id, which is 0
    ids, mask = torch.zeros(3, time, dtype=torch.long), torch.zeros(3, time, dtype=torch.long)
    for row, real in sides.items():
        ids[row, real], mask[row, real] = plain[0], 1
    ids[2], mask[2] = tokens(1, time, 3)[0], 1
    for window in (None, 2 * SEGMENT) if decoder else (None,):
        padded = carrier(model, window)
        logits = feed(model, ids, mask=mask, carried=padded) if decoder else _feed_encoder(model, ids, mask, padded)
        for row, real in sides.items():
            alone = carrier(model, window)
            if decoder:
                expected = feed(model, plain, carried=alone)
            else:
                # an encoder's call is a segment, full or not: the short row's calls hold the same tokens as alone
                counts = mask[row].unflatten(0, (3, SEGMENT)).sum(1).tolist()
                expected = torch.cat([call(model, part, alone).detach() for part in plain.split(counts, 1)], 1)
            assert_near(logits[row, real], expected[0])
            mine, its = stream(padded).select([row]), stream(alone)
            assert (mine.counts, mine.written, mine.seen) == (its.counts, its.written, its.seen)
            for key, tensor in its.state.items():
                assert_near(*level([mine.state[key], tensor]))
            assert_near(mine.waiting[:, : its.counts[0]], its.waiting)


@torch.no_grad()
def _feed_encoder(model, ids, mask, carried):
    logits = []
    for part, seen in zip(ids.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
        more = {"position_ids": positions_of(seen)} if model.config.model_type == "bert" else {}
        with carrying(carried):
            logits.append(model(part, attention_mask=seen, **more).logits)
    return torch.cat(logits, 1)


# a family without position_ids cannot be told of packing; an encoder's mask has no documents
PACKS = [name for name, family in DECODERS.items() if family.packs]


@matrix(PACKS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(config, name):
    model, lengths = host(name, config), (11, 13)
    documents = [tokens(2, length, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    packed = torch.cat(documents, 1)

    def run():
        return model(packed, position_ids=positions, use_cache=False).logits

    if mnemic.attached(model).memory.writes_see_reads:
        with pytest.raises(ValueError, match="packed documents need every read at the write or after it"):
            run()
        return
    expected = torch.cat([model(document, use_cache=False).logits for document in documents], 1)
    assert_near(run(), expected)
    assert_differ(feed(model, packed)[:, 11:], expected[:, 11:])


# --- 8. saving -------------------------------------------------------------------------------------------------------


@over_all
@torch.no_grad()
def test_adapter_round_trip(config, name, tmp_path):
    model, ids = host(name, config), tokens(2, 2 * SEGMENT)
    attachment = mnemic.attached(model)
    attachment.save_pretrained(tmp_path)
    again = make(name)
    loaded = mnemic.from_pretrained(again, tmp_path)
    assert loaded.config == config
    assert torch.equal(feed(again, ids), feed(model, ids))
    for key, tensor in attachment.memory.state_dict().items():
        assert torch.equal(loaded.memory.state_dict()[key], tensor)


@over_all
@torch.no_grad()
def test_session_round_trip(config, name, tmp_path):
    model, ids = host(name, config), tokens(1, 21)
    session = mnemic.Session(model, window=2 * SEGMENT if name in DECODERS else None)
    session.read(ids)
    session.save(tmp_path / "one.memory")
    again = mnemic.Session.load(tmp_path / "one.memory", model)
    assert_equal_stream(again.stream, session.stream)
    assert again.nbytes == session.nbytes
    more = tokens(1, SEGMENT, 5)
    logits = session.forward(more).logits
    assert torch.equal(again.forward(more).logits, logits)
    assert_differ(mnemic.Session(model, window=session.window).forward(more).logits, logits)


# --- 9. bytes --------------------------------------------------------------------------------------------------------


@over_all
@torch.no_grad()
def test_bytes_follow_the_declared_law(config, name):
    model = host(name, config)
    memory = mnemic.attached(model).memory
    session = mnemic.Session(model, window=SEGMENT if name in DECODERS else None)
    sizes = []
    for part in tokens(1, 30 * SEGMENT).split(6 * SEGMENT, 1):
        session.read(part)
        sizes.append(nbytes(session.stream.state))
        if memory.keeps:
            # two numbers of 4 bytes for each block, head and channel of every token
            attended = mnemic.attached(model).router.attended
            shapes = [shape for key, shape in key_shapes(model).items() if int(key.split(".")[1]) in attended]
            bank = session.stream.banks[0].nbytes
            assert bank == session.stream.seen[0] * 4 * sum(heads * size for heads, size in shapes)
            assert session.nbytes == sizes[-1] + bank
            assert sizes[-1] <= memory.most_bytes(session.stream.written[0])
            continue
        # at a segment's end nothing waits and a window of one segment is empty: the memory is all there is
        assert session.nbytes == sizes[-1]
        assert sizes[-1] <= memory.most_bytes(session.stream.written[0])
    if memory.most_bytes(30) == memory.most_bytes(0):
        assert set(sizes) == {nbytes(memory.init_state(1))}
    else:
        # it may grow with what is written, but not all of it is kept
        assert sizes[-1] < 30 * memory.most_bytes(1)
    assert session.stream.written == (30,)


@over_all
def test_bytes_grow_with_rows_only(config, name):
    memory = mnemic.attached(host(name, config)).memory
    assert nbytes(memory.init_state(3)) == 3 * nbytes(memory.init_state(1))
    state = memory.init_state(1)
    assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())


# --- 11. determinism -------------------------------------------------------------------------------------------------


@over_all
def test_determinism_under_a_seed(config, name):
    ids = tokens(2, 3 * SEGMENT)

    def run(seed):
        model = make(name)
        torch.manual_seed(seed)
        attachment = mnemic.attach(model, config)
        shake(attachment.memory)
        return feed(model, ids)

    first = run(1)
    assert torch.equal(run(1), first)
    assert not trains(host(name, config)) or not torch.equal(run(2), first)


# --- 12. the fast path is the equation -------------------------------------------------------------------------------


@every_config_that_writes
@pytest.mark.parametrize("padded", [False, True])
def test_fast_equals_naive(config, padded):
    torch.manual_seed(0)
    memory = config.build(64, 2)
    shake(memory)
    memory.double()
    # what is written may be the outputs of several blocks at once
    width = 64 * len(memory.writes)
    hidden = torch.randn(3, SEGMENT, width, dtype=torch.float64, requires_grad=True)
    keep = torch.ones(3, SEGMENT, dtype=torch.bool)
    keep[1, 5:] = keep[2, :3] = False
    keep = keep if padded else None
    state = memory.init_state(3)
    # a state that is not the first one: after one write
    ids = known(memory, 3, SEGMENT)
    state = memory.write(torch.randn(3, SEGMENT, width, dtype=torch.float64), state, **ids)
    if config.kind == "memoria":
        # so many that every level is filled and something was reminded from each
        for _ in range(4):
            state["use"] = torch.rand_like(state["use"])
            state = memory.write(torch.randn(3, SEGMENT, 64, dtype=torch.float64), state)
        assert bool((state["recalled"][:, config.reminded_stm :] >= 0).any())
    state = {key: tensor.detach() for key, tensor in state.items()}
    state = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    results = {}
    for path in ("fast", "naive"):
        leaves = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in state.items()}
        if path == "fast":
            output, traces = hidden, {}
            if memory.hidden_reads:
                # a read has the hidden states of one site: here of the first that is written
                output, traces = memory.read_and_trace(memory.hidden_reads[0], hidden[..., :64], leaves)
            kept = hidden.new_ones(3, SEGMENT) if keep is None else keep.double()
            left = {k: torch.einsum("bt,bt...->b...", kept, trace) for k, trace in traces.items()}
            after = memory.write(hidden, {k: t + left.get(k, 0) for k, t in leaves.items()}, keep, **ids)
        else:
            output, after = memory.naive(hidden, leaves, keep, **ids)
        weights = torch.Generator().manual_seed(3)
        loss = (output * torch.randn(output.shape, generator=weights)).sum()
        for key in sorted(key for key in after if after[key].requires_grad):
            loss = loss + (after[key] * torch.randn(after[key].shape, generator=weights)).sum()
        wanted = {"hidden": hidden, **{k: t for k, t in leaves.items() if t.requires_grad}}
        wanted |= dict(memory.named_parameters())
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        results[path] = (output, after, dict(zip(wanted, gradients, strict=True)))
    (output, after, gradients), (expected, expected_after, expected_gradients) = results["fast"], results["naive"]
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
    for key, tensor in expected_after.items():
        # the state is float32 whatever the memory computes in
        assert_near(after[key].to(tensor.dtype), tensor, 1e-5)
    for key, gradient in expected_gradients.items():
        assert (gradients[key] is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(
                gradients[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert gradients["hidden"].abs().max() > 0
