"""Language modelling on novels: texts apart by author, training with a carried memory, conditions, the record."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import language
import language_training
import mnemic
from helpers import shake
from language import Bits, Experiment, apart, measure, spans, texts
from language_training import Recipe, fit, small_model
from mnemic.bench.results import records
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.memoria import MemoriaConfig
from mnemic.tasks.documents import Tokens
from paired import difference

LENGTH = 8
CONFIG = MemoriaConfig(segment_length=LENGTH, working=2, reminded_stm=2, reminded_ltm=2, stm_capacity=4, heads=2)
RECIPE = Recipe(steps=6, rows=2, chunk=2, excerpt=4, warm=2, alone=2, sharp=2.0)


def model():
    return small_model(256, LENGTH, 0, layers=2, width=16).eval()


def document(seed, segments=5):
    ids = torch.randint(256, (segments * LENGTH,), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, torch.ones_like(ids))


@pytest.fixture
def novels(tmp_path):
    """Novels of eight authors; a line holds the author's letter."""
    for number, letter in enumerate("ABCDEFGH"):
        for title in ("x", "y")[: 1 + number % 2]:
            (tmp_path / f"{letter}_{title}.txt").write_text(f"{letter * 9}\n" * 400)
    return tmp_path


def test_authors_of_the_test_are_not_trained_on(novels):
    found = texts(novels, "bytes", train=40, test=60, excerpts=20, skip=100)
    assert list(found.test) == ["D_x", "D_y", "H_x", "H_y"]
    assert all(len(tokens) == 60 for tokens in found.test.values())
    assert len(found.train) == 20
    assert all(len(tokens) == 40 for tokens in found.train)
    letters = {chr(int(tokens.ids.max())) for tokens in found.train}
    assert letters == set("ABCEFG")
    with pytest.raises(ValueError, match="at least 10"):
        texts(novels, "bytes", train=40, test=60, excerpts=20, held_out=5)


def test_other_documents_are_by_other_authors():
    names = ["A_1", "A_2", "B_1", "C_1"]
    order = apart(names)
    assert sorted(order) == [0, 1, 2, 3]
    assert all(names[i][0] != names[other][0] for i, other in enumerate(order))
    with pytest.raises(ValueError, match="cannot be paired"):
        apart(["A_1", "A_2", "A_3", "B_1"])


def test_ranges_cover_all_positions():
    assert spans(6) == [(0, 1), (1, 2), (2, 4), (4, 6)]
    assert spans(128)[-1] == (64, 128)


