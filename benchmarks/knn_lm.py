"""kNN-LM on a real model, untrained: is the second half of a novel told better by a memory that has read the first?

Parts of novels are read with a window of 1,024 tokens, segments of 256. Of the second half count all tokens, under a
kNN-LM that has read the first half and goes on writing, with one rate and with a sentinel. Beside it stand, over the
same hidden states of the base, which no such memory changes: no memory, a memory that begins with the second half
(fresh), one whose keys are all zero, and one that has read the first half of another novel. How much each is above the
first comes with its interval: a bootstrap of blocks of 256 tokens, in pairs. Rate, temperature and sentinel are chosen
on one more novel, of which nothing else is told.

    python benchmarks/knn_lm.py --data novels.tar.xz --length 65536 --documents 3 --out results

What a novel gave is kept under `runs/knn_lm`: a run that was stopped goes on behind it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import is_attached
from mnemic.bench.drift import called
from mnemic.bench.experiments import Reporter
from mnemic.bench.results import Record, records
from mnemic.checkpoints import folder_of
from mnemic.cli.show import Show, console
from mnemic.controls import zeroed
from mnemic.memories.knn_lm import KNNLM, KNNLMConfig
from mnemic.state import State
from mnemic.tasks.documents import novels
from needles import Kept
from recall_perplexity import BLOCK, novel, scored

WINDOW = 1024
RATES = [0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7]
TEMPERATURES = [0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2]
SENTINELS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
OWN, SENTINEL, NONE, FRESH, ZEROED, OTHER = "memory", "sentinel", "no memory", "fresh", "zeroed", "other novel"


class Reading:
    """A session that goes through a novel, and what the base made of the tokens that it read last."""

    def __init__(self, attachment: mnemic.Attachment, ids: Int[Tensor, "1 t"]) -> None:
        """The first half is read; of its last segment the base's logits are kept."""
        assert isinstance(attachment.memory, KNNLM)
        self.memory, self.ids, self.half = attachment.memory, ids, ids.shape[1] // 2
        self.session = mnemic.Session(attachment.model)
        self.session.read(ids[:, : self.half - BLOCK])
        self.logits, *_ = self.forward(ids[:, self.half - BLOCK : self.half])

    @torch.no_grad()
    def forward(self, part: Int[Tensor, "1 t"]) -> tuple[Tensor, Tensor, State, Tensor]:
        """The base's logits, the hidden states, the state that was read, and the session's logits."""
        seen: list[Any] = []

        def mix(site: mnemic.Site, logits_btv: Tensor, hidden_btd: Tensor, state: State) -> Tensor:
            seen[:] = logits_btv, hidden_btd, state
            return KNNLM.mix(self.memory, site, logits_btv, hidden_btd, state)

        self.memory.mix = mix
        try:
            mixed = self.session.forward(part).logits
        finally:
            del self.memory.mix
        return (*seen, mixed)

    @property
    def state(self) -> State:
        """The memory as it stands."""
        assert self.session.stream is not None
        return self.session.stream.state


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(reading: Reading, show: Reporter) -> dict[str, KNNLMConfig]:
    """The best settings for the second half of a novel, with one rate and with a sentinel."""
    config, away, hits, plain = reading.memory.config, [], [], []
    for part in reading.ids[:, reading.half :].split(BLOCK, 1):
        logits, hidden, state, _ = reading.forward(part)
        # the token behind the last is not there yet
        distance, token = reading.memory.nearest(hidden[:, :-1], state)
        away.append(distance[0])
        hits.append(token[0] == part[0, 1:, None])
        plain.append(logits[0, :-1].log_softmax(-1).gather(-1, part[0, 1:, None])[:, 0])
        show.advance(part.shape[1])
    away_nm, hits_nm, plain_n = torch.cat(away), torch.cat(hits), torch.cat(plain)
    found: dict[str, tuple[float, KNNLMConfig]] = {}
    for temperature, rate, sentinel in itertools.product(TEMPERATURES, RATES, [None, *SENTINELS]):
        its = config.replace(temperature=temperature, rate=rate, sentinel=sentinel)
        name, nats = OWN if sentinel is None else SENTINEL, nats_of(its, away_nm, hits_nm, plain_n)
        if name not in found or nats < found[name][0]:
            found[name] = nats, its
    return {name: its for name, (_, its) in found.items()}


