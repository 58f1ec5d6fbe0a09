"""The page of a session: right, and safe whatever it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mnemic
from helpers import CONFIGS, SEGMENT, every_kind, host, tokens
from mnemic.cli import app
from mnemic.cli.inspect import look_inside
from mnemic.inspect import inside, page
from mnemic.inspect.inside import Words, open_session
from mnemic.state import read_file, write_file
from pages import HOSTILE, Spelling, saved


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text in each kind."""

    def __init__(self):
        super().__init__()
        self.found, self.text, self.open = [], {}, None

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        self.text[self.open] = self.text.get(self.open, "") + data


def elements(text):
    found = Elements()
    found.feed(text)
    return found


def embedded(text):
    """The values in a page, as its script gets them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


# --- what is in it ---------------------------------------------------------------------------------------------------


@every_kind
def test_every_mechanism_has_a_page(config, tmp_path):
    label = next(name for name, each in CONFIGS.items() if each is config)
    found, words = saved(tmp_path / "a.memory", label)
    shown = embedded(page.render(page.values(found, words)))
    assert (shown["seen"], shown["written"], shown["waiting"]) == (75, 9, 3)
    assert [each["number"] for each in shown["history"]] == list(range(1, 10))
    assert [each["name"] for each in shown["tensors"]] == sorted(found.state)
    # something sensible is shown of every one: places, matrices or queues; but for a vector (an LSTM's), keys beyond
    # the window, and what is the sum of others
    nothing = config.kind in ("memory-prompt", "recall", "compact", "several")
    assert shown["groups"] or shown["matrices"] or shown["queues"] or nothing
    passages = [entry["passage"] for group in shown["groups"] for row in group["rows"] for entry in row["written"]]
    passages += [entry["passage"] for each in shown["written_into"] for entry in each["written"]]
    assert bool(passages) == any(record["places"] for record in found.log.records())
    assert all(any(weight > 0 for _, weight in passage) for passage in passages)


def test_what_emt_shows(tmp_path):
    found, words = saved(tmp_path / "a.memory")
    shown = page.values(found, words)
    (group,) = shown["groups"]
    slots = read_file(tmp_path / "a.memory")[0]["state.slots"][0, 0].double()
    unit = torch.nn.functional.normalize(slots, dim=-1)
    cosine = (unit @ unit.T).numpy()
    stored = np.frombuffer(base64.b64decode(group["similarity"]["values"]), np.int8).reshape(4, 4) / 100
    assert np.abs(stored - cosine).max() <= 0.0051
    for row, norm in zip(group["rows"], slots.norm(dim=-1).tolist(), strict=True):
        assert row["norm"] == pytest.approx(norm)
        other, value = row["nearest"]
        assert other != row["id"]
        assert value == pytest.approx(max(cosine[row["id"]][i] for i in range(4) if i != row["id"]))
    ids = tokens(1, 75)[0].tolist()
    for row in group["rows"]:
        for entry in row["written"]:
            marked = [text for text, weight in entry["passage"] if weight]
            strongest = max((run for run in entry["passage"] if run[1]), key=lambda run: run[1])
            assert strongest[0].strip() == Spelling().decode([ids[entry["tokens"][0]]]).strip()
            assert len(marked) == len(entry["tokens"])
            # a segment of 8 is shown whole, and nothing before or behind it
            said = Spelling().decode(ids[entry["first"] : entry["last"] + 1])
            assert "".join(text for text, _ in entry["passage"]).strip() == said.strip()
    left = sum(entry["left"] for row in group["rows"] for entry in row["written"])
    assert sum(each["left"] for each in shown["history"]) == pytest.approx(left / 4, abs=1e-3)


def test_memorias_graph_is_that_of_its_reading(tmp_path):
    """At every step: who was alive, who fired, and how often each fired with its strongest tie, as it was then."""
    session = mnemic.Session(host("llama", CONFIGS["memoria-0"]))
    moments = {}
    for step, part in enumerate(tokens(1, 150 * SEGMENT).split(SEGMENT, 1), 1):
        session.read(part)
        state = session.stream.state
        fired = mnemic.memories.memoria.engrams.activated(state)[0]
        ids = state["id"][0]
        counts = mnemic.memories.memoria.graph.counts(state)[0]
        moments[step] = (set(ids[fired].tolist()), ids.tolist(), counts)
    session.save(tmp_path / "a.memory")
    graph = inside.graph_over_time(open_session(tmp_path / "a.memory"))
    steps, nodes = graph["steps"], graph["nodes"]
    assert steps == list(range(steps[0], 151))
    assert 121 < len(steps) < 130
    alive = {node["id"] for node in nodes}
    assert alive == set(session.stream.state["id"][0].tolist()) - {0}
    tie = {}
    for place, step in enumerate(steps):
        fired, ids, counts = moments[step]
        assert {nodes[i]["id"] for i in graph["fired"][place]} == fired & alive
        assert graph["alive"][place] in (None, sum(each > 0 for each in ids))
        tie |= {i: (other, times) for i, other, times in graph["ties"][place]}
        for i, (other, times) in tie.items():
            a, b = nodes[i]["id"], nodes[other]["id"]
            if times and a in ids and b in ids:
                assert counts[ids.index(a), ids.index(b)] == times
    assert {node["born"] for node in nodes} == {(node["id"] - 1) // 2 + 1 for node in nodes}
    assert all(-1 <= node[axis] <= 1 for node in nodes for axis in "xy")


def test_a_page_of_many_engrams_is_bounded(tmp_path):
    found, _ = saved(tmp_path / "a.memory", "memoria-0", 60 * SEGMENT, working=12, stm_capacity=300, lifespan=40.0)
    graph = inside.graph_over_time(found, most=50)
    assert len(graph["nodes"]) == 50
    assert graph["left_out"] == len(inside.groups(found)[0].ids) - 50 > 0
    assert {node["born"] for node in graph["nodes"]} >= {60}, "those of the last segment are there"
    (group,) = page.values(found)["groups"]
    assert len(group["rows"]) > page.MOST
    assert len(group["similarity"]["labels"]) <= page.MOST


def test_what_is_large_is_not_computed_at_length(tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "LARGEST", 6)
    found, words = saved(tmp_path / "a.memory", slots=20)
    (group,) = page.values(found, words)["groups"]
    assert len(group["rows"]) == 20
    assert group["similarity"]["labels"] == [0, 4, 8, 12, 16]
    assert group["similarity"]["most"][1] in (4, 8, 12, 16)
    assert all(row["nearest"] is None for row in group["rows"])
    assert group["directions"] is None
    output = run(tmp_path / "a.memory").output
    assert "20 of width 16" in output
    assert "directions" not in output
    found, _ = saved(tmp_path / "b.memory", "fast-weights-0")
    assert [(each["rank"], each["values"]) for each in page.values(found)["matrices"]] == [(None, [])] * 2
    assert run(tmp_path / "b.memory").exit_code == 0
    found, _ = saved(tmp_path / "c.memory", "memoria-0", 20 * SEGMENT)
    assert page.values(found)["graph"] is None
    assert run(tmp_path / "c.memory").exit_code == 0


def test_words_come_back_with_their_spaces():
    class Spaced:
        """As tokenizers that write a space between two words, and none before the first."""

        def decode(self, ids, skip_special_tokens=False):
            return " ".join(f"w{token}" for token in ids)

    words = Words(list(range(40)), Spaced())
    runs = words.passage(8, 31, [20, 10], [0.5, 0.25])
    assert (
        "".join(text for text, _ in runs)
        == "w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25 w26 \u2026"
    )
    assert [run for run in runs if run[1]] == [[" w10", 0.25], [" w20", 0.5]]
    assert words.passage(8, 60, [50], [1.0]) is None, "beyond the text that is known"
    assert Words([1, -1, 3], Spaced()).passage(0, 2, [1], [1.0]) is None
    gap = Words(list(range(100)), Spaced()).passage(0, 99, [2, 50], [0.5, 0.5])
    assert " w8 \u2026 w44 " in "".join(text for text, _ in gap)


def test_infinite_numbers_do_not_break_a_page(tmp_path):
    found, words = saved(tmp_path / "a.memory")
    found.state["slots"][0, 0, 1] = torch.nan
    shown = embedded(page.render(page.values(found, words)))
    assert shown["groups"][0]["rows"][1]["norm"] is None
    assert shown["tensors"][0]["finite"] is False


# --- what it may not do ----------------------------------------------------------------------------------------------


def test_hostile_text_is_text(tmp_path):
    found, words = saved(tmp_path / "a.memory", length=200)
    found.name = HOSTILE
    found.meta["base_model"] = HOSTILE
    found.meta["memory"]["note"] = HOSTILE
    text = page.render(page.values(found, words))
    assert HOSTILE not in text
    plain = page.render(page.values(saved(tmp_path / "b.memory")[0]))
    kinds = [tag for tag, _ in elements(text).found]
    assert kinds == [tag for tag, _ in elements(plain).found], "no element comes from what is shown"
    shown = embedded(text)
    assert shown["name"] == shown["base"] == HOSTILE
    written = [entry for group in shown["groups"] for row in group["rows"] for entry in row["written"]]
    assert any(HOSTILE in run for entry in written for run, _ in entry["passage"])
    for letter in "<>&\u2028":
        assert letter not in re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]


def test_a_page_asks_for_nothing(tmp_path):
    text = page.render(page.values(*saved(tmp_path / "a.memory")))
    found = elements(text)
    (policy,) = [at["content"] for tag, at in found.found if at.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("style", "script"):
        block = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert not {"src", "href", "style"} & {name for _, at in found.found for name in at}
    style = found.text["style"]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|https?:(?!//www\.w3\.org)", text
    )


# --- from the command line -------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, ["inspect", *(str(word) for word in words)])


@pytest.fixture
def spelling(tmp_path):
    """The folder of a tokenizer of words `w3`, `w4` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"?": 0} | {f"w{token}": token for token in range(1, 96)}, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="?").save_pretrained(tmp_path / "spelling")
    return tmp_path / "spelling"


