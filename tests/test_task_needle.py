"""Pass key and needles: rules, distribution, leakage, solver and floors against closed forms."""

import re
import tarfile

import pytest
import torch

from mnemic.tasks.base import TASKS, generator
from mnemic.tasks.haystack import NOISE, Book, Characters, Drawn, Markov, grid, sentences, trimmed, woven
from mnemic.tasks.needle import ADJECTIVES, NOUNS, TOLD, VALUES, NeedleTask
from mnemic.tasks.passkey import PasskeyTask
from mnemic.tasks.text import Bytes, Words, decoded, readable, runs
from task_checks import chi_square, perfect, real, words

# --- pass key --------------------------------------------------------------------------------------------------------


def test_passkey_rules():
    task = PasskeyTask()
    examples = task.examples(50)
    assert examples.input_ids.shape == (50, 640)
    for row in range(50):
        text = words(task, examples.input_ids[row, :512])
        numbers = re.findall(r"\d(?: \d){4}", text)
        assert len(numbers) == 2
        assert numbers[0] == numbers[1]
        assert numbers[0] == words(task, examples.input_ids[row][examples.asked[row]])
        assert numbers[0][0] != "0"
        assert text.startswith("somewhere in this long text")
        place = int(examples.evidence[row, 0, 0])
        assert words(task, examples.input_ids[row, place:]).startswith("the pass key is")
    assert (examples.facts == 1).all()
    assert ((examples.place == 512 + 8) & (examples.lag == 520 - examples.evidence[:, :, 0])).all()


def test_passkey_digits_are_balanced():
    task = PasskeyTask(length=128)
    examples = task.examples(1500)
    digits = examples.input_ids[examples.asked].view(1500, 5)
    for place in range(5):
        counts = digits[:, place].unique(return_counts=True)[1]
        assert len(counts) == (9 if place == 0 else 10)
        # 0.999 of chi-square with 8 and 9 degrees of freedom
        assert chi_square(counts) < (26.12 if place == 0 else 27.88)


