"""Run in a process of its own: loads what `test_saving` wrote and answers with the logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import mnemic
from families import make


@torch.no_grad()
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for job in json.loads((folder / "jobs.json").read_text()):
        model = make(job["family"])
        mnemic.from_pretrained(model, folder / job["id"])
        session = mnemic.Session.load(folder / f"{job['id']}.memory", model)
        torch.save(session.forward(torch.tensor(job["ids"])).logits, folder / f"{job['id']}.logits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