def test_the_command_writes_a_page(tmp_path, spelling):
    saved(tmp_path / "a.memory")
    result = run(tmp_path / "a.memory", "--html", tmp_path / "new" / "a.html", "--tokenizer", spelling)
    assert result.exit_code == 0, result.output
    shown = embedded((tmp_path / "new" / "a.html").read_text("utf-8"))
    assert shown["text"] is True
    first = shown["groups"][0]["rows"][0]["written"][0]
    word = f"w{tokens(1, 75)[0, first['tokens'][0]]}"
    assert word in "".join(text for text, _ in first["passage"])
    assert f"slot {0}" in result.output
    assert word in result.output
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.html"]
    without = run(tmp_path / "a.memory", "--html", tmp_path / "b.html")
    assert without.exit_code == 0
    assert embedded((tmp_path / "b.html").read_text("utf-8"))["text"] is False
    assert word not in without.output


def test_text_that_was_not_kept_can_be_brought(tmp_path, spelling):
    saved(tmp_path / "a.memory", keep_text=False)
    (tmp_path / "a.txt").write_text(" ".join(f"w{token}" for token in tokens(1, 75)[0].tolist()))
    brought = run(tmp_path / "a.memory", "--tokenizer", spelling, "--text", tmp_path / "a.txt")
    saved(tmp_path / "b.memory")
    kept = run(tmp_path / "b.memory", "--tokenizer", spelling)

    def said(result):
        return result.output[result.output.index("what was written") : result.output.index("tensor")]

    assert brought.exit_code == 0, brought.output
    assert said(brought) == said(kept)
    for words, message in (
        (("a.memory", "--text", tmp_path / "a.txt"), "--tokenizer FOLDER"),
        (("b.memory", "--tokenizer", spelling, "--text", tmp_path / "a.txt"), "kept its own text"),
        (("a.memory", "--tokenizer", spelling), "kept no text"),
        (("b.memory", "--tokenizer", tmp_path / "nowhere"), "nowhere"),
    ):
        result = run(tmp_path / words[0], *words[1:], "--html", tmp_path / "none.html")
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
        assert not (tmp_path / "none.html").exists()


