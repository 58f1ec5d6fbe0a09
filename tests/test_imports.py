"""What is imported when: nothing that is not used, and every public name all the same."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import mnemic
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.emt import EMTConfig
from mnemic.memories.registry import CONFIGS, MECHANISMS, cards
from mnemic.memory import Card, MemoryConfig

SOURCE = Path(mnemic.__file__).read_text()


def modules(code):
    """The modules that a new process has imported behind `code`, in two parts where it calls `mark()`."""
    code = f"""
import json, sys
marks = [[]]
def mark(): marks.append(list(sys.modules))
{code}
print(json.dumps([marks[-1], list(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    return set(before), set(after)


def test_importing_the_package_imports_nothing_else():
    _, found = modules("import mnemic; mnemic.__version__, dir(mnemic), mnemic.memories")
    assert {name for name in found if name.startswith("mnemic")} == {"mnemic", "mnemic.lazy", "mnemic.memories"}
    assert not found & {"torch", "transformers", "numpy", "jaxtyping", "sqlalchemy", "accelerate", "matplotlib", "rich"}


def test_a_plain_attach_imports_its_own_mechanism_and_no_more_than_it_needs():
    data = pickle.dumps(EMTConfig(segment_length=4, slots=2, dim=4, heads=1))
    before, after = modules(f"""
import pickle
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
ids = torch.zeros(1, 9, dtype=torch.long)
model.generate(ids, max_new_tokens=2)
mark()
import mnemic
mnemic.attach(model, pickle.loads({data!r}))
model(ids, **{{{CACHE!r}: mnemic.memory_cache(model, 4)}}, use_cache=True)
mnemic.MemoryConfig.from_dict(dict(kind="emt"))
""")
    new = {name for name in after - before if name.partition(".")[0] != "mnemic"}
    assert {name.partition(".")[0] for name in new} <= {"jaxtyping", "numpy"}, sorted(new)
    own = {name for name in after if name.startswith("mnemic.memories.")}
    rest = {"layers", "registry", "settings", "emt", "emt_naive", "emt_readers", "emt_writers"}
    assert own == {f"mnemic.memories.{name}" for name in rest}
    unused = ("analysis", "batching", "bench", "cli", "controls", "data", "inspect", "session", "store", "tasks")
    for name in (*unused, "trainer", "training", "unrolling"):
        assert not [found for found in after if f"{found}.".startswith(f"mnemic.{name}.")], name


def test_every_public_name_is_there_listed_and_what_type_checkers_take_it_for():
    assert set(mnemic.__all__) <= set(dir(mnemic))
    told = {}
    for part in ast.walk(ast.parse(SOURCE)):
        if isinstance(part, ast.ImportFrom) and str(part.module).startswith("mnemic.") and part.col_offset:
            told |= {name.name: part.module for name in part.names}
    assert set(told) == set(mnemic.__all__)
    for name, home in told.items():
        module = __import__(home, fromlist=[name])
        assert getattr(mnemic, name) is getattr(module, name), name
    everything = {}
    exec("from mnemic import *", everything)
    assert set(mnemic.__all__) <= set(everything)


def test_no_public_name_is_that_of_a_file():
    """Importing a file `train.py` would put it in the place of `mnemic.train`."""
    assert not set(mnemic.__all__) & {module.name for module in pkgutil.iter_modules(mnemic.__path__)}


def test_files_are_there_as_attributes_and_other_names_are_not():
    assert mnemic.unrolling.IGNORED == -100
    assert mnemic.memories.emt.EMTConfig is mnemic.memories.EMTConfig is EMTConfig
    for package in (mnemic, mnemic.memories):
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec("from mnemic import nothing")


def test_nothing_imports_what_stands_above_it():
    """Neither when it is used, nor for its types: the core knows none of these rooms, and each only those before it."""
    rooms, folder = ("inspect", "bench", "analysis", "cli"), Path(mnemic.__file__).parent
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0]
        above = rooms[rooms.index(own) + 1 :] if own in rooms else rooms
        for part in ast.walk(ast.parse(path.read_text())):
            if path == folder / "__init__.py" or not isinstance(part, ast.ImportFrom | ast.Import):
                continue  # the package itself names what users find in it
            names = [each.name for each in part.names]
            names = names if isinstance(part, ast.Import) else [part.module, *(f"{part.module}.{n}" for n in names)]
            for name in names:
                wrong = [room for room in above if f"{name}.".startswith(f"mnemic.{room}.")]
                assert not wrong, f"{path.relative_to(folder)} imports {name}"


# --- the registry ----------------------------------------------------------------------------------------------------


def test_the_registry_is_complete_and_each_file_is_named_after_its_kind():
    assert list(CONFIGS)[: len(MECHANISMS)] == list(MECHANISMS)
    assert len(CONFIGS) == len(list(CONFIGS)) == len(CONFIGS.values())
    for kind, name in MECHANISMS.items():
        config = CONFIGS[kind]
        assert (config.kind, config.__name__) == (kind, name)
        assert config.__module__.startswith(f"mnemic.memories.{kind.replace('-', '_')}")
        assert getattr(mnemic.memories, name) is config
    with pytest.raises(KeyError, match="nothing"):
        _ = CONFIGS["nothing"]
    assert "nothing" not in CONFIGS
    assert None not in CONFIGS


def test_a_mechanism_from_elsewhere_enters_by_being_defined():
    @dataclass
    class Elsewhere(MemoryConfig):
        kind: ClassVar[str] = "from-elsewhere"
        card: ClassVar[Card] = Card("Mine", "a seam", "nothing", "0", "none", "")

        def build(self, width, depth, causal=True):
            raise NotImplementedError

        @classmethod
        def tiny(cls):
            return [cls()]

    try:
        assert list(CONFIGS)[-1] == "from-elsewhere"
        assert mnemic.MemoryConfig.from_dict({"kind": "from-elsewhere", "segment_length": 3}) == Elsewhere(3)
        assert cards()["from-elsewhere"] is Elsewhere.card
    finally:
        del CONFIGS["from-elsewhere"]
    assert "from-elsewhere" not in CONFIGS
    assert set(CONFIGS) == set(MECHANISMS)


def test_cards_are_read_without_importing_the_files():
    code = "import json; from mnemic.memories.registry import cards; from dataclasses import asdict; "
    code += "print(json.dumps([{kind: asdict(card) for kind, card in cards().items()}, 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    found, torch_too = json.loads(done.stdout)
    assert not torch_too
    assert {kind: Card(**values) for kind, values in found.items()} == {kind: CONFIGS[kind].card for kind in CONFIGS}


@pytest.mark.parametrize("kind", MECHANISMS)
def test_configs_are_copied_and_pickled(kind):
    config = CONFIGS[kind].small(32, 64)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
