"""Set before anything imports transformers: no network, one thread (other processes share the machine), no chatter."""

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
import transformers

from mnemic.cli.show import console
from mnemic.memories.registry import import_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--mechanism", metavar="FILE.py", help="a mechanism outside of the package, which the tests join")


def pytest_configure(config):
    if file := config.getoption("--mechanism"):
        import_file(file)  # before the matrix is made of what is registered


def pytest_collection_finish():
    # a fifth of the time went into looking for garbage among what imports and collection leave, which is none
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables as wide as tests look for, whatever the terminal: rich takes its width when the console is made."""
    monkeypatch.setattr(console, "width", 120)
