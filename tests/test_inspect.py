"""`mnemic inspect`: any saved session, from its file alone."""

from __future__ import annotations

import os
import time

import pytest
import torch
from typer.testing import CliRunner

import mnemic
from helpers import CONFIGS, SEGMENT, every_kind, host, tokens
from mnemic.cli import app
from mnemic.cli.inspect import changes
from mnemic.inspect.inside import open_session
from mnemic.inspect.terminal import bar
from mnemic.state import StateError, nbytes, read_file, write_file

pytestmark = pytest.mark.small  # what is tested of the oldest and newest networkx


def run(*words):
    return CliRunner().invoke(app, ["inspect", *(str(word) for word in words)])


@pytest.fixture
def files(tmp_path):
    """A function that saves a session of a mechanism after so many tokens."""

    def make(name="memoria-0", length=21 * SEGMENT + 3, path="some.memory"):
        session = mnemic.Session(host("gpt2", CONFIGS[name]))
        if length:
            session.read(tokens(1, length))
        session.save(tmp_path / path)
        return tmp_path / path

    return make


@every_kind
def test_any_session(config, tmp_path):
    session = mnemic.Session(host("llama", config))
    session.read(tokens(1, 3 * SEGMENT + 5))
    session.save(tmp_path / "a.memory")
    result = run(tmp_path / "a.memory")
    assert result.exit_code == 0, result.output
    assert config.card.title in result.output
    assert "29 tokens read, 3 segments of 8 tokens written\n" in result.output
    assert "5 of 8 tokens" in result.output
    assert session.stream is not None
    assert f"state {nbytes(session.stream.state):,}" in result.output
    _, meta = read_file(tmp_path / "a.memory")
    assert meta["memory_fingerprint"] in result.output
    assert meta["base_fingerprint"] in result.output
    for name, tensor in session.stream.state.items():
        assert any(line.split()[:1] == [name] for line in result.output.splitlines()), name
        assert f"{tensor.numel() * tensor.element_size():,}" in result.output
    for setting in config.to_dict():
        assert setting == "kind" or f"{setting} " in result.output


def test_what_memoria_holds(files):
    path = files()
    state = {name[6:]: tensor for name, tensor in read_file(path)[0].items() if name.startswith("state.")}
    output = run(path, "--top", 3).output
    long, short, working = state["levels"][0].tolist()
    rows = {line.split()[1]: line.split() for line in output.splitlines() if line.startswith("│  ")}
    assert (rows["long-term"][2], rows["short-term"][2], rows["working"][2]) == (str(long), str(short), str(working))
    assert int(rows["short-term"][4]) + int(rows["long-term"][4]) == int((state["recalled"] >= 0).sum())
    fires = mnemic.memories.memoria.graph.fires(state)[0]
    strongest = int(fires.argmax())
    table = output[output.index("fired most") :].splitlines()[2:5]
    assert [int(line.split()[4]) for line in table] == fires.sort(descending=True).values[:3].tolist()
    first = table[0].split()
    assert int(first[0]) == int(state["id"][0, strongest])
    assert int(first[2]) == int(state["step"][0]) - (int(first[0]) - 1) // working
    assert "ages, segments" not in output
    output = run(path, "--histograms").output
    assert "ages, segments" in output
    assert "lifespans left" in output


def test_what_emt_holds(files):
    slots = read_file(files("emt-0"))[0]["state.slots"][0].flatten(0, -3)[0]
    output = run(files("emt-0")).output
    norms = slots.norm(dim=-1)
    assert f"{norms.min():.3f} to {norms.max():.3f}, mean {norms.mean():.3f}" in output
    cosine = torch.nn.functional.normalize(slots, dim=-1) @ torch.nn.functional.normalize(slots, dim=-1).T
    assert f"{cosine.fill_diagonal_(-1).max():.3f}" in output


