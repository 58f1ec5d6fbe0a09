"""Classification of long articles: windows, reading as the encoder itself would, controls, training and the record."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import classification
import mnemic
from classification import (
    Article,
    Classifier,
    Experiment,
    Recipe,
    encode,
    features,
    ordered,
    read,
    windows,
)
from helpers import shake
from mnemic.bench.results import records
from mnemic.host.cache import MemoryLayer
from mnemic.host.call import carrying
from mnemic.memories.memoria import MemoriaConfig

LENGTH = 12
CONFIG = MemoriaConfig(
    segment_length=LENGTH,
    working=3,
    reminded_stm=3,
    reminded_ltm=3,
    stm_capacity=4,
    heads=2,
    write_layer=-2,
    read_layers=[-1],
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Tokenizer:
    """A word is its place in the list."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, text, **_):
        return {"input_ids": [3 + WORDS.index(word) for word in text.split()]}


def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
    )
    return BertModel(config).eval()


def text(count, seed=0):
    source = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=source).tolist())


@pytest.fixture(scope="module")
def articles():
    """Of 1, 2, 3 and 4 windows."""
    examples = [(text(count, count), bool(count % 2)) for count in (5, 14, 30, 40)]
    return encode(encoder(), Tokenizer(), examples, CONFIG, most=4, batch=3)


@pytest.fixture
def memory():
    built = CONFIG.build(16, 3, causal=False)
    shake(built, 1)
    return built


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(3, 9, [(0, 3)]), (4, 9, [(0, 4)]), (5, 9, [(0, 4), (1, 5)]), (8, 9, [(0, 4), (4, 8)]), (99, 2, [(0, 4), (4, 8)])],
)
def test_windows_are_full(count, most, expected):
    assert windows(range(count), 4, most) == [list(range(*span)) for span in expected]


def test_articles_are_what_the_bare_encoder_puts_out(articles):
    assert [len(article) for article in articles] == [1, 2, 3, 4]
    assert [article.label for article in articles] == [1, 0, 0, 0]
    ids = torch.tensor([[1, *Tokenizer()(text(14, 14))["input_ids"][-10:], 2]])
    hidden = encoder()(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(articles[1].written[-1].float(), hidden[2][0], atol=2e-3, rtol=0)
    torch.testing.assert_close(articles[1].asked[-1].float(), hidden[3][0], atol=2e-3, rtol=0)


@torch.no_grad()
def test_reading_equals_the_encoder_with_its_memory(memory):
    """What is computed ahead and read later is what calls of the encoder give."""
    model = encoder()
    examples = [(text(count, count), False) for count in (34, 30)]
    found = encode(model, Tokenizer(), examples, CONFIG, most=4)
    attachment = mnemic.attach(model, CONFIG)
    attachment.memory.load_state_dict(memory.state_dict())
    ids = [windows(Tokenizer()(words)["input_ids"], LENGTH - 2, 4) for words, _ in examples]
    for article, parts in zip(found, ids, strict=True):
        layer, means = MemoryLayer(), []
        for part in parts:
            with carrying(layer):
                call = torch.tensor([[1, *part, 2]])
                means.append(model(input_ids=call).last_hidden_state.mean(1))
        torch.testing.assert_close(read(memory, [article]), means[-1], atol=5e-3, rtol=0)


@torch.no_grad()
def test_articles_of_a_batch_are_read_as_alone(articles, memory):
    together = read(memory, ordered(articles))
    alone = torch.cat([read(memory, [article]) for article in ordered(articles)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="longest first"):
        read(memory, articles)


@torch.no_grad()
def test_controls_change_what_they_are_about(articles, memory):
    batch = ordered(articles)
    own, other, empty = (read(memory, batch, way) for way in ("memory", "other article", "empty"))
    for control in (other, empty):
        assert (control[:3] - own[:3]).abs().amax(1).min() > 1e-3
        torch.testing.assert_close(control[3:], own[3:])  # one window: there is nothing earlier
    alone = [Article(a.written[-1:], a.asked[-1:], a.keep[-1:], a.label) for a in batch]
    torch.testing.assert_close(empty, read(memory, alone))
    new = CONFIG.build(16, 3, causal=False)
    torch.testing.assert_close(read(new, batch), features(batch, "last window"))


def test_gradients_reach_the_whole_memory(articles, memory):
    read(memory, ordered(articles)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in memory.parameters())


def test_the_best_epoch_is_kept():
    torch.manual_seed(0)
    label = torch.arange(40) % 2
    asked = torch.randn(40, 1, 4, 3) + label[:, None, None, None]
    made = [Article(h, h, torch.ones(1, 4, dtype=torch.bool), int(c)) for h, c in zip(asked, label, strict=True)]
    head = Classifier(features(made, "last window"))
    recipe = Recipe(rows=8, head_rate=0.3)
    logits = lambda batch: head(features(batch, "last window"))  # noqa: E731
    trail = classification.train({head: 0.3}, logits, (made[:30], made[30:]), 5, recipe, 0)
    assert len(trail) == 5
    with torch.no_grad():
        loss = nn.functional.cross_entropy(logits(made[30:]), label[30:]).item()
    assert loss == pytest.approx(min(trail), abs=1e-5)
    assert loss < 0.5


def test_articles_are_kept_and_an_experiment_runs(tmp_path, articles):
    description = {"content": "articles", "model": "tiny"}
    assert classification.restore(tmp_path / "kept", description) is None
    classification.store(tmp_path / "kept", articles, description)
    assert classification.restore(tmp_path / "kept", {**description, "model": "other"}) is None
    kept = classification.restore(tmp_path / "kept", description)
    assert kept is not None
    for mine, theirs in zip(kept, articles, strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in ("written", "asked", "keep"))
        assert mine.label == theirs.label

    experiment = Experiment(CONFIG, Recipe(epochs=1, rows=8, head_epochs=2), "tiny", most=4, depth=3)
    many = [Article(a.written, a.asked, a.keep, i % 2) for i, a in enumerate(articles * 10)]
    record = experiment.run(many, seed=1)
    (score,) = record.scores
    assert score.examples == 4
    assert score.score == record.measures["macro F1"]["memory"]
    assert {"cut at the window", "all windows", "other article"} < score.controls.keys()
    assert all(len(outcome) == 4 for outcome in score.outcomes.values())
    again = experiment.run(many, seed=1)
    assert again.scores == record.scores
    assert again.measures == record.measures


def test_the_command_writes_a_record_a_seed(articles, monkeypatch, tmp_path):
    many = [Article(a.written, a.asked, a.keep, i % 2) for i, a in enumerate(articles * 10)]
    experiment = Experiment(CONFIG, Recipe(epochs=1, rows=8, head_epochs=2), "tiny", most=4, depth=3)
    monkeypatch.setattr(classification, "published", lambda model: experiment)
    monkeypatch.setattr(experiment, "encode", lambda *_: many)
    words = f"--model tiny --articles x --seeds 0,1 --out {tmp_path}"
    result = CliRunner().invoke(classification.app, words.split())
    assert result.exit_code == 0, result.output
    assert "cut at the window" in result.output
    assert [record.seed for record in records(tmp_path, "hyperpartisan")] == [0, 1]