def test_depth_is_uniform_over_gaps():
    task = PasskeyTask(length=1024)
    depth = task.examples(1000).extra["depth"][:, 0]
    counts = (depth.clamp_max(99) // 10).bincount(minlength=10)
    assert depth.min() == 0
    assert depth.max() == 100
    # 0.999 of chi-square with 9 degrees of freedom; deciles hold 14 to 15 of the 139 gaps, which adds some
    assert chi_square(counts) < 27.88 + 8


@pytest.mark.parametrize("task", [PasskeyTask, NeedleTask])
def test_fixed_depth(task):
    for depth in (0, 25, 50, 99.5, 100):
        examples = task(length=1024, depth=depth).examples(5)
        # sentences have at most 11 of 1024 tokens
        assert ((examples.extra["depth"] - depth).abs() <= 1.5).all()
    first = task(length=1024, depth=0).examples(3).evidence
    last = task(length=1024, depth=100).examples(3).evidence
    assert (first < 60 + 10).all()
    assert (last > 1024 - 90).all()


def test_grid():
    cells = grid([128, 256], [0, 50, 100], segment_length=64)
    assert len(cells) == 6
    assert cells[1] == {"segment_length": 64, "length": 128, "depth": 50}
    assert {(cell["length"], cell["depth"]) for cell in cells} == {(n, d) for n in (128, 256) for d in (0, 50, 100)}
    assert len(grid([512])) == 11
    for cell in cells:
        assert TASKS["passkey"](**cell).examples(1).input_ids.shape == (1, cell["length"] + 64)


def test_passkey_reads_what_it_sees():
    """Three digits from the first time it was told and two from the second make the whole number."""
    task = PasskeyTask()
    examples = task.examples(30, "test")
    seen = torch.zeros_like(examples.asked)
    for row, place in enumerate(examples.evidence[:, 0, 0].tolist()):
        # "the pass key is d d d d d . keep it : d d d d d is the pass key ."
        seen[row, place : place + 7] = True
        seen[row, place + 16 : place + 22] = True
    assert task.score(task.solve(examples, seen), examples) == 1
    assert task.score(task.solve(examples, torch.zeros_like(seen)), examples) == 0


def test_passkey_floors():
    """Of 512 tokens of context the last segment has a quarter; the line must lie in it whole."""
    floors = PasskeyTask().floors(200)
    assert floors["oracle"] == 1
    assert floors["uniform"] == 1 / 90_000
    # three standard deviations of a share of 200
    assert abs(floors["last segment"] - 0.25) < 0.095
    assert abs(floors["last 2 segments"] - 0.5) < 0.11
    assert floors["majority"] < 0.01


def test_a_million_tokens():
    task = PasskeyTask(length=2**20, segment_length=2**10, depth=40)
    assert perfect(task, 1) == 1


# --- needles ---------------------------------------------------------------------------------------------------------


def test_words_are_apart():
    """No word is two things, and no noise has a word of a key or a value."""
    lists = (ADJECTIVES, NOUNS, VALUES)
    assert all(len(set(each)) == len(each) for each in lists)
    assert len(set().union(*lists)) == sum(map(len, lists))
    noise = set(re.findall(r"\w+", " ".join(NOISE).lower()))
    assert noise.isdisjoint(set().union(*lists))
    assert len(VALUES) == 128


def test_needle_rules():
    task = NeedleTask(keys=5, per_key=2, queries=2, segment_length=256, length=1024)
    examples = task.examples(40)
    assert examples.evidence.shape == (40, 4, 1)
    assert (examples.facts == 10).all()
    for row in range(40):
        told = TOLD.findall(words(task, examples.input_ids[row, :1024]))
        assert len(told) == 10
        assert len({(a, b) for a, b, _ in told}) == 5
        values = {}
        for a, b, value in told:
            values.setdefault(f"{a} - {b}", []).append(value)
        assert all(len(set(each)) == 2 for each in values.values())
        question = words(task, examples.input_ids[row, 1024:])
        keys = re.findall(r"for (\w+ - \w+) were told", question)
        assert len(set(keys)) == 2
        # in the order in which they were told
        answers = [words(task, examples.input_ids[row][examples.answer[row] == n]) for n in range(4)]
        assert answers == values[keys[0]] + values[keys[1]]
        for n, place in enumerate(examples.evidence[row, :, 0].tolist()):
            line = words(task, examples.input_ids[row, place : place + 20])
            assert line.startswith(f"a special number for {keys[n // 2]} is {answers[n]} .")


def test_no_filler_is_a_needle():
    """In 10,000 streams nothing but needles names a key, and the key that is asked is told once."""
    task = NeedleTask(length=64, segment_length=32, keys=2, values="word")
    examples = task.examples(10_000)
    adjectives = torch.tensor(task._encoder.encode(" ".join(ADJECTIVES)))
    nouns = torch.tensor(task._encoder.encode(" ".join(NOUNS)))
    values = torch.tensor(task._encoder.encode(" ".join(VALUES)))
    context = examples.input_ids[:, :64]
    for kind in (adjectives, nouns, values):
        assert (torch.isin(context, kind).sum(1) == 2).all()
    asked = torch.isin(examples.input_ids[:, 64:], nouns)
    assert (asked.sum(1) == 1).all()
    noun = examples.input_ids[:, 64:][asked]
    adjective = examples.input_ids[:, 64:][torch.isin(examples.input_ids[:, 64:], adjectives)]
    # the key is its adjective, "-" and its noun
    told = (context[:, 2:] == noun[:, None]) & (context[:, :-2] == adjective[:, None])
    assert (told.sum(1) == 1).all()


def test_word_values_are_balanced():
    task = NeedleTask(length=64, segment_length=32, keys=1, values="word")
    examples = task.examples(2560)
    counts = examples.input_ids[examples.asked].unique(return_counts=True)[1]
    # 0.999 of chi-square with 127 degrees of freedom
    assert len(counts) == 128
    assert chi_square(counts) < 181.99


def test_needle_floors():
    floors = NeedleTask(values="word").floors(200)
    # a needle of 9 tokens begins in the last of 4 segments, or else it is one of 128 words
    expected = 0.25 + 0.75 / 128
    assert floors["oracle"] == 1
    assert floors["uniform"] == 1 / 128
    assert abs(floors["last segment"] - expected) < 0.095
    assert floors["majority"] < 0.05


def test_last_values_in_a_window():
    """A window holds the last values of a key, and the solver knows that they are the last."""
    task = NeedleTask(keys=1, per_key=2, length=512)
    examples = task.examples(300, "test")
    alone = (examples.evidence[:, 0, 0] < 384) & (examples.evidence[:, 1, 0] >= 384)
    right = task.right(task.solve(examples, task.last(examples, 1)), examples).view(300, 2)[alone]
    assert alone.sum() > 50
    assert right[:, 1].all()
    assert not right[:, 0].any()


def test_needles_all_around():
    task = NeedleTask(haystack="needles", length=2048, segment_length=256)
    examples = task.examples(4)
    text = words(task, examples.input_ids[0, :2048])
    keys = [key[:2] for key in TOLD.findall(text)]
    assert len(keys) == len(set(keys)) == int(examples.facts[0]) > 100
    assert perfect(task) == 1
    assert "river" not in text


def test_markov():
    task = NeedleTask(haystack="markov", keys=3)
    examples = task.examples(300)
    for row in examples.input_ids:
        text = "".join(task.text(row.tolist()))
        assert text.count("@") == 4
        assert len(set(re.findall(r"@(\w\w)=\d{4};", text[:512]))) == 3
        assert re.fullmatch(r"[a-z ]*(@[a-z]{2}=\d{4};[a-z ]*){3}", text[:512])
    assert perfect(task) == 1
    assert perfect(NeedleTask(haystack="markov", keys=4, per_key=2, queries=3)) == 1
    digits = examples.input_ids[examples.asked]
    # 0.999 of chi-square with 9 degrees of freedom
    assert chi_square(digits.unique(return_counts=True)[1]) < 27.88


def test_markov_chain_has_the_text_in_it():
    """Every three letters in a row are three letters in a row of its text, as often as there."""
    text = " ".join(NOISE)
    chain, signs = Markov(text, Characters()), Characters()
    drawn = "".join(signs.pieces([token for (token,) in chain.take(20_000, generator(1), "train")]))
    flat = re.sub("[^a-z]+", " ", text.lower())
    ring = flat + flat[:2]
    assert {drawn[n : n + 3] for n in range(len(drawn) - 2)} <= {ring[n : n + 3] for n in range(len(flat))}
    after = [ring[n + 2] for n in range(len(flat)) if ring[n : n + 2] == "he"]
    found = [drawn[n + 2] for n in range(len(drawn) - 2) if drawn[n : n + 2] == "he"]
    assert abs(found.count(" ") / len(found) - after.count(" ") / len(after)) < 0.08


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
@pytest.mark.parametrize(
    "settings",
    [
        {"length": 1024, "segment_length": 512, "keys": 1},
        {"length": 768, "segment_length": 256, "keys": 7, "queries": 2, "values": "word"},
        {"length": 2048, "segment_length": 512, "keys": 3, "queries": 3, "per_key": 3, "values": "word"},
        {"length": 1536, "segment_length": 512, "keys": 2, "haystack": "needles", "depth": 30},
    ],
)
def test_oracle(tokenizer, settings):
    assert perfect(NeedleTask(tokenizer=tokenizer, **settings)) == 1


def test_measures_know_other_needles():
    task = NeedleTask(keys=3)
    examples = task.examples(20, "test")
    assert task.measures(task.solve(examples), examples) == {"another needle": 0, "all values": 1}
    other = torch.zeros_like(examples.labels)
    for row in range(20):
        text = task.text(examples.input_ids[row].tolist())
        mine = text[int(examples.place[row, 0]) :][:7]
        values = [value.split() for _, _, value in TOLD.findall(" ".join(text[:512]))]
        wrong = next(value for value in values if value != mine)
        other[row][examples.asked[row]] = torch.tensor(task._encoder.encode(" ".join(wrong)))
    assert task.measures(other, examples) == {"another needle": 1, "all values": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 100}, "length is 100 and segment_length 128; the context must be whole segments"),
        ({"length": 0}, "whole segments"),
        ({"depth": 101}, "depth is 101; use None for any, or per cent"),
        ({"keys": 2, "queries": 3}, "keys is 2, queries 3"),
        ({"keys": 200}, "length is 512; what is told needs"),
        ({"segment_length": 16}, "segment_length is 16; use more"),
        ({"values": "uuid"}, "values is 'uuid'; use one of number, word"),
        ({"haystack": "hay"}, "use one of noise, needles, essay, markov"),
        ({"haystack": "essay"}, '"essay" needs texts'),
        ({"data": "x", "haystack": "noise"}, '"essay" needs texts'),
        ({"data": "x", "haystack": "essay"}, "has no words of other texts"),
        ({"haystack": "markov", "tokenizer": "bytes"}, "leave tokenizer and values alone"),
        ({"haystack": "needles", "length": 2**20}, "there are keys for"),
        ({"tokenizer": "letters"}, "tokenizer is 'letters'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NeedleTask(**settings)


@pytest.mark.parametrize(
    "settings", [{"length": 64, "segment_length": 64, "depth": -1}, {"length": 32, "segment_length": 32}]
)
def test_bad_passkey_settings(settings):
    with pytest.raises(ValueError, match=r"depth is -1|what is told needs \d+ tokens"):
        PasskeyTask(**settings)


# --- haystacks -------------------------------------------------------------------------------------------------------


def test_woven():
    hay = [[1, 2], [3], [4, 5]]
    assert woven(hay, [[8], [9, 9]], [3, 0]) == ([9, 9, 1, 2, 3, 4, 5, 8], [7, 0])
    assert woven(hay, [[8], [9]], [1, 1]) == ([1, 2, 8, 9, 3, 4, 5], [2, 3])
    assert trimmed(hay, 4) == [[1, 2], [3], [4]]
    assert trimmed(hay, 3) == [[1, 2], [3]]


def test_drawn():
    hay = Drawn([[1], [2, 2]], cycle=True)
    assert hay.take(4, generator(0), "train") == [[1], [2, 2], [1]]
    assert sum(map(len, Drawn([[1, 1, 1]]).take(7, generator(0), "train"))) == 9


def test_readable():
    some = Words(["one two three"])
    assert readable(some, some.encode("one two three"), [True, False, True]) == "one\nthree"
    assert readable(Bytes(), list(b"Abc"), [True, True, False]) == "ab"
    assert decoded(some, []) == ""
    assert runs([True, False, True, True]) == [(0, 1), (2, 4)]


def test_sentences():
    text = 'Mr. Brown came. "So?" he said. "Yes!" And J. Smith\nwent home.\n\nCHAPTER TWO\n\nIt rained 3.5 inches. Oh'
    assert sentences(text) == [
        "Mr. Brown came.",
        '"So?" he said.',
        '"Yes!"',
        "And J. Smith went home.",
        "CHAPTER TWO",
        "It rained 3.5 inches.",
        "Oh",
    ]


def test_books_divide_texts(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text("Short one. " + f"The text number {number} goes on. " * 40)
    book = Book(str(tmp_path), Bytes(), shortest=12)
    assert book.shares["test"] == [9]
    assert book.shares["validation"] == [8]
    assert len(book.shares["train"]) == 10
    for split, allowed in book.shares.items():
        drawn = {bytes(each).decode() for each in book.take(3000, generator(0), split)}
        assert {int(re.findall(r"\d+", each)[0]) for each in drawn} <= set(allowed)
        assert all("Short" not in each for each in drawn)
    with pytest.raises(ValueError, match="has too few sentences"):
        Book(str(tmp_path), Bytes(), barred=lambda sentence: True).take(10, generator(0), "test")
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        tar.add(tmp_path / "01.txt", "01.txt")
    with pytest.raises(ValueError, match="has 1 texts"):
        Book(str(tmp_path / "one.tar"), Bytes())


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["models/stories260K", "tokenizers/gpt2"])
def test_real_tokenizers(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real(folder))
    assert perfect(PasskeyTask(length=512, segment_length=256, tokenizer=tokenizer)) == 1
    for values in ("number", "word"):
        task = NeedleTask(length=1024, segment_length=256, tokenizer=tokenizer, values=values, per_key=2, queries=2)
        assert perfect(task, 10) == 1


def test_real_essays():
    task = NeedleTask(
        length=4096, segment_length=256, haystack="essay", tokenizer="bytes", data=str(real("text/novels.tar.xz"))
    )
    examples = task.examples(3, "test")
    assert task.score(task.solve(examples), examples) == 1
    text = words(task, examples.input_ids[0])
    assert len(set(text.split())) > 20
