"""The examples of the pages, each block run as it is written, one page after another, on SmolLM2 in bfloat16."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnemic
from runs import prose

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    "README.md": 2,
    "docs/own-text.md": 3,
    "docs/quickstart.md": 7,
    "docs/chat.md": 1,
    "docs/store.md": 1,
    "docs/windows-and-sessions.md": 5,
    "docs/families.md": 1,
    "docs/training.md": 4,
}
"""How many blocks of each are run, from the first on."""
LONG = {"docs/own-text.md", "docs/quickstart.md", "docs/windows-and-sessions.md", "docs/training.md"}
"""Of these, those that take minutes on two cores."""
MECHANISMS = sorted((ROOT / "docs" / "mechanisms").glob("*.md"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a book, where SmolLM2 is at hand."""
    try:
        mnemic.fetch("smollm2")
    except (mnemic.FetchError, ModuleNotFoundError) as error:
        pytest.skip(f"no SmolLM2 here: {error}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(prose(700))
    return tmp_path


def blocks(page):
    return BLOCK.findall(page.read_text())


def run(code, names):
    exec(compile(code, "a page", "exec"), names)


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.long] * (page in LONG)) for page in PAGES])
def test_the_examples_of_a_page_run_as_they_are_written(page, here, capsys):
    names: dict[str, object] = {"__name__": "page"}
    if page == "docs/training.md":
        (here / "book.txt").write_text(prose(12_000))  # more than a thousand tokens are held out
    for code in blocks(ROOT / page)[: PAGES[page]]:
        run(code, names)
    assert capsys.readouterr().out or page == "docs/families.md"


@pytest.mark.long
def test_the_chatbot_knows_its_user_s_name_in_another_process_and_nobody_else_s(here):
    names: dict[str, object] = {"__name__": "page"}
    begin, attach, go_on, ask = blocks(ROOT / "docs" / "chatbot.md")
    for code in (begin, attach, go_on):
        run(code, names)
    for user, knows in (("maria", True), ("bob", False)):
        code = go_on.replace('print(turn("maria", "I am a baker and my name is Maria."))', "") + (
            f'print(turn("{user}", "Please repeat my name."))'
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
        assert done.returncode == 0, done.stderr
        assert ("Maria" in done.stdout) is knows, done.stdout
        assert f'print(turn("{user}", "Please repeat my name."))' in ask


@pytest.mark.long
@pytest.mark.parametrize("page", MECHANISMS, ids=lambda page: page.stem)
def test_a_mechanism_is_attached_as_its_page_says(page, here):
    names: dict[str, object] = {"__name__": "page"}
    run(blocks(page)[0], names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert mnemic.attached(model).config.kind == page.stem
