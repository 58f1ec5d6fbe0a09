"""The output distribution as a site, with a memory of which it is known what it adds: how often it read each token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import mnemic
from families import COMMON, GROUPED, VOCABULARY, WIDTH, make
from helpers import SEGMENT, assert_near, feed, stream, tokens
from mnemic import Site
from mnemic.host.call import thread
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.knn_lm import KNNLMConfig
from mnemic.memory import Memory
from mnemic.state import StateError, read_file, write_file

CONFIG = KNNLMConfig(segment_length=SEGMENT)


class Counts(Memory):
    """Adds to a token's logit how often it was read in whole segments. It keeps what it was written with."""

    takes_ids = True

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.reads = self.writes = (Site(depth - 1, "logits"),)
        self.fails = False

    def init_state(self, batch, device=None):
        return {"counts": torch.zeros(batch, VOCABULARY), "sum": torch.zeros(batch, WIDTH)}

    def read(self, site, hidden_btd, state):
        raise AssertionError("hidden states are not read at the head")

    def mix(self, site, logits_btv, hidden_btd, state):
        if self.fails:
            raise RuntimeError("no")
        assert hidden_btd.shape[:2] == logits_btv.shape[:2]
        return logits_btv + state["counts"][:, None].to(logits_btv)

    def write(self, hidden_btd, state, keep_bt=None, ids_bt=None):
        keep = torch.ones_like(ids_bt) if keep_bt is None else keep_bt
        counts = state["counts"] + (F.one_hot(ids_bt, VOCABULARY) * keep[..., None]).sum(1)
        return {"counts": counts, "sum": state["sum"] + (hidden_btd * keep[..., None]).sum(1)}

    def write_and_tell(self, hidden_btd, state, keep_bt=None, ids_bt=None):
        return self.write(hidden_btd, state, keep_bt, ids_bt), None

    def naive(self, hidden_btd, state, keep_bt=None, ids_bt=None):
        return hidden_btd, self.write(hidden_btd, state, keep_bt, ids_bt)


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(KNNLMConfig, "build", lambda self, width, depth, causal=True: Counts(depth))


def attached(name="llama", **changes):
    model = make(name, **changes)
    return model, mnemic.attach(model, CONFIG)


def added(ids, keep=None):
    """What each token `[b, t, v]` gets: the counts of the whole segments before its own."""
    keep = torch.ones_like(ids) if keep is None else keep
    said = F.one_hot(ids, VOCABULARY) * keep[..., None]
    place = (keep.cumsum(1) - 1).clamp_min(0) // SEGMENT
    before = place[:, None, :] < place[:, :, None]
    return torch.einsum("bts,bsv->btv", (before & (keep[:, None] > 0)).float(), said.float())


def alone(attachment, run):
    with attachment.disabled():
        return run()


@torch.no_grad()
@pytest.mark.parametrize("window", [None, SEGMENT, 2 * SEGMENT])
def test_each_token_reads_what_stood_when_its_segment_began(window):
    # over a call of one pass, over one of a pass for each segment, and over calls that are cut anywhere
    (model, attachment), ids = attached(), tokens(2, 29)

    def run(lengths=None):
        carried = mnemic.memory_cache(model, window) if window else None
        return feed(model, ids, lengths, carried=carried)

    expected = alone(attachment, run) + added(ids)
    assert_near(run(), expected, 1e-5)
    assert_near(run([3, 1, 4, 11, 10]), expected)
    assert torch.equal(alone(attachment, run), alone(attachment, run))


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 5, 29, 0, torch.tensor([2, 9, 20]), torch.tensor([20, 2, 9, 28])])
def test_logits_of_some_tokens(kept):
    (model, attachment), ids = attached(), tokens(2, 29)

    def run():
        return model(ids, logits_to_keep=kept).logits

    every = added(ids)
    expected = every[:, kept] if isinstance(kept, torch.Tensor) else every[:, -kept:]
    assert_near(run(), alone(attachment, run) + expected, 1e-5)


