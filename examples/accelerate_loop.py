"""A memory trained by several processes: accelerate launch examples/accelerate_loop.py BASE FOLDER."""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

import mnemic

base, folder = sys.argv[1:]
accelerator = Accelerator()
model = AutoModelForCausalLM.from_pretrained(base)
memory = mnemic.attach(model, mnemic.EMTConfig(segment_length=8))  # before prepare
optimizer = torch.optim.AdamW(memory.parameters(), lr=2e-3)

streams = torch.randint(3, 90, (32, 4 * 8), generator=torch.Generator().manual_seed(0))  # yours: whole segments
loader = torch.utils.data.DataLoader(streams, batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for ids in loader:
    with accelerator.autocast():
        unrolled = mnemic.unroll(model, ids, ids, bptt_segments=2)  # the prepared model, not what is inside
    accelerator.backward(unrolled.loss + unrolled.auxiliary)
    accelerator.clip_grad_norm_(memory.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {accelerator.reduce(unrolled.loss.detach(), 'mean').item():.4f}")

if accelerator.is_main_process:
    memory.save_pretrained(folder)
