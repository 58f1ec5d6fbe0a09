"""Set before anything imports transformers: no network, one thread (other processes share the machine), no chatter."""

import gc
import os
import uuid

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import sqlalchemy
import torch
import transformers

from mnemic.cli.show import console
from mnemic.memories.registry import import_file
from mnemic.store import SessionStore

POSTGRES = os.environ.get("MNEMIC_POSTGRES")
needs_postgres = pytest.mark.skipif(POSTGRES is None, reason="MNEMIC_POSTGRES names no PostgreSQL server to test with")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--mechanism", metavar="FILE.py", help="a mechanism outside of the package, which the tests join")
    parser.addoption("--hostile", type=int, default=150, metavar="N", help="hostile requests that a server is sent")


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


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def url(request, tmp_path):
    """An empty database; of PostgreSQL a schema, as tests run side by side."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    schema = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    yield (
        sqlalchemy.make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(False)
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


@pytest.fixture
def store(url):
    with SessionStore(url) as opened:
        yield opened


@pytest.fixture
def file_store(tmp_path):
    with SessionStore(f"sqlite:///{tmp_path / 'store.db'}") as opened:
        yield opened
