"""`mnemic chat`: the past is in the session, turns are whole, and nothing that was said is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import mnemic
from families import make
from helpers import CONFIGS, assert_equal_stream, shake
from mnemic.cli import app
from mnemic.turns import Turns
from talkers import TEMPLATE, tokenizer_of

CONFIG = CONFIGS["emt-0"].replace(window=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer with a template, and a memory."""
    folder = tmp_path_factory.mktemp("chat")
    model = make("llama", vocab_size=101)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "model")
    tokenizer_of(TEMPLATE).save_pretrained(folder / "model")
    torch.manual_seed(0)
    attachment = mnemic.attach(model, CONFIG)
    shake(attachment.memory)
    attachment.save_pretrained(folder / "memory")
    return folder


class Talk:
    """Runs of `mnemic chat` on one store."""

    def __init__(self, folder, store):
        self.folder, self.url = folder, f"sqlite:///{store}"
        self.arguments = [str(folder / "model"), "--session", "work", "--store", self.url, "--greedy"]
        self.arguments += ["--memory", str(folder / "memory")]

    def __call__(self, *lines, more=("--max-new-tokens", "12"), code=0):
        result = CliRunner().invoke(app, ["chat", *self.arguments, *more], input="".join(f"{line}\n" for line in lines))
        assert result.exit_code == code, result.output
        return result.output

    def session(self):
        """The stored session, and its version."""
        model = make("llama", vocab_size=101)
        mnemic.from_pretrained(model, self.folder / "memory")
        session = mnemic.SessionStore(self.url).get("work", model, tokenizer_of(TEMPLATE))
        return session, session.stored.version


@pytest.fixture
def talk(folder, tmp_path):
    return Talk(folder, tmp_path / "m.db")


# --- turns -----------------------------------------------------------------------------------------------------------


def test_turns_add_up_to_the_whole_conversation():
    tokenizer = tokenizer_of(TEMPLATE)
    turns, end = Turns(tokenizer), tokenizer.eos_token_id
    said = [("who?", "ann"), ("where?", "rome"), ("when?", "may")]
    ids, conversation = [], []
    for number, (question, answer) in enumerate(said):
        ids += turns.message(question, first=number == 0)[0].tolist()
        answered = tokenizer(answer)["input_ids"]
        if number != 1:  # the second answer was cut short
            answered.append(end)
        ids += answered
        closing = turns.closing(answered)
        ids += closing[0].tolist()
        conversation += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(conversation, tokenize=False)


def test_only_the_turns_own_tokens_are_read():
    turns = Turns(tokenizer_of(TEMPLATE))
    decode = turns.tokenizer.decode
    assert decode(turns.message("who?", first=True)[0]) == "<s><|turn|>user\nwho?<|end|>\n<|turn|>assistant\n"
    assert decode(turns.message("who?", first=False)[0]) == "<|turn|>user\nwho?<|end|>\n<|turn|>assistant\n"


def test_without_a_template_the_message_is_the_prompt():
    turns = Turns(tokenizer_of())
    assert turns.tokenizer.decode(turns.message("who?", first=True)[0]) == "who?"
    assert turns.tokenizer.decode(turns.closing([50])[0]) == "\n"
    assert turns.closing(turns.closing([50])[0].tolist()) is None


def test_a_text_begins_as_the_tokenizer_begins_texts():
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    turns = Turns(tokenizer)
    assert turns.message("who?", first=True)[0, 0] == 1
    assert turns.message("who?", first=False)[0, 0] != 1


def test_an_answer_that_ended_otherwise_is_not_ended_again():
    turns = Turns(tokenizer_of(TEMPLATE))
    assert turns.tokenizer.decode(turns.closing([50])[0]) == "<|end|>\n"
    for end in (2, 0):  # the template's end, and another special token that the model may end with
        assert turns.tokenizer.decode(turns.closing([50, end])[0]) == "\n"


def test_a_template_that_hides_answers_is_refused():
    turns = Turns(tokenizer_of("{{ messages[0]['content'] }}"))
    with pytest.raises(ValueError, match="does not repeat what was answered"):
        turns.message("who?", first=False)


