"""Long documents: reading them, their tokens and bytes, rows that stay with their document, and classification."""

from __future__ import annotations

import math
import os
import tarfile

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mnemic.tasks import documents
from mnemic.tasks.documents import DocumentStream, Tokens, hyperpartisan, macro_f1, novels, split, tokenize
from mnemic.unrolling import IGNORED
from task_checks import real

TEXT = "The café was naïve.\n\nA ☕ and two\n  more lines 🙂🙂,\nthe end\n\n" * 6


def pack(folder, archive, mode="w:xz"):
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, folder.name)
    return archive


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes("\ufeffOne\r\ntwo é\r\n".encode())
    (folder / "a.b.txt").write_bytes(b"first")
    (folder / "deep" / "c.txt").write_bytes(b"deep\n\n")
    (folder / ".hidden.txt").write_bytes(b"\xff")
    (folder / "readme.md").write_bytes(b"\xff")
    return folder


WANTED = [("a.b", "first"), ("b", "One\ntwo é\n"), ("deep/c", "deep\n\n")]


@pytest.mark.parametrize("kind", ["folder", "xz", "gz", ""])
def test_novels(shelf, tmp_path, kind):
    path = shelf if kind == "folder" else pack(shelf, tmp_path / f"texts.{kind}", f"w:{kind}")
    assert novels(path) == WANTED
    assert novels(str(path)) == WANTED


def test_one_novel(shelf, tmp_path):
    assert novels(shelf / "b.txt") == WANTED[1:2]
    assert novels(pack(shelf / "deep", tmp_path / "one.tar.xz")) == [("c", "deep\n\n")]


