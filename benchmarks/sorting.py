"""Sorting by frequency with Memoria: a small model and its memory trained together, and what its memories add.

The prompts are `mnemic.tasks.sorting`'s; a model sees one segment at a time. Its own weights train too, since nobody
has pretrained a model on these symbols. It is asked with the stream's own memory and under every control of
`mnemic.controls`, and, with the same weights but the prompt read again, with working memory alone, with working and
short-term memory, and under the other rules of reminding. No score is without the task's floors.

The mechanism is the paper's. Where it stands in the model, and how training begins, are not:

- It reads and writes behind the first block, and embeddings and first block stay as they were drawn. No gradient passes
  from engrams to hidden states, so nothing would keep symbols apart in hidden states that change while the model
  learns to answer: trained through, they lose the counts.
- The base first learns alone, in seconds, not to name a symbol twice.
- Abstractor and readers begin near the identity, with values scaled to vary between streams (`begin`).

    python benchmarks/sorting.py --segments 4,8 --out results
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import Attachment, attach, attached, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, Score, records
from mnemic.cli.show import Show, Table, console
from mnemic.controls import conditions, others, parts
from mnemic.host.anatomy import examine
from mnemic.host.arguments import with_cache
from mnemic.memories.memoria import Memoria, MemoriaConfig, engrams
from mnemic.memories.memoria.attention import Reader
from mnemic.memories.memoria.config import RULES
from mnemic.state import State
from mnemic.tasks.base import generator, seed_of
from mnemic.tasks.sorting import PAD, SEPARATOR, SYMBOLS, VOCABULARY, SortingTask, exact_order, kendall_tau
from mnemic.training import Batch, train
from mnemic.unrolling import IGNORED
from scripts import Checkpoints, Out, launch, numbers, saved, today


@dataclass
class Recipe:
    """How base and memory are trained.

    The base alone names symbols for `naming` steps. The training with memory goes through `stages`: segments of the
    prompts, steps and streams a step. Its rate rises for `warm` of the steps, holds until `hold` of them and falls to
    nothing on a cosine; weights end as their running `average`. `embedding` is the deviation of the base's embeddings;
    `query`, `linear`, `engram` and `value` are those of the abstractor's queries, of what its feed-forward sees, of
    engrams and of the readers' values at the start: see `begin`.
    """

    naming: int = 200
    stages: tuple[tuple[int, int, int], ...] = ((1, 400, 32), (4, 240, 32))
    learning_rate: float = 3e-3
    base_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warm: float = 0.04
    hold: float = 0.3
    average: float = 0.98
    embedding: float = 1.0
    query: float = 0.1
    linear: float = 0.1
    engram: float = 0.25
    value: float = 4.5

    @property
    def steps(self) -> int:
        """Training steps with memory."""
        return sum(steps for _, steps, _ in self.stages)

    def rate(self, progress: float) -> float:
        """Learning-rate factor at `progress` in [0, 1]."""
        if progress < self.warm:
            return progress / self.warm + 1e-3
        return 0.5 * (1 + math.cos(math.pi * max(0.0, progress - self.hold) / (1 - self.hold)))


# --- the base --------------------------------------------------------------------------------------------------------


def make_base(length: int, width: int, depth: int, recipe: Recipe) -> GPT2LMHeadModel:
    """A small GPT-2, untrained; what lies before the memory stays as it is drawn here."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=length,
            n_embd=width,
            n_layer=depth,
            n_head=2,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=SEPARATOR,
            eos_token_id=PAD,
        )
    )
    nn.init.normal_(model.transformer.wte.weight, std=recipe.embedding)
    nn.init.normal_(model.transformer.wpe.weight, std=0.01)
    for name, parameter in model.transformer.h.named_parameters():
        if parameter.ndim == 2 and "c_proj" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            bound = parameter.shape[0] ** -0.5  # GPT-2 stores its matrices input first
            nn.init.uniform_(parameter, -bound, bound)
    model.lm_head.reset_parameters()
    for part in (model.transformer.wte, model.transformer.wpe, model.transformer.h[0]):
        part.requires_grad_(False)
    return model


