"""What is EMT's own: where it sits, which slots a token goes to, what it weighs, and the whitepaper's setting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_differ, assert_near, feed, host, shake, tokens
from mnemic import EMTConfig
from mnemic.memory import Site
from mnemic.state import nbytes


def test_default_placement_is_the_middle():
    for depth, middle in ((1, 0), (2, 0), (3, 1), (12, 5)):
        memory = EMTConfig().build(64, depth)
        assert memory.reads == memory.writes == (Site(middle),)
        assert not memory.writes_see_reads


def test_layers_count_from_the_end_too():
    memory = EMTConfig(read_layers=[-1, 0], write_layer=-12).build(64, 12)
    assert (memory.reads, memory.writes) == ((Site(0), Site(11)), (Site(0),))
    assert EMTConfig(read_layers=[0], write_layer=1).build(64, 2).writes_see_reads


def test_whitepaper_sits_after_the_last_block_twice():
    config = EMTConfig.whitepaper(slots=8, dim=16, heads=2)
    assert (config.stack, config.write, config.zero_shot, config.slots) == (2, "token", True, 8)
    memory = config.build(64, 6)
    assert memory.reads == memory.writes == (Site(5),)
    assert len(memory.writers) == len(memory.readers["5"]) == 2


@torch.no_grad()
def test_zero_shot_moves_the_outputs():
    model, ids = make("llama"), tokens(2, SEGMENT)
    expected = model(ids).logits
    config = EMTConfig.whitepaper(slots=4, dim=16, heads=2, segment_length=SEGMENT)
    attachment = mnemic.attach(model, config)
    assert_differ(model(ids).logits, expected)
    attachment.detach()
    mnemic.attach(model, config.replace(zero_shot=False))
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("stack", [1, 3])
def test_bytes_law(stack):
    config = EMTConfig(segment_length=SEGMENT, slots=5, dim=12, heads=2, stack=stack)
    for rows in (1, 4):
        assert nbytes(config.build(64, 2).init_state(rows)) == rows * stack * 5 * 12 * 4
        # usage and age of every slot besides
        token = config.replace(write="token").build(64, 2).init_state(rows)
        assert nbytes(token) == rows * stack * (5 * 12 * 4 + 5 * 8)
    session = mnemic.Session(host("llama", config), window=SEGMENT)
    session.read(tokens(1, 10 * SEGMENT))
    assert session.nbytes == stack * 5 * 12 * 4
    assert nbytes(EMTConfig().build(64, 2).init_state(1)) == 64 * 1024


@torch.no_grad()
def test_a_token_goes_to_the_slot_that_resembles_it_least():
    memory = EMTConfig(segment_length=SEGMENT, slots=4, dim=16, heads=2, write="token", update_rate=1.0).build(64, 2)
    shake(memory)
    state = memory.init_state(1)
    hidden = torch.randn(1, 1, 64)
    address = torch.nn.functional.normalize(memory.writers[0].address(hidden[0, 0]), dim=-1)
    # one slot that is the address, one its opposite
    slots = state["slots"].clone()
    slots[0, 0, 1], slots[0, 0, 2] = address, -address
    after = memory.write(hidden, {**state, "slots": slots})
    weight = after["usage"][0, 0] / 0.99
    assert weight.argmax() == 2
    assert weight.argmin() == 1
    torch.testing.assert_close(weight.sum(), torch.tensor(1.0))
    torch.testing.assert_close(weight, torch.softmax(-(slots[0, 0] @ address), 0))


@torch.no_grad()
def test_a_token_goes_to_the_slot_that_was_used_most():
    memory = EMTConfig(segment_length=SEGMENT, slots=4, dim=16, heads=2, write="token").build(64, 2)
    state = memory.init_state(1)
    used = state["usage"].clone()
    used[0, 0, 3] = 30.0
    hidden = torch.randn(1, 1, 64)
    plain, after = memory.write(hidden, state), memory.write(hidden, {**state, "usage": used})
    assert after["usage"][0, 0, 3] - 0.99 * 30 > plain["usage"][0, 0, 3]
    # age is the same for all slots, so it moves nothing
    old = memory.write(hidden, {**state, "age": state["age"] + 7})
    torch.testing.assert_close(old["slots"], plain["slots"])
    torch.testing.assert_close(after["age"], torch.ones(1, 1, 4))
    torch.testing.assert_close(memory.write(hidden, after)["age"], torch.full((1, 1, 4), 1.98))


@torch.no_grad()
def test_token_slots_keep_norm_one():
    model = host("llama", CONFIGS["emt-2"])
    session = mnemic.Session(model, window=SEGMENT)
    session.read(tokens(1, 10 * SEGMENT))
    norms = session.stream.state["slots"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@torch.no_grad()
def test_a_closed_gate_keeps_the_slots():
    for bias, same in ((-100.0, True), (0.0, False)):
        memory = EMTConfig(segment_length=SEGMENT, slots=4, dim=16, heads=2, gate_bias=bias).build(64, 2)
        state = memory.init_state(2)
        after = memory.write(torch.randn(2, SEGMENT, 64), state)
        assert torch.allclose(after["slots"], state["slots"]) == same


@torch.no_grad()
def test_every_memory_of_a_stack_matters():
    config = EMTConfig(segment_length=SEGMENT, slots=4, dim=16, heads=2, stack=2)
    model, ids = host("llama", config), tokens(2, 2 * SEGMENT)
    expected = feed(model, ids)
    for k in range(2):
        changed = host("llama", config)
        shake(mnemic.attached(changed).memory.writers[k], seed=9)
        logits = feed(changed, ids)
        assert torch.equal(logits[:, :SEGMENT], expected[:, :SEGMENT])
        assert_differ(logits[:, SEGMENT:], expected[:, SEGMENT:])


def test_feedback_and_blend_scale_the_read():
    hidden, results = torch.randn(1, 3, 64), {}
    for depth, feedback, blend in ((2, 1.0, 0.6), (2, 0.5, 0.6), (1, 1.0, 0.6), (1, 1.0, 0.3)):
        torch.manual_seed(0)
        memory = EMTConfig(slots=4, dim=16, heads=2, feedback=feedback, final_blend=blend).build(64, depth)
        shake(memory)
        results[depth, feedback, blend] = memory.read(Site(0), hidden, memory.init_state(1)) - hidden
    full = results[2, 1.0, 0.6]
    torch.testing.assert_close(results[2, 0.5, 0.6], 0.5 * full)
    # block 0 of 1 is the last one, where the result is the output
    torch.testing.assert_close(results[1, 1.0, 0.6], 0.6 * full)
    torch.testing.assert_close(results[1, 1.0, 0.3], 0.3 * full)


def test_configs_go_to_plain_values_and_back():
    for config in mnemic.CONFIGS["emt"].tiny():
        assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config


# --- allocation ------------------------------------------------------------------------------------------------------


def allocated(**changes):
    """A memory that writes by allocation, on a host of width 64 with 4 blocks, and 12 random tokens that enter it."""
    torch.manual_seed(0)
    settings = {"segment_length": 16, "slots": 64, "dim": 128, "heads": 1, "write": "allocation", **changes}
    memory = mnemic.EMTConfig(**settings).build(64, 4)
    entered, hidden = torch.randn(2, 1, 12, 64)
    return memory, entered, hidden


def answers(memory, hidden, state):
    """What a read adds, alpha at 1."""
    reader = memory.readers[str(memory.reads[0].layer)][0]
    with torch.no_grad():
        reader.alpha.fill_(1.0)
        return memory.read(memory.reads[0], hidden, state) - hidden


def test_allocation_reads_back_what_followed_before_it_is_trained():
    """A token that comes again finds the one that came after it, for 11 tokens in 12 slots or so."""
    memory, entered, hidden = allocated()
    with torch.no_grad():
        state = memory.write(torch.cat([entered, hidden], -1), memory.init_state(1))
    found = answers(memory, hidden, state)[0]
    near = F.cosine_similarity(found[:, None], F.layer_norm(entered[0], (64,))[None], dim=-1)
    right = near.argmax(-1)[:-1] == torch.arange(1, 12)
    assert right.float().mean() > 0.7
    nothing = answers(memory, hidden, memory.init_state(1))[0]
    near = F.cosine_similarity(nothing[:, None], F.layer_norm(entered[0], (64,))[None], dim=-1)
    assert (near.argmax(-1)[:-1] == torch.arange(1, 12)).float().mean() < 0.4


def test_a_slot_that_no_token_goes_to_keeps_what_it_has():
    memory, entered, hidden = allocated(sharpness=8.0)
    before = memory.init_state(1)
    with torch.no_grad():
        state, told = memory.write_and_tell(torch.cat([entered, hidden], -1), before)
    moved = (state["slots"] - before["slots"]).abs().amax(-1)[0, 0]
    assert (moved < 0.01).sum() >= 64 - 3 * 12
    assert (moved > 0.1).sum() >= 4
    assert_near(told.weight.sum(-1), torch.ones_like(told.weight[..., 0]))


def test_a_second_telling_takes_the_place_of_the_first():
    """What has the same address goes to the same slots: the new content is read, and the old is not."""
    memory, entered, hidden = allocated()
    new = torch.randn_like(entered)
    with torch.no_grad():
        state = memory.write(torch.cat([entered, hidden], -1), memory.init_state(1))
        state = memory.write(torch.cat([new, hidden], -1), state)
    found = answers(memory, hidden, state)[0, :-1]
    near = [F.cosine_similarity(found, F.layer_norm(each[0, 1:], (64,)), dim=-1) for each in (new, entered)]
    assert (near[0] > near[1]).float().mean() > 0.8


@pytest.mark.parametrize("slots", [64, 4])
def test_tokens_with_one_address_go_to_slots_of_their_own(slots):
    """Two digits of a number look alike to what tells where they go; with fewer slots than tokens they share."""
    memory, entered, hidden = allocated(slots=slots, sharpness=16.0)
    hidden[0, 1:] = hidden[0, :1]
    with torch.no_grad():
        _, told = memory.write_and_tell(torch.cat([entered, hidden], -1), memory.init_state(1))
    # the weights of a slot add up to 1, so the slots that are one token's own
    own = (told.weight[0] > 0.6) & (told.share[0] > 0.3)[:, None]
    assert own.any(0).sum() >= 10 if slots == 64 else not own.any()


def test_a_second_telling_gets_slots_of_its_own_where_usage_counts():
    """What has the same address goes where nothing was written yet, and what was told stays."""
    with pytest.raises(ValueError, match=r"usage_weight is -1.0; use 0 or more"):
        mnemic.EMTConfig(write="allocation", usage_weight=-1.0)
    found = []
    for weight in (0.0, 4.0):
        memory, entered, hidden = allocated(sharpness=16.0, usage_weight=weight)
        joined, places = torch.cat([entered, hidden], -1), []
        state = memory.init_state(1)
        for _ in range(2):
            with torch.no_grad():
                state, told = memory.write_and_tell(joined, state)
            places.append((told.share[0] > 0.3).nonzero().flatten().tolist())
        found.append(len({*places[0]} & {*places[1]}) / len(places[0]))
        assert ("usage" in state) is (weight > 0)
    assert found[0] > 0.8
    assert found[1] == 0


def test_what_is_written_costs_in_training():
    """The auxiliary loss is the mean of beta over real tokens, and closes the gate where nothing asks."""
    memory, entered, hidden = allocated(write_cost=0.5)
    joined, keep = torch.cat([entered, hidden], -1), torch.ones(1, 12, dtype=torch.bool)
    keep[0, 8:] = False
    beta = torch.sigmoid(memory.writers[0].keep(F.layer_norm(hidden, (64,)))).flatten()
    assert_near(memory.auxiliary(joined, memory.init_state(1)), 0.5 * beta.mean()[None])
    assert_near(memory.auxiliary(joined, memory.init_state(1), keep), 0.5 * beta[:8].mean()[None])
    assert allocated()[0].auxiliary(joined, memory.init_state(1)) is None
    rate = torch.optim.SGD(memory.parameters(), 10.0)
    before = memory.write(joined, memory.init_state(1))["slots"]
    for _ in range(100):
        rate.zero_grad()
        memory.auxiliary(joined, memory.init_state(1)).sum().backward()
        rate.step()
    moved = [
        (each - memory.init_state(1)["slots"]).norm()
        for each in (before, memory.write(joined, memory.init_state(1))["slots"])
    ]
    assert moved[1] < 0.2 * moved[0]
    with pytest.raises(ValueError, match=r"write_cost is -0.1; use 0 or more nats"):
        mnemic.EMTConfig(write="allocation", write_cost=-0.1)


def test_an_address_crosses_the_border_of_segments():
    """The first token of a segment is found by the last one of the segment before, whatever padding lies between."""
    memory, entered, hidden = allocated(sharpness=4.0)
    joined, keep = torch.cat([entered, hidden], -1), torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        state = memory.write(joined[:, :6], memory.init_state(1))
        alone = memory.write(joined[:, 6:], {**memory.init_state(1), "slots": state["slots"]})
        state = memory.write(joined[:, 6:], state)
    sought = F.layer_norm(entered[:, 6], (64,))
    near = [F.cosine_similarity(answers(memory, hidden[:, 5:6], each)[0], sought).item() for each in (state, alone)]
    assert near[0] > 0.6 > near[1]
    keep[:, 6:] = False
    with torch.no_grad():
        padded = memory.write(torch.cat([joined[:, :6], torch.randn(1, 2, 128)], 1), memory.init_state(1), keep)
        assert_near(padded["last"], memory.write(joined[:, :6], memory.init_state(1))["last"])
        nothing = memory.write(joined[:, :8], state, torch.zeros_like(keep))
    assert_near(nothing["last"], state["last"])


def test_calibration_ties_the_output_to_what_was_whitened():
    """Contents come back as what entered, whatever its covariance is."""
    memory, entered, _ = allocated(whiten=True)
    mix = torch.randn(64, 64) / 8
    samples = torch.cat([torch.randn(2000, 64) @ mix, torch.randn(2000, 64)], -1)
    memory.calibrate(samples, dict.fromkeys(memory.reads, samples[:, 64:]))
    writer, reader = memory.writers[0], memory.readers[str(memory.reads[0].layer)][0]
    entered = entered[0] @ mix
    with torch.no_grad():
        content = writer.content(writer.whiten_entered(writer.norm_entered(entered)))
        back = reader.output(content)
    normed = F.layer_norm(entered, (64,)) - writer.whiten_entered.mean
    assert F.cosine_similarity(back, normed, dim=-1).mean() > 0.9


def test_allocation_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"half of dim 24 is not divisible by 8 heads; set dim= to a multiple of 16"):
        mnemic.EMTConfig(write="allocation", dim=24, heads=8)
    with pytest.raises(ValueError, match="zero_shot=True reads at random"):
        mnemic.EMTConfig(write="allocation", zero_shot=True)
    with pytest.raises(ValueError, match=r"update_rate is 0\.3, but nothing here uses it"):
        mnemic.EMTConfig(write="allocation", update_rate=0.3)
