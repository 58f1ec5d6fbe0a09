"""Which mechanisms there are, and what is said of them, without importing them: their files need PyTorch."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mnemic.memories import MECHANISMS

if TYPE_CHECKING:
    from mnemic.memory import MemoryConfig


@dataclass(frozen=True)
class Card:
    """What `mnemic list` and the documentation say of a mechanism."""

    title: str
    seam: str
    trains: str
    bytes_law: str
    paper: str
    citation: str


def home(kind: str) -> str:
    """The module of one of this package's mechanisms: it is named like the kind."""
    return f"{__package__}.{kind.replace('-', '_')}"


class Configs(MutableMapping[str, "type[MemoryConfig]"]):
    """Config classes by kind. Those of this package come first and are imported when they are asked for; the others
    follow as they were defined.
    """

    def __init__(self) -> None:
        self.defined: dict[str, type[MemoryConfig]] = {}

    def __getitem__(self, kind: str) -> type[MemoryConfig]:
        if kind not in self.defined and kind in MECHANISMS:
            import_module(home(kind))
        return self.defined[kind]

    def __setitem__(self, kind: str, config: type[MemoryConfig]) -> None:
        self.defined[kind] = config

    def __delitem__(self, kind: str) -> None:
        del self.defined[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in MECHANISMS or kind in self.defined

    def __iter__(self) -> Iterator[str]:
        return iter({**MECHANISMS, **self.defined})

    def __len__(self) -> int:
        return len({**MECHANISMS, **self.defined})

    def __repr__(self) -> str:
        return f"<{len(self)} mechanisms: {', '.join(self)}>"


CONFIGS = Configs()
"""Every mechanism by its kind; a subclass of `MemoryConfig` that names a `kind` enters by being defined."""


def cards() -> dict[str, Card]:
    """Every mechanism's card by kind. Of those that are not imported it is read from the text of their files."""
    return {
        kind: CONFIGS.defined[kind].card if kind in CONFIGS.defined else _written(home(kind), MECHANISMS[kind])
        for kind in CONFIGS
    }


FILES = "mnemic_file_"
"""Begins the names of modules that were files outside of this package."""


def import_file(path: str | Path) -> list[str]:
    """Runs a Python file outside of this package and returns the kinds of the mechanisms it defines, which are
    registered then. A file that was run before is not run again.

    Raises:
        ValueError: no Python file, one that fails, or one without a mechanism.
    """
    file = Path(path).resolve()
    # two files may have one name
    name = f"{FILES}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file) if file.suffix == ".py" else None
        if spec is None or spec.loader is None or not file.is_file():
            raise ValueError(f"{path} is no Python file; name one that defines a MemoryConfig")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            for kind in [kind for kind, config in CONFIGS.defined.items() if config.__module__ == name]:
                del CONFIGS.defined[kind]
            raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not (kinds := [kind for kind, config in CONFIGS.defined.items() if config.__module__ == name]):
        raise ValueError(f"{path} defines no mechanism: a subclass of mnemic.MemoryConfig with a kind")
    return kinds


def imported_files() -> list[Path]:
    """The files that `import_file` ran: another process needs them too."""
    names = {config.__module__ for config in CONFIGS.defined.values()}
    files = (sys.modules[name].__file__ for name in sorted(names) if name.startswith(FILES))
    return [Path(file) for file in files if file is not None]


def _written(module: str, name: str) -> Card:
    """The card in the text of class `name`, in a module or in the one that it imports the class from."""
    path = Path(__file__).parent.joinpath(*module.removeprefix(f"{__package__}.").split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for part in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(part, ast.ImportFrom) and any(each.name == name for each in part.names):
            return _written(str(part.module), name)
        if isinstance(part, ast.ClassDef) and part.name == name:
            for line in part.body:
                if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "card":
                    assert isinstance(line.value, ast.Call)
                    return Card(**{str(each.arg): ast.literal_eval(each.value) for each in line.value.keywords})
    raise ValueError(f"{file} has no class {name} with a card of plain text, `card: ClassVar[Card] = Card(...)`")