@torch.no_grad()
def test_rows_of_unequal_length_and_packed_documents():
    (model, attachment), ids = attached(), tokens(2, 29)
    keep = torch.ones(2, 29, dtype=torch.long)
    keep[0, :6] = 0

    def padded():
        return feed(model, ids, mask=keep)[keep.bool()]

    assert_near(padded(), alone(attachment, padded) + added(ids, keep)[keep.bool()], 1e-5)
    positions = torch.cat([torch.arange(11), torch.arange(18)])[None].expand(2, -1)

    def packed():
        return model(ids, position_ids=positions, use_cache=False).logits

    expected = torch.cat([added(ids[:, :11]), added(ids[:, 11:])], 1)
    assert_near(packed(), alone(attachment, packed) + expected, 1e-5)


@torch.no_grad()
def test_the_loss_is_that_of_what_comes_out():
    (model, attachment), ids = attached(), tokens(2, 29)
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_near(output.loss, expected, 1e-6)
    assert abs(output.loss - alone(attachment, lambda: model(ids, labels=ids).loss)) > 1e-2
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert_near(as_tuple[0], expected, 1e-6)
    assert torch.equal(as_tuple[1], output.logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [("cohere", {"logit_scale": 0.3}, 0.3), ("granite", {"logits_scaling": 7.0}, 1 / 7), ("granite", {}, 1.0)],
)
def test_a_scale_behind_the_head(name, changes, scale):
    (model, attachment), ids = attached(name, **changes), tokens(2, 29)
    assert attachment.router.logits_scale == pytest.approx(scale, rel=1e-6)

    def run():
        return model(ids).logits

    expected = alone(attachment, run)
    assert_near(run(), expected + added(ids), 1e-5)
    assert torch.equal(run()[:, :SEGMENT], expected[:, :SEGMENT])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("gemma2"), "Gemma2ForCausalLM bends the logits .* softcap.*final_logit_softcapping=None"),
        (lambda: make("bert"), "BertForMaskedLM is an encoder, and Counts is about the next token's distribution"),
        (lambda: make("llama").model, "LlamaModel has no head .* at which Counts reads; .*AutoModelForCausalLM"),
        (
            lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**COMMON, **GROUPED)),
            "LlamaForSequenceClassification has no head",
        ),
        (
            lambda: make("opt", word_embed_proj_dim=32),
            "the head of OPTForCausalLM takes 32 values of a token, its blocks have 64",
        ),
    ],
)
def test_a_model_without_such_a_head_is_refused(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        mnemic.attach(model, CONFIG)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    assert not mnemic.attachment.is_attached(model)


@torch.no_grad()
def test_gemma_without_its_cap_is_served():
    (model, attachment), ids = attached("gemma2", final_logit_softcapping=None), tokens(2, 20)
    assert_near(model(ids).logits, alone(attachment, lambda: model(ids).logits) + added(ids), 1e-5)


@torch.no_grad()
def test_the_trunk_and_the_head_by_themselves():
    (model, _), ids = attached(), tokens(2, 29)
    hidden = model.model(ids).last_hidden_state
    plain = make("llama")
    assert torch.equal(model.lm_head(hidden), plain(ids).logits)
    assert not any(thread.ahead.values())


@torch.no_grad()
def test_embeddings_without_ids_are_refused():
    (model, attachment), ids = attached(), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"Counts has to know which tokens it reads, .* call with input_ids"):
        model(inputs_embeds=embeddings)
    assert torch.equal(alone(attachment, lambda: model(inputs_embeds=embeddings)).logits, make("llama")(ids).logits)


@torch.no_grad()
def test_an_error_at_the_head_takes_the_call_back():
    (model, attachment), ids = attached(), tokens(2, 20)
    for cache in (hf.DynamicCache(config=model.config), mnemic.memory_cache(model, 2 * SEGMENT)):
        model(ids, **{CACHE: cache})
        before, length = stream(cache), cache.get_seq_length()
        attachment.memory.fails = True
        with pytest.raises(RuntimeError, match="no"):
            model(ids, **{CACHE: cache})
        attachment.memory.fails = False
        assert stream(cache) is before
        assert cache.get_seq_length() == length
    assert not any(thread.ahead.values())


