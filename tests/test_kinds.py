"""Instances of kinds of faults that were found by looking for them, each with the right value."""

from __future__ import annotations

import json

import pytest
import torch

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, host, tokens
from mnemic.bench.drift import TextRun
from mnemic.bench.lessons import SETTINGS_FILE, LessonRun
from mnemic.bench.results import Record, Score, digest, problems
from mnemic.state import from_bytes, to_bytes

EMT = CONFIGS["emt-0"]
SAMPLED = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 12, "pad_token_id": 0}


def test_a_session_reads_no_padding_of_a_row_that_ended_before_the_others():
    model, ids = host("llama", EMT), tokens(1, 11)
    torch.manual_seed(0)
    first, *others = mnemic.Session(model).generate(ids, eos_token_id=None, **SAMPLED).tolist()
    end = next(token for token in first[:6] if not any(token in row for row in others))
    torch.manual_seed(0)
    session = mnemic.Session(model, keep_text=True)
    rows = session.generate(ids, eos_token_id=end, **SAMPLED)
    length = rows[0].tolist().index(end) + 1
    assert length < rows.shape[1], "it did not end before the others"
    assert session.stream.seen == (11 + length,)
    assert session.stream.logs[0].ids[11:] == rows[0, :length].tolist()


def test_a_prompt_may_hold_the_padding_token():
    model, ids = host("llama", EMT), tokens(1, 11)
    ids[0, 4] = 0
    session = mnemic.Session(model)
    session.generate(ids, num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert session.stream.seen == (15,)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_call_that_somebody_else_s_hook_interrupts_leaves_nothing(when):
    model, armed = make("llama"), [False]

    def interrupt(*_):
        if armed[0]:
            raise KeyboardInterrupt

    if when == "before":  # it runs before the memory's own, which torch then does not call
        model.model.register_forward_hook(interrupt)
    attachment = mnemic.attach(model, EMT)
    if when == "after":
        model.model.register_forward_pre_hook(interrupt)
    session = mnemic.Session(model)
    session.read(tokens(1, 13))
    expected = session.fork().forward(tokens(1, 5, 1)).logits
    for _ in range(2):
        armed[0] = True
        with pytest.raises(KeyboardInterrupt):
            session.read(tokens(1, 5, 2))
        armed[0] = False
        assert len(attachment.router.calls) <= 1
    assert torch.equal(session.forward(tokens(1, 5, 1)).logits, expected)
    assert attachment.router.calls == []


@pytest.mark.parametrize("label", ["rmt-0", "transformer-xl-0", "emt-0", "compressive-0"])
@torch.no_grad()
def test_a_model_may_change_its_dtype_while_a_memory_is_attached(label):
    model = host("llama", CONFIGS[label])
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        session = mnemic.Session(model)
        session.read(tokens(1, 2 * SEGMENT + 3))
        session.generate(tokens(1, 4), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        session.flush()
        assert session.forward(tokens(1, 3)).logits.dtype == dtype


def test_bytes_without_what_their_description_tells_of_are_not_put(tmp_path):
    session = mnemic.Session(host("llama", EMT), window=2 * SEGMENT)
    session.read(tokens(1, 21))
    good = session.to_bytes()
    with mnemic.SessionStore(tmp_path / "s.db") as store:
        store.put_bytes("one", good)
        for lost in (("waiting",), ("window.valid",), ("keys.", "values.")):
            tensors, meta = from_bytes(good)
            left = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
            with pytest.raises(mnemic.StateError, match="it lacks"):
                store.put_bytes("one", to_bytes(left, meta), overwrite=True)
        assert store.get_bytes("one")[0] == good


def test_a_run_s_settings_may_lack_what_came_later(tmp_path):
    run = TextRun("model", EMT)
    described = run.described()
    path = tmp_path / "run.json"
    known = json.loads(json.dumps(described))
    del known["memory"]["zero_shot"], known["bf16"]
    path.write_text(json.dumps(known))
    run._check(path, described)
    path.write_text(json.dumps({**known, "steps": 7}))
    with pytest.raises(ValueError, match="was begun with steps 7, not 1000"):
        run._check(path, described)


def test_lessons_may_lack_what_came_later_too(tmp_path):
    run = LessonRun("model", EMT, [])
    known = json.loads(json.dumps(run.described()))
    del known["memory"]["usage_weight"], known["bf16"]
    path = tmp_path / SETTINGS_FILE
    path.write_text(json.dumps(known))
    run._check(tmp_path)
    path.write_text(json.dumps({**known, "pool": 7}))
    with pytest.raises(ValueError, match="was begun with pool 7, not 2048"):
        run._check(tmp_path)


def test_detaching_lets_resized_embeddings_train():
    model = make("llama")
    attachment = mnemic.attach(model, EMT)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    attachment.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_encoder_s_session_has_no_window():
    with pytest.raises(ValueError, match=r"window is 64, but .* is an encoder and keeps no keys; leave it out"):
        mnemic.Session(host("bert", EMT), window=64)


def test_a_control_that_was_taken_out_of_a_result_is_told(tmp_path):
    score = Score(4, 64, 4, 0.75, {"zeroed": 0.25}, {}, None, {}, {"memory": "1101", "zeroed": "1000"})
    path = Record("a", "emt", "tiny", 0, {}, [score]).save(tmp_path)
    values = json.loads(path.read_text())
    del values["scores"][0]["controls"]["zeroed"]
    values["digest"] = digest(values)
    path.write_text(json.dumps(values))
    assert problems(path) == ["zeroed at 4 has outcomes and no score"]


@pytest.mark.parametrize("token", [-1, 5000])
def test_a_session_says_which_token_the_model_does_not_know(token):
    model = host("llama", EMT)
    known = model.get_input_embeddings().num_embeddings
    session = mnemic.Session(model)
    for use in (session.read, session.forward, session.generate):
        with pytest.raises(ValueError, match=rf"token {token} is none of the model's, which are 0 \.\. {known - 1}"):
            use([3, token, 4])
    assert session.is_new


def test_data_that_is_none_is_named():
    with pytest.raises(ValueError, match="a document is a text or a list of token ids, this is 'None'"):
        mnemic.Streams([None], 8, 2)
    with pytest.raises(ValueError, match=r"row 0 has no input_ids, it has \['text'\]; tokenize the texts first"):
        mnemic.collate([{"text": "a"}], 8)


def test_nothing_shows_itself_as_tensors_or_an_address():
    model = make("llama")
    attachment = mnemic.attach(model, EMT)
    session = mnemic.Session(model)
    assert repr(mnemic.batch([session])) == "<mnemic.SessionBatch of 1 sessions of LlamaForCausalLM>"
    assert repr(mnemic.Batch(tokens(2, 16), tokens(2, 16))) == "Batch(2 streams of 16 tokens)"
    attachment.detach()
    assert "has no memory any more" in repr(session)
