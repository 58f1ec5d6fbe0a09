"""Recall: what leaves the window is kept and found again inside attention, as its equations say, on any family."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import mnemic
from families import COMMON, DECODERS, GROUPED, make
from helpers import CACHE, SEGMENT, assert_near, feed, random_cuts, refusal, tokens
from mnemic.bank import Bank
from mnemic.memories.recall import RecallConfig, by_mass
from mnemic.memory import Asked
from test_recall_choice import SMALL

SERVED = [name for name in DECODERS if refusal("recall-0", name) is None]


def recalling(name="llama", **settings):
    model = make(name)
    mnemic.attach(model, RecallConfig(**{**SMALL, "budget": 8, **settings}))
    return model


# --- in attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_everything_in_line_is_the_base_with_everything_in_its_window(name, implementation):
    model, ids = make(name), tokens(2, 9 * SEGMENT)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{name} has no sdpa")
    model.set_attn_implementation(implementation)
    expected = model(ids).logits
    # a window in which sliding layers see all that they ever see
    window = (DECODERS[name].sliding or 0) + 2 * SEGMENT
    attachment = mnemic.attach(model, RecallConfig(**{**SMALL, "window": window, "budget": 128}))
    for lengths in ([9 * SEGMENT], random_cuts(9 * SEGMENT, 1)):
        cache = mnemic.memory_cache(model, window)
        assert_near(feed(model, ids, lengths, carried=cache), expected, 1e-4)
        assert cache.window.kept < 9 * SEGMENT
    with attachment.disabled():
        cut_off = feed(model, ids, carried=mnemic.memory_cache(model, window))
    assert (cut_off - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [{}, {"search": "candidates"}, {"choice": "mean", "by": "layer", "layout": "capped"}, {"choice": "bounds"}],
)
@torch.no_grad()
def test_cuts_rows_and_padding_change_nothing(settings, monkeypatch):
    monkeypatch.setattr("mnemic.bank.LEAST", SEGMENT)
    model, ids = recalling(**settings), tokens(3, 11 * SEGMENT + 3)
    expected = feed(model, ids)
    assert_near(feed(model, ids, random_cuts(ids.shape[1], 2)), expected, 1e-4)
    for row in range(3):
        assert_near(feed(model, ids[row : row + 1]), expected[row : row + 1], 1e-4)
    changed = ids.clone()
    changed[:, -1] = tokens(3, 1, 5)[:, 0]
    assert torch.equal(feed(model, changed)[:, :-1], expected[:, :-1])
    mask = torch.ones(3, ids.shape[1] + 5, dtype=torch.long)
    mask[:, :5] = 0
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], 1)
    assert_near(feed(model, padded, mask=mask)[:, 5:], expected, 1e-4)


@torch.no_grad()
def test_off_and_without_a_window_it_is_the_base_to_the_bit():
    model, ids = make("llama"), tokens(2, 60)
    expected = model(ids).logits
    attachment = mnemic.attach(model, RecallConfig(**SMALL, budget=8))
    assert torch.equal(model(ids).logits, expected)
    with attachment.disabled():
        assert torch.equal(model(ids).logits, expected)
        window = feed(model, ids)
    attachment.detach()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, expected)
    mnemic.attach(model, mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=16))
    assert_near(feed(model, ids, carried=mnemic.memory_cache(model, 2 * SEGMENT, sinks=0)), window, 1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mistral", "sliding window of 16"),
        ("falcon", "AttentionInterface"),
        ("bloom", "AttentionInterface"),
        ("gptj", "cannot undo|AttentionInterface"),
        ("bert", "an encoder has no keys"),
    ],
)
def test_families_that_cannot_be_served_are_refused_whole(name, said):
    model, ids = make(name), tokens(1, 9)
    expected, before = model(ids).logits, model.config._attn_implementation
    with pytest.raises(ValueError, match=said):
        mnemic.attach(model, RecallConfig(**{**SMALL, "window": None if name == "bert" else 2 * SEGMENT}, budget=8))
    assert not mnemic.attachment.is_attached(model)
    assert model.config._attn_implementation == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_reading_retrieves_where_it_is_asked_to():
    ids, question = tokens(1, 10 * SEGMENT), tokens(1, 4, 3)
    seen = {}
    for reads in (False, True):
        model = recalling(recall_in_reading=reads)
        read, forward = mnemic.Session(model), mnemic.Session(model)
        read.read(ids)
        forward.forward(ids)
        seen[reads] = [session.forward(question).logits for session in (read, forward)]
    assert_near(*seen[True], 1e-4)
    assert (seen[False][0] - seen[False][1]).abs().max() > 1e-3
    # what is read beside the sinks alone is not what a window without them makes
    model = recalling(recall_in_reading=False)
    sinks = mnemic.Session(model)
    sinks.read(ids)
    mnemic.attached(model).memory.config = mnemic.attached(model).memory.config.replace(sinks=0)
    none = mnemic.Session(model)
    none.read(ids)
    kept, its = (session.stream.banks[0].tensors()["keys"] for session in (sinks, none))
    assert_near(kept[:, :, :, : 2 * SEGMENT], its[:, :, :, : 2 * SEGMENT], 1e-5)
    assert (kept - its).abs().max() > 1e-3


@torch.no_grad()
def test_another_stream_has_another_memory():
    model, question = recalling(), tokens(1, 4, 3)
    sessions = [mnemic.Session(model) for _ in range(2)]
    for seed, session in enumerate(sessions):
        session.read(tokens(1, 10 * SEGMENT, seed))
    one, two = (session.fork() for session in sessions)
    expected = one.fork().forward(question).logits
    one._layer.stream = one.stream.with_banks(two.stream.banks)
    assert (one.forward(question).logits - expected).abs().max() > 1e-3


def test_the_rotation_of_each_block_is_found():
    def kinds(name, **settings):
        model = make(name, **settings)
        mnemic.attach(model, RecallConfig(**{**SMALL, "window": 32}, budget=8))
        return [(turning.rotary is not None, turning.kind) for turning in mnemic.attached(model).router.turnings]

    for padding in (0, 3, 7):
        assert kinds("smollm3", pad_token_id=padding) == [(True, None), (False, None)]
        assert kinds("gemma3", pad_token_id=padding) == [(True, "full_attention")]
    assert kinds("gpt2") == [(False, None)] * 2


@pytest.mark.parametrize("name", ["llama", "smollm3", "gpt_neox", "cohere", "gpt2"])
@torch.no_grad()
def test_what_a_few_blocks_give_by_hand(name):
    """Against attention over keys that are taken from the base's own cache, where less is seen than was kept."""
    model, ids = make(name), tokens(1, 6 * SEGMENT)
    attachment = mnemic.attach(model, RecallConfig(**SMALL, budget=8))
    cache = mnemic.memory_cache(model, 2 * SEGMENT)
    feed(model, ids, carried=cache)
    bank, (first, *_) = cache.memory.stream.banks[0], attachment.router.turnings
    if first.rotary is None:
        return
    # the first block's keys depend on no attention, so they are those of the base at any positions
    plain = DynamicCache()
    with attachment.disabled():
        model(ids, use_cache=True, **{CACHE: plain})
    moved = first(torch.cat(bank.keys(0), 1), torch.arange(bank.length))
    assert_near(moved, plain.layers[0].keys[0][:, : bank.length], 1e-4)


