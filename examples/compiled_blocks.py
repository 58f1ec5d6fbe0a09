"""Blocks compiled whole, with the memory between them: python examples/compiled_blocks.py BASE [BACKEND]."""

import sys

import torch
from transformers import AutoModelForCausalLM

import mnemic

base, backend = (*sys.argv[1:], "inductor")[:2]
model = AutoModelForCausalLM.from_pretrained(base)
memory = mnemic.attach(model, mnemic.EMTConfig(segment_length=8))
blocks = memory.anatomy.blocks
torch._dynamo.config.recompile_limit = 8 * len(blocks)  # one function to torch, whose graphs it counts together
for block in blocks:
    block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)

ids = torch.randint(3, 90, (4, 4 * 8), generator=torch.Generator().manual_seed(0))  # your streams
loss = mnemic.unroll(model, ids, ids).loss
loss.backward()
print(f"loss {loss.item():.4f}")
