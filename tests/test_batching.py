"""Sessions as one batch: equal to each alone, nothing of one in another, all or none of them moved."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import mnemic
from families import ENCODERS
from helpers import (
    CONFIGS,
    FIRST_FORMS,
    SEGMENT,
    assert_differ,
    assert_near,
    assert_same_stream,
    every_kind,
    host,
    other,
    refusal,
    tokens,
)
from mnemic.batching import Rows
from mnemic.host.release import GENERATE_CACHE as CACHE
from ordered import ordered

SOME = ["gpt2", "llama", "gemma3", "bloom", "opt", "mistral"]
EMT = CONFIGS["emt-0"]
# every mechanism with one family, in a window of one segment or a longer one, and one with others
WIDE = ("compressive", "transformer-xl", "rmt", "persistent", "memoria", "knn")
CASES = [(CONFIGS[f"{kind}-0"], "llama", SEGMENT) for kind in mnemic.CONFIGS if kind not in WIDE]
CASES += [(EMT, name, 3 * SEGMENT) for name in SOME[::2]]
CASES += [(CONFIGS[f"{kind}-0"], "gemma3", 3 * SEGMENT) for kind in WIDE]
over_cases = pytest.mark.parametrize(
    ("config", "name", "window"), CASES, ids=[f"{config.kind}-{name}-{window}" for config, name, window in CASES]
)
ENCODED = [
    (config, name) for kind, config in FIRST_FORMS.items() for name in ENCODERS if refusal(f"{kind}-0", name) is None
]
over_encoders = pytest.mark.parametrize(
    ("config", "name"), ENCODED, ids=[f"{config.kind}-{name}" for config, name in ENCODED]
)


def sessions_of(model, window=None, read=(21, 53, 0)):
    """Sessions at different points of their segments and windows, the last one new."""
    found = [mnemic.Session(model, window=window) for _ in read]
    for seed, (session, length) in enumerate(zip(found, read, strict=True)):
        if length:
            session.read(tokens(1, length, seed))
    return found


def texts_of(lengths, seed=0):
    return [tokens(1, length, 100 + 10 * seed + place) for place, length in enumerate(lengths)]


def written(session):
    """The writes of a session's history."""
    return [(record["number"], record["first"], record["last"]) for record in session.history]


def assert_same_sessions(batch, alone):
    """The same streams, windows and bytes; a table may be as short as what is in it, however it grew."""
    for session, expected in zip(batch, alone, strict=True):
        if expected.stream is None:
            assert session.stream is None
            continue
        assert_same_stream(session.stream, expected.stream)
        assert session.nbytes <= expected.nbytes
        assert written(session) == written(expected)
        if expected.window is not None:
            ours, theirs = session.cache.window, expected.cache.window
            assert (ours.context, ours.running, ours.position) == (theirs.context, theirs.running, theirs.position)
            assert torch.equal(ours.valid, theirs.valid)


@over_cases
def test_a_batch_equals_each_alone(config, name, window):
    model = host(name, config)
    together, alone = sessions_of(model, window), sessions_of(model, window)
    batch = mnemic.batch(together)
    texts = texts_of([30, 3, 17])
    assert batch.read(texts) == [30, 3, 17]
    for session, text in zip(alone, texts, strict=True):
        session.read(text)
    assert_same_sessions(together, alone)
    texts = texts_of([20, 1, 7], 1)
    with torch.no_grad():
        outputs = batch.forward(texts)
        for session, text, output in zip(alone, texts, outputs, strict=True):
            # the writes of Titans are steep, and those of compact solve equations
            steep = config.kind in ("titans", "compact")
            assert_near(output.logits, session.forward(text).logits, 1e-4 if steep else 2e-5)
    assert_same_sessions(together, alone)
    prompts, more = texts_of([11, 2, 5], 2), {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.3}
    answers = batch.generate(prompts, **more)
    for session, prompt, answer in zip(alone, prompts, answers, strict=True):
        assert answer.tolist() == session.generate(prompt, **more).tolist()
    assert_same_sessions(together, alone)


