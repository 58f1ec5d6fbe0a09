"""Language modelling: excerpts, bits per byte, readers and n-grams as floors, loaders, batches that carry a memory."""

from __future__ import annotations

import itertools
import math
import sys
import types
import zipfile
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from mnemic.tasks import language, tales
from mnemic.tasks.base import generator
from mnemic.tasks.corpora import Stateful, articles, enwik8, from_hub, wikitext
from mnemic.tasks.documents import DocumentStream, Tokens, tokenize
from mnemic.tasks.language import Language
from mnemic.tasks.ngrams import Learned, Ngram
from mnemic.tasks.tales import FORMS, NAMES, PLACES, TRAITS, facts_told, parse, reader_bits
from mnemic.unrolling import IGNORED
from task_checks import chi_square, real


@pytest.fixture(scope="module")
def task():
    return Language()


@pytest.fixture(scope="module")
def floors(task):
    return task.floors(16)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_every_token_but_the_first_is_labelled(task):
    examples = task.examples(3)
    assert examples.input_ids.shape == (3, 8 * 64)
    assert examples.input_ids.dtype == torch.int64
    assert (examples.labels[:, 0] == IGNORED).all()
    assert torch.equal(examples.labels[:, 1:], examples.input_ids[:, 1:])
    assert examples.answer[0].tolist() == [-1] + [0] * 63 + [place // 64 for place in range(64, 512)]
    assert examples.evidence.shape == (3, 8, 8)
    assert sorted(examples.evidence[0, 3].tolist()) == [-1] * 5 + [0, 64, 128]
    assert examples.lag[0].tolist() == [1] + [64] * 7


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_bytes_are_those_of_the_text(tokenizer):
    task = Language(tokenizer=tokenizer)
    examples = task.examples(5)
    for row, pieces in enumerate(map(task.text, examples.input_ids.tolist())):
        text = (" " if tokenizer == "words" else "").join(pieces)
        assert int(examples.extra["bytes"][row].sum()) == len(text) - len(pieces[0])


def test_tales_keep_to_their_rules():
    sources = generator(7)
    for _ in range(50):
        told = [line.split() for line in language.tale(4, 100, sources)]
        people, traits = set(), {}
        for person, kind, *rest in told[1:]:
            people.add(person)
            (place,) = (at for at, word in enumerate(FORMS[kind].split()[1:]) if word == "{}")
            if kind == "meets":
                assert rest[place] in NAMES
                assert rest[place] != person, "people do not meet themselves"
                people.add(rest[place])
            elif kind == "walks":
                assert rest[place] in PLACES
            else:
                assert traits.setdefault((person, kind), rest[place]) == rest[place], "a trait changed"
                assert rest[place] in TRAITS[kind]
        assert len(people) <= 4


def test_every_choice_is_even():
    sources, names, kinds, places, jobs, met = generator(1), Counter(), Counter(), Counter(), Counter(), Counter()
    for _ in range(1000):
        told = [line.split() for line in language.tale(4, 40, sources)][1:]
        # one of each tale: those of the same are not independent
        names[told[0][0]] += 1
        kinds.update(line[1] for line in told)
        places.update(line[-2] for line in told if line[1] == "walks")
        jobs.update({line[0]: line[4] for line in told if line[1] == "works"}.values())
        met.update([next((line[2] for line in told if line[1] == "meets"), told[0][0])])
    # 99.9 % of chi-square with 31, 7 and 23 degrees of freedom
    assert len(names) == 32
    assert chi_square(names.values(), 1000 / 32) < 61.1
    assert chi_square(met.values(), 1000 / 32) < 61.1
    assert chi_square(kinds.values(), 40_000 / 8) < 24.3
    assert len(places) == 24
    assert chi_square(places.values(), places.total() / 24) < 49.7
    assert chi_square(jobs.values(), jobs.total() / 24) < 49.7


def test_words_of_the_world_tell_what_they_are():
    lists = [*TRAITS.values(), PLACES]
    assert [len(values) for values in lists] == [len(set(values)) for values in lists] == [24] * 7
    assert len(NAMES) == len(set(NAMES)) == 32
    assert len(FORMS) == 8
    assert [form.split()[0] for form in FORMS.values()] == list(FORMS)
    assert not {word for values in lists for word in values} & {*NAMES, *FORMS}


def test_facts_are_traits_that_were_told(task):
    examples = task.examples(20)
    for row, ids in enumerate(examples.input_ids.tolist()):
        lines = [line.split() for line in " ".join(task.text(ids)).split(" . ")[1:-1]]
        whole = {(line[0], line[1]) for line in lines if line[1] in TRAITS}
        assert whole <= facts_told(parse(task.text(ids)))
        assert 0 <= int(examples.facts[row]) - len(whole) <= 1  # the last sentence may be cut


# --- the ideal reader ------------------------------------------------------------------------------------------------


def test_the_reader_pays_what_chance_asks():
    twice = "ada works as a baker . " * 2
    words = parse(f"here begins a tale . {twice}ada meets bela again . bela walks to the inn .".split())
    bits = reader_bits(words, [0] * len(words), [[]], cast=2)
    kind, names, trait = 3.0, math.log2(32), math.log2(24)
    assert bits[:5] == [0] * 5
    assert bits[5:11] == pytest.approx([names, kind, 0, 0, trait, 0])
    again = -math.log2(1 / 2)
    assert bits[11:17] == pytest.approx([again, kind, 0, 0, 0, 0])
    assert bits[17:22] == pytest.approx([again, kind, math.log2(31), 0, 0])
    assert bits[22:] == pytest.approx([again, kind, 0, 0, math.log2(24), 0])


@pytest.mark.parametrize(("cast", "known"), [(4, 0), (4, 1), (4, 3), (4, 4), (2, 1), (32, 5)])
@pytest.mark.parametrize("kind", ["who", "meets"])
def test_the_readers_probabilities_add_up_to_one(cast, known, kind):
    # somebody is met only by somebody the sentence has told
    told = [tales.Word(name, "who", name) for name in NAMES[:known]]
    person = NAMES[0] if kind == "meets" else ""
    if kind == "meets" and known == 0:
        told = [tales.Word(person, "who", person)]
    total = 0.0
    for name in NAMES:
        if name == person or (known >= cast and name in NAMES[known:]):
            continue
        words = [*told, tales.Word(name, kind, person or name), tales.Word(".")]
        total += 2 ** -reader_bits(words, [0] * len(words), [[]], cast)[len(told)]
    assert total == pytest.approx(1)


def test_a_reader_forgets_what_it_may_not_remember():
    text = "here begins a tale . ada likes figs most . ada likes figs most . ada likes figs most ."
    words = parse(text.split())
    segment = [0] * 10 + [1] * 5 + [2] * 5
    told = {
        "nothing": reader_bits(words, segment, [[], [], []], 4),
        "last": reader_bits(words, segment, [[], [0], [1]], 4),
        "first": reader_bits(words, segment, [[], [0], [0]], 4),
    }
    assert [round(told["nothing"][place], 3) for place in (7, 12, 17)] == [4.585] * 3
    assert [round(told["last"][place], 3) for place in (7, 12, 17)] == [4.585, 0, 0]
    assert told["first"] == told["last"]
    assert [round(told["nothing"][place], 3) for place in (5, 10, 15)] == [5.0] * 3
    assert [round(told["last"][place], 3) for place in (5, 10, 15)] == [5.0, 2.0, 2.0]


def test_who_remembers_more_pays_less(floors):
    order = ["everything", "last 2 segments", "last segment", "this segment"]
    for kind in ("n-gram", "reader"):
        paid = [floors[f"{kind}, {name}"] for name in order]
        assert paid == sorted(paid)
        assert paid[-1] > 1.15 * paid[0]
        assert paid[0] < floors[f"{kind}, sample of a segment"] < paid[-1]
    assert all(floors[f"reader, {name}"] < floors[f"n-gram, {name}"] for name in order)
    assert floors["n-gram, this segment"] < floors["unigram"] < floors["uniform"]


def test_the_uniform_floor_in_closed_form(task, floors):
    examples = task.examples(16, "test")
    total = int(examples.extra["bytes"].sum())
    assert floors["uniform"] == pytest.approx(16 * 511 * math.log2(221) / total)
    assert Language(tokenizer="bytes", segments=2).floors(2)["uniform"] == pytest.approx(8)
    assert task.uniform == 1 / task.vocabulary == 1 / 221


def test_the_reader_of_bytes_reads_the_same_words():
    by_words, by_bytes = Language(segments=2, segment_length=400), Language(tokenizer="bytes", segment_length=400)
    words, bytes_ = by_words.examples(1), by_bytes.examples(1)
    few, many = by_bytes._spelt(bytes_.input_ids[0].tolist()), by_words._spelt(words.input_ids[0].tolist())
    assert few[0][:5] == many[0][:5] == language.OPENING.split()
    text = bytes(bytes_.input_ids[0].tolist()).decode()
    assert few[0] == text.split()
    starts = [0, *(place for place, mark in enumerate(text) if mark == " ")]
    assert few[1] == [start // 400 for start in starts]


# --- n-grams ---------------------------------------------------------------------------------------------------------


def test_an_ngram_is_a_distribution():
    model = Ngram(3)
    row = torch.randint(5, (200,), generator=generator(0)).tolist()
    for place, token in enumerate(row):
        model.add(row[max(0, place - 2) : place], token)
    for history in ([], [1], [1, 2], [4, 4], [9, 1]):
        assert sum(model.probability(history, token, 1 / 5)[0] for token in range(5)) == pytest.approx(1)
    # Witten and Bell by hand: behind a come b, b, c
    model = Ngram(2)
    for token in (1, 1, 2):
        model.add([0], token)
    shorter = (2 + 2 * 0.25) / (3 + 2)
    assert model.probability([0], 1, 0.25) == (pytest.approx((2 + 2 * shorter) / (3 + 2)), 2)
    assert model.probability([7], 1, 0.25) == (pytest.approx(shorter), 1)


def test_counts_of_the_document_are_those_of_its_past():
    # what is behind a place does not change what was paid before it
    learned = Learned(3, 6, torch.randint(6, (4, 60), generator=generator(1)))
    row = torch.randint(6, (40,), generator=generator(2)).tolist()
    other = row[:20] + torch.randint(6, (20,), generator=generator(3)).tolist()
    trust = [[1.0, 2.0] for _ in range(4)]

    def paid(tokens, earlier, until=None):
        return learned.bits(tokens[:until], learned.base(tokens[:until]), 10, earlier, trust)

    every = [[], [0], [0, 1], [0, 1, 2]]
    assert paid(row, every, 20) == paid(other, every, 20)
    # and a forgotten segment may be anything
    nothing = [[], [], [], []]
    changed = [5 - token for token in row[:10]] + row[10:]
    # contexts reach over the border of a window, so the first ones are given the same tokens
    changed[8:10] = row[8:10]
    assert paid(row, nothing) - paid(row, nothing, 10) == pytest.approx(
        paid(changed, nothing) - paid(changed, nothing, 10)
    )
    assert paid(row, every) - paid(row, every, 10) != pytest.approx(paid(changed, every) - paid(changed, every, 10))
    assert trust == [[1.0, 2.0]] * 4


def test_a_repeated_text_is_cheap_for_who_remembers_it():
    learned = Learned(3, 50, torch.randint(50, (4, 100), generator=generator(1)))
    part = torch.randint(50, (50,), generator=generator(2)).tolist()
    row = part * 3
    views = Language(segments=3).views(generator(0))
    paid = {}
    for name, earlier in views.items():
        paid[name] = learned.bits(row, learned.base(row), 50, earlier, [[9.0, 10.0]] * 4)
    assert paid["last segment"] < 0.6 * paid["this segment"]
    assert paid["everything"] <= paid["last segment"]


def test_views_look_back_only(task):
    views = task.views(generator(5))
    for earlier in views.values():
        assert all(segment < here for here, some in enumerate(earlier) for segment in some)
    assert views["everything"][5] == [0, 1, 2, 3, 4]
    assert views["last segment"][:3] == [[], [0], [1]]
    assert views["last 2 segments"][:4] == [[], [0], [0, 1], [1, 2]]
    drawn = Counter(Language(segments=4).views(generator(seed))["sample of a segment"][3][0] for seed in range(300))
    assert chi_square([drawn[place] for place in range(3)], 100) < 13.8  # 99.9 %, 2 degrees of freedom


# --- bits per byte ---------------------------------------------------------------------------------------------------


def test_bits_by_position(task):
    examples = task.examples(4)
    nats = torch.full(examples.labels.shape, math.log(2)) * (1 + torch.arange(512) // 64)
    nats[:, 0] = float("nan")  # not read
    found = task.bits(nats, examples)
    lengths = examples.extra["bytes"].sum(0).tolist()
    tokens = [4 * 63, *[4 * 64] * 7]
    paid = [count * (1 + number) for number, count in enumerate(tokens)]
    assert found["bits per byte"] == pytest.approx(sum(paid) / sum(lengths))
    assert found["perplexity"] == pytest.approx(2 ** (sum(paid) / sum(tokens)))
    assert found["bits per byte, segment 0"] == pytest.approx(paid[0] / lengths[0])
    assert found["bits per byte, segment 1"] == pytest.approx(paid[1] / lengths[1])
    assert found["bits per byte, segment 2-3"] == pytest.approx(sum(paid[2:4]) / sum(lengths[2:4]))
    assert found["bits per byte, segment 4-7"] == pytest.approx(sum(paid[4:]) / sum(lengths[4:]))
    assert len(found) == 6
    assert Language.lower_is_better
    assert Language.metric in found


def test_bits_of_a_uniform_model_are_the_uniform_floor():
    task = Language(tokenizer="bytes", segments=2, segment_length=32)
    examples = task.examples(3, "test")
    found = task.bits(torch.full((3, 64), math.log(256)), examples)
    assert found["bits per byte"] == pytest.approx(8)
    assert found["perplexity"] == pytest.approx(256)


def test_bits_that_cannot_be(task):
    examples = task.examples(2)
    with pytest.raises(ValueError, match=r"nll_nats is \[2, 511\], the labels are \[2, 512\]"):
        task.bits(torch.zeros(2, 511), examples)
    with pytest.raises(ValueError, match="not finite at a labelled place"):
        task.bits(torch.full((2, 512), torch.inf), examples)


def test_the_guess_is_the_most_frequent_token(task):
    examples = task.examples(50, "test")
    said = task.solve(examples)
    assert task.text(said[0, :1].tolist()) == ["."]
    share = (examples.labels[examples.asked] == said[0, 0]).double().mean().item()
    assert task.score(said, examples) == pytest.approx(share)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"segments": 0}, "segments is 0"),
        ({"segment_length": 1}, "segment_length 1"),
        ({"order": 0}, "order 0"),
        ({"cast": 1}, "cast is 1; a tale has 2 to 32 people"),
        ({"cast": 33}, "cast is 33"),
        ({"kind": "pdf"}, "kind is 'pdf'; choose one of texts, wikitext"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'; use"),
        ({"data": "x"}, 'real text takes "bytes"'),
    ],
)
def test_settings_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        Language(**settings)