def test_novels_that_cannot_be_read(shelf, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none does not exist; pass a folder, a tar archive or a \.txt file"):
        novels(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.txt file"):
        novels(tmp_path / "empty")
    with pytest.raises(ValueError, match="is not a tar archive"):
        novels(shelf / "readme.md")
    (shelf / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 \(byte 3\)"):
        novels(shelf)


def test_a_damaged_archive(shelf, tmp_path):
    (shelf / "long.txt").write_bytes(os.urandom(100_000).hex().encode())
    archive = pack(shelf, tmp_path / "texts.tar.xz")
    archive.write_bytes(archive.read_bytes()[:60_000])
    with pytest.raises(ValueError, match=r"is not a tar archive, or a damaged one .* pass a folder"):
        novels(archive)


# --- tokens and bytes ------------------------------------------------------------------------------------------------


def byte_level():
    """As GPT-2: a token a byte, spaces belong to the word behind them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ċ", "Ċ")]
    vocabulary |= {"".join(pair): len(letters) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece():
    """As Llama: a space goes before the text, spaces are letters, letters it does not know are bytes."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set("abdefhilmnorstuwTA.,cv"))]
    vocabulary = {letter: index for index, letter in enumerate([*letters, "▁t", "he"])}
    bpe = models.BPE(vocabulary, [("▁", "t"), ("h", "e")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def by_words():
    words = ["[UNK]", "The", "the", "end", "A", "and", "two", "more", "lines"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


every_tokenizer = pytest.mark.parametrize(
    "tokenizer", [byte_level(), sentence_piece(), by_words()], ids=["bytes", "pieces", "words"]
)


@every_tokenizer
@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_chunks_make_the_tokens_of_the_whole_text(tokenizer, chunk):
    tokens = tokenize(TEXT, tokenizer, chunk)
    assert tokens.ids.tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert int(tokens.lengths.sum()) == len(TEXT.encode())
    assert tokens.lengths.min() >= 0
    assert len(tokens) == len(tokens.ids) == len(tokens.lengths)
    assert torch.equal(tokens.lengths, tokenize(TEXT, tokenizer).lengths)


def test_a_token_has_its_bytes():
    text = "the é a"
    tokens = tokenize(text, byte_level())
    pieces = byte_level().convert_ids_to_tokens(tokens.ids.tolist())
    assert pieces == ["the", "Ġ", "Ã", "©", "Ġa"]
    assert tokens.lengths.tolist() == [3, 1, 2, 0, 2]


def test_bytes_are_a_tokenizer():
    tokens = tokenize(TEXT)
    assert bytes(tokens.ids.tolist()).decode() == TEXT
    assert tokens.lengths.tolist() == [1] * len(TEXT.encode())
    assert len(tokenize("")) == len(tokenize("", byte_level())) == 0


def test_tokenizers_that_do_not_do():
    with pytest.raises(ValueError, match="tokenizer is 'gpt2'; use \"bytes\""):
        tokenize(TEXT, "gpt2")
    with pytest.raises(ValueError, match="bytes cannot be counted; load the fast tokenizer"):
        tokenize(TEXT, object())
    with pytest.raises(ValueError, match="makes no token of"):
        tokenize(" \n ", by_words())


def test_bits_per_byte():
    assert documents.bits_per_byte(80 * math.log(2), 10) == pytest.approx(8)
    with pytest.raises(ValueError, match="n_bytes is 0"):
        documents.bits_per_byte(1.0, 0)


# --- documents in order ----------------------------------------------------------------------------------------------


def books(*lengths):
    """Documents whose tokens tell which they are and at what place."""
    return [torch.arange(length) + 1000 * number for number, length in enumerate(lengths)]


def test_rows_stay_with_their_document():
    stream = DocumentStream(books(35, 9, 20, 41, 10, 12), rows=2, segment=10, seed=3)
    before, read = [None, None], [0] * 6
    for step in range(200):
        batch = stream[step]
        assert batch.input_ids.shape == batch.targets.shape == (2, 10)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
        for row in range(2):
            ids, position, book = batch.input_ids[row].tolist(), int(batch.position[row]), int(batch.document[row])
            first = 1000 * book + 10 * position
            assert ids == list(range(first, first + 10))
            assert bool(batch.fresh[row]) == (position == 0)
            if position:
                assert (book, position - 1) == before[row]
            else:
                assert before[row] is None or before[row][1] == [3, -1, 2, 4, 1, 1][before[row][0]] - 1
                read[book] += 1
            before[row] = book, position
    assert read[1] == 0, "too short, yet read"
    others = [read[book] for book in (0, 2, 3, 4, 5)]
    assert max(others) - min(others) <= 2
    assert stream.segments == 11


def test_the_order_is_that_of_the_seed():
    def order(seed, count=15):
        stream = DocumentStream(books(*[10] * 5), rows=1, segment=10, seed=seed)
        return [int(stream[step].document) for step in range(count)]

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5
    assert order(None) == [0, 1, 2, 3, 4] * 3
    chosen = order(0)
    for epoch in range(3):
        assert sorted(chosen[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert chosen[:5] != chosen[5:10]


def test_steps_can_be_asked_for_in_any_order():
    made = {"documents": books(35, 20, 41, 10, 12, 55), "rows": 3, "segment": 5}
    forward, back = DocumentStream(**made), DocumentStream(**made)
    some = [forward[step] for step in range(60)]
    for step in reversed(range(60)):
        for name, value in vars(back[step]).items():
            assert torch.equal(value, getattr(some[step], name)), name


def test_one_epoch_reads_everything_once():
    stream = DocumentStream(books(35, 9, 20, 41, 10), rows=2, segment=10, seed=None, epochs=1)
    batches = list(stream)
    assert len(batches) == stream.steps == 6
    assert [batch.document.tolist() for batch in batches] == [[0, 2], [0, 2], [0, 3], [4, 3], [-1, 3], [-1, 3]]
    assert [batch.position.tolist() for batch in batches] == [[0, 0], [1, 1], [2, 0], [0, 1], [-1, 2], [-1, 3]]
    assert [batch.fresh.tolist() for batch in batches][-2:] == [[False, False]] * 2
    assert (batches[-1].targets[0] == IGNORED).all()
    assert not batches[-1].input_ids[0].any()
    for step in (-1, 6):
        with pytest.raises(IndexError, match=f"no step {step}; the last is 5"):
            stream[step]
    assert DocumentStream(books(10), 1, 10).steps is None


def test_targets_are_the_next_tokens_with_their_bytes():
    ids = torch.arange(25)
    stream = DocumentStream([Tokens(ids, ids + 100)], rows=2, segment=10, epochs=1)
    first, second = stream
    assert first.targets[0].tolist() == list(range(1, 11))
    assert second.targets[0].tolist() == [*range(11, 20), IGNORED]
    assert first.target_bytes[0].tolist() == list(range(101, 111))
    assert second.target_bytes[0].tolist() == [*range(111, 120), 0]
    assert not first.target_bytes[1].any()
    assert first.document.tolist() == [0, -1]


def test_every_byte_behind_the_first_token_is_scored_once():
    tokens = tokenize(TEXT, byte_level())
    used = len(tokens) // 7 * 7
    batches = list(DocumentStream([tokens], 1, 7, epochs=1))
    assert sum(int(batch.target_bytes.sum()) for batch in batches) == int(tokens.lengths[1:used].sum())
    assert sum(int((batch.targets != IGNORED).sum()) for batch in batches) == used - 1


def test_streams_that_cannot_be():
    with pytest.raises(ValueError, match=r"no document fills a segment of 10 tokens \(the longest has 9\)"):
        DocumentStream(books(3, 9), 1, 10)
    with pytest.raises(ValueError, match="rows is 0"):
        DocumentStream(books(30), 0, 10)
    with pytest.raises(ValueError, match=r"document 1 is \[2, 3\] torch.int64; give 1-D token ids"):
        DocumentStream([torch.arange(9), torch.zeros(2, 3, dtype=torch.long)], 1, 4)
    with pytest.raises(ValueError, match="float32"):
        DocumentStream([torch.zeros(9)], 1, 4)


# --- classification --------------------------------------------------------------------------------------------------

ARTICLES = """<?xml version="1.0" encoding="UTF-8"?><articles>
<article id="0000000" title="T"><p>One &amp;amp; <a href="x">two</a></p>
 <p>three\u00a0four</p></article><article id="0000001" title="U">Plain</article></articles>"""
LABELS = """<articles><article hyperpartisan="false" id="0000001" url="u"/>
<article hyperpartisan="true" id="0000000" url="u"/></articles>"""


@pytest.fixture
def news(tmp_path):
    folder = tmp_path / "news"
    folder.mkdir()
    (folder / "articles-training-byarticle-20181122.xml").write_text(ARTICLES, encoding="utf-8")
    (folder / "ground-truth-training-byarticle-20181122.xml").write_text(LABELS, encoding="utf-8")
    (folder / "article.xsd").write_text("<x>")
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_hyperpartisan(news, tmp_path, packed):
    path = pack(news, tmp_path / "news.tar.xz") if packed else news
    assert hyperpartisan(path) == [("One & two three four", True), ("Plain", False)]


def test_hyperpartisan_without_its_files(news, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none does not exist; pass the archive or folder of SemEval-2019"):
        hyperpartisan(tmp_path / "none")
    truth = news / "ground-truth-training-byarticle-20181122.xml"
    truth.write_text(LABELS.replace("0000001", "0000002"))
    with pytest.raises(ValueError, match="the 2 articles and the 2 labels are not of the same ids"):
        hyperpartisan(news)
    truth.unlink()
    with pytest.raises(ValueError, match="lacks the file of ground-truth; pass the archive"):
        hyperpartisan(news)


def test_split_by_strata():
    items = list(range(645))
    labels = [item % 8 < 3 for item in items]
    parts = split(items, seed=1, strata=labels)
    assert sorted(parts.train + parts.validation + parts.test) == items
    assert (len(parts.validation), len(parts.test)) == (64, 64)
    assert [sum(labels[item] for item in part) for part in (parts.validation, parts.test)] == [24, 24]
    assert parts == split(items, seed=1, strata=labels)
    assert parts != split(items, seed=2, strata=labels)
    assert parts.test == sorted(parts.test)


def test_split_without_strata():
    parts = split("abcdefghij", shares=(0.5, 0.3, 0.2))
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [5, 3, 2]
    assert len(split([1]).train) == 1
    with pytest.raises(ValueError, match="must be 0 or more and add up to 1"):
        split([1], shares=(0.5, 0.3, 0.3))
    with pytest.raises(ValueError, match="2 items have 1 strata"):
        split([1, 2], strata=[True])


def test_macro_f1():
    assert macro_f1([True, False, True], [True, False, True]) == 1
    assert macro_f1([1, 1, 0, 0], torch.tensor([1, 0, 0, 0])) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert macro_f1([True] * 4, [True, False, False, False]) == pytest.approx(0.4 / 2)
    assert macro_f1([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    for pair in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match="give as many of both"):
            macro_f1(*pair)


# --- real data -------------------------------------------------------------------------------------------------------


def test_real_novels():
    shelf = novels(real("text/novels.tar.xz"))
    assert len(shelf) == 83
    assert [name for name, _ in shelf] == sorted(name for name, _ in shelf)
    assert shelf[0][0] == "Anon_Clara_1864"
    assert not any("\r" in text or "\ufeff" in text for _, text in shelf)
    assert all(len(text) > 100_000 for _, text in shelf)


@pytest.mark.parametrize("folder", ["models/stories260K", "models/babyllama-969K", "tokenizers/gpt2"])
def test_real_tokenizers(folder):
    text = real("text/tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000]
    tokenizer = AutoTokenizer.from_pretrained(real(folder))
    tokens = tokenize(text, tokenizer, chunk=5_000)
    assert tokens.ids.tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert int(tokens.lengths.sum()) == len(text.encode())


def test_real_articles():
    examples = hyperpartisan(real("classification/hyperpartisan-byarticle.tar.xz"))
    labels = [label for _, label in examples]
    assert (len(examples), sum(labels)) == (645, 238)
    assert all(text and "<" not in text[:1] for text, _ in examples)
    parts = split(examples, strata=labels)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [515, 65, 65]
    assert [sum(label for _, label in part) for part in (parts.validation, parts.test)] == [24, 24]
