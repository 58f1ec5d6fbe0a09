"""A frozen base in shards, and a memory that trains: torchrun --nproc_per_node 2 examples/fsdp2_loop.py BASE FOLDER."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import mnemic

base, folder = sys.argv[1:]
if not dist.is_initialized():
    dist.init_process_group()
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
model = AutoModelForCausalLM.from_pretrained(base).to(device)
memory = mnemic.attach(model, mnemic.EMTConfig(segment_length=8))  # before fully_shard
for block in memory.anatomy.blocks:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(memory.parameters(), lr=2e-3)  # after: these are the shards

for step in range(4):
    source = torch.Generator().manual_seed(dist.get_world_size() * step + dist.get_rank())
    ids = torch.randint(3, 90, (4, 4 * 8), generator=source).to(device)  # yours: every process has rows of its own
    unrolled = mnemic.unroll(model, ids, ids, bptt_segments=2)
    (unrolled.loss + unrolled.auxiliary).backward()
    torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

memory.save_pretrained(folder)  # in every process: weights are gathered, and the first one writes