def nats_of(config: KNNLMConfig, away_nm: Tensor, hits_nm: Tensor, plain_n: Tensor) -> float:
    """Mean nats a token by the equations of `knn_lm`, of distances, of who is right, and of the model's log p."""
    score_nm = -away_nm / config.temperature
    nearest_n = (score_nm.softmax(-1) * hits_nm).sum(-1)
    rate = torch.tensor(config.rate)
    if config.sentinel is not None:
        rate = rate * torch.sigmoid(score_nm.logsumexp(-1) + config.sentinel / config.temperature)
    return -float((rate * nearest_n + (1 - rate) * plain_n.exp()).log().mean())


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(reading: Reading, sentinel: KNNLMConfig, other: State, show: Reporter) -> dict[str, list[float]]:
    """The mean nats a token of each block of the second half, under every condition."""
    memory, own = reading.memory, reading.state
    (site,), rest = memory.logits_reads, {name: own[name] for name in ("last", "waits")}
    states = {FRESH: memory.init_state(1) | rest, ZEROED: zeroed(own) | rest, OTHER: other | rest}
    adaptive = sentinel.build(memory.width, site.layer + 1)
    found: dict[str, list[float]] = {name: [] for name in (OWN, SENTINEL, NONE, *states)}
    # the first token is predicted before anything differs
    last = dict.fromkeys(found, reading.logits[0, -1:])
    for part in reading.ids[:, reading.half :].split(BLOCK, 1):
        plain, hidden, state, mixed = reading.forward(part)
        outputs = {OWN: mixed, SENTINEL: adaptive.mix(site, plain, hidden, state), NONE: plain}
        outputs |= {name: memory.mix(site, plain, hidden, each) for name, each in states.items()}
        for name, logits_btv in outputs.items():
            found[name].append(float(F.cross_entropy(torch.cat([last[name], logits_btv[0, :-1]]).float(), part[0])))
            last[name] = logits_btv[0, -1:]
        states = {name: memory.write(hidden, each, ids_bt=part) for name, each in states.items()}
        show.advance(part.shape[1])
    return found