def test_messages_are_written_as_the_template_writes_them():
    tokenizer = tokenizer_of(TEMPLATE)
    turns, decode = Turns(tokenizer), tokenizer.decode
    system, asked = {"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}
    told = [system, asked, {"role": "assistant", "content": "ann"}, {"role": "user", "content": "where?"}]
    whole = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert decode(turns.message(told, first=True)[0]) == whole
    assert decode(turns.message(told, first=False)[0]) == whole.removeprefix("<s>")
    assert torch.equal(turns.message([asked], first=False), turns.message("who?", first=False))


def test_what_are_no_messages_is_refused():
    turns = Turns(tokenizer_of("{{ messages[0]['content'] + messages[0]['nothing'] }}"))
    for said in ([], ["who?"], [{"content": "who?"}]):
        with pytest.raises(ValueError, match="messages are a text or a list of"):
            turns.message(said, first=True)
    with pytest.raises(ValueError, match="template does not take these messages"):
        turns.message("who?", first=True)
    with pytest.raises(ValueError, match="no chat template to write messages with; pass a text"):
        Turns(tokenizer_of()).message([{"role": "user", "content": "who?"}], first=True)


# --- a session's own chat --------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    model = make("llama", vocab_size=101)
    model.generation_config.eos_token_id = 2
    torch.manual_seed(0)
    shake(mnemic.attach(model, CONFIG).memory)
    return model


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_session_chats_as_the_command_does(model, template):
    tokenizer = tokenizer_of(template)
    session, by_hand = mnemic.Session(model, tokenizer), mnemic.Session(model, tokenizer)
    turns = Turns(tokenizer)
    for number, text in enumerate(["who?", "where?", "when?"]):
        said = list(by_hand.answer(turns.message(text, first=number == 0), **GREEDY))
        if (closing := turns.closing(said)) is not None:
            by_hand.read(closing)
        messages = [{"role": "user", "content": text}] if template and number else text
        assert session.chat(messages, **GREEDY) == tokenizer.decode(said, skip_special_tokens=True)
        assert_equal_stream(session.stream, by_hand.stream)
    again = mnemic.Session.from_bytes(session.to_bytes(), model, tokenizer)
    assert again.chat("and?", **GREEDY) == session.chat("and?", **GREEDY)


def test_an_answer_ends_where_somebody_says_so(model):
    turns, config = Turns(tokenizer_of(TEMPLATE)), GenerationConfig(max_new_tokens=3, eos_token_id=7)
    assert turns.ways(model, {}) == {"max_new_tokens": 512}
    assert turns.ways(model, {"max_length": 9}) == {"max_length": 9}
    assert turns.ways(model, {"generation_config": config}) == {"generation_config": config}
    silent = make("llama", vocab_size=101)
    silent.generation_config = GenerationConfig()
    assert turns.ways(silent, {"max_new_tokens": 3}) == {"max_new_tokens": 3, "eos_token_id": 2, "pad_token_id": 0}


def test_a_turn_that_fails_was_not_said(model):
    session = mnemic.Session(model, tokenizer_of(TEMPLATE))
    session.chat("who?", **GREEDY)
    before = session.stream
    handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.chat("where?", **GREEDY)
    handle.remove()
    with pytest.raises(ValueError, match="messages are a text or a list"):
        session.chat([], **GREEDY)
    assert session.stream is before
    with pytest.raises(ValueError, match="a chat needs a tokenizer"):
        mnemic.Session(model).chat("who?")


# --- talking ---------------------------------------------------------------------------------------------------------


def test_what_was_said_is_in_the_session_and_not_in_the_prompt(talk):
    output = talk("who is ann?", "/exit")
    assert "Session 'work'" in output
    assert "is new" in output
    session, version = talk.session()
    assert version == 1
    first = len("<|turn|>user\nwho is ann?") - 7  # <|turn|> is one token
    assert session.stream.seen[0] > first + 12
    output = talk("and bob?", "/exit")
    assert f"goes on after {session.stream.seen[0]:,} tokens" in output
    later, version = talk.session()
    assert version == 2
    # the whole conversation, by hand
    by_hand, _ = talk.session()
    by_hand.reset()
    turns = Turns(tokenizer_of(TEMPLATE))
    for number, text in enumerate(["who is ann?", "and bob?"]):
        said = list(by_hand.answer(turns.message(text, first=number == 0), max_new_tokens=12, do_sample=False))
        if (closing := turns.closing(said)) is not None:
            by_hand.read(closing)
    assert_equal_stream(later.stream, by_hand.stream)


def test_answers_are_those_of_the_session(talk):
    output = talk("who is ann?", "/exit")
    model = make("llama", vocab_size=101)
    mnemic.from_pretrained(model, talk.folder / "memory")
    tokenizer = tokenizer_of(TEMPLATE)
    alone = mnemic.Session(model, tokenizer)
    prompt = tokenizer.decode(Turns(tokenizer).message("who is ann?", first=True)[0])
    answer = alone.generate(prompt, max_new_tokens=12, do_sample=False)
    shown = "".join(letter for letter in answer if letter.isprintable() or letter in "\n\t")
    assert shown.strip()
    assert shown in output


def test_every_command(talk):
    output = talk(
        "who?", "/memory", "/cost", "/help", "/nonsense", "", "/exit", "never read", more=("--max-new-tokens", "20")
    )
    assert re.search(r"\d+ tokens read, \d+ segments of 8 tokens written; the memory is trained\n", output)
    assert "norms of slots" not in output
    assert "norms of slots" in talk("/histograms")
    assert "slots" in output
    assert re.search(r"segments? written", output)
    assert "bytes in the store, version 1" in output
    assert "seconds a token" in output
    assert "/forget" in output
    assert "remove this session from the store" in output
    assert "There is no command /nonsense; /help lists them." in output
    assert talk.session()[1] == 1
    assert "Nothing was read yet." in Talk(talk.folder, talk.folder / "other.db")("/cost")


def test_memory_tells_in_words_where_the_text_is_kept(talk):
    # a segment may begin within a word
    assert "ello" not in talk("hello " * 9, "/memory", more=("--max-new-tokens", "1", "--session", "other"))
    assert "ello" in talk("hello " * 9, "/memory", more=("--keep-text", "--max-new-tokens", "1"))
    assert talk.session()[0].keep_text


def test_reset_and_forget_ask_first(talk):
    talk("who?")
    seen = talk.session()[0].stream.seen
    output = talk("/reset", "n", "/forget", "no", "/forget")  # the last one is asked at the end of the input
    assert "Forget all that session 'work' has read? [y/N]" in output
    assert talk.session()[0].stream.seen == seen
    assert "The session is new." in talk("/reset", "y")
    session, version = talk.session()
    assert version == 2
    assert session.stream is None
    output = talk("/forget", "y", "/forget", "y")
    assert "Removed session 'work': version 2" in output
    assert "Session 'work' is not in the store." in output
    with pytest.raises(LookupError):
        talk.session()


def test_a_conflict_is_told_and_nothing_is_lost(talk, monkeypatch):
    from mnemic.cli import chat as command

    talk("who?")
    lines = iter(["and bob?", "/reload", "and eve?", "and eve?", "/overwrite", "/exit"])

    def typed(_=""):
        line = next(lines)
        if line == "and bob?" or line == "and eve?":
            # somebody else talks in the same session meanwhile
            session, _ = talk.session()
            session.read("x" * 9)
            mnemic.SessionStore(talk.url).put("work", session)
        return line

    monkeypatch.setattr("builtins.input", typed)
    output = talk()
    assert "version 2 is there, this one came from version 1" in output
    assert "/reload takes theirs" in output
    assert "version 3 is there, this one came from version 2" in output
    assert "version 4 is there, this one came from version 2" in output
    session, version = talk.session()
    assert version == 5
    assert session.stream.seen[0] > 60
    assert command.COMMANDS.keys() >= {"reload", "overwrite"}


def test_without_a_memory_it_says_what_that_means(folder, tmp_path):
    talk = Talk(folder, tmp_path / "m.db")
    talk.arguments = talk.arguments[:-2]
    output = talk("who?")
    assert "nothing is remembered beyond the window" in output
    assert "Window: the last 256 tokens, as they were. Memory (emt): 0 segments of 64 written." in output
    assert "goes on after" in talk("and?")  # its sessions are taken back all the same


def test_recall_is_there_by_name_and_finds_its_sessions_again(folder, tmp_path):
    talk = Talk(folder, tmp_path / "m.db")
    talk.arguments = [*talk.arguments[:-2], "--memory", "recall"]
    output = talk("who?")
    assert "Window: the last 256 tokens, as they were. Memory (recall): 0 segments of 64 written." in output
    assert "not trained" not in output
    assert "goes on after" in talk("and?", "/sources")
    assert "that takes --memory recall and --keep-text" in talk("/sources")
    talk.arguments += ["--keep-text", "--session", "kept"]
    output = talk("who is there? " * 30, "and?", "/sources")
    assert re.search(r"^ *\d+\.\d%  tokens \d+ to \d+$", output, re.M), output
    assert "is ther" in output.split("tokens ")[-1]


def test_what_cannot_be_opened_is_told(talk, tmp_path):
    def refused(*arguments):
        result = CliRunner().invoke(app, ["chat", *arguments], input="")
        assert result.exit_code == 1
        assert "error:" in result.stderr
        return result.stderr

    refused(str(tmp_path / "nothing"))
    assert "memory" in refused(str(talk.folder / "model"), "--memory", str(tmp_path))
    assert "use sqlite:///file.db" in refused(str(talk.folder / "model"), "--store", "mysql://somewhere/db")
    talk("who?")
    # a session of another memory
    assert "memory" in refused(str(talk.folder / "model"), "--session", "work", "--store", talk.url)


def test_nothing_that_steers_the_terminal_is_written(capsys):
    from mnemic.cli.chat import Chat

    Chat._write("a\x1b[2Jb\x07\r\nc [red]é")
    assert capsys.readouterr().out == "a[2Jb\nc [red]é"


class Process:
    """`mnemic chat` in a process of its own, spoken to through pipes."""

    def __init__(self, talk, *more):
        environment = os.environ | {"COLUMNS": "200"}
        run = [sys.executable, "-c", "from mnemic.cli import app; app()", "chat", *talk.arguments, *more]
        self.process = subprocess.Popen(
            run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        self.output = ""

    def type(self, *lines):
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def until(self, text, more=0):
        """Waits for some output, and for `more` bytes after it."""
        while text not in self.output:
            read = os.read(self.process.stdout.fileno(), 1 if not more else 4096)
            assert read, self.output
            self.output += read.decode(errors="replace")
        while len(self.output.partition(text)[2]) < more:
            self.output += os.read(self.process.stdout.fileno(), 4096).decode(errors="replace")

    def end(self):
        rest, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, self.output + rest.decode()
        return self.output + rest.decode(errors="replace")


@pytest.mark.long
def test_ctrl_c_ends_the_answer_and_a_new_process_goes_on(talk):
    first = Process(talk, "--max-new-tokens", "100000")
    first.type("who is ann?")
    first.until("lists commands.\n", more=8)  # in the middle of the answer
    first.process.send_signal(signal.SIGINT)
    first.until("saved\n")
    first.type("/cost", "/exit")
    output = first.end()
    said = int(re.search(r"stopped after ([\d,]+) tokens, which were read and saved", output)[1].replace(",", ""))
    assert said < 100_000
    session, version = talk.session()
    prompt = Turns(tokenizer_of(TEMPLATE)).message("who is ann?", first=True).shape[1]
    assert session.stream.seen == (prompt + said + 2,)  # the answer is closed: <|end|> and a line's end
    assert f"{session.stream.seen[0]:,} tokens read" in output
    assert version == 1
    second = Process(talk, "--max-new-tokens", "4")
    second.type("and bob?", "/exit")
    assert f"goes on after {session.stream.seen[0]:,} tokens" in second.end()
    later, version = talk.session()
    assert version == 2
    assert later.stream.seen > session.stream.seen


@pytest.mark.parametrize("step", [1, 6])
def test_a_second_ctrl_c_ends_the_step_too(talk, monkeypatch, step):
    calls = []

    class Impatient(mnemic.Session):
        def _feed(self, module, ids, **kwargs):
            calls.append(ids)
            if len(calls) == step:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super()._feed(module, ids, **kwargs)

    monkeypatch.setattr(mnemic, "Session", Impatient)
    output = talk("who?", "/cost")
    if step == 1:
        assert "stopped before the first token; your message was not read" in output
        assert "Nothing was read yet." in output
        with pytest.raises(LookupError):
            talk.session()
    else:
        # the prompt's step, then one for each token; the last was not finished
        assert "stopped after 4 tokens, which were read and saved" in output
        prompt = Turns(tokenizer_of(TEMPLATE)).message("who?", first=True).shape[1]
        assert talk.session()[0].stream.seen == (prompt + 4 + 2,)


def test_a_third_ctrl_c_leaves_the_turn(talk, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(mnemic.SessionStore, "put", interrupted)
        output = talk("who?", code=1)
    assert "left off; what was not saved now, the next turn saves" in output
    assert "Left with something unsaved: session 'work'" in output
    with pytest.raises(LookupError):
        talk.session()


@pytest.mark.parametrize("page", ["chat.md", "windows-and-sessions.md"])
def test_the_examples_of_the_pages_run(page, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= (1 if page == "chat.md" else 5)
    monkeypatch.chdir(tmp_path)
    model = make("gpt2", vocab_size=101)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(mnemic, "fetch", lambda name: name)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer_of())
    names = {}
    for block in blocks:  # each goes on from the one before
        exec(block, names)
    session = names["session"]
    assert session.stream.seen[0] > 20
    if page == "chat.md":
        assert capsys.readouterr().out
        assert names["store"].entry("work").version == 1
    else:
        assert {"alice", "bob", "first", "answers"} <= names.keys()
        assert names["first"].logits.shape[:2] == (1, len("How are you?"))
