"""What a session may be given: texts that begin as their tokenizer begins them, ids, and what tokenizers return."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

import mnemic
from helpers import CONFIGS, assert_equal_stream, host, tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz ?"
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def tokenizer_of(around="$A"):
    """A token a letter, and what it puts around every text."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<2>": 3}
    inner = Tokenizer(models.BPE(special | {letter: number for number, letter in enumerate(LETTERS, 4)}, []))
    inner.add_special_tokens([AddedToken(word, special=True) for word in special])
    inner.post_processor = processors.TemplateProcessing(around, special_tokens=list(special.items()))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def read_by(session, text):
    """The ids that a session takes in for a text."""
    ids = session.ids(text)[0].tolist()
    assert session.read(text) == len(ids)
    return ids


@pytest.fixture(scope="module")
def model():
    return host("llama", CONFIGS["emt-0"])


@pytest.mark.parametrize(
    ("around", "before"), [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("<2> <s> $A", [3, 1]), ("$A </s>", [])]
)
def test_the_first_text_of_a_stream_begins_as_its_tokenizer_begins_texts(model, around, before):
    tokenizer = tokenizer_of(around)
    session, own = (
        mnemic.Session(model, tokenizer),
        {text: [4 + LETTERS.index(x) for x in text] for text in ("ab", "c")},
    )
    assert read_by(session, "ab") == before + own["ab"]
    assert read_by(session, "c") == own["c"]
    assert read_by(session.fork(), "ab") == own["ab"]
    assert read_by(mnemic.Session.from_bytes(session.to_bytes(), model, tokenizer), "ab") == own["ab"]
    session.reset()
    assert (
        read_by(session, "".join(tokenizer.convert_ids_to_tokens(before)) + "ab") == before + own["ab"]
    )  # it brings it, and gets one
    session.reset()
    assert session.generate("ab", **GREEDY) is not None
    assert session.stream.seen == (len(before) + 2 + 3,)
    session.reset()
    assert session.forward("ab").logits.shape[1] == len(before) + 2
    session.reset()
    assert len(list(session.answer(session.ids("ab"), **GREEDY))) == 3
    assert session.stream.seen == (len(before) + 2 + 3,)


def test_of_a_batch_only_new_sessions_texts_begin(model):
    sessions = [mnemic.Session(model, tokenizer_of("<s> $A")) for _ in range(3)]
    sessions[1].read("abc")
    batch = mnemic.batch(sessions)
    assert batch.read(["ab", "ab", ""]) == [3, 2, 0]
    assert sessions[2].is_new
    assert [output.logits.shape[1] for output in batch.forward(["ab", "ab", "ab"])] == [2, 2, 3]


def test_a_stream_that_was_read_with_the_memory_off_has_begun(model):
    session = mnemic.Session(model, tokenizer_of("<s> $A"))
    with mnemic.attached(model).disabled():
        assert session.read("ab") == 3
    assert session.read("ab") == 2


def test_an_encoder_sees_every_text_by_itself():
    session = mnemic.Session(host("bert", CONFIGS["emt-0"]), tokenizer_of("<s> $A </s>"))
    for _ in range(2):
        assert read_by(session, "ab") == [1, 4, 5, 2]
    assert read_by(session, "<s>ab</s>") == [1, 4, 5, 2]


def test_an_empty_text_is_nothing_to_read(model):
    session = mnemic.Session(model, tokenizer_of("<s> $A"))
    for nothing in ("", [], tokens(1, 0), torch.zeros(0), {"input_ids": [[]]}):
        assert session.read(nothing) == 0
        assert session.is_new
        for use in (session.forward, session.generate, session.answer):
            with pytest.raises(ValueError, match="the input is empty"):
                use(nothing)
    assert mnemic.batch([session, session.fork()]).read(["", ""]) == [0, 0]
    with pytest.raises(ValueError, match="the text of session 1 is empty"):
        mnemic.batch([session, session.fork()]).forward(["a", ""])
    assert session.is_new
    assert session.read("ab") == 3  # what comes now is the first