def test_the_terminal_shows_no_control_characters(tmp_path):
    found, words = saved(tmp_path / "a.memory")

    class Moving(Spelling):
        def decode(self, ids, skip_special_tokens=False):
            return "".join("\x1b[2J\x07[red]" for _ in ids)

    from mnemic.inspect.show import Shown

    text = str(Shown(found, Words(words.ids, Moving())))
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "[red]" in text


def test_a_file_of_parts_that_do_not_fit(tmp_path):
    saved(tmp_path / "a.memory", "memoria-0")
    tensors, meta = read_file(tmp_path / "a.memory")
    state = {name: each for name, each in tensors.items() if not name.startswith("history.")}
    write_file(
        tmp_path / "b.memory", {name: each[:, :0] if each.ndim > 1 else each for name, each in state.items()}, meta
    )
    meta["memory"].pop("segment_length")
    write_file(tmp_path / "c.memory", tensors, meta)
    for name in ("b", "c"):
        result = run(tmp_path / f"{name}.memory")
        assert result.exit_code == 1
        assert "do not fit each other" in " ".join(result.stderr.split())


def test_matrices_and_queues_in_the_terminal(tmp_path):
    found, _ = saved(tmp_path / "a.memory", "fast-weights-0")
    matrix = found.state["matrix"][0, 0].double()
    share = torch.linalg.svdvals(matrix).square() / matrix.square().sum()
    output = run(tmp_path / "a.memory").output
    assert f"{matrix.norm():.3f}" in output
    assert f"{torch.exp(-(share * share.log()).sum()):.1f}" in output
    saved(tmp_path / "b.memory", "knn-0")
    assert "48 to 71" in " ".join(run(tmp_path / "b.memory").output.split()), "room for three segments of nine"


