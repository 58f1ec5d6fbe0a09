"""The records that benchmarks write: one JSON file a run, complete enough to be read without the code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
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
    the examples are from, as many from each and one stream behind another; None where that is not known.
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


@dataclass
class Record:
    """One run: what was run, how, on what, and what came of it. Times in seconds, sizes in bytes."""

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
    commit: str | None = None
    written: str = ""
    digest: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str], name: str | None = None) -> Path:
        """Writes `<task>-<mechanism>-seed<seed>.json` (or `name`) with the environment filled in; returns its path."""
        self.command = self.command or command()
        self.versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
        self.machine = machine()
        self.commit = commit()
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
        values = json.loads(Path(path).read_text())
        # earlier records have the number of streams among their settings
        streams = values["config"].get("test rows")
        values["scores"] = [Score(**{"streams": streams, **score}) for score in values["scores"]]
        return Record(**values)


def digest(values: dict[str, Any]) -> str:
    """SHA-256 over everything else in a record."""
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def problems(path: str | os.PathLike[str]) -> list[str]:
    """What shows that a result file is not as a command wrote it: its digest, or scores that are not what the outcomes
    of single examples come to. Empty when nothing does.
    """
    values = json.loads(Path(path).read_text())
    found = [] if values.get("digest") == digest(values) else ["the digest does not fit"]
    for score in values["scores"]:
        said = {"memory": score["score"], **score["controls"]}
        for name, outcome in score["outcomes"].items():
            if name not in said:
                found.append(f"{name} at {score['length']} has outcomes and no score")
                continue
            came = _recomputed(outcome, values["measures"], score["details"])
            if abs(came - said[name]) > 1e-4 * max(1.0, abs(came)):
                found.append(f"{name} at {score['length']} says {said[name]:.4f}, its outcomes come to {came:.4f}")
    return found


def _recomputed(outcome: str, measures: dict[str, Any], details: dict[str, float]) -> float:
    """A score from the outcomes of single examples: a share right, macro F1 where the classes are known, or bits."""
    if " " in outcome:
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


def commit() -> str | None:
    """The commit of the source tree, marked when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