@torch.no_grad()
def test_conditions_are_what_they_say():
    """Against calls of the model by hand, two documents of three segments."""
    base = model()
    documents = {"A_1": document(1, 3), "B_1": document(2, 3)}
    attachment = mnemic.attach(base, CONFIG)
    shake(attachment.memory, 3)
    bits = measure(base, documents, LENGTH, attachment)
    assert set(bits.bits) == set(language.CONDITIONS)

    def surprise(stream, number, segment):
        ids = documents[number].ids
        cache = mnemic.memory_cache(base, LENGTH)
        cache.memory.stream = stream
        part = ids[segment * LENGTH :][:LENGTH]
        logits = base(input_ids=part[None], **{CACHE: cache}, use_cache=True).logits[0]
        targets = ids[segment * LENGTH + 1 :][:LENGTH]
        nats = F.cross_entropy(logits[: len(targets)], targets, reduction="sum")
        return float(nats) / math.log(2), cache.memory.stream

    streams = {name: [None] for name in documents}
    for name, history in streams.items():
        for segment in range(3):
            history.append(surprise(history[-1], name, segment)[1])
    for row, (name, other) in enumerate((("A_1", "B_1"), ("B_1", "A_1"))):
        for segment in range(3):
            last = surprise(None, name, segment - 1)[1] if segment else None
            given = {
                "memory": streams[name][segment],
                "other document": streams[other][segment],
                "last segment": last,
                "empty": None,
            }
            for condition, stream in given.items():
                expected = surprise(stream, name, segment)[0]
                assert float(bits.bits[condition][row, segment]) == pytest.approx(expected, abs=1e-3), condition
    torch.testing.assert_close(bits.bits["empty"], bits.bits["no memory"], atol=1e-3, rtol=0)
    assert (bits.bits["memory"] - bits.bits["other document"]).abs()[:, 1:].min() > 1e-3
    assert (bits.bits["memory"] - bits.bits["last segment"]).abs()[:, 2:].min() > 1e-3
    assert bits.bytes.tolist() == [[8, 8, 7], [8, 8, 7]]
    attachment.detach()
    bare = measure(base, documents, LENGTH).bits[language.TRAINED_WITHOUT]
    torch.testing.assert_close(bare, bits.bits["no memory"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("freeze", [True, False])
def test_training_moves_what_is_free_and_carries_the_memory(freeze, monkeypatch):
    base = model()
    before = copy.deepcopy(base.state_dict())
    attachment = mnemic.attach(base, CONFIG, freeze=freeze)
    seen = []
    inner = language_training.carried

    def spy(attachment, batch, stream):
        loss, stream = inner(attachment, batch, stream)
        seen.append((batch.fresh.tolist(), stream.written))
        return loss, stream

    monkeypatch.setattr(language_training, "carried", spy)
    fit(base, [document(i, 4) for i in range(4)], LENGTH, RECIPE, 0, attachment)
    assert seen[:4] == [([True] * 2, (2, 2)), ([False] * 2, (4, 4)), ([True] * 2, (2, 2)), ([False] * 2, (4, 4))]
    after = base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) == freeze
    assert any(
        parameter.abs().sum() > 0 for name, parameter in attachment.memory.named_parameters() if "output" in name
    )


def test_without_a_memory_the_same_tokens_are_predicted():
    """An untrained memory adds nothing, so both losses are one."""
    base = model()
    batch = language.DocumentStream([document(i, 4) for i in range(2)], 2, 2 * LENGTH, 0)[0]
    alone = language_training.alone(base, batch, LENGTH)
    attachment = mnemic.attach(base, CONFIG)
    together, stream = language_training.carried(attachment, batch, None)
    torch.testing.assert_close(alone, together)
    assert not any(tensor.requires_grad for tensor in stream.tensors().values())


@pytest.mark.parametrize("remembering", [True, False])
def test_a_stopped_training_goes_on(tmp_path, monkeypatch, remembering):
    """Stopped in the middle of an excerpt, so the streams must come back too."""
    monkeypatch.setattr(language_training, "CHECKPOINT_SECONDS", 0.0)
    documents = [document(i, 8) for i in range(4)]
    recipe = Recipe(steps=7, rows=2, chunk=2, excerpt=8, warm=2)

    def run(checkpoint, stop=None):
        base = model()
        torch.manual_seed(0)
        attachment = mnemic.attach(base, CONFIG, freeze=False) if remembering else None
        done = []

        def advance(steps, **values):
            if stop is not None and len(done) == stop:
                raise KeyboardInterrupt
            done.append(values["loss"])

        with contextlib.suppress(KeyboardInterrupt):
            fit(base, documents, LENGTH, recipe, 0, attachment, advance, checkpoint)
        return base.state_dict(), done

    whole, losses = run(None)
    _, first = run(tmp_path / "c", 3)
    resumed, rest = run(tmp_path / "c")
    assert first + rest == pytest.approx(losses)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    with pytest.raises(mnemic.StateError, match="not a checkpoint of this training"):
        fit(small_model(256, LENGTH, 0, 1, 16), documents, LENGTH, recipe, 0, checkpoint=tmp_path / "c")


def test_engrams_begin_apart():
    """Sharper attention, entries of deviation 1, and still nothing added before training."""
    attachment = mnemic.attach(model(), CONFIG)
    documents = [document(i, 16) for i in range(4)]
    language_training.spread(attachment, documents, 2.0)
    memory, ids = attachment.memory, torch.cat([tokens.ids for tokens in documents]).view(-1, LENGTH)
    hidden = attachment.router.watch(attachment.anatomy, ids, memory.writes)[memory.writes[-1]]
    made = memory.abstractor
    score = made.query @ made.key.weight @ made.norm(hidden).transpose(1, 2)
    assert score.std(-1).mean().item() == pytest.approx(2.0, abs=1e-4)
    assert made(hidden, None).std(0).mean().item() == pytest.approx(1.0, abs=1e-4)
    bits = measure(attachment.model, {"A_1": document(1), "B_1": document(2)}, LENGTH, attachment).bits
    torch.testing.assert_close(bits["memory"], bits["no memory"], atol=1e-3, rtol=0)


def test_differences_are_paired():
    low = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = difference(low, low + torch.tensor([0.125, 0.25, 0.125, 0.25]))
    assert found["mean"] == pytest.approx(0.1875)
    assert 0.125 <= found["low"] < 0.1875 < found["high"] <= 0.25
    assert (found["documents"], found["of"]) == (4, 4)
    bits = Bits({"memory": torch.tensor([[4.0, 8.0, 12.0]])}, torch.full((1, 3), 4.0))
    assert bits.mean("memory").tolist() == [2.0]
    assert bits.mean("memory", 1).tolist() == [2.5]


@pytest.mark.parametrize("frozen", [True, False])
def test_an_experiment_makes_a_record(novels, monkeypatch, frozen, tmp_path):
    monkeypatch.setattr(language.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model())
    monkeypatch.setattr(language.AutoTokenizer, "from_pretrained", lambda *_: "bytes")
    experiment = Experiment(CONFIG, RECIPE, "tiny" if frozen else None, segments=3, layers=2, width=16)
    record = experiment.run(novels)
    assert record.task == ("novels-frozen" if frozen else "novels-scratch")
    assert [score.length for score in record.scores] == [0, 1, 2]
    controls = {"other document", "last segment", "empty", "no memory"} | (set() if frozen else {"trained without"})
    assert all(set(score.controls) == controls for score in record.scores)
    assert set(record.measures["above memory"]) == controls
    trained = {"base alone", "with memory"} | (set() if frozen else {"without memory"})
    assert set(record.seconds) == trained | {"evaluation"}
    documents = record.measures["bits per byte by document and range"]
    assert list(documents) == ["D_x", "D_y", "H_x", "H_y"]
    mean = sum(values["memory"][1] for values in documents.values()) / 4
    assert record.scores[1].score == pytest.approx(mean, abs=1e-4)
    assert (record.save(tmp_path / "out")).is_file()
    assert experiment.run(novels).scores == record.scores


def test_the_command_writes_a_record_a_seed(novels, monkeypatch, tmp_path):
    made = []

    def published(model, tokenizer, seed, steps, segments):
        made.append((model, tokenizer, seed, steps, segments))
        return Experiment(CONFIG, RECIPE, segments=segments, seed=seed, layers=2, width=16)

    monkeypatch.setattr(language, "published", published)
    words = f"--novels {novels} --seeds 0,1 --segments 3 --out {tmp_path / 'out'}"
    result = CliRunner().invoke(language.app, words.split())
    assert result.exit_code == 0, result.output
    assert "above memory" in result.output
    assert made == [(None, "bytes", 0, None, 3), (None, "bytes", 1, None, 3)]
    assert [record.seed for record in records(tmp_path / "out", "novels-scratch")] == [0, 1]
    assert (tmp_path / "out" / "language-memoria-scratch-seed1.json").is_file()