# --- real documents --------------------------------------------------------------------------------------------------

WIKI = """ 
 = One = 
 
 The first article , with x = y . 
 = not a title = 
 
 = = Section = = 
 
 Text . 
 
 
 = Two @-@ = 
 
 The second . 
"""


def test_articles_of_wikitext(tmp_path):
    found = articles(WIKI)
    assert [name for name, _ in found] == ["One", "Two @-@"]
    assert found[0][1].startswith(" = One = \n")
    assert " = not a title = " in found[0][1]
    assert "= = Section" in found[0][1]
    (tmp_path / "test.txt").write_text(WIKI)
    assert wikitext(tmp_path / "test.txt") == found
    with pytest.raises(ValueError, match="is it WikiText"):
        articles("Plain text\n")


@pytest.mark.parametrize("packed", [False, True])
def test_enwik8(tmp_path, packed):
    text = "é" * 1001
    path = tmp_path / "enwik8"
    path.write_bytes(text.encode() + "☕".encode()[:2])  # the file ends within a character
    if packed:
        with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "enwik8")
        path = tmp_path / "enwik8.zip"
    found = {name: texts[0][1] for name, texts in enwik8(path).items()}
    assert "".join(found.values()) == text
    assert [len(part) for part in found.values()] == [901, 50, 50]
    with pytest.raises(FileNotFoundError, match=r"pass enwik8 or enwik8\.zip"):
        enwik8(tmp_path / "none")


