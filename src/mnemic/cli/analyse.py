"""`mnemic analyse`: what a memory does while it reads, in numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mnemic.cli.bench import _numbers
from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import Show, Table, console, need

analyse = typer.Typer(no_args_is_help=True, help="What a memory does while it reads, in numbers and pictures.")

COUNTS = ("LTM alive", "start points", "found", "LTM reminded", "mean age of reminded LTM", "mean age of LTM alive")
TWICE = {
    "of LTM reminded, made in the first reading": "of LTM reminded, made in the first reading",
    "the same by chance": "  by chance",
    "of those, reminded": "of LTM made of the same segment, reminded",
    "of the first reading's other segments, reminded": "of LTM made of others in the first reading",
    "of all LTM alive, reminded": "  by chance: of all LTM",
}


@analyse.callback()
def main() -> None:
    """Without this the only command would be the group itself."""


@analyse.command()
def memoria(
    model: Annotated[str, typer.Option(help=CAUSAL, callback=found)],
    text: Annotated[Path, typer.Option(help="A text file, or a tar archive of them.")],
    memory: Annotated[Path | None, typer.Option(help="Folder of a saved memory; an untrained one else.")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="paper, seeds or lift; may be given several times. All by default.")
    ] = None,
    segments: Annotated[int, typer.Option(min=4, help="Segments to read.")] = 200,
    twice: Annotated[int, typer.Option(min=2, help="Segments of the text that is read twice.")] = 30,
    steps: Annotated[str, typer.Option(help="Steps whose graphs are drawn, separated by commas.")] = "20,60,200",
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens a segment, for an untrained memory.")] = 150,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for the result file.")] = Path("runs/memoria"),
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures; --out by default.")] = None,
) -> None:
    """Memoria's engrams: ages, autocorrelation, the graph, a text seen twice, under three rules of reminding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mnemic.analysis.memoria import PAPER, PUBLISHED
    from mnemic.analysis.memoria_report import analyse as run
    from mnemic.analysis.memoria_report import draw, record_of
    from mnemic.bench.settings import read_text
    from mnemic.memories.memoria import MemoriaConfig

    need("matplotlib", "networkx")
    rules = rule or ["paper", "seeds", "lift"]
    keep = [step for step in _numbers(steps) if step <= segments]
    try:
        for name in rules:
            MemoriaConfig().with_rule(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config, weights = MemoriaConfig(segment_length=segment_length), None
    if memory is not None:
        config, weights = _saved(base, memory)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"])
    wanted = segments * config.segment_length
    if len(ids) < wanted:
        whole = len(ids) // config.segment_length
        raise typer.BadParameter(f"{text.name} has {whole} segments of {config.segment_length} tokens, not {segments}")
    try:
        with Show("") as show:
            show.phase("read", len(rules) * (segments + 3 * twice))
            found = run(
                base, config, weights, ids[:wanted], rules, twice=twice, keep=keep, seed=seed, progress=show.advance
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    host = f"{Path(model).name}, frozen, {text.name}"
    kind = f"trained memory {memory.name}" if memory else "untrained memory"
    record = record_of(found, config, host, seed, weights=kind, tokens=wanted, segments=segments)
    path = record.save(out, f"memoria-engrams-seed{seed}.json")
    console.print(_table(record.measures["rules"], PAPER, PUBLISHED))
    console.print(_twice_table(record.measures["seen twice"]))
    for picture in draw(found, pictures or out, f"{Path(model).name}, {text.stem.replace('_', ' ')}, {kind}"):
        console.print(f"picture {picture}")
    console.print(f"results {path}")


def _saved(base: Any, folder: Path) -> tuple[Any, Any]:
    """The config and the weights of a memory that `save_pretrained` wrote."""
    from mnemic.attachment import from_pretrained
    from mnemic.memories.memoria import MemoriaConfig

    try:
        attachment = from_pretrained(base, folder)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    config, weights = attachment.config, attachment.memory.state_dict()
    attachment.detach()
    if not isinstance(config, MemoriaConfig):
        raise typer.BadParameter(f"{folder} holds a memory of kind {config.kind!r}, not Memoria")
    return config, weights


def _table(rules: dict[str, dict[str, float | None]], paper: dict[int, float], published: dict[int, float]) -> Table:
    table = Table(title="Rules of reminding, means over the later half", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name in (*rules, "table 7", "published*"):
        table.add_column(name, justify="right")
    for name in COUNTS:
        table.add_row(name, *(_cell(line[name], 1) for line in rules.values()))
    for lag in paper:
        again = (_cell(line[f"LTM again at {lag}"]) for line in rules.values())
        table.add_row(f"LTM again at {lag}", *again, _cell(paper[lag]), _cell(published[lag]), style="bold")
        table.add_row(
            "  by chance", *(_cell(line[f"LTM again at {lag}, by chance"]) for line in rules.values()), style="dim"
        )
    for lag in paper:
        table.add_row(f"STM again at {lag}", *(_cell(line[f"STM again at {lag}"]) for line in rules.values()))
    table.caption = "table 7: the paper's LTM; published: memoria-pytorch 1.1.0 on synthetic input"
    return table


def _twice_table(rules: dict[str, dict[str, float | None]]) -> Table:
    table = Table(title="The same text read twice", title_justify="left", title_style="bold")
    table.add_column("share")
    for name in rules:
        table.add_column(name, justify="right")
    for name, says in TWICE.items():
        table.add_row(says, *(_cell(line[name]) for line in rules.values()))
    return table


def _cell(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
