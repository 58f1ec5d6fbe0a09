"""Every way of using a memory in float32, bfloat16 and float16, and sessions that go on in another of them."""

from __future__ import annotations

import copy

import pytest
import torch
from typer.testing import CliRunner

import mnemic
from families import make
from helpers import CONFIGS, INSIDE, SEGMENT, assert_near, every_kind, every_trained_kind, shake, tokens
from mnemic.cli import app
from mnemic.state import StateError
from runs import arguments
from test_chat import TEMPLATE, tokenizer_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def base(dtype):
    return make("llama").to(dtype)


@every_dtype
@every_kind
def test_a_memory_is_used(config, dtype, tmp_path):
    """Attached, saved, loaded; its sessions read, written, shown, kept in a file and a store, and run as a batch."""
    model = base(dtype)
    with torch.no_grad():
        expected = model(tokens(1, SEGMENT)).logits
    attachment = mnemic.attach(model, config)
    if not attachment.memory.beside:
        with torch.no_grad():
            assert torch.equal(model(tokens(1, SEGMENT)).logits, expected)
    shake(attachment.memory)
    attachment.save_pretrained(tmp_path / "memory")
    again = base(dtype)
    mnemic.from_pretrained(again, tmp_path / "memory")

    session = mnemic.Session(model, keep_text=True)
    session.read(tokens(1, 3 * SEGMENT + 3))
    assert session.generate(tokens(1, 4), max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 5)
    session.save(tmp_path / "one.memory")
    with mnemic.SessionStore(f"sqlite:///{tmp_path}/s.db") as store:
        store.put("one", session)
        kept = [mnemic.Session.load(tmp_path / "one.memory", again), store.get("one", again)]
    assert "36 tokens" in str(mnemic.show(session))
    assert config.card.title in mnemic.show(kept[0]).html
    seen = CliRunner().invoke(app, ["inspect", str(tmp_path / "one.memory")])
    assert seen.exit_code == 0, seen.output

    with torch.no_grad():
        expected = session.forward(tokens(1, SEGMENT)).logits
        assert expected.dtype == dtype
        assert torch.isfinite(expected).all()
        assert all(torch.equal(other.forward(tokens(1, SEGMENT)).logits, expected) for other in kept)

    one, two = kept[0], mnemic.Session(again)
    mnemic.batch([one, two]).read([tokens(1, 11), tokens(1, 5)])
    answers = mnemic.batch([one, two]).generate([tokens(1, 3)] * 2, max_new_tokens=3, do_sample=False)
    assert [stream.stream.seen[0] for stream in (one, two)] == [
        36 + SEGMENT + 11 + 3 + answers[0].shape[1],
        5 + 3 + answers[1].shape[1],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_trained_kind
def test_a_memory_is_trained(config, dtype, tmp_path):
    """By `mnemic.train` and by the Trainer, on a base in half precision (the other tests do it in float32)."""
    ids = tokens(2, 3 * SEGMENT)
    for way in ("train", "Trainer"):
        model = base(dtype)
        torch.manual_seed(0)
        attachment = mnemic.attach(model, config)
        before = copy.deepcopy(attachment.memory.state_dict())
        if way == "train":
            losses = [step.loss for step in mnemic.train(model, lambda _: mnemic.Batch(ids, ids), steps=2)]
        else:
            trainer = mnemic.Trainer(model, arguments(tmp_path), train_dataset=[{"input_ids": row} for row in ids])
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 2
        assert torch.isfinite(torch.tensor(losses)).all()
        after = attachment.memory.state_dict()
        assert all(torch.isfinite(weight).all() for weight in after.values() if weight.is_floating_point())
        assert any(not torch.equal(after[name], weight) for name, weight in before.items())


@every_dtype
def test_a_chat(dtype, tmp_path):
    model = make("llama", vocab_size=101).to(dtype)
    model.save_pretrained(tmp_path / "model")
    tokenizer_of(TEMPLATE).save_pretrained(tmp_path / "model")
    arguments = ["chat", str(tmp_path / "model"), "--store", f"sqlite:///{tmp_path}/m.db", "--max-new-tokens", "8"]
    for seen in ("is new", "goes on after"):
        told = CliRunner().invoke(app, arguments, input="hello\n/memory\n/cost\n/exit\n")
        assert told.exit_code == 0, told.output
        assert seen in told.output
        assert "could not answer" not in told.output


@pytest.mark.parametrize(
    ("config", "saved", "loaded"),
    [
        *((CONFIGS[f"{kind}-0"], "float32", "bfloat16") for kind in mnemic.CONFIGS),
        (CONFIGS["emt-0"], "bfloat16", "float32"),
        (CONFIGS["emt-0"], "float16", "float32"),
    ],
    ids=[*(f"{kind}-float32-bfloat16" for kind in mnemic.CONFIGS), "emt-bfloat16-float32", "emt-float16-float32"],
)
@torch.no_grad()
def test_a_session_goes_on_in_another_dtype(config, saved, loaded, tmp_path):
    """Of a base whose weights are the same in both."""
    model = base(DTYPES["float16"] if saved == "float16" else torch.bfloat16).to(DTYPES[saved])
    other = copy.deepcopy(model).to(DTYPES[loaded])
    if f"{config.kind}-0" in INSIDE:
        all_of_it = {"keys": 64} if config.kind == "compact" else {"budget": 64}
        config = config.replace(**all_of_it)  # what rounding chooses among random keys tells nothing
    attachment = mnemic.attach(model, config)
    shake(attachment.memory)
    attachment.save_pretrained(tmp_path / "memory")
    mnemic.from_pretrained(other, tmp_path / "memory")

    session = mnemic.Session(model)
    session.read(tokens(1, 3 * SEGMENT + 3))
    session.save(tmp_path / "one.memory")
    there = mnemic.Session.load(tmp_path / "one.memory", other)
    expected, found = (each.forward(tokens(1, 2 * SEGMENT)).logits.float() for each in (session, there))
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    # it is a session of that base from here on
    assert there.generate(tokens(1, 4), max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 5)
    there.save(tmp_path / "two.memory")
    again = mnemic.Session.load(tmp_path / "two.memory", other)
    both = mnemic.Session(other)
    mnemic.batch([there, both]).read([tokens(1, 5), tokens(1, 5)])
    again.read(tokens(1, 5))
    assert_near(*(each.forward(tokens(1, 3)).logits.float() for each in (there, again)), 5e-2)


def test_float16_makes_another_base_of_wider_weights(tmp_path):
    config = CONFIGS["emt-0"]
    torch.manual_seed(0)
    wide = make("llama")
    mnemic.attach(wide, config).save_pretrained(tmp_path / "memory")
    session = mnemic.Session(wide)
    session.read(tokens(1, 20))
    session.save(tmp_path / "one.memory")
    narrow = make("llama").half()
    with pytest.raises(StateError, match="was written for base model"):
        mnemic.from_pretrained(narrow, tmp_path / "memory")
    mnemic.from_pretrained(narrow, tmp_path / "memory", strict=False)
    with pytest.raises(StateError, match="was written for base model"):
        mnemic.Session.load(tmp_path / "one.memory", narrow)
    there = mnemic.Session.load(tmp_path / "one.memory", narrow, strict=False)
    assert there.read(tokens(1, 20)) == 20
