"""A mechanism in a file outside of the package: registered, at the terminal, in spawned workers, in the matrix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mnemic
from families import make
from helpers import SEGMENT, tokens
from mnemic.bench.results import records
from mnemic.cli import app
from mnemic.memories.registry import import_file, imported_files

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "average.py"


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that is imported here is known to other tests."""
    before = set(mnemic.CONFIGS)
    yield
    for kind in set(mnemic.CONFIGS) - before:
        del mnemic.CONFIGS[kind]
    for name in [name for name in sys.modules if name.startswith("mnemic_file_")]:
        del sys.modules[name]


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_it_is_registered_by_being_imported():
    assert import_file(FILE) == import_file(FILE) == ["average"]
    assert imported_files() == [FILE]
    config = mnemic.CONFIGS["average"]
    assert mnemic.MemoryConfig.from_dict({"kind": "average", "decay": 0.5}) == config(decay=0.5)
    model, ids = make("llama"), tokens(2, 3 * SEGMENT)
    expected = model(ids).logits
    mnemic.attach(model, config.tiny()[0])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no Python file; name one that defines a MemoryConfig"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("x = 1", "defines no mechanism: a subclass of mnemic.MemoryConfig with a kind"),
    ],
)
def test_a_file_that_is_none(text, message, tmp_path):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    result = command("--import", path, "list")
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_files_of_one_name_and_those_that_fail_half_way(tmp_path):
    here, there = tmp_path / "here" / "my.py", tmp_path / "there" / "my.py"
    for path in (here, there):
        path.parent.mkdir()
    here.write_text(FILE.read_text())
    there.write_text("x = 1")
    assert import_file(here) == ["average"]
    with pytest.raises(ValueError, match="defines no mechanism"):
        import_file(there)
    assert imported_files() == [here]
    del mnemic.CONFIGS["average"]
    broken = tmp_path / "broken.py"
    broken.write_text(FILE.read_text() + "\n1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        import_file(broken)
    assert "average" not in mnemic.CONFIGS
    assert imported_files() == []


@pytest.mark.long
def test_it_is_listed_and_compared_at_the_terminal(tmp_path):
    result = command("--import", FILE, "list")
    assert result.exit_code == 0, result.output
    assert "Exponential average" in result.output
    (tmp_path / "mine.toml").write_text(
        'title = "one"\ntest_rows = 4\n[recipe]\nsteps = 1\nrows = 2\n[[task]]\nname = "reverse"\n'
        "settings = { count = 4, segment_length = 4 }\n"
    )
    words = ("bench", tmp_path / "mine.toml", "--memory", "average", "--seeds", 1, "--workers", 2, "--out", tmp_path)
    result = command("--import", FILE, *words)  # each run in a worker that is spawned
    assert result.exit_code == 0, result.output
    assert {record.mechanism for record in records(tmp_path / "suite-mine")} == {"none", "average"}


@pytest.mark.long
def test_it_joins_the_matrix():
    words = ("tests/test_matrix.py", "--mechanism", str(FILE), "-k", "average-0 and (naive or initialisation)")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
    assert "3 passed" in found.stdout, found.stdout


@pytest.mark.parametrize("kind", mnemic.CONFIGS)
def test_small_settings_choose_a_size_themselves_and_grow_with_one_that_is_given(kind):
    def most(size):
        config = mnemic.CONFIGS[kind].small(SEGMENT, 64, size)
        assert config.segment_length == SEGMENT
        return config.build(64, 2).most_bytes(9)

    assert most(None) == mnemic.CONFIGS[kind].small(SEGMENT, 64).build(64, 2).most_bytes(9)
    sizes = [most(size) for size in (1, 2, 8, 32)]
    assert sizes == sorted(sizes)