FAMILIES_OF_THEIR_OWN = {
    "two attentions in a block": (hf.DiffLlamaConfig, hf.DiffLlamaForCausalLM, {}),
    "latent keys": (
        hf.DeepseekV3Config,
        hf.DeepseekV3ForCausalLM,
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 2,
            "first_k_dense_replace": 2,
            "num_key_value_heads": 4,
        },
    ),
    "sinks": (
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
    ),
}


@pytest.mark.parametrize("name", FAMILIES_OF_THEIR_OWN)
def test_attention_of_another_kind_is_refused(name):
    config, kind, settings = FAMILIES_OF_THEIR_OWN[name]
    model = kind(config(**{**COMMON, **GROUPED, **settings})).eval()
    with pytest.raises(ValueError, match=r"attention of its own in block \d|cannot undo"):
        mnemic.attach(model, RecallConfig(**{**SMALL, "window": 256}, budget=8))
    assert not mnemic.attachment.is_attached(model)


@torch.no_grad()
def test_scaled_rotations_choose_as_attention_would():
    rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, "rope_theta": 10_000.0}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON | GROUPED, rope_parameters=rope)).eval()
    attachment = mnemic.attach(model, RecallConfig(**SMALL, budget=8))
    turn = attachment.router.turnings[0]
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 40, 16, generator=generator)
    query, position = torch.randn(4, 3, 16, generator=generator), torch.arange(60, 63)
    asked = Asked(query, position, 40, 0.25, Bank().append(keys, values), 0, turn, 16, range(3))
    far, near = turn(asked.query_hts, torch.full((3,), 16)), turn(keys[0], torch.zeros(40, dtype=torch.long))
    found = attachment.memory._far(asked)
    assert_near(found @ keys[0].repeat_interleave(2, 0).mT, far @ near.repeat_interleave(2, 0).mT, 1e-4)
    worth = attachment.memory._voted(
        by_mass(0.25 * found.unflatten(0, (2, 2)).flatten(1, 2), asked.bank, 0, 4).unflatten(1, (2, 3))
    )
    shares = (0.25 * far.unflatten(0, (2, 2)) @ near[:, None].transpose(-1, -2)).softmax(-1)
    assert_near(worth, shares.unflatten(-1, (-1, 4)).sum(-1).amax(1), 1e-5)