@over_encoders
def test_a_batch_of_encoders_equals_each_alone(config, name):
    model = host(name, config)
    together, alone = sessions_of(model), sessions_of(model)
    texts = texts_of([30, 3, 17])
    assert mnemic.batch(together).read(texts) == [30, 3, 17]
    for session, text in zip(alone, texts, strict=True):
        session.read(text)
    assert_same_sessions(together, alone)
    with torch.no_grad():
        texts = texts_of([SEGMENT, 2, 5], 1)
        outputs = mnemic.batch(together).forward(texts, output_hidden_states=True)
        for session, text, output in zip(alone, texts, outputs, strict=True):
            expected = session.forward(text, output_hidden_states=True)
            assert_near(output.logits, expected.logits, 1e-4)
            for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_near(ours, theirs, 1e-4)
    assert_same_sessions(together, alone)


@torch.no_grad()
def test_hidden_states_and_caches_are_each_sessions_own():
    model = host("llama", EMT)
    together, alone = sessions_of(model, 2 * SEGMENT), sessions_of(model, 2 * SEGMENT)
    texts = texts_of([5, 12, 1])
    for session, lone, text, output in zip(
        together, alone, texts, mnemic.batch(together).forward(texts, output_hidden_states=True), strict=True
    ):
        expected = lone.forward(text, output_hidden_states=True)
        assert type(output) is type(expected)
        assert output[CACHE] is session.cache
        for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_near(ours, theirs, 1e-4)
    assert "hidden_states" not in mnemic.batch(together).forward(texts)[0]


def test_each_answer_ends_by_itself():
    model = host("llama", EMT)
    together, alone = sessions_of(model), sessions_of(model)
    prompts = texts_of([11, 2, 5])
    for more in (
        {"max_length": 12, "min_length": 12},  # so the answers have 1, 10 and 7 tokens
        {"max_new_tokens": 30, "eos_token_id": list(range(2, 30)), "no_repeat_ngram_size": 2},
    ):
        answers = mnemic.batch(together).generate(prompts, do_sample=False, **more)
        expected = [lone.generate(prompt, do_sample=False, **more) for lone, prompt in zip(alone, prompts, strict=True)]
        assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in expected]
        assert len({answer.shape[1] for answer in answers}) > 1
        assert_same_sessions(together, alone)


def test_a_batch_of_one_samples_as_it_would_alone():
    model = host("llama", EMT)
    one, two = sessions_of(model, read=(21, 21))
    two.reset()
    two.read(tokens(1, 21))
    more = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    torch.manual_seed(5)
    (answer,) = mnemic.batch([one]).generate([tokens(1, 5, 3)], **more)
    torch.manual_seed(5)
    assert answer.tolist() == two.generate(tokens(1, 5, 3), **more).tolist()
    assert_same_sessions([one], [two])


def test_text_is_answered_with_text():
    class Letters:
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

        def decode(self, ids, skip_special_tokens=True):
            return " ".join(str(int(token)) for token in ids)

    model = host("llama", EMT)
    together, alone = ([mnemic.Session(model, Letters()) for _ in range(2)] for _ in range(2))
    more = {"max_new_tokens": 6, "do_sample": False}
    answers = mnemic.batch(together).generate(["what?", "and who else?"], **more)
    assert answers == [alone[0].generate("what?", **more), alone[1].generate("and who else?", **more)]


@torch.no_grad()
def test_nothing_of_one_session_is_kept_by_another():
    # of a row that was cut out of a batch, no storage may hold more than the row itself
    model = host("llama", CONFIGS["memoria-0"])
    together = sessions_of(model, 3 * SEGMENT)
    mnemic.batch(together).read(texts_of([20, 50, 3]))
    for session in together:
        tensors, _ = session.contents()
        assert len(tensors) > 8
        for name, tensor in tensors.items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@torch.no_grad()
def test_a_disabled_memory_moves_windows_alone():
    model = host("llama", EMT)
    together = sessions_of(model, 2 * SEGMENT)
    streams = [session.stream for session in together]
    with mnemic.attached(model).disabled():
        mnemic.batch(together).read(texts_of([5, 20, 3]))
    for session, stream in zip(together, streams, strict=True):
        if stream is None:
            assert session.stream is None
        else:
            assert_same_stream(session.stream, stream, 0.0)
    assert [session.cache.window.running for session in together] == [(2,), (1,), (3,)]


