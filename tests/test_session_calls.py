"""Calls of a session: every token reaches it once, one thread at a time, as in evaluation, and with no graph kept."""

from __future__ import annotations

import copy
import pickle
import threading

import peft
import pytest
import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

import mnemic
from families import COMMON, GROUPED, make
from helpers import CONFIGS, SEGMENT, assert_equal_stream, host, tokens, trained

EMT = CONFIGS["emt-0"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
PROMPT = tokens(1, 5, 3)
USES = {
    "read": lambda session: session.read(PROMPT),
    "forward": lambda session: session.forward(PROMPT),
    "generate": lambda session: session.generate(PROMPT, **GREEDY),
    "beams": lambda session: session.generate(PROMPT, num_beams=2, **GREEDY),
    "answer": lambda session: list(session.answer(PROMPT, **GREEDY)),
    "batch": lambda session: mnemic.batch([session, session.fork()]).generate([PROMPT, PROMPT], **GREEDY),
}
over_uses = pytest.mark.parametrize("use", USES.values(), ids=USES)


def session_of(model, read=21):
    session = mnemic.Session(model)
    session.read(tokens(1, read))
    return session


# --- each token once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"num_beams": 2}]
)
@pytest.mark.parametrize("given", [False, True])
def test_a_checkpoints_settings_do_not_change_what_a_session_reads(settings, given):
    model = host("llama", EMT)
    session, expected = session_of(model), session_of(model)
    answer = expected.generate(PROMPT, num_beams=settings.get("num_beams", 1), **GREEDY)
    if given:
        config = GenerationConfig(**GREEDY, **settings)
        found = session.generate(PROMPT, generation_config=config)
    else:
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        found = session.generate(PROMPT, **GREEDY)
    assert torch.equal(found, answer)
    assert_equal_stream(session.stream, expected.stream)


def test_whoever_generates_without_a_cache_reads_each_token_once():
    session, expected = (session_of(host("llama", EMT)) for _ in range(2))
    assert torch.equal(session.generate(PROMPT, use_cache=False, **GREEDY), expected.generate(PROMPT, **GREEDY))
    assert_equal_stream(session.stream, expected.stream)


@pytest.mark.parametrize(
    "settings",
    [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig],
    ids=lambda cls: cls.__name__,
)
def test_a_model_with_tokens_of_its_own_in_every_call_is_refused(settings):
    more = {"encoder_hidden_size": 8} if settings is peft.PromptEncoderConfig else {}
    model = peft.get_peft_model(make("llama"), settings(task_type="CAUSAL_LM", num_virtual_tokens=4, **more))
    trained(model, EMT)
    session = session_of(model)
    before = session.stream
    for use in [use for name, use in USES.items() if name != "read"]:  # which runs the stack below such tokens
        with pytest.raises(RuntimeError, match=r"puts tokens of its own before every call.*prefix"):
            use(session)
        assert session.stream is before


def test_a_model_that_feeds_tokens_again_is_refused():
    model = host("llama", EMT)
    session = session_of(model)
    plain, before = model.forward, session.stream

    def again(**given):
        plain(**given)
        return plain(**given)

    model.forward = again
    for use in [use for name, use in USES.items() if name != "read"]:
        with pytest.raises(RuntimeError, match=r"gave the session \d+ token\(s\) where \d+ were to be read"):
            use(session)
        assert session.stream is before


def test_a_model_that_leaves_its_cache_is_right_or_refused():
    # past `original_max_position_embeddings` tokens of one call of generate, this family begins a new cache
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "rope_theta": 1e4}
    settings = {**COMMON, **GROUPED, "original_max_position_embeddings": 8, "rope_parameters": rope}
    model = Phi3ForCausalLM(Phi3Config(**settings)).eval()
    trained(model, EMT)
    session, by_hand = session_of(model), session_of(model)
    by_hand.read(torch.cat([PROMPT, session.generate(PROMPT, **GREEDY)], 1))
    assert session.stream.seen == by_hand.stream.seen == (21 + 5 + 6,)
    before = session.stream
    with pytest.raises(RuntimeError, match="left the cache that it was given"):
        session.generate(PROMPT, num_beams=2, **GREEDY)
    assert session.stream is before


