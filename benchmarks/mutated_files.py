"""Files that are wrong, by the thousand: what of them is loaded, and what becomes of the model.

Some are damaged, some made by hand, and in most of them the checksum fits what was changed: whoever can write a file
can write that too. None may be loaded, whatever it says.

    python benchmarks/mutated_files.py --files 10000 --out results
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from safetensors.torch import save as serialize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import CONFIG_FILE, WEIGHTS_FILE, attach, attached, from_pretrained
from mnemic.bench.results import Record, records
from mnemic.cli.show import Show, console
from mnemic.memories.settings import is_a
from mnemic.memory import CONFIGS, MemoryConfig
from mnemic.session import Session
from mnemic.state import APART, FORMAT, FORMAT_APART, StateError, checksum, digest_of, from_bytes
from scripts import Out, launch, saved, today

SEGMENT = 8
JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0.5, 2**31, 2**62, 2**70, -(2**63), 1e308, "", "x", "\0", "../../etc/passwd", "\ud800",
    [], [[]], [0, 1], [-1], ["a"], {}, {"a": 1}, [None], "int", "__class__",
)  # fmt: skip
"""Values that stand where others should."""


@dataclass(frozen=True)
class Subject:
    """A model with a memory, a session of it, its bytes, and the folder that `save_pretrained` wrote."""

    kind: str
    model: Any
    bare: Any
    session: Session
    data: bytes
    weights: bytes

    @property
    def first(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a new stream's state, by their names in a file."""
        state = attached(self.model).memory.init_state(1)
        return {f"state.{name}": tuple(tensor.shape) for name, tensor in state.items()}


@dataclass
class Findings:
    """What came of wrong files, by sort: `refused` with a clear error; `loaded` all the same; `crashed` with another
    error; `changed` something of the model or of a session that was there.
    """

    refused: dict[str, int] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def files(self) -> int:
        """How many there were."""
        return sum(self.refused.values()) + len(self.loaded) + len(self.crashed)


