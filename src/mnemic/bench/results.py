"""The records that benchmarks write: one JSON file a run, complete enough to be read without the code."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mnemic.tasks.documents import macro_f1

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


@dataclass
class Score:
    """One mechanism on one task at one length. `controls`, `floors` and `ceiling` are in the unit of `score`.

    `outcomes` holds what the score is computed from, one character an example and control: `1` right, `0` wrong; where
    the score is about probabilities, the mean nats of each stream, separated by spaces. `streams` is how many streams
    the examples are from, as many from each and one stream behind another; None where that is not known. `questions` is
    a digest of the streams and of what is asked in them.
    """

    length: int
    tokens: int
    examples: int
    score: float
    controls: dict[str, float]
    floors: dict[str, float]
    ceiling: float | None
    details: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    streams: int | None = None
    questions: str = ""


@dataclass
class Record:
    """One run: what was run, how, on what, and what came of it. Times in seconds, sizes in bytes.

    `commit` is that of the sources as they were when the record was begun, marked when they were changed. `digests`
    name the "code", whatever was committed, and where a run has them its "model" before it learns and its "texts".
    """

    task: str
    mechanism: str
    host: str
    seed: int
    config: dict[str, Any]
    scores: list[Score] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    state_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str | None = field(default_factory=lambda: commit())
    written: str = ""
    digest: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str], name: str | None = None) -> Path:
        """Writes `<task>-<mechanism>-seed<seed>.json` (or `name`) with the environment filled in; returns its path.

        Raises:
            ValueError: `folder` lies in `results/` of the checkout, whose sources have changes (`refuse_changes`). The
                record is in `runs/refused` then.
        """
        try:
            refuse_changes(folder, self.commit)
        except ValueError as error:
            kept = self._write(checkout() / "runs" / "refused", name)
            raise ValueError(f"{error}; this one is kept as {kept}") from None
        return self._write(folder, name)

    def _write(self, folder: str | os.PathLike[str], name: str | None) -> Path:
        self.command = self.command or command()
        self.versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
        self.machine = machine()
        self.digests = {**self.digests, "code": code()}
        self.written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        path = Path(folder) / (name or f"{self.task}-{self.mechanism}-seed{self.seed}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        values = asdict(self)
        values["digest"] = self.digest = digest(values)
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(temporary, path)
        return path

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Record:
        """The record in a file."""
        values = {"commit": None, **json.loads(Path(path).read_text())}
        # earlier records have the number of streams among their settings
        streams = values["config"].get("test rows")
        values["scores"] = [Score(**{"streams": streams, **score}) for score in values["scores"]]
        return Record(**values)


def digest(values: dict[str, Any]) -> str:
    """SHA-256 over everything else in a record."""
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def problems(path: str | os.PathLike[str]) -> list[str]:
    """What shows that a result file is not as a command wrote it: its digest; outcomes of single examples that are
    missing, or not as many as there were examples; or scores that are not what they come to. Empty when nothing does.
    """
    values = json.loads(Path(path).read_text())
    found = [] if values.get("digest") == digest(values) else ["the digest does not fit"]
    for score in values["scores"]:
        said = {"memory": score["score"], **score["controls"]}
        found += _cut(score, said)
        for name, outcome in score["outcomes"].items():
            if name not in said:
                found.append(f"{name} at {score['length']} has outcomes and no score")
                continue
            came = _recomputed(outcome, values["measures"], score["details"])
            if abs(came - said[name]) > 1e-4 * max(1.0, abs(came)):
                found.append(f"{name} at {score['length']} says {said[name]:.4f}, its outcomes come to {came:.4f}")
    return found


def _cut(score: dict[str, Any], said: dict[str, float]) -> list[str]:
    """Which outcomes of a score are missing, or too few or too many. A score without any is one of a record that keeps
    none.
    """
    outcomes, examples = score["outcomes"], score["examples"]
    if not outcomes:
        return []
    found = [f"{name} at {score['length']} has a score and no outcomes" for name in said if name not in outcomes]
    # nats are kept for each stream, of which every one has as many examples
    counts = {name: len(each.split()) if "." in each else len(each) for name, each in outcomes.items()}
    most = score.get("streams") or next(iter(counts.values()))
    for name, count in counts.items():
        nats = "." in outcomes[name]
        wanted = most if nats else examples
        if count != wanted or not count or (nats and examples % count):
            found.append(f"{name} at {score['length']} has {count} outcomes, where there are {wanted}")
    return found


def _recomputed(outcome: str, measures: dict[str, Any], details: dict[str, float]) -> float:
    """A score from the outcomes of single examples: a share right, macro F1 where the classes are known, or bits."""
    if "." in outcome:
        nats = [float(word) for word in outcome.split()]
        return sum(nats) / len(nats) / math.log(2) / details["bytes a labelled token"]
    right = [each == "1" for each in outcome]
    if "classes" in measures:
        true = [each == "1" for each in measures["classes"]]
        return macro_f1([is_it == good for is_it, good in zip(true, right, strict=True)], true)
    return sum(right) / len(right)


def is_record(path: str | os.PathLike[str]) -> bool:
    """Whether a JSON file is a result file."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(values, dict) and {"task", "mechanism", "scores", "digest"} <= values.keys()