@torch.no_grad()
def test_what_was_read_with_the_memory_off_has_a_part_in_where_segments_end():
    for batched in (False, True):
        streams = []
        for parts in ([tokens(1, 24, 1)], tokens(1, 24, 1).split(1, 1)):
            model = host("llama", EMT)
            session = mnemic.Session(model)
            with mnemic.attached(model).disabled():
                session.read(tokens(1, 5))
            for part in parts:
                mnemic.batch([session]).read([part]) if batched else session.read(part)
            streams.append(session.stream)
        torch.testing.assert_close(streams[0].state["slots"], streams[1].state["slots"], atol=1e-5, rtol=1e-5)


# --- one thread at a time --------------------------------------------------------------------------------------------

ENTRIES = {
    **USES,
    "flush": lambda session: session.flush(),
    "reset": lambda session: session.reset(),
    "fork": lambda session: session.fork(),
    "save": lambda session: session.save("never-written.memory"),
    "to_bytes": lambda session: session.to_bytes(),
    "put": lambda session: mnemic.SessionStore.put(None, "work", session),  # asks nothing of the store
    "batch of others": lambda session: mnemic.batch([mnemic.Session(session.model), session]).read([PROMPT] * 2),
    "a piece": lambda session: next(iter(session.answer(PROMPT, **GREEDY))),
}


@pytest.fixture
def busy():
    """A session that another thread is using, until the test is over."""
    session = session_of(host("llama", EMT))
    inside, over = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert over.wait(60)

    handle = session.model.lm_head.register_forward_hook(wait)
    thread = threading.Thread(target=session.forward, args=(PROMPT,))
    thread.start()
    assert inside.wait(60)
    handle.remove()
    yield session, over, thread
    over.set()
    thread.join()


def test_another_threads_call_is_refused_by_every_entry(busy):
    session, over, thread = busy
    for use in ENTRIES.values():
        with pytest.raises(RuntimeError, match="the session is in use by another thread"):
            use(session)
    over.set()
    thread.join()
    assert session.stream.seen == (26,)  # what the other thread read is there, and nothing else
    session.read(PROMPT)


def test_whoever_holds_the_lock_waits(busy):
    session, over, _ = busy
    threading.Timer(0.05, over.set).start()
    with session.lock:
        session.read(PROMPT)
        session.generate(PROMPT, **GREEDY)
    assert session.stream.seen == (26 + 5 + 11,)


def test_a_lock_is_left_after_an_error_and_between_pieces():
    session = session_of(host("llama", EMT))
    with pytest.raises(ValueError, match="token 10000 is none of the model's"):
        session.read([10_000])
    pieces = session.answer(PROMPT, **GREEDY)
    next(pieces)
    failed = []

    def use():
        try:
            session.fork()
            session.read(PROMPT)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failed
    with pytest.raises(RuntimeError, match="the session was used while it answers"):
        next(pieces)


def test_what_reads_between_asking_and_the_first_piece_is_noticed():
    session = session_of(host("llama", EMT))
    pieces = session.answer(PROMPT, **GREEDY)
    session.read(PROMPT)
    with pytest.raises(RuntimeError, match="the session was used while it answers"):
        next(pieces)
    assert session.stream.seen == (26,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))])
def test_a_copy_has_a_lock_of_its_own(busy, copied):
    session, over, thread = busy
    over.set()
    thread.join()
    other = copied(session)
    with session.lock:
        thread = threading.Thread(target=other.read, args=(PROMPT,))
        thread.start()
        thread.join()
    assert other.stream.seen == (31,)


# --- as in evaluation ------------------------------------------------------------------------------------------------


def dropping(name):
    """A model of which every call in training is another one."""
    more = {
        "gpt2": {},
        "bert": {},
        "llama": {"attention_dropout": 0.5},
        "opt": {"layerdrop": 0.5, "attention_dropout": 0.5},
    }
    if name == "mixtral":
        more[name] = {"router_jitter_noise": 0.5, "attention_dropout": 0.5}
    return host(name, EMT, **more[name])


def another_each_time(model, ids):
    first = model(ids).logits
    return any(not torch.equal(model(ids).logits, first) for _ in range(9))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "mixtral", "bert"])