def test_enwik8_in_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    with pytest.raises(ValueError, match="holds 2 files"):
        enwik8(tmp_path / "two.zip")


def test_from_hub(monkeypatch):
    asked = []

    class Rows(dict):
        column_names = ("text", "n")

    def load(name, config, split):
        asked.append((name, config, split))
        wiki = [f"{line}\n" for line in WIKI.split("\n")]
        return Rows(text=wiki if "wikitext" in name else ["one", "two"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert from_hub("pg19", "train") == [("pg19 0", "one"), ("pg19 1", "two")]
    assert from_hub("Salesforce/wikitext", config="wikitext-2-raw-v1") == articles(WIKI)
    assert asked == [("pg19", None, "train"), ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    with pytest.raises(ValueError, match="no column 'words'; choose one of text, n"):
        from_hub("pg19", column="words")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        from_hub("pg19")


def test_from_hub_reads_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [text for _, text in from_hub(str(tmp_path / "set"))] == ["one", "two"]


@pytest.fixture
def shelf(tmp_path):
    """Twelve documents, each of one letter."""
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(chr(97 + number) * (100 + 5 * number))
    return tmp_path


def test_documents_are_divided(shelf):
    task = Language(data=str(shelf), tokenizer="bytes", segments=2, segment_length=20)
    letters = {
        part: set(task.examples(200, part).input_ids.flatten().tolist()) for part in ("train", "validation", "test")
    }
    assert [len(some) for some in letters.values()] == [10, 1, 1]
    assert not any(one & other for one, other in itertools.combinations(letters.values(), 2))
    examples = task.examples(300, "train")
    assert (examples.input_ids == examples.input_ids[:, :1]).all(), "an excerpt is of one document"
    assert (examples.facts == 0).all()
    assert examples.extra["bytes"].tolist() == [[19, 20]] * 300
    tests = {
        next(iter(Language(data=str(shelf), tokenizer="bytes", seed=seed).documents["test"]))[0] for seed in range(5)
    }
    assert len(tests) > 1, "another seed divides otherwise"


def test_excerpts_begin_everywhere(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(bytes(range(100)))
    task = Language(data=str(tmp_path), tokenizer="bytes", segments=3, segment_length=10)
    begun = Counter(task.examples(800).input_ids[:, 0].tolist())
    assert sorted(begun) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert chi_square(begun.values(), 100) < 24.3  # 99.9 %, 7 degrees of freedom
    assert task.floors(3)["n-gram, this segment"] < 8
    assert not any("reader" in name for name in task.floors(3))


def test_documents_that_are_too_short_or_few(shelf, tmp_path):
    with pytest.raises(ValueError, match=r"no train document of .* has 512 tokens \(the longest has 1"):
        Language(data=str(shelf), tokenizer="bytes").examples(1)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="has 1 documents; to divide them takes 3"):
        Language(data=str(tmp_path / "few"), tokenizer="bytes").examples(1)


def test_enwik8_and_the_hub_as_tasks(tmp_path, monkeypatch):
    path = tmp_path / "enwik8"
    path.write_bytes(b"a" * 900 + b"b" * 50 + b"c" * 50)
    task = Language(data=str(path), kind="enwik8", tokenizer="bytes", segments=2, segment_length=20)
    assert [int(task.examples(1, part).input_ids[0, 0]) for part in ("train", "validation", "test")] == [*b"abc"]
    calls = []

    def load(name, part, config):
        calls.append((name, part, config))
        return [("x", part * 20)]

    monkeypatch.setattr(language, "from_hub", load)
    task = Language(data="some/set:raw", kind="hub", tokenizer="bytes", segments=2, segment_length=10)
    assert bytes(task.examples(1, "test").input_ids[0].tolist()).decode() in "test" * 20
    assert calls == [("some/set", part, "raw") for part in ("train", "validation", "test")]


# --- carrying the memory ---------------------------------------------------------------------------------------------


def made(reset_every=None, per_document=True, epochs=None):
    documents = [torch.arange(length) + 1000 * number for number, length in enumerate((70, 40, 30, 55))]
    return Stateful(DocumentStream(documents, 2, 10, seed=None, epochs=epochs), reset_every, per_document)


def test_a_memory_is_carried_or_begins_again():
    plain = DocumentStream([torch.arange(70), torch.arange(40), torch.arange(30), torch.arange(55)], 2, 10, None)
    for step in range(30):
        own, reset, only = made()[step], made(4)[step], made(4, per_document=False)[step]
        assert torch.equal(own.fresh, plain[step].fresh)
        assert torch.equal(reset.fresh, plain[step].fresh | (step % 4 == 0))
        assert only.fresh.tolist() == [step % 4 == 0] * 2
        # rows read on: what they read does not depend on resets
        assert torch.equal(own.input_ids, reset.input_ids)
        assert torch.equal(own.position, only.position)
    assert made(per_document=False)[0].fresh.tolist() == [True, True]
    assert not any(bool(made(per_document=False)[step].fresh.any()) for step in range(1, 20))


def test_rows_without_a_document_do_not_begin():
    batches = list(made(3, epochs=1))
    assert len(batches) == made(3, epochs=1).steps
    idle = [row for batch in batches for row in range(2) if batch.document[row] < 0 and batch.fresh[row]]
    assert any((batch.document < 0).any() for batch in batches)
    assert not idle
    assert made().steps is None
    with pytest.raises(ValueError, match="reset_every is 0"):
        made(0)


# --- real data -------------------------------------------------------------------------------------------------------


def test_real_wikitext():
    found = wikitext(real("text/wikitext-2/test.txt"))
    assert len(found) == 60
    assert [name for name, _ in found][:2] == ["Robert <unk>", "Du Fu"]
    assert len({text for _, text in found}) == 60
    task = Language(data=str(real("text/wikitext-2/test.txt")), kind="wikitext", tokenizer="bytes", segments=4, order=5)
    assert [len(task.documents[part]) for part in ("train", "validation", "test")] == [48, 6, 6]
    found = task.floors(20)
    assert found["n-gram, everything"] < found["n-gram, this segment"] < found["unigram"] < found["uniform"] == 8


def test_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(real("models/stories260K"))
    task = Language(tokenizer=tokenizer, segments=2)
    examples = task.examples(2, "test")
    words, segment = task._spelt(examples.input_ids[0].tolist())
    assert words[:5] == language.OPENING.split()
    assert segment == sorted(segment)
    assert set(segment) == {0, 1}
    text = tokenizer.decode(examples.input_ids[0].tolist()).strip()
    assert words == text.split()
    whole = tokenize(text, tokenizer)
    assert isinstance(whole, Tokens)
    assert int(examples.extra["bytes"][0].sum()) == int(whole.lengths[1:].sum())