def naming(task: SortingTask, rows: int, seed: int) -> Batch:
    """The answers alone: without a memory nothing but not to name a symbol twice can be learned from them."""
    batch = task.draw(rows, generator(seed))
    return Batch(batch.input_ids[:, task.tokens :], batch.labels[:, task.tokens :])


def train_base(model: nn.Module, task: SortingTask, recipe: Recipe, seed: int, reporter: Reporter) -> float:
    """Trains the base without a memory; returns the share of answers' symbols it got right in the last steps."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], recipe.base_rate, betas=recipe.betas, weight_decay=0.0
    )
    right = 0.0
    reporter.phase("train the base alone", recipe.naming)
    for step in range(recipe.naming):
        number = seed_of("train", 200_000_000 + 1_000_000 * seed + step)
        batch = naming(task, 64, number)
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        used = int((targets != IGNORED).any(0).nonzero().max()) + 1
        chosen = targets[:, :used] != IGNORED
        logits = model(input_ids=batch.input_ids[:, :used], use_cache=False).logits[chosen]
        loss = F.cross_entropy(logits, targets[:, :used][chosen])
        for group in optimizer.param_groups:
            group["lr"] = recipe.base_rate * min(1.0, (step + 1) / 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.95 * right + 0.05 * float((logits.argmax(-1) == targets[:, :used][chosen]).float().mean())
        reporter.advance(1, loss=loss.item(), named=right)
    return right


# --- the memory ------------------------------------------------------------------------------------------------------


def sorting_config(length: int = 256, rule: str = "paper", **changes: Any) -> MemoriaConfig:
    """The paper's sizes for sorting: T/8 working, T/4 and 5T/8 reminded, T/2 short-term, lifespan 5, alpha 8.

    The first block alone reads and writes: what is written lies before the read, so engrams hold their own segment and
    nothing that was read.
    """
    sizes: dict[str, Any] = {"segment_length": length, "working": length // 8, "reminded_stm": length // 4}
    sizes |= {
        "reminded_ltm": 5 * length // 8,
        "stm_capacity": length // 2,
        "lifespan": 5.0,
        "alpha": 8.0,
        "heads": 1,
        "read_layers": [0],
        "write_layer": 0,
    }
    return MemoriaConfig(**{**sizes, **changes}).with_rule(rule)


@torch.no_grad()
def begin(attachment: Attachment, task: SortingTask, recipe: Recipe, seed: int) -> None:
    """Where training begins: engrams are means of hidden states, and readers pass on what varies between streams.

    What tells prompts apart is small beside what they share. Values are therefore scaled to a deviation between
    streams of `linear` before the abstractor's feed-forward, which is then close to linear, of `engram` behind it and
    of `value` in the readers, and what all streams share is taken off. Readers' outputs start at zero, as always.
    """
    memory = attachment.memory
    assert isinstance(memory, Memoria)
    abstractor = memory.abstractor
    ids = task.examples(128, "train", 400_000_000 + seed).input_ids[:, : task.length]
    hidden_btd = attachment.router.record(examine(attachment.model).trunk, ids)
    nn.init.normal_(abstractor.query, std=recipe.query)
    nn.init.eye_(abstractor.value.weight)
    nn.init.orthogonal_(abstractor.expand.weight)
    nn.init.zeros_(abstractor.expand.bias)
    # GELU passes one half of what is small
    abstractor.contract.weight.copy_(2 * abstractor.expand.weight.T * recipe.engram / recipe.linear)
    nn.init.zeros_(abstractor.contract.bias)
    normed_btd = abstractor.norm(hidden_btd)
    weight_bwt = (abstractor.query @ abstractor.key.weight @ normed_btd.transpose(1, 2)).softmax(-1)
    _standardise(abstractor.value, weight_bwt @ normed_btd, recipe.linear)
    engram_b1d = abstractor(hidden_btd, None).mean(1, keepdim=True)
    for reader in memory.readers.values():
        assert isinstance(reader, Reader)
        if reader.value.weight.shape[0] == reader.value.weight.shape[1]:
            nn.init.eye_(reader.value.weight)
        _standardise(reader.value, engram_b1d, recipe.value)


def _standardise(linear: nn.Linear, input_bkd: Float[Tensor, "b k d"], deviation: float) -> None:
    output = input_bkd @ linear.weight.T
    scale = deviation / (output - output.mean(0)).std()
    linear.bias.copy_(-output.flatten(0, 1).mean(0) * scale)
    linear.weight.mul_(scale)


class Stages:
    """The batches of training: prompts of the stage's length."""

    def __init__(self, length: int, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed, self.length = recipe, seed, length
        self.plan = [(segments, rows) for segments, steps, rows in recipe.stages for _ in range(steps)]

    def batch(self, step: int) -> Batch:
        """The same for the same step and seed."""
        segments, rows = self.plan[step]
        return SortingTask(self.length, segments).examples(rows, "train", 1_000_000 * self.seed + step)


def train_sorting(
    attachment: Attachment, recipe: Recipe, seed: int, reporter: Reporter, checkpoint: str | Path | None = None
) -> float:
    """Trains memory and base together; returns the seconds it took, those before an interruption included."""
    stages = Stages(attachment.router.segment_length, recipe, seed)
    reporter.phase("train base and memory", recipe.steps)
    notes, seconds, done = {"accuracy": 0.0}, 0.0, 0
    for step in train(
        attachment.model,
        stages.batch,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        schedule=recipe.rate,
        betas=recipe.betas,
        bptt_segments=attachment.memory.gradient_reach,
        average=recipe.average,
        notes=notes,
        checkpoint=checkpoint,
    ):
        notes["accuracy"] = 0.96 * notes["accuracy"] + 0.04 * step.accuracy
        seconds = step.seconds
        reporter.advance(step.step + 1 - done, segments=stages.plan[step.step][0], **notes)
        done = step.step + 1
    return seconds


# --- measuring -------------------------------------------------------------------------------------------------------


def variant(attachment: Attachment, config: MemoriaConfig) -> Attachment:
    """A copy of base and memory with the same weights under other settings."""
    model = copy.deepcopy(attachment.model)
    attached(model).detach()
    other = attach(model, config, freeze=False)
    other.memory.load_state_dict(attachment.memory.state_dict())
    model.eval()
    return other


@torch.no_grad()
def read_prompt(attachment: Attachment, prompt_bt: Int[Tensor, "b t"]) -> State:
    """The memory's state when the prompt has been read."""
    length = attachment.router.segment_length
    cache = memory_cache(attachment.model, length)
    for segment in prompt_bt.to(attachment.router.device).split(length, 1):
        attachment.model(input_ids=segment, **with_cache(attachment.model, cache))
    assert cache.memory.stream is not None
    return cache.memory.stream.state


@torch.no_grad()
def answers(
    attachment: Attachment, answer: Int[Tensor, "b symbols"], state: State | None
) -> tuple[Bool[Tensor, "b symbols"], Int[Tensor, "b symbols"]]:
    """Whether each symbol is the most probable one when those before it are given, and the order written greedily."""
    model, router = attachment.model, attachment.router

    def new_cache() -> Any:
        cache = memory_cache(model, router.segment_length)
        if state is not None:
            cache.memory.stream = router.new_stream(len(answer), state)
        return cache

    answer = answer.to(router.device)
    first = torch.full_like(answer[:, :1], SEPARATOR)
    given = torch.cat([first, answer[:, :-1]], 1)
    right = model(input_ids=given, **with_cache(model, new_cache())).logits.argmax(-1) == answer
    cache, token, written = new_cache(), first, []
    for _ in range(SYMBOLS):
        token = model(input_ids=token, **with_cache(model, cache)).logits.argmax(-1)
        written.append(token)
    return right.cpu(), torch.cat(written, 1).cpu()


def reminded_segments(state: State, working: int, segments: int) -> list[float]:
    """How many engrams of each segment a stream is reminded of at the end of its prompt, mean over streams."""
    real = state["recalled"] >= 0
    born = (engrams.gather(state["id"][..., None], state["recalled"])[..., 0] - 1) // working
    return [float(((born == segment) & real).sum(1).float().mean()) for segment in range(segments)]


def evaluate_sorting(
    attachment: Attachment,
    task: SortingTask,
    *,
    rows: int = 256,
    batch: int = 64,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[Score, dict[str, Any]]:
    """Scores memory, controls, ablations and rules on the same test streams; with it how reminding went under each."""
    reporter = reporter or Silent()
    config, model = attachment.router.config, attachment.model
    assert isinstance(config, MemoriaConfig)
    model.eval()
    own = next((rule for rule in RULES if config.with_rule(rule) == config), "")
    variants = {
        "working memory": config.with_rule("paper").replace(reminded_stm=0, reminded_ltm=0),
        "working and short-term memory": config.with_rule("paper").replace(reminded_ltm=0),
        **{f"rule {rule}": config.with_rule(rule) for rule in RULES if rule != own},
    }
    test = task.examples(rows, "test", seed)
    prompts, wanted = task.prompt(test), task.order(test)
    outcomes: dict[str, list[Tensor]] = {}
    written: dict[str, list[Tensor]] = {}
    reminded: dict[str, Any] = {}
    state_bytes = 0
    reporter.phase(f"ask after {task.segments} segments", (1 + len(variants)) * rows)
    for name, made in {"memory": attachment, **{n: variant(attachment, c) for n, c in variants.items()}}.items():
        counted, levels = [], []
        for part in parts(rows, batch):
            prompt, answer = prompts[part], wanted[part]
            state = read_prompt(made, prompt)
            counted.append(reminded_segments(state, config.working, task.tokens // config.segment_length))
            levels.append(state["levels"].float().mean(0).tolist())
            asked = conditions(made, state, others(prompt)) if name == "memory" else {name: state}
            for condition, its in asked.items():
                with made.disabled() if its is None else contextlib.nullcontext():
                    right, order = answers(made, answer, its)
                outcomes.setdefault(condition, []).append(right)
                written.setdefault(condition, []).append(order)
            if name == "memory":
                state_bytes = max(state_bytes, sum(t[0].numel() * t.element_size() for t in state.values()))
            reporter.advance(len(answer))
        reminded[name] = {"reminded of each segment": _means(counted), "long, short, working": _means(levels)}
    right = {name: torch.cat(parts) for name, parts in outcomes.items()}
    orders = {name: torch.cat(parts) for name, parts in written.items()}
    scores = {name: float(each.double().mean()) for name, each in right.items()}
    details = {"state_bytes": float(state_bytes)}
    for name, order in orders.items():
        details |= {f"{name}: exact order": exact_order(order, wanted)}
        details |= {f"{name}: Kendall tau": kendall_tau(order, wanted)}
    score = Score(
        length=task.segments,
        tokens=task.tokens,
        examples=rows * SYMBOLS,
        score=scores.pop("memory"),
        controls=scores,
        floors=task.floors(rows, seed),
        ceiling=None,
        details=details,
        outcomes={name: "".join(map(str, each.int().flatten().tolist())) for name, each in right.items()},
    )
    return score, reminded


def _means(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows).mean(0).tolist()


# --- from beginning to end -------------------------------------------------------------------------------------------


@dataclass
class SortingExperiment:
    """A base and Memoria learn to sort prompts of `segments` segments; asked after each length in `lengths`."""

    config: MemoriaConfig
    recipe: Recipe
    lengths: tuple[int, ...]
    width: int = 64
    depth: int = 3
    rows: int = 256
    batch: int = 64
    seed: int = 0

    def run(self, reporter: Reporter | None = None, checkpoint: str | Path | None = None) -> tuple[Attachment, Record]:
        """Trains and measures; the record is not saved yet."""
        reporter = reporter or Silent()
        begun = time.monotonic()
        torch.manual_seed(self.seed)
        length = self.config.segment_length
        task = SortingTask(length, 1)
        model = make_base(length, self.width, self.depth, self.recipe)
        named = train_base(model, task, self.recipe, self.seed, reporter)
        attachment = attach(model, self.config, freeze=False)
        begin(attachment, task, self.recipe, self.seed)
        record = Record(
            task="sorting",
            mechanism=self.config.kind,
            host=f"GPT-2, {self.depth} blocks, width {self.width}, trained with its memory",
            seed=self.seed,
            config={"memory": self.config.to_dict(), "recipe": asdict(self.recipe)},
            seconds={"base": time.monotonic() - begun},
        )
        record.seconds["training"] = train_sorting(attachment, self.recipe, self.seed, reporter, checkpoint)
        begun = time.monotonic()
        record.measures = {"base": {"named": named}, "reminding": {}}
        for segments in self.lengths:
            score, reminded = evaluate_sorting(
                attachment,
                SortingTask(length, segments),
                rows=self.rows,
                batch=self.batch,
                seed=self.seed,
                reporter=reporter,
            )
            record.scores.append(score)
            record.measures["reminding"][str(segments)] = reminded
            record.state_bytes = int(score.details["state_bytes"])
        record.seconds["evaluation"] = time.monotonic() - begun
        return attachment, record


def published(seed: int, rule: str, lengths: Sequence[int], rows: int) -> SortingExperiment:
    """Memoria with the paper's sizes for sorting, 256 symbols a segment, trained on prompts of up to four segments."""
    return SortingExperiment(sorting_config(rule=rule), Recipe(), tuple(lengths), rows=rows, seed=seed)


# --- the table --------------------------------------------------------------------------------------------------------


def table(found: Sequence[Record]) -> str:
    """Sorting by frequency: memory, controls, ablations and floors."""
    columns = [(record, score) for record in found for score in record.scores]
    titles = {"sorting": "paper's rules", "sorting-extended": "extended"}
    header = ["right symbols, %"]
    for record, score in columns:
        seed = f", seed {record.seed}" if sum(r.task == record.task for r in found) > 2 else ""
        header.append(f"{titles[record.task]}, {score.length} segments{seed}")
    rows = [["**memory**", *(f"**{100 * score.score:.1f}**" for _, score in columns)]]
    for kind in ("controls", "floors"):
        names = list(dict.fromkeys(name for _, score in columns for name in getattr(score, kind)))
        for name in names:
            cells = [getattr(score, kind).get(name) for _, score in columns]
            mark = "*" if kind == "floors" else ""
            rows.append([f"{mark}{name}{mark}", *("-" if cell is None else f"{100 * cell:.1f}" for cell in cells)])
    minutes = [f"{(record.seconds['base'] + record.seconds['training']) / 60:.0f}" for record, _ in columns]
    rows.append(["training, minutes", *minutes])
    commands = dict.fromkeys(record.command.split(" --out")[0] for record in found)
    return markdown(header, rows) + (
        "\n\nSegments of 256 symbols, teacher-forced; floors in italics. *working memory* and *working and short-term "
        "memory* are the same weights with the rest not reminded, *rule* the same weights reminded by another rule. "
        "Made by " + ", ".join(f"`{command}`" for command in commands) + "."
    )


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name: of these records, and of those of `sorting_extended.py`."""
    found = [record for record in records(results) if record.task in ("sorting", "sorting-extended")]
    found = today(today(found, "bench sorting-extended", "sorting_extended.py"), "bench sorting", "sorting.py")
    return {"memoria-sorting": table(found) if found else missing("memoria-sorting")}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    segments: Annotated[str, typer.Option(help="Segments of 256 symbols a prompt, separated by commas.")] = "4,8",
    seed: Annotated[int, typer.Option(help="Of weights and streams.")] = 0,
    rule: Annotated[str, typer.Option(help="How Memoria is reminded while it learns: paper, seeds or lift.")] = "paper",
    rows: Annotated[int, typer.Option(help="Test streams a length.")] = 256,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Sorting by frequency: Memoria and a small base trained together; controls, ablations, rules and floors."""
    experiment = published(seed, rule, numbers(segments), rows)
    name = f"sorting-{rule}-{seed}"
    with Show(name) as show:
        _, record = experiment.run(show, checkpoints / f"{name}.safetensors" if checkpoints else None)
    table = Table("right symbols, %", *(f"{score.length} segments" for score in record.scores))
    table.add_row("memory", *(f"{100 * score.score:.1f}" for score in record.scores), style="bold")
    for kind in ("controls", "floors"):
        table.add_section()
        for row in getattr(record.scores[0], kind):
            table.add_row(row, *(f"{100 * getattr(score, kind)[row]:.1f}" for score in record.scores))
    console.print(table)
    saved(record, out, f"sorting-memoria-{rule}-seed{seed}.json")


if __name__ == "__main__":
    launch(app)