def run(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    config: KNNLMConfig,
    length: int,
    documents: int,
    name: str,
    seed: int,
    folder: Path,
    show: Reporter,
) -> Record:
    """Settings from the first novel, and all others under all conditions; what `folder` has is not read again."""
    about = {"kind": "knn-lm", "model": name, "seed": seed, "text": called(texts), "length": length}
    kept = Kept(folder, about | {"memory": config.to_dict()})
    values, parts = (
        kept.values["documents"],
        [novel(texts, tokenizer, length, number, seed, length // 2) for number in range(documents + 1)],
    )

    def reading(number: int, its: KNNLMConfig) -> Reading:
        if is_attached(model):
            mnemic.attached(model).detach()
        return Reading(mnemic.attach(model, its), parts[number].ids.to(model.device))

    if "chosen" not in values:
        show.phase("choosing", length // 2)
        values["chosen"] = {name: its.to_dict() for name, its in choose(reading(0, config), show).items()}
        kept.save()
    chosen = {name: mnemic.MemoryConfig.from_dict(its) for name, its in values["chosen"].items()}
    plain, sentinel = chosen[OWN], chosen[SENTINEL]
    assert isinstance(plain, KNNLMConfig)
    assert isinstance(sentinel, KNNLMConfig)
    show.phase("novels", documents * length // 2)
    other: State | None = None
    for number in range(1, documents + 1):
        if f"novel {number}" in values:
            show.advance(length // 2)
            continue
        begun = time.perf_counter()
        if other is None:  # of the novel before, or of the one that settings were chosen on
            other = reading(number - 1, plain).state
        its = reading(number, plain)
        own = its.state
        nats = measured(its, sentinel, other, show)
        values[f"novel {number}"] = {"nats": nats, "seconds": time.perf_counter() - begun, "bytes": its.session.nbytes}
        kept.save()
        other = own
    told = [values[f"novel {number}"] for number in range(1, documents + 1)]
    found = {each: [nats for novel in told for nats in novel["nats"][each]] for each in told[0]["nats"]}
    size = sum(part.bytes for part in parts[1:])
    score, above = scored(length, found, size, dict.fromkeys(found, 0.0))
    score.details = {key: value for key, value in score.details.items() if not key.startswith("seconds")}
    each = [{name: sum(nats) / len(nats) for name, nats in novel["nats"].items()} for novel in told]
    return Record(
        task="knn-lm",
        mechanism="knn-lm",
        host=f"{name}, untrained",
        seed=seed,
        config={**about, "memory": plain.to_dict(), "sentinel": sentinel.to_dict(), "documents": documents},
        scores=[score],
        measures={"nats above memory": above, "nats of each novel": each},
        state_bytes=max(novel["bytes"] for novel in told),
        seconds={"reading": sum(novel["seconds"] for novel in told)},
    )


def main(
    data: Annotated[Path, typer.Option(help="Text: a folder or a tar archive of .txt files.")],
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    length: Annotated[int, typer.Option(help="Tokens of each novel; half of them are read first.")] = 65_536,
    documents: Annotated[int, typer.Option(min=1, help="Novels that are measured.")] = 3,
    top_k: Annotated[int, typer.Option(min=1, help="Entries that speak.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of novels.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs/knn_lm/records"),
) -> None:
    """Reads novels and writes one record."""
    if length % (2 * BLOCK) or length <= 2 * WINDOW:
        raise typer.BadParameter(f"{length} tokens; use a multiple of {2 * BLOCK} above {2 * WINDOW}")
    folder, name = folder_of(model), Path(model).name
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = KNNLMConfig(segment_length=BLOCK, window=WINDOW, size=length, top_k=top_k)
    texts = list(novels(data))
    with Show("kNN-LM") as show:
        record = run(base, tokenizer, texts, config, length, documents, name, seed, Path("runs/knn_lm"), show)
    record.command = (
        f"python benchmarks/knn_lm.py --data {data.name} --model {name} --length {length} --documents {documents} "
        f"--top-k {top_k} --seed {seed}"
    )
    score = record.scores[0]
    console.print(f"memory: {score.score:.4f} bits a byte, {record.config['memory']}")
    for condition, bits in score.controls.items():
        above = record.measures["nats above memory"][condition]
        told = "{mean:+.4f}, {low:+.4f} to {high:+.4f}".format(**above)
        console.print(f"{condition}: {bits:.4f} bits a byte ({told} nats a token above)")
    console.print(record.save(out, f"knn-lm{f'-seed{seed}' if seed else ''}.json"))


def table(found: Sequence[Record]) -> str:
    """Bits a byte of second halves of novels with a kNN-LM that read the first, and how much the controls are above."""
    if not found:
        return missing("the kNN-LM")
    record, score = found[0], found[0].scores[0]
    rows = [["one rate", f"**{score.score:.4f}**", ""]]
    for name, bits in score.controls.items():
        above = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**record.measures["nats above memory"][name])
        rows.append([name, f"{bits:.4f}", above])
    plain, sentinel = record.config["memory"], record.config["sentinel"]
    note = f"{score.examples:,} tokens, the second halves of {record.config['length']:,} tokens each of "
    note += f"{record.config['documents']} novels, {record.host}, window {plain['window']}, {plain['top_k']} entries. "
    note += f"Chosen on another novel: rate {plain['rate']} and temperature {plain['temperature']}; with a sentinel at "
    note += (
        f"{sentinel['sentinel']}, {sentinel['rate']} and {sentinel['temperature']}. In brackets 95 % of a bootstrap "
    )
    note += f"of blocks of 256 tokens. Made by `{record.command}`."
    return f"{markdown(['memory', 'bits a byte', 'nats a token above'], rows)}\n\n{note}"


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"knn-lm": table(records(results, "knn-lm"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
