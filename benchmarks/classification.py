"""Long articles to one class: does an encoder that carries a memory know more than one that is cut at its window?

The encoder is frozen. It reads an article a window at a time, the last one reaching back to be full, and the memory is
carried from window to window: written after one block, read after the last. A linear classifier sees means over tokens:

    memory               of the last window, with what the memory adds
    cut at the window    of the first window
    last window          of the last window
    all windows          of every window, and of these: what a memory has to beat

Every one has a classifier of its own, kept from the epoch of the lowest validation loss; the one with a memory begins
as that of the last window. It is also asked with `other article` (before the last window the memory is that of another
test article) and `empty` (it is new there).

What the frozen blocks put out does not depend on the memory, so it is computed once for all seeds.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mnemic.analysis.markdown import markdown, missing, spread
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, Score, records
from mnemic.cli.show import Show, Table, console
from mnemic.controls import apart, parts
from mnemic.memories.memoria import MemoriaConfig
from mnemic.memory import Memory, MemoryConfig, Site
from mnemic.state import read_file, write_file
from mnemic.stream import Stream
from mnemic.tasks.base import generator
from mnemic.tasks.documents import Split, hyperpartisan, macro_f1, split
from scripts import Checkpoints, Out, Seeds, launch, numbers, saved, today

Way = Literal["memory", "other article", "empty"]
WAYS: tuple[Way, ...] = ("memory", "other article", "empty")
WITHOUT = ("cut at the window", "last window", "all windows")


@dataclass
class Recipe:
    """AdamW on batches of `rows` articles; the weights of the epoch with the lowest validation loss are kept."""

    epochs: int = 3
    rows: int = 16
    learning_rate: float = 5e-4
    head_rate: float = 1e-3
    head_epochs: int = 30
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass(frozen=True)
class Article:
    """One article as the frozen encoder sees it: `written` and `asked` `[s, t, d]`, real tokens `[s, t]`, its class."""

    written: Float[Tensor, "s t d"]
    asked: Float[Tensor, "s t d"]
    keep: Bool[Tensor, "s t"]
    label: int

    def __len__(self) -> int:
        return len(self.keep)


# --- what the frozen encoder makes of articles -----------------------------------------------------------------------


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Token ids cut into windows of `length`, at most `most`; the last reaches back to be full."""
    ids = list(ids)[: length * most]
    starts = [*range(0, max(1, len(ids) - length), length), max(0, len(ids) - length)]
    return [ids[start : start + length] for start in dict.fromkeys(starts)]


@torch.no_grad()
def encode(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[tuple[str, bool]],
    config: MemoryConfig,
    *,
    most: int,
    batch: int = 16,
    reporter: Reporter | None = None,
) -> list[Article]:
    """What the bare encoder's blocks put out where the memory writes and after the last, for all windows.

    Kept in half precision: only what is learned on top of it matters here.
    """
    length = config.segment_length
    memory = config.build(model.config.hidden_size, model.config.num_hidden_layers, causal=False)  # pyright: ignore
    if memory.reads != (Site(model.config.num_hidden_layers - 1),):  # pyright: ignore
        raise ValueError(
            f"it reads {', '.join(map(str, memory.reads))}; frozen blocks are only kept where the last reads"
        )
    first, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    parts: list[tuple[int, list[int]]] = []
    for index, (text, _) in enumerate(examples):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        parts += [(index, [first, *part, end]) for part in windows(ids, length - 2, most)]
    reporter = reporter or Silent()
    reporter.phase("encode windows", len(parts))
    found: dict[int, tuple[Tensor, Tensor, int]] = {}
    for group in torch.arange(len(parts)).split(batch):
        rows = [parts[place][1] for place in group.tolist()]
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for row, part in enumerate(rows):
            ids[row, : len(part)] = torch.tensor(part)
        keep = torch.tensor([len(part) for part in rows])[:, None] > torch.arange(length)
        hidden = model(input_ids=ids, attention_mask=keep.long(), output_hidden_states=True).hidden_states
        for row, place in enumerate(group.tolist()):
            written, asked = hidden[memory.writes[-1].layer + 1][row].half(), hidden[-1][row].half()
            found[place] = (written.clone(), asked.clone(), len(rows[row]))
        reporter.advance(len(rows))
    articles = []
    for index, (_, label) in enumerate(examples):
        places = [place for place, (whose, _) in enumerate(parts) if whose == index]
        keep = torch.tensor([found[place][2] for place in places])[:, None] > torch.arange(length)
        written = torch.stack([found[place][0] for place in places])
        asked = torch.stack([found[place][1] for place in places])
        articles.append(Article(written, asked, keep, int(label)))
    return articles