USES = {
    "read": lambda session, *text, **more: session.read(*text, **more),
    "forward": lambda session, *text, **more: session.forward(*text, **more).logits.shape[1],
    "generate": lambda session, *text, **more: session.generate(*text, **more, **GREEDY),
    "answer": lambda session, *text, **more: list(session.answer(*text, **more, **GREEDY)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@torch.no_grad()
def test_what_a_tokenizer_returns_is_read_as_its_ids(model, use):
    ids = tokens(1, 5)
    mask = torch.ones_like(ids)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), mask], 1),
    }
    plain = mnemic.Session(model)
    expected = use(plain, ids)
    rows = ids[0].tolist()
    for given in (rows, [rows], tuple(rows), ids[0], ids.numpy(), {"input_ids": rows}, BatchEncoding(padded)):
        session = mnemic.Session(model)
        found = use(session, given)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
        assert_equal_stream(session.stream, plain.stream)
    for keywords in (
        padded,
        {"input_ids": rows},
        {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids},
    ):
        session = mnemic.Session(model)
        use(session, **keywords)
        assert_equal_stream(session.stream, plain.stream)
    session = mnemic.Session(model)
    use(session, padded["input_ids"], attention_mask=padded["attention_mask"])
    assert_equal_stream(session.stream, plain.stream)


def test_a_batch_reads_what_a_tokenizer_returns_for_a_list(model):
    tokenizer = tokenizer_of("<s> $A")
    together, alone = ([mnemic.Session(model, tokenizer) for _ in range(2)] for _ in range(2))
    encoded = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert mnemic.batch(together).read(encoded) == [4, 2]
    assert [len(each[0]) for each in mnemic.batch(together).generate(**encoded, **GREEDY)] == [3, 3]
    for session, text in zip(alone, ["abc", "a"], strict=True):
        session.read(text)
        session.generate(tokenizer(text)["input_ids"], **GREEDY)
    for session, lone in zip(together, alone, strict=True):
        assert session.stream.seen == lone.stream.seen


NO_TEXT = {
    r"a list of 2 text\(s\); join them, or use mnemic\.batch": ["ab", "c"],
    r"messages are for Session\.chat": [{"role": "user", "content": "ab"}],
    r"expected token ids \[1, T\], got \[2, 3\]; use mnemic\.batch": tokens(2, 3),
    r"expected input_ids \[1, T\], got \[2, 3\]": {"input_ids": tokens(2, 3)},
    "this is a list of int, list": [1, [2, 3]],
    "this is a list of list": [[1], [2, 3]],
    "this is a object": object(),
    "this is of torch.float32": torch.rand(1, 3),
    "this is of torch.bool": torch.ones(1, 3, dtype=torch.bool),
    "nothing to read: expected a text": None,
    "nothing to read": {"attention_mask": [1, 1]},
    "a session reads input_ids.*, not pixel_values; leave it out": {"input_ids": [5], "pixel_values": 1},
    "attention_mask is of 9 tokens, input_ids of 3": {"input_ids": [5, 6, 7], "attention_mask": [1] * 9},
    "token_type_ids are not all 0": {"input_ids": [5, 6], "token_type_ids": [0, 1]},
}


@pytest.mark.parametrize(("message", "given"), NO_TEXT.items(), ids=[str(number) for number in range(len(NO_TEXT))])
def test_what_is_no_text_is_refused_in_our_words(model, message, given):
    session = mnemic.Session(model, tokenizer_of())
    for use in (session.read, session.forward, session.generate, session.answer):
        with pytest.raises(ValueError, match=message):
            use(given)
    assert session.is_new


def test_arguments_that_are_the_sessions_own_are_refused(model):
    session = mnemic.Session(model)
    for name in ("past_key_values", "position_ids", "inputs_embeds", "cache_implementation"):
        for use in (session.forward, session.generate, session.answer, mnemic.batch([session]).generate):
            with pytest.raises(ValueError, match=f"{name} is the session's own; leave it out"):
                use(tokens(1, 3), **{name: "static"})
    with pytest.raises(ValueError, match="which of them is to be read"):
        session.read(tokens(1, 3), input_ids=tokens(1, 3))
    with pytest.raises(TypeError, match="read takes one text, and no temperature"):
        session.read(tokens(1, 3), temperature=1.0)
    assert session.is_new