class Fused(hf.LlamaForCausalLM):
    """Computes its loss of labels without logits, as fused losses do."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        if labels is None:
            return super().forward(input_ids, logits_to_keep=logits_to_keep, **kwargs)
        return self.model(input_ids, **kwargs).last_hidden_state.sum()


@torch.no_grad()
def test_a_loss_without_a_head_is_refused():
    model, ids = Fused(hf.LlamaConfig(**COMMON, **GROUPED)).eval(), tokens(1, 20)
    mnemic.attach(model, CONFIG)
    cache = hf.DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"Fused ran without calling its head, where Counts reads; .*fused losses"):
        model(ids, labels=ids, **{CACHE: cache})
    assert model(ids, **{CACHE: cache}).logits.shape == (1, 20, VOCABULARY)
    assert stream(cache).seen == (20,)


@torch.no_grad()
def test_what_is_written_is_what_enters_the_head():
    (model, attachment), ids = attached(), tokens(2, 2 * SEGMENT)
    hidden = alone(attachment, lambda: model.model(ids).last_hidden_state)
    whole, read = feed_state(model, ids), mnemic.read_segments(model, ids)
    assert_near(whole["sum"], hidden.sum(1), 1e-5)
    assert_near(read.state["counts"], F.one_hot(ids, VOCABULARY).sum(1).float())
    unrolled = [mnemic.unroll(model, ids, ids, parallel=each, window=SEGMENT) for each in (True, False)]
    for each in unrolled:
        assert_near(each.stream.state["counts"], whole["counts"])
        assert_near(each.logits, unrolled[0].logits)
    assert_near(mnemic.read_segments(model, ids).state["sum"], unrolled[0].stream.state["sum"])


def feed_state(model, ids):
    cache = hf.DynamicCache(config=model.config)
    feed(model, ids, carried=cache)
    return stream(cache).state


@torch.no_grad()
def test_ids_wait_with_their_hidden_states(tmp_path):
    (model, _), ids, more = attached(), tokens(1, 21), tokens(1, 9, 1)
    session, path = mnemic.Session(model, window=2 * SEGMENT, keep_text=True), tmp_path / "one.memory"
    session.read(ids)
    assert session.stream.ids.tolist() == ids[:, 16:].tolist()
    session.save(path)
    again, fork = mnemic.Session.load(path, model), session.fork()
    expected = session.forward(more).logits
    for each in (again, fork):
        assert torch.equal(each.forward(more).logits, expected)
        assert torch.equal(each.stream.state["counts"], F.one_hot(torch.cat([ids, more], 1)[:, :24], 97).sum(1).float())
    tensors, meta = read_file(path)
    for wrong, message in (
        ({"ids": tensors["ids"] + VOCABULARY}, "ids goes from"),
        ({"ids": tensors["ids"][:, 1:]}, r"ids is \[1, 4\] of torch.int64, here it would be \[1, 5\]"),
        ({"ids": None}, "lacks ids"),
    ):
        write_file(path, {name: t for name, t in (tensors | wrong).items() if t is not None}, meta)
        with pytest.raises(StateError, match=message):
            mnemic.Session.load(path, model)


@torch.no_grad()
def test_sessions_in_a_batch_and_a_window_read_again(tmp_path):
    (model, _), rows = attached(), [tokens(1, length, length) for length in (21, 4, 13)]
    sessions = [mnemic.Session(model, window=2 * SEGMENT, keep_text=True, keep_keys=False) for _ in rows]
    mnemic.batch(sessions).read(rows)
    more = tokens(1, 9, 1)
    outputs = mnemic.batch(sessions).forward([more] * 3)
    for ids, output, session in zip(rows, outputs, sessions, strict=True):
        lone = mnemic.Session(model, window=2 * SEGMENT)
        lone.read(ids)
        assert_near(output.logits, lone.forward(more).logits, 1e-4)
        session.save(tmp_path / "one.memory")
        again = mnemic.Session.load(tmp_path / "one.memory", model)
        assert torch.equal(again.stream.ids, session.stream.ids)
        assert again.stream.state.keys() == session.stream.state.keys()