@pytest.mark.parametrize("use", ["read", "forward", "generate"])
@pytest.mark.parametrize("name", ["llama", "bert"])
@torch.no_grad()
def test_all_sessions_move_or_none(name, use, monkeypatch):
    if (name, use) == ("bert", "generate"):
        use = "read"
    model = host(name, EMT)
    together = sessions_of(model)
    before = [(session.stream, session.nbytes, session.fork()) for session in together]
    texts = texts_of([5, 8, 3])
    monkeypatch.setattr("mnemic.session.check_known", lambda *_: None)  # fails on the way, not before
    texts[1][0, 6] = 10_000  # no such token
    with pytest.raises(IndexError):
        getattr(mnemic.batch(together), use)(texts)
    for session, (stream, nbytes, fork) in zip(together, before, strict=True):
        assert session.stream is stream
        assert session.nbytes == nbytes
        question = tokens(1, 5)
        assert torch.equal(session.forward(question).logits, fork.forward(question).logits)


def test_an_interrupted_batch_leaves_all_as_they_were():
    model = host("llama", EMT)
    together = sessions_of(model)
    before = [session.stream for session in together]
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mnemic.batch(together).generate(texts_of([5, 8, 3]), max_new_tokens=9, min_new_tokens=9)
    handle.remove()
    assert all(session.stream is stream for session, stream in zip(together, before, strict=True))


def test_what_is_no_batch_is_refused():
    model = host("llama", EMT)
    one, two = mnemic.Session(model), mnemic.Session(model)
    with pytest.raises(ValueError, match="a batch of no sessions"):
        mnemic.batch([])
    with pytest.raises(ValueError, match=r"session 2 is in the batch twice; use session\.fork\(\)"):
        mnemic.batch([one, two, one])
    with pytest.raises(ValueError, match=r"session 1 is of another model \(LlamaForCausalLM\)"):
        mnemic.batch([one, mnemic.Session(host("llama", EMT))])
    with pytest.raises(ValueError, match="session 1 has a window of 16 tokens, session 0 one of 256"):
        mnemic.batch([one, mnemic.Session(model, window=16)])
    batch = mnemic.batch([one, two])
    with pytest.raises(ValueError, match=r"1 text\(s\) for 2 session\(s\)"):
        batch.read([tokens(1, 3)])
    with pytest.raises(ValueError, match=r"one text for 2 session\(s\); pass a list"):
        batch.read("ab")
    with pytest.raises(ValueError, match=r"beam search with 3 sequence\(s\) does not choose one token after another"):
        batch.generate([tokens(1, 3)] * 2, num_beams=3)
    with pytest.raises(ValueError, match="is an encoder and has no cache"):
        mnemic.batch([mnemic.Session(host("bert", EMT))]).generate([tokens(1, 3)])


# --- isolation -------------------------------------------------------------------------------------------------------

NARROW = {"n_embd": 16, "n_head": 2}  # sums in order are slow
FEW = settings(
    max_examples=1,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to look for a smaller example takes minutes
    suppress_health_check=list(HealthCheck),
)
STEP = st.tuples(
    st.sampled_from(["read", "forward", "forward", "generate", "restart"]),
    st.sets(st.integers(0, 2), min_size=1).map(sorted),
    st.lists(st.integers(1, 20), min_size=3, max_size=3),
)
PLAN = st.lists(STEP, min_size=3, max_size=6)
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def restarted(sessions, model, folder):
    """The same sessions from files, of a model that is another object."""
    for place, session in enumerate(sessions):
        session.save(folder / f"{place}.memory")
    return [mnemic.Session.load(folder / f"{place}.memory", model) for place in range(len(sessions))]