@torch.no_grad()
def test_a_pickled_model_recalls_in_another_process(tmp_path):
    model, ids = recalling(), tokens(1, 9 * SEGMENT)
    expected = feed(model, ids)
    torch.save((model, ids, expected), tmp_path / "all.pt")
    code = (
        "import sys, torch, mnemic; model, ids, expected = torch.load(sys.argv[1], weights_only=False); "
        "session = mnemic.Session(model); found = session.forward(ids).logits; "
        "assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "all.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_models_of_one_config_each_have_their_own():
    config = hf.LlamaConfig(**COMMON)
    one, two = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    for model in (one, two):
        mnemic.attach(model, RecallConfig(**SMALL, budget=8))
    ids = tokens(1, 9 * SEGMENT)
    expected = [feed(model, ids) for model in (one, two)]
    assert torch.equal(feed(one, ids), expected[0])
    mnemic.attached(one).detach()
    with pytest.raises(ValueError, match="was set to 'sdpa' after its memory was attached"):
        feed(two, ids)


@torch.no_grad()
def test_a_model_inside_of_another_of_its_config_is_left_alone():
    config, ids = hf.LlamaConfig(**COMMON), tokens(1, 9 * SEGMENT)
    outer, bare, other = (hf.LlamaForCausalLM(config).eval() for _ in range(3))
    for model in (outer, other):
        mnemic.attach(model, RecallConfig(**SMALL, budget=8))
    calls = [lambda: bare(ids).logits, lambda: feed(other, ids)]
    expected, found = [feed(outer, ids), *(call() for call in calls)], []
    handle = outer.model.layers[0].register_forward_pre_hook(lambda *_: found.append([call() for call in calls]))
    assert torch.equal(feed(outer, ids), expected[0])
    handle.remove()
    assert len(found) == 9
    assert all(torch.equal(one, its) for each in found for one, its in zip(each, expected[1:], strict=True))


@torch.no_grad()
def test_what_the_window_must_not_hold_is_refused(tmp_path):
    model = recalling()
    attachment, session = mnemic.attached(model), mnemic.Session(model)
    session.read(tokens(1, 5 * SEGMENT))
    with attachment.disabled():
        session.read(tokens(1, 3))
        session.forward(tokens(1, 3))
    with pytest.raises(ValueError, match="read while the memory was off"):
        session.read(tokens(1, 3))
    with pytest.raises(mnemic.StateError, match="read while the memory was off"):
        session.save(tmp_path / "s.memory")
    session.reset()
    session.read(tokens(1, 5 * SEGMENT))
    with torch.inference_mode():
        session.read(tokens(1, 5 * SEGMENT))
    session.read(tokens(1, 5 * SEGMENT))
    assert session.stream.banks[0].length > 10 * SEGMENT
    model.train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ValueError, match="gradient checkpointing runs attention twice"):
        model(tokens(1, 4), use_cache=True, **{CACHE: mnemic.memory_cache(model)})