@pytest.mark.parametrize("name", ["memoria-0", "emt-0"])
@pytest.mark.parametrize("length", [0, 3])
def test_a_session_that_has_hardly_begun(files, name, length):
    result = run(files(name, length=length))
    assert result.exit_code == 0, result.output
    said = f"{length} tokens read, 0 segments of 8 tokens written" if length else "nothing was read yet"
    assert result.output.startswith(f"{said}\n")


def test_an_encoders_session(tmp_path):
    session = mnemic.Session(host("bert", CONFIGS["memoria-0"]))
    session.read(tokens(1, 2 * SEGMENT))
    session.save(tmp_path / "a.memory")
    result = run(tmp_path / "a.memory")
    assert result.exit_code == 0
    assert "16 tokens read, 2 segments of 8 tokens written" in result.output


def test_no_session(tmp_path, files):
    path = files()
    broken = tmp_path / "broken.memory"
    broken.write_bytes(path.read_bytes()[:-9])
    write_file(tmp_path / "training", {"a": torch.zeros(1)}, {"content": "training"})
    mnemic.attached(host("gpt2", CONFIGS["emt-0"])).save_pretrained(tmp_path / "weights")
    for file, words in (
        (broken, "not a whole safetensors file"),
        (tmp_path / "training", "holds 'training', not a session"),
        (tmp_path / "weights" / "memory_model.safetensors", "a memory's weights"),
        (tmp_path / "weights", "no memory file"),
        (tmp_path / "nothing", "no memory file"),
    ):
        result = run(file)
        assert result.exit_code == 1
        assert words in result.stderr
        assert str(file) in result.stderr
        assert result.stdout == ""


def test_the_graph(files, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("networkx")
    result = run(files(), "--graph", tmp_path / "new" / "graph.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "graph.png").read_bytes().startswith(b"\x89PNG\r\n")
    for path, words in (
        (files("emt-0", path="e.memory"), "only Memoria has a graph"),
        (files(length=0, path="0.memory"), "no engrams yet"),
    ):
        result = run(path, "--graph", tmp_path / "none.png")
        assert result.exit_code == 1
        assert words in result.stderr
    assert not (tmp_path / "none.png").exists()


def test_watching_shows_what_becomes_of_the_file(files, monkeypatch):
    path = files(length=5 * SEGMENT)
    whole = path.read_bytes()

    def grown():
        files(length=6 * SEGMENT)

    def cut():
        path.write_bytes(whole[:100])

    def nothing():
        pass

    def stop():
        raise KeyboardInterrupt

    turns = iter([nothing, grown, nothing, cut, path.unlink, lambda: path.write_bytes(whole), stop])
    monkeypatch.setattr(time, "sleep", lambda _: next(turns)())
    result = run(path, "--watch")
    assert result.exit_code == 0, result.output
    order = [
        result.output.index(words) for words in ("5 segments of 8", "6 segments of 8", "not a whole", "no memory file")
    ]
    assert order == sorted(order)
    assert result.output.count("6 segments of 8") == 1, "a file that does not change is shown once"
    assert result.output.count("5 segments of 8") == 2
    assert "no longer watched" in result.output


def test_a_change_of_the_same_size_is_noticed(tmp_path):
    path = tmp_path / "file"
    path.write_text("a")
    other = tmp_path / "other"
    other.write_text("b")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    turns = iter(range(5))

    def swap(_):
        if next(turns) == 2:
            os.replace(other, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", swap)
        next(changes(path))
    assert path.read_text() == "b"
    assert next(turns) == 3, "noticed when it was changed, neither before nor later"


def test_bars():
    assert bar(5, 10, 4).plain == "██··"
    assert bar(0, 10, 4).plain == "····"
    assert bar(0.001, 10, 4).plain == "▏···", "something is not nothing"
    assert bar(20, 10, 4).plain == "████"


def test_an_error_is_of_the_kind_that_sessions_raise(files):
    path = files()
    path.write_bytes(b"")
    with pytest.raises(StateError):
        open_session(path)