@every_kind
@FEW
@given(plan=PLAN, window=st.sampled_from([SEGMENT, 2 * SEGMENT]))
@torch.no_grad()
def test_any_interleaving_is_bit_equal_to_each_alone(config, plan, window, tmp_path_factory):
    """Under arithmetic that sums in order; libraries' own products differ in their last bits with the batch's shape."""
    models = [host("gpt2", config, **NARROW) for _ in range(2)]
    together, alone = ([mnemic.Session(models[0], window=window) for _ in range(3)] for _ in range(2))
    with ordered():
        for number, (use, members, lengths) in enumerate(plan):
            if use == "restart":
                models.reverse()
                together = restarted(together, models[0], tmp_path_factory.mktemp("restart"))
                continue
            texts = [tokens(1, lengths[place], 10 * number + place) for place in members]
            more = GREEDY if use == "generate" else {}
            found = getattr(mnemic.batch([together[place] for place in members]), use)(texts, **more)
            for place, text, result in zip(members, texts, found, strict=True):
                expected = getattr(alone[place], use)(text, **more)
                if use == "forward":
                    assert torch.equal(result.logits, expected.logits)
                elif use == "generate":
                    assert result.tolist() == expected.tolist()
        question = tokens(1, 11, 99)
        for session, lone in zip(together, alone, strict=True):
            if lone.stream is not None:
                assert_same_stream(session.stream, lone.stream, 0.0)
            assert torch.equal(session.forward(question).logits, lone.forward(question).logits)


@every_kind
@FEW
@given(plan=PLAN)
@torch.no_grad()
def test_nothing_leaks_from_one_session_into_another(config, plan):
    """In the usual arithmetic: what the others are told changes no bit of what session 0 puts out."""
    model = host("llama", config)
    worlds = [[mnemic.Session(model, window=2 * SEGMENT) for _ in range(3)] for _ in range(2)]
    for number, (_, members, lengths) in enumerate(plan):
        members = sorted({0, *members})
        texts = [tokens(1, lengths[place], 10 * number + place) for place in members]
        mine, changed = (
            mnemic.batch([sessions[place] for place in members]).forward(told)[0].logits
            for sessions, told in zip(worlds, (texts, [texts[0], *map(other, texts[1:])]), strict=True)
        )
        assert torch.equal(mine, changed)
    assert_same_stream(worlds[0][0].stream, worlds[1][0].stream, 0.0)


@torch.no_grad()
def test_the_others_were_told_something_else():
    # without this the test above could not fail
    model = host("llama", EMT)
    batch = mnemic.batch([mnemic.Session(model) for _ in range(2)])
    first, second = batch.forward([tokens(1, 5), tokens(1, 5)])
    assert_near(first.logits, second.logits, 1e-5)
    first, second = batch.forward([tokens(1, 5), other(tokens(1, 5))])
    assert_differ(first.logits, second.logits)


# --- joining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["recall", "memoria"])
def test_rows_that_join_and_leave_between_tokens_equal_each_alone(kind):
    """Bit by bit where sums are taken in order: a row knows nothing of when others came and went."""
    config = FIRST_FORMS[kind]
    model = host("llama", config)
    window = config.window or 2 * SEGMENT
    together, alone = sessions_of(model, window, (5, 19, 3)), sessions_of(model, window, (5, 19, 3))
    said = [tokens(1, 12, seed) for seed in (7, 8, 9)]
    with ordered(), torch.no_grad():
        rows, heard = Rows(together[:1]), [[], [], []]

        def step(*sessions):
            parts = [[said[each][:, len(heard[each]) : len(heard[each]) + 1]] for each in sessions]
            logits = rows.call(model, parts)[0].logits[:, -1]
            for row, each in enumerate(sessions):
                heard[each].append(logits[row])

        for _ in range(3):
            step(0)
        rows.join(Rows(together[1:2]))
        for _ in range(4):
            step(0, 1)
        rows.part_with([0])
        rows.join(Rows(together[2:]))
        for _ in range(5):
            step(1, 2)
        rows.give_back()
        for session, ids, found in zip(alone, said, heard, strict=True):
            expected = [session.forward(ids[:, at : at + 1]).logits[0, -1] for at in range(len(found))]
            assert torch.equal(torch.stack(found), torch.stack(expected))
        assert [len(found) for found in heard] == [7, 9, 5]
    assert_same_sessions(together, alone)