@torch.no_grad()
def test_beams_keep_what_retrieval_made():
    model = recalling(recall_in_reading=False)
    session, prompt = mnemic.Session(model), tokens(1, 9, 5)
    session.read(tokens(1, 12 * SEGMENT))
    beams, by_hand = session.fork(), session.fork()
    answer = beams.generate(prompt, max_new_tokens=2 * SEGMENT, num_beams=2, do_sample=False, eos_token_id=None)
    by_hand.forward(torch.cat([prompt, answer], 1))
    assert_near(beams.forward(tokens(1, 4, 9)).logits, by_hand.forward(tokens(1, 4, 9)).logits, 1e-4)


# --- sessions --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forks_find_what_each_has_read(monkeypatch):
    monkeypatch.setattr("mnemic.bank.LEAST", SEGMENT)
    model, question = recalling(search="candidates", wider=1), tokens(1, 5, 3)
    first = mnemic.Session(model)
    first.read(tokens(1, 12 * SEGMENT))
    before = first.fork().forward(question).logits
    for seed, session in enumerate([first.fork(), first.fork()]):
        more, alone = tokens(1, 5 * SEGMENT, 7 + seed), mnemic.Session(model)
        session.read(more)
        assert session.stream.banks[0].chunks[0] is first.stream.banks[0].chunks[0]
        assert len(session.stream.banks[0].chunks) == 1 + seed
        alone.read(torch.cat([tokens(1, 12 * SEGMENT), more], 1))
        assert_near(session.forward(question).logits, alone.forward(question).logits, 1e-4)
        again = mnemic.Session.from_bytes(session.to_bytes(), model)
        assert torch.equal(again.forward(question).logits, session.forward(question).logits)
    assert torch.equal(first.fork().forward(question).logits, before)


@torch.no_grad()
def test_a_saved_session_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("mnemic.bank.LEAST", SEGMENT)
    model, question = recalling(), tokens(1, 5, 3)
    session = mnemic.Session(model)
    session.read(tokens(1, 12 * SEGMENT + 3))
    session.save(tmp_path / "s.memory")
    again = mnemic.Session.load(tmp_path / "s.memory", model)
    assert again.stream.banks[0].length == session.stream.banks[0].length > 0
    assert again.nbytes == session.nbytes
    # what was loaded is saved again, and is the same
    assert all(torch.equal(t, session.contents()[0][name]) for name, t in again.contents()[0].items() if "bank" in name)
    mnemic.Session.from_bytes(again.to_bytes(), model)
    assert torch.equal(again.forward(question).logits, session.forward(question).logits)
    lower = copy.deepcopy(model).to(torch.bfloat16)
    assert mnemic.Session.from_bytes(again.to_bytes(), lower).stream.banks[0].positions.dtype == torch.long


