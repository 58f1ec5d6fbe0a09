"""Sessions whose files hold the window as token ids, which are read again when the session is loaded."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_differ,
    assert_equal_stream,
    assert_near,
    every_kind,
    first_forms,
    host,
    tokens,
)
from mnemic.state import from_bytes, to_bytes

WINDOW = 3 * SEGMENT


def session_of(model, length=45, **options):
    """Past its window, in the middle of a segment."""
    session = mnemic.Session(model, window=WINDOW, keep_text=True, keep_keys=False, **options)
    session.read(tokens(1, length))
    return session


def keys_in(data):
    return [name for name in from_bytes(data)[0] if name.startswith("keys.")]


def again(session, data=None):
    return mnemic.Session.from_bytes(session.to_bytes() if data is None else data, session.model)


@first_forms(["gpt2", "llama", "gemma3", "bloom", "mistral"])
@pytest.mark.parametrize("slid", [False, True])
@torch.no_grad()
def test_it_goes_on_where_it_stood(config, name, slid):
    """As if it had been there, with an untrained memory, until something has left the window."""
    model = make(name)
    attachment = mnemic.attach(model, config)
    session = session_of(model, 45 if slid else WINDOW - 3)
    loaded = again(session)
    assert_equal_stream(loaded.stream, session.stream)
    assert (loaded.keep_keys, loaded.history) == (False, session.history)
    here, there = session.cache.window, loaded.cache.window
    assert (here.context, here.running, here.position) == (there.context, there.running, there.position)
    ids = tokens(1, 2 * SEGMENT, 7)
    expected, found = session.forward(ids).logits, loaded.forward(ids).logits
    if attachment.memory.beside:  # memory tokens have keys, which no text makes
        assert keys_in(session.to_bytes())
        assert torch.equal(found, expected)
        return
    assert not keys_in(loaded.to_bytes())
    assert torch.isfinite(found).all()
    if not slid:
        assert_near(found, expected, 1e-4)
    else:
        assert_differ(found, expected)
    assert loaded.stream.seen == session.stream.seen


@every_kind
@torch.no_grad()
def test_a_trained_memory_keeps_its_state_and_adds_none(config, tmp_path):
    model = host("llama", config)
    session = session_of(model)
    with mnemic.SessionStore(tmp_path / "s.db") as store:
        store.put("one", session)
        loaded = store.get("one", model)
        assert_equal_stream(loaded.stream, session.stream)
        store.put("one", loaded)
        assert_equal_stream(store.get("one", model).stream, session.stream)
    assert torch.isfinite(loaded.forward(tokens(1, 5, 3)).logits).all()
    assert loaded.fork().keep_keys is False


def test_the_file_is_smaller_by_its_keys():
    model = host("llama", CONFIGS["emt-0"])
    session = session_of(model)
    keys = sum(t.nbytes for layer in session.cache.layers[:-1] for t in (layer.keys, layer.values))
    small = len(session.to_bytes())
    session.keep_keys = True
    assert len(session.to_bytes()) - small > 0.9 * keys


def test_it_needs_the_text():
    with pytest.raises(
        ValueError, match="keep_keys is False, and keys are made again from the text; pass keep_text=Tr"
    ):
        mnemic.Session(host("llama", CONFIGS["emt-0"]), keep_keys=False)


@torch.no_grad()
def test_a_window_that_the_text_does_not_have_is_kept_as_keys():
    model = host("llama", CONFIGS["emt-0"])
    disabled, embedded = session_of(model, 20), session_of(model, 20)
    with mnemic.attached(model).disabled():
        disabled.read(tokens(1, 5, 2))
    words = model.get_input_embeddings()(tokens(1, 5, 2))
    embedded.model(inputs_embeds=words, past_key_values=embedded.cache)
    for session in (disabled, embedded):
        assert keys_in(session.to_bytes())
        loaded = again(session)
        later = again(again(loaded))  # whoever keeps it again keeps the keys again
        assert keys_in(later.to_bytes())
        for each in (loaded, later):
            assert torch.equal(each.forward(tokens(1, 3, 4)).logits, session.fork().forward(tokens(1, 3, 4)).logits)
    disabled.reset()
    disabled.read(tokens(1, 20))
    assert not keys_in(disabled.to_bytes())
    later = again(disabled)
    later.read(tokens(1, 7, 5))
    assert not keys_in(later.to_bytes())


@torch.no_grad()
def test_what_cannot_be_read_again_is_refused():
    model = host("llama", CONFIGS["emt-0"])
    session = session_of(model)
    good = session.to_bytes()

    def changed(change):
        tensors, meta = from_bytes(good)
        change(tensors, meta)
        return to_bytes(tensors, meta)

    wrong = {
        "neither the .* keys of its window nor the text": lambda t, _: t["history.text"][-3:].fill_(-1),
        "token 5000 is in its window, and the model knows": lambda t, _: t["history.text"][-3:].fill_(5000),
        "has a description of the wrong kind: keep_keys": lambda _, m: m.update(keep_text=False),
        "cannot hold": lambda _, m: m.update(window=SEGMENT, sinks=0),
    }
    for match, change in wrong.items():
        with pytest.raises(mnemic.StateError, match=match):
            again(session, changed(change))
    no_text = changed(lambda t, _: t.pop("history.text"))
    with pytest.raises(mnemic.StateError):
        again(session, no_text)
    assert_equal_stream(again(session, good).stream, session.stream)