def records(folder: str | os.PathLike[str], task: str | None = None) -> list[Record]:
    """All records in a folder, of one task if named, by file name."""
    found = [Record.load(path) for path in sorted(Path(folder).glob("*.json"))]
    return [record for record in found if task is None or record.task == task]


def command() -> str:
    """The command as typed, folders left out: where a file lay on one machine means nothing on another."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        # a hub id has one slash and does not exist here; a path is absolute, exists, or has more
        is_path = os.path.isabs(value) or os.path.exists(value) or value.count("/") > 1
        words.append(option + equals + (Path(value).name if is_path else value))
    return " ".join(["mnemic", *words])


def machine() -> dict[str, Any]:
    """The class of machine, without its name: processor, cores, threads used, memory, accelerator."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {
        "processor": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": memory,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


PACKAGE = Path(__file__).resolve().parents[1]
"""Where the sources are."""

SOURCES = ("src", "benchmarks")
"""What decides a result, in a checkout."""

DIRTY = "MNEMIC_DIRTY"
"""The variable of the environment that allows records of changed sources in `results/`; `mnemic --dirty` sets it."""


def checkout() -> Path:
    """The root of the sources: what holds `src/mnemic`."""
    return PACKAGE.parents[1]


@functools.cache
def commit() -> str | None:
    """The commit of the sources, marked when files differ from it; None outside a checkout. What it is when it is first
    asked for holds for the process: later changes are not what runs.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=checkout(), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", str(PACKAGE / "__init__.py")):
            return None  # installed inside of another repository
        head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


@functools.cache
def code() -> str:
    """SHA-256 over the sources of the package, by name."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def refuse_changes(folder: str | os.PathLike[str], made: str | None = None) -> None:
    """Refuses `results/` of the checkout to records whose sources are no commit's, `made` or those of now.

    Raises:
        ValueError: the sources have changes, and nobody has allowed it (`DIRTY`).
    """
    made = commit() if made is None else made
    inside = Path(folder).resolve().is_relative_to(checkout() / "results")
    if inside and (made or "").endswith("+changes") and os.environ.get(DIRTY) != "1":
        raise ValueError(
            f"{' and '.join(SOURCES)} have changes that are not committed, and results/ holds records of commits; "
            "commit them, write to another folder with --out, or allow it with mnemic --dirty"
        )


def joined(scores: Sequence[Score]) -> str:
    """One digest of the questions of all scores."""
    return hashlib.sha256(" ".join(score.questions for score in scores).encode()).hexdigest()[:16]


def digest_of(*tensors: torch.Tensor) -> str:
    """SHA-256 over numbers, with their shapes and kinds."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