def store(path: str | os.PathLike[str], articles: Sequence[Article], description: dict[str, Any]) -> None:
    """Writes what `encode` made, so that a run that was stopped need not make it again."""
    tensors = {name: torch.cat([getattr(each, name) for each in articles]) for name in ("written", "asked", "keep")}
    tensors["windows"] = torch.tensor([len(each) for each in articles])
    tensors["label"] = torch.tensor([each.label for each in articles])
    write_file(path, tensors, description)


def restore(path: str | os.PathLike[str], description: dict[str, Any]) -> list[Article] | None:
    """What `store` wrote, if it is there and of the same description."""
    if not Path(path).is_file():
        return None
    tensors, found = read_file(path)
    if any(found.get(name) != value for name, value in description.items()):
        return None
    counts = tensors["windows"].tolist()
    written, asked, keep = (tensors[name].split(counts) for name in ("written", "asked", "keep"))
    return [Article(*each) for each in zip(written, asked, keep, tensors["label"].tolist(), strict=True)]


# --- reading with a memory -------------------------------------------------------------------------------------------


def read(memory: Memory, articles: Sequence[Article], way: Way = "memory") -> Float[Tensor, "n d"]:
    """Means over the last window's tokens of what the memory puts out; articles by number of windows, longest first.
    Equal to calls of the encoder within `carrying`.

    Articles end together: a shorter one joins later. Gradients come from the last window.
    """
    counts = [len(article) for article in articles]
    if counts != sorted(counts, reverse=True):
        raise ValueError("articles must come by number of windows, longest first")
    longest, width = counts[0], articles[0].asked.shape[-1]
    stream = Stream.new(memory, 0, torch.empty(0, 0, width))
    for step in range(longest):
        ends = step == longest - 1
        rows = [row for row, count in enumerate(counts) if count >= longest - step]
        places = [step - longest + counts[row] for row in rows]
        joined = Stream.new(memory, len(rows) - stream.batch, torch.empty(0, 0, width))
        stream = Stream.concatenate([stream, joined]) if stream.batch else joined
        if ends and way == "empty":
            stream = Stream.new(memory, len(rows), torch.empty(0, 0, width))
        if ends and way == "other article":
            # those that have read something change places among themselves
            several = sum(count > 1 for count in counts)
            order = apart([(row + 1) % several for row in range(several)])
            stream = stream.select([*order, *range(several, len(rows))])
        written, asked, keep = (
            torch.stack([getattr(articles[row], name)[place] for row, place in zip(rows, places, strict=True)])
            for name in ("written", "asked", "keep")
        )
        padded = None if bool(keep.all()) else keep
        with torch.set_grad_enabled(torch.is_grad_enabled() and ends):
            stream = stream.append(written.float(), padded).commit(memory, range(len(rows)))
            output, traces = memory.read_and_trace(memory.reads[-1], asked.float(), stream.state)
            stream = stream.leave(traces, padded)
            if ends:
                return mean(output, keep)
    raise ValueError("there are no articles")