def base(seed: int = 0, width: int = 64) -> Any:
    """A tiny Llama with random weights."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 97, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**settings, **heads, **layers)).eval()  # pyright: ignore[reportArgumentType]


def subject(config: MemoryConfig, folder: Path, seed: int = 0, width: int = 64) -> Subject:
    """A base with that memory, and a session that has read enough to hold some of everything."""
    model, bare = base(seed, width), base(seed, width)
    attachment = attach(model, config)
    session = Session(model, window=2 * SEGMENT, keep_text=True)
    session.read(torch.randint(3, 97, (1, 5 * SEGMENT + 3)))
    attachment.save_pretrained(folder)
    data, weights = steady(session.to_bytes()), steady((folder / WEIGHTS_FILE).read_bytes())
    return Subject(config.kind, model, bare, session, data, weights)


# --- how files go wrong -----------------------------------------------------------------------------------------------

Damage = Callable[[random.Random, bytes, Subject], bytes]


def seal(tensors: dict[str, Tensor], meta: Any) -> bytes:
    """A file with a checksum that fits, whatever is in it."""
    text = json.dumps(meta, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    apart = {name: digest_of(tensor) for name, tensor in tensors.items() if name.startswith(APART)}
    words = {"mnemic": FORMAT_APART, "apart": json.dumps(apart, sort_keys=True)} if apart else {"mnemic": FORMAT}
    return steady(serialize(tensors, metadata={**words, "meta": text, "sha256": checksum(tensors, text, apart)}))


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and the bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def closed(header: Any, body: bytes) -> bytes:
    """A file of a header, as JSON or as the bytes themselves, and what stands behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def steady(data: bytes) -> bytes:
    """The same file with its header in order: safetensors writes metadata in any."""
    header, body = opened(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return closed(dict(sorted(header.items())), body)


def truncated(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """The beginning of a file."""
    return data[: source.randrange(len(data))]


def flipped(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A few bits the other way."""
    edited = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 8))):
        edited[source.randrange(len(edited))] ^= 1 << source.randrange(8)
    return bytes(edited)


def overwritten(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A stretch of zeros or of noise."""
    start, length = source.randrange(len(data)), source.choice((1, 16, 512))
    noise = source.randbytes(length) if source.random() < 0.5 else bytes(length)
    return data[:start] + noise + data[start + length :]


def extended(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """Something more at its end, or the same twice."""
    return data + (data if source.random() < 0.5 else source.randbytes(source.randrange(1, 99)))


def hostile_length(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A header that says it is longer than the file, or all of it."""
    length = source.choice((2**63 - 1, 2**64 - 1, 2**32, 10**8, len(data), len(data) - 7, 0, 1))
    return struct.pack("<Q", length) + data[8:]


def bomb(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """JSON that nests, names things twice or is no JSON at all, in the header or in the description."""
    header, body = opened(data)
    depth = source.choice((2_000, 200_000))
    deep = (
        "[" * depth + "]" * depth,
        '{"a":' * depth + "1" + "}" * depth,
        "1" * 5000,
        "NaN",
        '{"a":1,"a":2}',
        "\ufeff{}",
    )
    text = source.choice(deep)
    if source.random() < 0.5:
        tensors, _ = from_bytes(data)
        words = {"mnemic": FORMAT, "meta": text, "sha256": checksum(tensors, text)}
        return steady(serialize(tensors, metadata=words))
    whole = json.dumps(header)
    nested = f'{whole[:-1]},"x":{text}}}'
    return closed(
        source.choice((text.encode(), nested.encode(), nested.encode("utf-16"), b"\xff\xfe" + whole.encode())), body
    )


def twice(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A tensor, or the metadata, under one name twice."""
    header, body = opened(data)
    name = source.choice(list(header))
    again = json.dumps({name: header[name]})[1:-1]
    return closed(f"{json.dumps(header)[:-1]},{again}}}".encode(), body)


def header_entry(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """One field of a tensor's entry that cannot be: shapes below zero or beyond all memory, places in other tensors."""
    header, body = opened(data)
    if header.keys() == {"__metadata__"}:  # of a memory without weights: of one that is not there
        header["weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    name = source.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = source.choice(("shape", "dtype", "data_offsets", "gone", "more", "other"))
    if kind == "shape":
        entry["shape"] = source.choice(
            ([-1], [2**63], [2**40, 2**40, 0], [0, 2**62], [1.5], ["1"], None, [True], [1] * 99)
        )
    elif kind == "dtype":
        entry["dtype"] = source.choice(("C64", "F8_E4M3", "object", "pickle", 7, None, "U16", "I128"))
    elif kind == "data_offsets":
        start, end = entry["data_offsets"]
        wrong = ([end, start + end + 1], [start + 1, end + 1], [-1, end], [0, 2**63], [start], [0, len(body) + 1], "x")
        entry["data_offsets"] = source.choice(wrong)
    elif kind == "gone":
        del entry[source.choice(list(entry))]
    elif kind == "more":
        entry["code"] = "import os"
    else:
        header[name] = source.choice((None, [], "x", 3))
    return closed(header, body)


def not_a_file(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """Pickles that would make a file if they were opened as such, archives, text, nothing."""
    kinds = (pickle.dumps(Marker()), b"PK\x03\x04" + data, b"", b"hello", source.randbytes(4096), data[8:])
    return source.choice(kinds)


class Marker:
    """What leaves a mark in the environment where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.putenv, ("MNEMIC_UNPICKLED", "1")


def meta_field(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A field of the description that is gone, of another kind, or one too many."""
    tensors, meta = from_bytes(data)
    # any text may name a base
    name = source.choice([name for name in meta if name not in ("base_model", "keep_text")])
    choice = source.random()
    if choice < 0.2 and name != "sinks":  # files of earlier releases say nothing of them
        del meta[name]
    elif choice < 0.3:
        meta[source.choice(("version", "__reduce__", "../x", "code"))] = source.choice(JUNK)
    else:
        meta[name] = source.choice([junk for junk in JUNK if junk is not None])
    if source.random() < 0.05:
        return seal(tensors, source.choice(([], "x", 7, None, [meta])))
    return seal(tensors, meta)


def setting(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A setting of the memory of another type or far from any that was meant, an unknown one, or an unknown kind."""
    tensors, meta = from_bytes(data)
    memory = meta["memory"]
    choice = source.random()
    if choice < 0.15:
        memory["kind"] = source.choice([*JUNK, "unheard-of", "os.system"])
    elif choice < 0.25:
        memory[source.choice(("code", "__init__", "path", "../x"))] = source.choice(JUNK)
    else:
        name = source.choice([name for name in memory if name != "kind"])
        hint = get_type_hints(CONFIGS[memory["kind"]])[name]
        memory[name] = source.choice([junk for junk in JUNK if not is_a(junk, hint)])
    return seal(tensors, meta)


def tensor_of_another_kind(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """A tensor of another dtype or shape, NaN somewhere, under another name, gone, or one too many."""
    tensors, meta = from_bytes(data)
    if not tensors:
        return seal({"weight": torch.zeros(2)}, meta)
    name = source.choice(sorted(tensors))
    tensor = tensors[name]
    kind = source.choice(("dtype", "dimension", "longer", "shorter", "nan", "name", "gone", "more"))
    floats = tensor.is_floating_point()
    if kind == "gone" and name.endswith("last"):  # files of earlier releases lack it
        kind = "more"
    if kind == "dtype":
        wrong = (torch.int16, torch.uint8) if floats else (torch.float32, torch.int8)
        tensors[name] = tensor.to(source.choice([each for each in wrong if each != tensor.dtype]))
    elif kind == "dimension":
        tensors[name] = tensor[None] if source.random() < 0.5 or tensor.ndim == 0 else tensor[..., None]
    elif kind in ("longer", "shorter") and tensor.ndim:
        # a table may be longer than what is in it, and a history than what is told of it
        growing = name.startswith("history.") or 0 in subject.first.get(name, ())
        dimension = source.randrange(tensor.ndim)
        if kind == "longer" and not growing:
            tensors[name] = torch.cat([tensor, tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))], dimension)
        elif not name.startswith("history."):
            tensors[name] = tensor.narrow(dimension, 0, max(0, tensor.shape[dimension] - 1)).contiguous()
    elif kind == "nan" and floats and tensor.numel():
        tensor.view(-1)[source.randrange(tensor.numel())] = source.choice((torch.nan, torch.inf, -torch.inf))
    elif kind == "name":
        wrong = source.choice(("../../x", "state.__class__", "keys.99", name + ".", "", "state.", name.upper(), "\n"))
        tensors[wrong] = tensors.pop(name)
    elif kind == "gone":
        del tensors[name]
    else:
        tensors[source.choice(("../../x", "extra", "keys.99", "state.more", "history.more"))] = torch.zeros(1, 2)
    return seal(tensors, meta)


def ledger(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """Counts of a session that do not fit each other or its tensors."""
    tensors, meta = from_bytes(data)
    part = source.choice([name for name in ("stream", "running") if name in meta])
    name = source.choice(list(meta[part]))
    beyond = (-1, 2**31, 2**61, 2**62, 10_000 if name != "position" else 2**20)
    wrong = ([], [0, 0], [[0]], 5, None, [None], ["5"], [True], [1.0], *([number] for number in beyond))
    meta[part][name] = source.choice(wrong)
    return seal(tensors, meta)


def place(source: random.Random, data: bytes, subject: Subject) -> bytes:
    """Numbers in a state that point outside its tables, where it has any."""
    tensors, meta = from_bytes(data)
    whole = [name for name in sorted(tensors) if name.startswith("state.") and not tensors[name].is_floating_point()]
    # an engram may have any id, and a memory does not know how many tokens there are in a vocabulary
    free = ("fired", "elders", "tokens", ".id")
    pointing = [name for name in whole if not name.endswith(free) and tensors[name].numel()]
    if not pointing:
        return ledger(source, data, subject)
    tensor = tensors[source.choice(pointing)]
    tensor.view(-1)[source.randrange(tensor.numel())] = source.choice((-2, -(2**31), 2**31 - 1))
    return seal(tensors, meta)


DAMAGED: tuple[Damage, ...] = (truncated, flipped, overwritten, extended)
MADE: tuple[Damage, ...] = (hostile_length, bomb, twice, header_entry, not_a_file)
SEALED: tuple[Damage, ...] = (meta_field, setting, tensor_of_another_kind)
OF_SESSIONS: tuple[Damage, ...] = (*DAMAGED, *MADE, *SEALED, *SEALED, ledger, ledger, place)
OF_ADAPTERS: tuple[Damage, ...] = (*DAMAGED, *MADE, *SEALED, *SEALED)


# --- and what is made of them -----------------------------------------------------------------------------------------


def subjects(folder: Path, kinds: list[str] | None = None) -> list[Subject]:
    """One of each kind of memory, by name if named."""
    chosen = sorted(CONFIGS) if kinds is None else kinds
    return [subject(CONFIGS[kind].tiny()[0], folder / kind) for kind in chosen]


def of_another(source: random.Random, data: bytes, other: bytes) -> bytes:
    """What somebody else's file holds, under the name and the fingerprints of this one."""
    _, mine = from_bytes(data)
    tensors, theirs = from_bytes(other)
    own = ("memory", "memory_fingerprint", "base_model", "base_fingerprint")
    return seal(tensors, theirs | {name: mine[name] for name in own if name in mine})


def mutated_files(files: int, folder: Path, seed: int = 0, progress: Callable[[int], None] | None = None) -> Findings:
    """Loads `files` wrong sessions and adapters, in turn, and notes what came of each.

    A file that says in other bytes what the right one says (a flipped bit of padding) does not count.
    """
    source, found = random.Random(seed), Findings()
    everyone = subjects(folder)
    others = [*everyone, subject(CONFIGS["emt"].tiny()[0], folder / "narrow", width=32)]
    watched = [(each, _look(each.model), _look(each.bare), each.session.to_bytes()) for each in everyone]
    os.environ.pop("MNEMIC_UNPICKLED", None)
    while found.files < files:
        of = everyone[found.files % len(everyone)]
        sort, load = ("session", _session) if found.files % 2 else ("adapter", _adapter)
        right = of.data if sort == "session" else of.weights
        damage = source.choice(OF_SESSIONS if sort == "session" else OF_ADAPTERS)
        if source.random() < 0.05:
            other = source.choice([each for each in others if each is not of])
            name = "of_another"
            wrong = of_another(source, right, other.data if sort == "session" else other.weights)
        else:
            name, wrong = damage.__name__, damage(source, right, of)
        if _says_the_same(wrong, right):
            continue
        label, begun = f"{sort}, {name}".replace("_", " "), time.perf_counter()
        try:
            load(of, wrong, folder)
            found.loaded.append(f"{label}, {of.kind}")
        except StateError as error:
            found.refused[label] = found.refused.get(label, 0) + 1
            if len(str(error)) < 20:
                found.crashed.append(f"{label}, {of.kind}: says only {error}")
        except Exception as error:
            found.crashed.append(f"{label}, {of.kind}: {type(error).__name__}: {str(error)[:200]}")
        found.slowest = max(found.slowest, time.perf_counter() - begun)
        if progress is not None:
            progress(1)
        if found.files % 500 == 0 or found.files == files:
            found.changed += [
                each.kind
                for each, model, bare, data in watched
                if (_look(each.model), _look(each.bare)) != (model, bare)
                or not _says_the_same(each.session.to_bytes(), data)
            ]
    if os.environ.get("MNEMIC_UNPICKLED"):
        found.changed.append("a pickle was opened")
    return found


def _session(of: Subject, wrong: bytes, folder: Path) -> None:
    (folder / "wrong.memory").write_bytes(wrong)
    # what is mapped is checked when it is used
    Session.load(folder / "wrong.memory", of.model).contents()


def _adapter(of: Subject, wrong: bytes, folder: Path) -> None:
    """The attacker writes both files, so the one beside says what the weights' own description says."""
    (folder / WEIGHTS_FILE).write_bytes(wrong)
    try:
        said = json.dumps(from_bytes(wrong)[1])
    except StateError:
        said = (folder / of.kind / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(said)
    from_pretrained(of.bare, folder).detach()


def _says_the_same(one: bytes, other: bytes) -> bool:
    try:
        (mine, said), (theirs, meant) = from_bytes(one), from_bytes(other)
    except StateError:
        return False
    alike = mine.keys() == theirs.keys() and said == meant
    return alike and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def _look(model: nn.Module) -> list[tuple[str, int, bool, float]]:
    """Everything of a model that loading could change."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        (name, weight.data_ptr(), weight.requires_grad, float(weight.detach().double().sum()))
        for name, weight in weights.items()
    ]


# --- table ------------------------------------------------------------------------------------------------------------


def table(found: Sequence[Record]) -> str:
    """Wrong files by how they came to be wrong."""
    if not found:
        return missing("wrong files")
    m = found[0].measures
    sorts = sorted({label.split(", ")[1] for label in m["refused"]})
    rows = [
        [sort, *(f"{m['refused'].get(f'{which}, {sort}', 0):,}" for which in ("session", "adapter"))] for sort in sorts
    ]
    note = (
        f"{m['sum']:,} of {m['files']:,} refused with a `StateError`, {len(m['loaded'])} loaded, {len(m['crashed'])} "
        f"crashed, {len(m['changed'])} changed anything. Made by `{found[0].command}`."
    )
    return markdown(["wrong by", "sessions refused", "adapters refused"], rows) + "\n\n" + note


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"mutated-files": table(today(records(results, "mutated-files"), "bench mutated-files", "mutated_files.py"))}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    files: Annotated[int, typer.Option(min=1, help="Wrong files, half sessions and half adapters.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the damage.")] = 0,
    out: Out = Path("results"),
) -> None:
    """Sessions and adapters that are damaged or made by hand, their checksums with them: what of them is loaded?"""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Show("") as progress:
        progress.phase("wrong files", files)
        found = mutated_files(files, Path(folder), seed, progress.advance)
    measures = {"files": found.files, "sum": sum(found.refused.values()), **asdict(found)}
    for label in ("loaded", "crashed", "changed"):
        console.print(f"{label}: {len(measures[label]):,} {measures[label][:5]}", highlight=False, soft_wrap=True)
    console.print(f"refused with a clear error: {measures['sum']:,} of {found.files:,}; slowest {found.slowest:.2f} s")
    record = Record("mutated-files", "all", "Llama, 2 blocks, width 64, random weights", seed, {}, measures=measures)
    record.seconds = {"all": time.perf_counter() - begun}
    saved(record, out, "mutated-files.json")


if __name__ == "__main__":
    launch(app)
