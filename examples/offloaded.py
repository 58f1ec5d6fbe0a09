"""A base that does not fit, its blocks on the disk, with a session: python examples/offloaded.py BASE FOLDER."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mnemic

base, folder = sys.argv[1], Path(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(
    base,
    device_map="auto",
    max_memory={"cpu": 100_000},  # bytes; leave it out to take what there is
    offload_folder=folder / "offload",
)
mnemic.attach(model, mnemic.EMTConfig(segment_length=8))  # after the model is dispatched: the memory stays where it is
session = mnemic.Session(model)
session.read(torch.arange(3, 40))
print(session.generate(torch.arange(40, 45), max_new_tokens=4))
session.save(folder / "alice.memory")