def mean(hidden: Float[Tensor, "n t d"], keep: Bool[Tensor, "n t"]) -> Float[Tensor, "n d"]:
    """Over real tokens."""
    return (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def features(articles: Sequence[Article], name: str) -> Float[Tensor, "n d"]:
    """What a classifier without a memory sees."""
    found = []
    for article in articles:
        means = mean(article.asked.float(), article.keep)
        found.append({"cut at the window": means[0], "last window": means[-1], "all windows": means.mean(0)}[name])
    return torch.stack(found)


# --- training --------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two classes from features that are brought to mean 0 and deviation 1 over the training articles."""

    middle: Tensor
    spread: Tensor

    def __init__(self, features: Float[Tensor, "n d"]) -> None:
        super().__init__()
        self.register_buffer("middle", features.mean(0))
        self.register_buffer("spread", features.std(0) + 1e-4)
        self.linear = nn.Linear(features.shape[1], 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
        """Logits."""
        return self.linear((features - self.middle) / self.spread)


def train(
    rates: dict[nn.Module, float],
    logits: Callable[[Sequence[Article]], Tensor],
    parts: tuple[list[Article], list[Article]],
    epochs: int,
    recipe: Recipe,
    seed: int,
    advance: Callable[..., None] = lambda steps, **values: None,
) -> list[float]:
    """Trains modules, each at its rate, on the first part and leaves them as they were best on the second. Returns the
    second part's loss by epoch.
    """
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    everything = nn.ModuleList(rates)
    examples, validation = parts
    source, trail, kept = generator(seed), [float("inf")], copy.deepcopy(everything.state_dict())
    for epoch in range(epochs):
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 - epoch / epochs)
        for places in torch.randperm(len(examples), generator=source).split(recipe.rows):
            batch = ordered([examples[place] for place in places.tolist()])
            loss = F.cross_entropy(logits(batch), labels(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(everything.parameters(), recipe.clip)
            optimizer.step()
        with torch.no_grad():
            summed = [F.cross_entropy(logits(batch), labels(batch), reduction="sum") for batch in batches(validation)]
        loss = float(sum(summed)) / len(validation)
        advance(1, validation=loss)
        if loss < min(trail):
            kept = copy.deepcopy(everything.state_dict())
        trail.append(loss)
    everything.load_state_dict(kept)
    return trail[1:]


def ordered(articles: Sequence[Article]) -> list[Article]:
    """By number of windows, longest first."""
    return sorted(articles, key=len, reverse=True)


def batches(articles: Sequence[Article], rows: int = 32) -> list[list[Article]]:
    """All articles in order of length, in batches."""
    articles = ordered(articles)
    return [articles[part] for part in parts(len(articles), rows)]


def labels(articles: Sequence[Article]) -> Tensor:
    """Their classes."""
    return torch.tensor([article.label for article in articles])


# --- the experiment --------------------------------------------------------------------------------------------------


@dataclass
class Experiment:
    """An encoder, a memory that is read after the last block, and how both are trained; `most` windows an article."""

    config: MemoryConfig
    recipe: Recipe
    model: str
    most: int = 8
    depth: int = 6

    @property
    def name(self) -> str:
        """The model's, without the folders around it."""
        return "/".join(Path(self.model).parts[-2:])

    def encode(
        self, path: str | os.PathLike[str], reporter: Reporter | None = None, kept: str | os.PathLike[str] | None = None
    ) -> list[Article]:
        """The articles as the frozen encoder sees them, from the file `kept` if they are there."""
        blocks = {name: getattr(self.config, name) for name in ("segment_length", "write_layer", "read_layers")}
        description = {"content": "articles", "model": self.name, "most": self.most, **blocks}
        if kept is not None and (found := restore(kept, description)) is not None:
            return found
        model = AutoModel.from_pretrained(self.model, dtype=torch.float32).eval()
        tokenizer, examples = AutoTokenizer.from_pretrained(self.model), hyperpartisan(path)
        articles = encode(model, tokenizer, examples, self.config, most=self.most, reporter=reporter)
        if kept is not None:
            store(kept, articles, description)
        return articles

    def run(self, articles: Sequence[Article], seed: int, reporter: Reporter | None = None) -> Record:
        """Divides the articles by the seed, trains every classifier on the same part and asks all about the same test.
        The record is not saved yet.
        """
        reporter, recipe, begun = reporter or Silent(), self.recipe, time.monotonic()
        divided = split(articles, seed, [article.label for article in articles])
        parts, test = (divided.train, divided.validation), batches(divided.test)
        true = torch.cat([labels(batch) for batch in test])
        predicted: dict[str, Tensor] = {}
        chosen: dict[str, int] = {}
        seconds: dict[str, float] = {}
        heads: dict[str, Classifier] = {}
        for name in WITHOUT:
            known = {id(article): value for article, value in zip(articles, features(articles, name), strict=True)}
            head = heads[name] = Classifier(features(divided.train, name))
            trail = train(
                {head: recipe.head_rate},
                lambda batch, head=head, known=known: head(torch.stack([known[id(article)] for article in batch])),
                parts,
                recipe.head_epochs,
                recipe,
                seed,
            )
            chosen[name] = trail.index(min(trail)) + 1
            with torch.no_grad():
                predicted[name] = torch.cat([head(features(batch, name)).argmax(1) for batch in test])
        torch.manual_seed(seed)
        memory = self.config.build(articles[0].asked.shape[-1], self.depth, causal=False)
        head = copy.deepcopy(heads["last window"])
        reporter.phase(f"train the memory, seed {seed}", recipe.epochs)
        trail = train(
            {memory: recipe.learning_rate, head: recipe.head_rate},
            lambda batch: head(read(memory, batch)),
            parts,
            recipe.epochs,
            recipe,
            seed,
            reporter.advance,
        )
        chosen["memory"] = trail.index(min(trail)) + 1
        for way in WAYS:
            with torch.no_grad():
                predicted[way] = torch.cat([head(read(memory, batch, way)).argmax(1) for batch in test])
        seconds["training and test"] = time.monotonic() - begun
        return self._record(seed, divided, true, predicted, chosen, seconds)

    def _record(
        self,
        seed: int,
        divided: Split[Article],
        true: Tensor,
        predicted: dict[str, Tensor],
        chosen: dict[str, int],
        seconds: dict[str, float],
    ) -> Record:
        f1 = {name: macro_f1(said, true) for name, said in predicted.items()}
        accuracy = {name: float((said == true).float().mean()) for name, said in predicted.items()}
        score = Score(
            length=self.most,
            tokens=self.most * self.config.segment_length,
            examples=len(true),
            score=f1["memory"],
            controls={name: value for name, value in f1.items() if name != "memory"},
            floors={"most frequent class": macro_f1([0] * len(true), true)},
            ceiling=None,
            details={f"accuracy, {name}": value for name, value in accuracy.items()},
            outcomes={name: "".join(map(str, (said == true).int().tolist())) for name, said in predicted.items()},
        )
        return Record(
            task="hyperpartisan",
            mechanism=self.config.kind,
            host=f"{self.name}, frozen, windows of {self.config.segment_length} tokens",
            seed=seed,
            config={"memory": self.config.to_dict(), "recipe": asdict(self.recipe), "most windows": self.most},
            scores=[score],
            measures={
                "unit": "macro F1",
                "macro F1": f1,
                "accuracy": accuracy,
                "classes": "".join(map(str, true.tolist())),
                "windows": [len(article) for batch in batches(divided.test) for article in batch],
                "articles": {name: len(getattr(divided, name)) for name in ("train", "validation", "test")},
                "epoch chosen": chosen,
            },
            seconds=seconds,
        )


def published(model: str) -> Experiment:
    """The settings of the published runs: Memoria written after the last block but one and read after the last."""
    config = MemoriaConfig(
        segment_length=256,
        working=32,
        feed_forward=384,
        reminded_stm=32,
        reminded_ltm=32,
        stm_capacity=64,
        lifespan=12.0,
        dim=64,
        write_layer=-2,
        read_layers=[-1],
    )
    return Experiment(config, Recipe(), model)


# --- the table --------------------------------------------------------------------------------------------------------


def table(found: Sequence[Record]) -> str:
    """Hyperpartisan news: macro F1 and accuracy over seeds."""
    rows = []
    for name in found[0].measures["macro F1"]:
        f1, accuracy = ([record.measures[key][name] for record in found] for key in ("macro F1", "accuracy"))
        rows.append([name, spread(f1), spread(accuracy)])
    rows.append(["*most frequent class*", spread([r.scores[0].floors["most frequent class"] for r in found]), ""])
    command = found[0].command.split(" --out")[0]
    return markdown(["classifier", "macro F1, %", "accuracy, %"], rows) + (
        f"\n\n{found[0].host}; {len(found)} seeds, each its own split; mean and, in brackets, least and most. Made by "
        f"`{command}`."
    )


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    found = today(records(results, "hyperpartisan"), "bench classify", "classification.py")
    return {"memoria-classification": table(found) if found else missing("memoria-classification")}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="An encoder: local folder or hub id.")],
    articles: Annotated[Path, typer.Option(help="The archive or folder of SemEval-2019 task 4, by article.")],
    seeds: Seeds = "0,1,2,3,4",
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Hyperpartisan news with Memoria on a frozen encoder, beside the encoder cut at its window: macro F1."""
    experiment = published(model)
    with Show("hyperpartisan") as show:
        encoded = experiment.encode(articles, show, checkpoints / "articles.safetensors" if checkpoints else None)
        made = []
        for seed in numbers(seeds):
            made.append(experiment.run(encoded, seed, show))
            saved(made[-1], out)
    table = Table("macro F1", *(f"seed {record.seed}" for record in made), "mean")
    for name in made[0].measures["macro F1"]:
        values = [record.measures["macro F1"][name] for record in made]
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{sum(values) / len(values):.3f}")
    console.print(table)


if __name__ == "__main__":
    launch(app)
