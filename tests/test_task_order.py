"""Order recall: the rules, read again from the text; exact balance, even positions, and books of one's own."""

from __future__ import annotations

import itertools
import re
import tarfile
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mnemic.tasks.base import TASKS, generator
from mnemic.tasks.order import EXCERPTS, FRAGMENTS, OrderTask, body, edges, sentences, story
from task_checks import kolmogorov, real

QUESTION = re.compile(r"which came (first|last) \? a : (.*) b : (.*) answer : ([ab])")


def shelf(tmp_path, books=10, count=90):
    tmp_path.mkdir(exist_ok=True)
    for number in range(books):
        text = story(count, generator(100 + number)).replace(". ", ".\n")
        (tmp_path / f"book-{number}.txt").write_text(f"{text}\n")
    return str(tmp_path)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"ask": "last", "fragment": 3, "segments": 3}, {"segments": 20}])
def test_rules(settings):
    task = OrderTask(**settings)
    examples = task.examples(48)
    length = task.segments * 48
    assert examples.input_ids.shape == (48, length + 48)
    for row in range(48):
        tokens = task.text(examples.input_ids[row].tolist())
        text = " ".join(tokens[:length])
        asks, one, other, answer = QUESTION.match(" ".join(tokens[length:])).groups()
        assert asks == task.ask
        assert text.count(f" {one} ") + text.startswith(one) == text.count(f" {other} ") + text.startswith(other) == 1
        first = one if text.find(one) < text.find(other) else other
        assert ("a" if (one if task.ask == "first" else other) == first else "b") == answer
        # fragments are words that follow each other within the whole sentences
        words = [word for word in tokens[:length] if word != "."]
        begins = [len([t for t in tokens[:at] if t != "."]) for at in examples.evidence[row, 0].tolist()]
        for begin, fragment in zip(begins, (first, other if first == one else one), strict=True):
            assert words[begin : begin + task.fragment] == fragment.replace(" .", "").split()
        extra = {name: int(numbers[row, 0]) for name, numbers in examples.extra.items()}
        assert begins == [extra["first word"], extra["first word"] + extra["distance"]]
        last = max(at for at, word in enumerate(tokens[:length]) if word == ".")
        assert extra["words"] == len([word for word in tokens[:last] if word != "."])
        assert begins[1] + task.fragment <= extra["words"]
        assert examples.facts[row] == tokens[:length].count(".")
        edge = edges(extra["words"], task.fragment)
        assert edge[extra["bin"]] + (extra["bin"] > 0) <= extra["distance"] <= edge[extra["bin"] + 1]


def test_edges():
    assert EXCERPTS == (250, 1000, 2500, 10000, 20000)
    assert FRAGMENTS == (20, 50)
    assert edges(250, 20) == [20, 62, 83, 125, 200]
    assert edges(2500, 50) == [50, 625, 833, 1250, 2000]
    assert edges(10000, 50) == [50, 1000, 2500, 5000, 8000]
    assert edges(20000, 20) == [20, 1000, 5000, 10000, 16000]
    for fragment in range(1, 60):
        for words in range(max(5 * fragment, 16), 6000, 7):
            edge = edges(words, fragment)
            # no bin is empty, and the farthest fragments fit
            assert all(low < high for low, high in itertools.pairwise(edge))
            assert edge[-1] + fragment <= words