@torch.no_grad()
def test_forgotten_tokens_are_gone(tmp_path):
    model, ids = recalling(budget=128), tokens(1, 10 * SEGMENT)
    session, question = mnemic.Session(model, keep_text=True), tokens(1, 4, 3)
    session.read(ids)
    whole, record = session.fork(), session.history[2]
    assert session.forget(record["first"], record["last"]) == SEGMENT
    bank, before = session.stream.banks[0], whole.stream.banks[0]
    assert bank.length == before.length - SEGMENT
    stay = [place for place in range(before.length) if not record["first"] <= place <= record["last"]]
    assert bank.positions.tolist() == stay
    assert torch.equal(bank.tensors()["keys"], before.tensors()["keys"][:, :, :, stay])
    text = session.stream.logs[0].ids
    assert [i for i, token in enumerate(text) if token < 0] == list(range(record["first"], record["last"] + 1))
    assert session.forget(record["first"], record["last"]) == 0
    assert (session.forward(question).logits - whole.forward(question).logits).abs().max() > 1e-3
    session.save(tmp_path / "s.memory")
    again = mnemic.Session.load(tmp_path / "s.memory", model)
    assert torch.equal(again.forward(question).logits, session.fork().forward(question).logits)
    with pytest.raises(ValueError, match=r"tokens 70 to 79 cannot be forgotten: of 84 .* < 72"):
        session.forget(70, 79)
    assert session.forget(0, 71) > 0
    assert session.stream.banks[0].length == session.forget(0, 71) == 0
    session.forward(question)
    other = make("llama")
    mnemic.attach(other, mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=16))
    with pytest.raises(ValueError, match=r"kind 'emt' keeps no token apart from others; reset\(\) forgets all"):
        mnemic.Session(other).forget(0, 1)
    two = make("llama")
    mnemic.attach(
        two, [RecallConfig(**SMALL, budget=8), mnemic.EMTConfig(segment_length=SEGMENT, window=16, slots=4, dim=16)]
    )
    with pytest.raises(ValueError, match="another memory has written these tokens"):
        mnemic.Session(two).forget(0, 1)


@pytest.mark.parametrize("change", ["long", "short", "nan", "shape", "lost", "order"])
@torch.no_grad()
def test_a_bank_that_no_session_makes_is_refused(change, tmp_path):
    model = recalling()
    session = mnemic.Session(model)
    session.read(tokens(1, 12 * SEGMENT))
    tensors, meta = session.contents()
    if change == "long":
        for name in ("bank.keys", "bank.values"):
            tensors[name] = torch.cat([tensors[name]] * 3, 3)
        tensors["bank.positions"] = torch.arange(3 * tensors["bank.positions"].numel())[None]
    elif change == "short":
        tensors["bank.keys"] = tensors["bank.keys"][:, :, :, 1:]
    elif change == "nan":
        tensors["bank.values"] = tensors["bank.values"] * torch.nan
    elif change == "shape":
        tensors["bank.keys"] = tensors["bank.keys"].unflatten(4, (2, -1))
    elif change == "order":
        tensors["bank.positions"] = tensors["bank.positions"].flip(1)
    else:
        del tensors["bank.values"]
    mnemic.state.write_file(tmp_path / "s.memory", tensors, meta)
    with pytest.raises(mnemic.StateError, match="bank"):  # numbers are looked at when they are used
        mnemic.Session.load(tmp_path / "s.memory", model).forward(tokens(1, 2))


@torch.no_grad()
def test_a_failed_call_keeps_nothing():
    model = recalling()
    session = mnemic.Session(model)
    session.read(tokens(1, 6 * SEGMENT))
    before, expected = session.stream, session.fork().forward(tokens(1, 4).clamp_min(6)).logits
    weight = model.get_input_embeddings().weight
    weight[5] = torch.nan
    with pytest.raises(mnemic.StateError, match=r"keys of block 1 are NaN .*row 0, token 0 of the call"):
        session.read(torch.cat([tokens(1, 3 * SEGMENT).clamp_min(6), torch.tensor([[5]])], 1))
    weight[5] = 0.1
    assert session.stream is before
    assert torch.equal(session.forward(tokens(1, 4).clamp_min(6)).logits, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unit": 3}, "unit is 3"),
        ({"unit": 0}, "unit is 0"),
        ({"budget": 9}, "budget is 9"),
        ({"sinks": -4}, "sinks is -4"),
        ({"search": "candidates", "wider": 0}, "wider is 0"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        RecallConfig(**{**SMALL, "budget": 8, **settings})