def test_the_demonstrations_page(tmp_path):
    model = host("gpt2", CONFIGS["emt-0"].replace(segment_length=32))
    made = look_inside(model, tmp_path, fillers=3)
    shown = embedded(made.read_text("utf-8"))
    assert (shown["seen"], shown["written"]) == (4 * 32, 4)
    told = "".join(run for row in shown["groups"][0]["rows"] for entry in row["written"] for run, _ in entry["passage"])
    assert re.search(r"\bk\d+ v\d+ ", told), "symbols by their names"
    again = mnemic.Session.load(tmp_path / "session.memory", model)
    assert len(again.history) == 4


# --- in a notebook ---------------------------------------------------------------------------------------------------


def test_show(tmp_path):
    session = mnemic.Session(host("llama", CONFIGS["emt-0"]), Spelling(), keep_text=True)
    session.read(tokens(1, 30))
    shown = mnemic.show(session)
    frame = elements(shown._repr_html_()).found
    assert [tag for tag, _ in frame] == ["iframe"]
    assert frame[0][1]["sandbox"] == "allow-scripts"
    values = embedded(frame[0][1]["srcdoc"])
    assert (values["seen"], values["text"]) == (30, True)
    assert repr(shown).startswith("30 tokens read, 3 segments of 8 tokens written; the memory is trained\n")
    session.read(tokens(1, 30))
    assert embedded(shown.html)["seen"] == 30, "it shows what was there when it was asked for"
    session.reset()
    assert "nothing was read yet" in str(mnemic.show(session))