def test_sides_are_exactly_balanced():
    task = OrderTask(segments=3, fragment=4)
    for number, rows in enumerate((8, 40, 64)):
        examples = task.examples(rows, number=number)
        side = examples.labels[examples.asked]
        counts = Counter(zip(side.tolist(), examples.extra["bin"].flatten().tolist(), strict=True))
        assert set(counts.values()) == {rows // 8}
        assert len(counts) == 8
    odd = task.examples(9).labels
    assert abs((odd[odd >= 0] == odd.max()).long().sum() * 2 - 9) == 1
    # single rows are fair too: 4 standard deviations of a coin
    single = torch.stack([task.examples(1, number=number).labels.amax() for number in range(400)])
    assert abs(float((single == single.max()).double().mean()) - 0.5) < 4 * 0.025


def test_positions_are_even():
    task = OrderTask(segments=6, fragment=4)
    first, distance, source = [], [], generator(0)

    def luck():
        return float(torch.rand((), generator=source))

    for number in range(2):
        extra = task.examples(1000, number=number).extra
        columns = (extra[name].flatten().tolist() for name in ("words", "distance", "first word", "bin"))
        for words, gap, begin, place in zip(*columns, strict=True):
            # whole numbers, spread evenly over the room that each has
            first.append((begin + luck()) / (words - 4 - gap + 1))
            low, high = edges(words, 4)[place : place + 2]
            low += place > 0
            distance.append((gap - low + luck()) / (high - low + 1))
    assert kolmogorov(first) < 1.95
    assert kolmogorov(distance) < 1.95
    # the test can fail
    assert kolmogorov([share**1.2 for share in first]) > 1.95


def test_no_fragment_stands_twice():
    # 10,000 streams of a short fragment, which would often be there twice
    task, doubles = OrderTask(segments=2, fragment=2, segment_length=24), 0
    words = task.text(range(task.vocabulary))
    for number in range(5):
        for row in task.examples(2000, number=number).input_ids.tolist():
            tokens = [words[token] for token in row]
            text, question = " ".join(["", *tokens[:48], ""]), " ".join(tokens[48:])
            for fragment in QUESTION.match(question).groups()[1:3]:
                doubles += text.count(f" {fragment} ") != 1
    assert doubles == 0


def test_one_question_for_first_and_last():
    first, last = (OrderTask(ask=ask).examples(16) for ask in ("first", "last"))
    assert torch.equal(first.labels, last.labels)
    assert torch.equal(first.input_ids[:, :384], last.input_ids[:, :384])
    assert not torch.equal(first.input_ids[:, 384:], last.input_ids[:, 384:])


# --- floors ----------------------------------------------------------------------------------------------------------


def test_floors():
    task = OrderTask(segments=6)
    floors = task.floors(400)
    assert floors["oracle"] == 1
    assert floors["uniform"] == 0.5
    assert floors["majority"] == 0.5
    examples = task.examples(400, "test")
    for segments in (0, 1, 2):
        right = task.right(task.solve(examples, task.last(examples, segments)), examples).double()
        seen = examples.evidence[:, 0] >= (6 - segments) * 48
        gone = examples.evidence[:, 0] + 10 < (6 - segments) * 48
        # the later one in view: what is not seen came before it. None in view: a coin
        assert bool(right[seen[:, 1]].all())
        blind = right[gone.all(1)]
        assert abs(float(blind.mean()) - 0.5) < 4 * 0.5 / len(blind) ** 0.5
        if segments:
            wanted = 0.5 + float(seen[:, 1].double().mean()) / 2
            assert floors["last segment" if segments == 1 else "last 2 segments"] == pytest.approx(wanted, abs=0.09)
    assert 0.5 - 0.1 < floors["sample of 48 tokens"] < floors["last 2 segments"] + 0.1


def test_a_fragment_at_the_edge_of_what_is_seen():
    task = OrderTask(segments=6)
    examples = task.examples(400)
    cut = examples.evidence[:, 0, 1] // 48 * 48
    inside = examples.evidence[:, 0, 1] - cut
    # the later fragment begins three words before what is seen does, and the other is not seen
    rows = (inside >= 42) & (inside <= 44) & (examples.evidence[:, 0, 0] + 10 < cut)
    seen = torch.arange(7 * 48) >= (cut + 48)[:, None]
    right = task.right(task.solve(examples, seen), examples)
    assert int(rows.sum()) > 5
    assert bool(right[rows].all())


def test_measures():
    task = OrderTask(segments=3, fragment=4)
    examples = task.examples(80)
    assert task.measures(examples.labels, examples) == {f"bin {place}": 1 for place in range(4)}
    wrong = examples.labels.clone()
    wrong[examples.extra["bin"][:, 0] == 2] = 0
    assert task.measures(wrong, examples) == {"bin 0": 1, "bin 1": 1, "bin 2": 0, "bin 3": 1}


# --- texts -----------------------------------------------------------------------------------------------------------


def test_sentences():
    text = "\u201cYes!\u201d He met Mr. Fox and Dr. J. Bell. Then? \u201cNo,\u201d said St. John. so what. _Why?_ End"
    begins = sentences(text.split())
    words = text.split()
    assert [words[begin] for begin in begins[:-1]] == [
        "\u201cYes!\u201d",
        "He",
        "Then?",
        "\u201cNo,\u201d",
        "_Why?_",
        "End",
    ]
    assert begins[-1] == len(words)
    assert sentences([]) == [0]


def test_licence():
    start, end = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK A BOOK ***" for word in ("START", "END"))
    assert body(f"Header\n{start}\nText.\n{end}\nMore") == "\nText.\n"
    assert body("No mark. *** Stars ***") == "No mark. *** Stars ***"


def byte_pairs(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=["<pad>"], initial_alphabet=letters
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.mark.parametrize("kind", ["bytes", "pairs"])
def test_books(tmp_path, kind):
    path = shelf(tmp_path)
    tokenizer = "bytes" if kind == "bytes" else byte_pairs((tmp_path / "book-0.txt").read_text())
    task = OrderTask(3, 300, 6, tokenizer=tokenizer, data=path)
    splits = {split: task.books(split) for split in ("train", "validation", "test")}
    assert [len(books) for books in splits.values()] == [8, 1, 1]
    assert len({name for books in splits.values() for name in books}) == 10
    for split, books in splits.items():
        examples = task.examples(24, split)
        assert task.score(task.solve(examples), examples) == 1
        texts = [" ".join((tmp_path / f"{name}.txt").read_text().split()) for name in books]
        for row in examples.input_ids[:, :900].tolist():
            read = "".join(task.text(row)).strip() if kind == "bytes" else tokenizer.decode(row).strip()
            assert any(read in text for text in texts)
            assert re.match(r"(The|At|In|Near) ", read)
    # the division is the same for other settings
    assert OrderTask(4, 200, 3, tokenizer="bytes", data=path).books("test") == splits["test"]


def test_books_from_an_archive(tmp_path):
    path = shelf(tmp_path / "books")
    with tarfile.open(tmp_path / "books.tar.xz", "w:xz") as tar:
        tar.add(path, "books")
    one, other = (
        OrderTask(3, 300, 6, tokenizer="bytes", data=str(each)).examples(8)
        for each in (path, tmp_path / "books.tar.xz")
    )
    assert torch.equal(one.input_ids, other.input_ids)


def test_a_chorus_is_not_asked_for(tmp_path):
    chorus = "And so we sing the same old song again. " * 3
    for number in range(3):
        lines = story(40, generator(number)).split(". ")
        (tmp_path / f"{number}.txt").write_text(chorus.join(f"{line}. " for line in lines))
    task = OrderTask(8, 200, 6, tokenizer="bytes", data=str(tmp_path))
    examples = task.examples(40)
    assert task.score(task.solve(examples), examples) == 1
    for row, places in zip(examples.input_ids[:, :1600].tolist(), examples.evidence[:, 0].tolist(), strict=True):
        text = bytes(row).decode()
        for place in places:
            fragment = " " + " ".join(text[place:].split()[:6])
            assert text.count(fragment) == 1 or len(text) - place < 80


def test_bad_books(tmp_path):
    with pytest.raises(FileNotFoundError):
        OrderTask(tokenizer="bytes", segment_length=256, data=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has 2 texts"):
        OrderTask(tokenizer="bytes", segment_length=256, data=shelf(tmp_path, 2))
    short = OrderTask(100, 256, tokenizer="bytes", data=shelf(tmp_path / "more"))
    with pytest.raises(ValueError, match="no train book has 25600 tokens"):
        short.examples(2)
    for number in range(3):
        folder = tmp_path / "same"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text("The cat sat on the mat again. " * 400)
    with pytest.raises(ValueError, match="in 200 excerpts no two fragments"):
        OrderTask(tokenizer="bytes", segment_length=256, data=str(folder)).examples(1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"segments": 0}, "segments is 0"),
        ({"fragment": 0}, "fragment 0"),
        ({"ask": "middle"}, "ask is 'middle'"),
        ({"segment_length": 20}, "segment_length is 20; two fragments of 8 words and their question take some"),
        ({"fragment": 20}, "shorter fragments"),
        ({"segments": 1}, "1 segments of 48 tokens are some 4. words; .* use more segments"),
        ({"tokenizer": "characters", "segment_length": 500}, "tokenizer is 'characters'"),
        ({"data": "books"}, 'tokenizer "words" knows the own world only'),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        OrderTask(**settings)


def test_registered():
    assert TASKS["order"] is OrderTask


# --- Book-SORT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("excerpt", "fragment"), [(250, 20), (2500, 50)])
def test_book_sort(excerpt, fragment):
    task = OrderTask.published(str(real("text/book-sort.tar.xz")), excerpt, fragment, 1024 if fragment == 50 else 512)
    assert [len(task.books(split)) for split in ("train", "validation", "test")] == [7, 1, 1]
    examples = task.examples(80, "test")
    assert task.score(task.solve(examples), examples) == 1
    words = examples.extra["words"].double()
    assert float(words.mean()) == pytest.approx(excerpt, rel=0.15)
    assert set(examples.extra["bin"].flatten().tolist()) == {0, 1, 2, 3}
    for row in range(4):
        text = bytes(examples.input_ids[row].tolist()).rstrip(b"\0").decode(errors="replace")
        assert "PROJECT GUTENBERG" not in text
        question = text[text.index("Which came first? A:") :]
        one, other = question[21 : question.rindex(" Answer:")].split(" B: ")
        assert len(one.split()) == len(other.split()) == fragment
        assert text.count(f" {one}") == text.count(f" {other}") == 2
        assert (text.index(one) < text.index(other)) == question.endswith("A")


def test_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(real("models/stories260K"))
    task = OrderTask(4, 250, tokenizer=tokenizer)
    examples = task.examples(40)
    assert task.score(task.solve(examples), examples) == 1