@torch.no_grad()
def test_a_session_has_no_dropout_in_training(name, attention):
    model = dropping(name)
    model.set_attn_implementation(attention)
    ids = tokens(1, SEGMENT)
    expected = mnemic.Session(model).forward(ids).logits
    model.train()
    assert another_each_time(model, ids)  # without this the test could not fail
    assert torch.equal(mnemic.Session(model).forward(ids).logits, expected)
    assert torch.equal(mnemic.batch([mnemic.Session(model)]).forward([ids])[0].logits, expected)
    sessions = [mnemic.Session(model) for _ in range(2)]
    for session in sessions:
        for use in (USES if name != "bert" else {"read": USES["read"], "forward": USES["forward"]}).values():
            use(session)
        session.flush()
    assert_equal_stream(sessions[0].stream, sessions[1].stream)
    assert another_each_time(model, ids)


@over_uses
def test_modes_and_settings_are_what_they_were(use):
    model = host("gpt2", EMT)
    model.activation_checkpointing_enable()
    model.train()
    model.transformer.h[1].eval()

    def modes():
        return [(module.training, vars(module).get("gradient_checkpointing")) for module in model.modules()]

    before, session = modes(), mnemic.Session(model, window=2 * SEGMENT)
    session.read(tokens(1, 21))
    use(session)
    assert modes() == before

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        use(session)
    handle.remove()
    assert modes() == before


def test_another_threads_training_goes_on_meanwhile():
    model = dropping("gpt2")
    model.train()
    inside, over, seen = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert over.wait(60)

    model.transformer.h[0].register_forward_hook(wait)
    session = mnemic.Session(model)
    thread = threading.Thread(target=lambda: seen.append(session.forward(PROMPT).logits))
    thread.start()
    assert inside.wait(60)
    assert all(module.training for module in model.modules())
    outside = [model(PROMPT).logits for _ in range(2)]
    over.set()
    thread.join()
    assert not torch.equal(*outside)
    model.eval()
    assert torch.equal(seen[0], mnemic.Session(model).forward(PROMPT).logits)


# --- no graph from call to call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_call_has_gradients_and_the_session_none(name, batched):
    model = host(name, EMT)
    memory = mnemic.attached(model).memory
    session = mnemic.Session(model)
    session.read(tokens(1, 2 * SEGMENT))
    for _ in range(2):
        text = tokens(1, SEGMENT)
        output = mnemic.batch([session]).forward([text])[0] if batched else session.forward(text)
        output.logits.sum().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in memory.parameters())
        carried = [*session.stream.tensors().values()]
        if name == "llama":
            carried += [tensor for layer in session.cache.layers[:-1] for tensor in (layer.keys, layer.values)]
        assert not any(tensor is not None and tensor.requires_grad for tensor in carried)


# --- notes -----------------------------------------------------------------------------------------------------------


def test_notes_go_where_the_session_goes(tmp_path, file_store):
    model = host("llama", CONFIGS["emt-0"])
    session = mnemic.Session(model)
    session.read(tokens(1, 5))
    session.notes = {"said": ["a", "ü"], "count": 2}
    fork = session.fork()
    fork.notes["said"].append("b")
    assert session.notes == {"said": ["a", "ü"], "count": 2}
    session.save(tmp_path / "a")
    session.save(f"{tmp_path}/b/")
    file_store.put("me", session)
    again = mnemic.Session.load(tmp_path / "a", model), mnemic.Session.load(f"{tmp_path}/b/", model)
    for other in (*again, file_store.get("me", model), mnemic.Session.from_bytes(session.to_bytes(), model)):
        assert other.notes == session.notes
    session.reset()
    assert session.notes == {}


@pytest.mark.parametrize("notes", [{"a": float("nan")}, {"a": {1}}, {1: 2}, ["a"], {"a": (1,)}, {"a": "b" * 2**20}])
def test_notes_that_no_file_could_hold_are_refused(notes, file_store):
    session = mnemic.Session(host("llama", CONFIGS["emt-0"]))
    session.notes = notes
    with pytest.raises(mnemic.StateError, match="notes is"):
        session.to_bytes()
    with pytest.raises(mnemic.StateError, match="notes is"):
        file_store.put("me", session)
    assert file_store.stored("me") is None
