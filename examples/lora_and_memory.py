"""Adapters and a memory on one base, saved, loaded and merged: python examples/lora_and_memory.py BASE FOLDER."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import mnemic

base, folder = sys.argv[1], Path(sys.argv[2])
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, target_modules="all-linear"))
memory = mnemic.attach(model, mnemic.EMTConfig(segment_length=8), freeze=False)  # after PEFT; adapters go on training
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
for step in range(4):
    ids = torch.randint(3, 90, (4, 4 * 8), generator=torch.Generator().manual_seed(step))  # your streams
    unrolled = mnemic.unroll(model, ids, ids)
    (unrolled.loss + unrolled.auxiliary).backward()
    optimizer.step()
    optimizer.zero_grad()

# two folders: an adapter's files do not hold the memory, nor a memory's the adapter
model.save_pretrained(folder / "adapter")
memory.save_pretrained(folder / "memory")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
mnemic.from_pretrained(again, folder / "memory")

# merged into the base, which is another base then: its memory is saved anew, and the base without it
merged = model.merge_and_unload()
memory = mnemic.attached(merged)
memory.save_pretrained(folder / "merged-memory")
memory.detach()
merged.save_pretrained(folder / "merged")
