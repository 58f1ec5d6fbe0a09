"""Two processes equal one: DDP and FSDP2 under `accelerate launch`, in loops of one's own and in both Trainers.

All of it is one launch, because importing is what takes the time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import mnemic
from families import make
from helpers import SEGMENT, assert_near, tokens
from two_processes import batch, jobs, model_with, unrolled


def launch(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    flags = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port", str(port)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder),  # no settings of whoever runs this
    }
    done = subprocess.run(
        [*command, here / "two_processes.py", folder], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_equal_one(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    launch(tmp_path)
    two, one = torch.load(tmp_path / "found.pt"), jobs(tmp_path)
    for name, expected in one.items():
        found = two[name]
        print(name)  # shown when an assertion fails
        assert found.get("fingerprint") == expected.get("fingerprint")
        assert_near(found["losses"], expected["losses"], 2e-6)
        assert found["weights"].keys() == expected["weights"].keys()
        for key, weight in expected["weights"].items():
            assert_near(found["weights"][key], weight, 1e-6)

    # a memory saved from its shards is the one that was not sharded, and fits a base that is not
    for label in ("emt-0-True", "emt-1-True", "rmt-0-True"):
        saved, whole = (load_file(tmp_path / f"{label}-{n}" / "memory_model.safetensors") for n in (2, 1))
        for key, weight in whole.items():
            assert_near(saved[key], weight, 1e-6)
        mnemic.from_pretrained(make("llama"), tmp_path / f"{label}-2")

    # each process read a stream of its own
    logits = two["apart"]["logits"]
    for process in range(2):
        session = mnemic.Session(model_with("emt-0").eval())
        session.read(tokens(1, 3 * SEGMENT, 10 + process))
        assert torch.equal(logits[process : process + 1], session.forward(tokens(1, 5)).logits)

    # sharded models and their sessions answer as whole ones
    ids = tokens(1, 3 * SEGMENT)
    for label in ("emt-0", "emt-1"):
        model = model_with(label).eval()
        session = mnemic.Session(model)
        session.read(ids)
        assert_near(two["shards"][label]["session"], session.forward(ids[:, :5]).logits, 1e-5)
        answer = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(two["shards"][label]["answer"], answer)
    assert_near(two["shards"]["lower"], unrolled(model_with("emt-0"), *batch(0)).detach(), 1e-2)
    assert two["shards"]["gradients"]

    # the examples' memories fit the base and were trained
    for name in ("accelerate_loop", "fsdp2_loop"):
        memory = mnemic.from_pretrained(make("llama"), tmp_path / name).memory
        began_as_zero = [weight for key, weight in memory.named_parameters() if key.endswith("output.weight")]
        assert began_as_zero
        assert all(weight.abs().sum() > 0 for weight in began_as_zero)

    assert "find_unused_parameters" in two["unused"]["untold"]
    assert two["unused"]["told"] == ""
    assert "DistributedDataParallel has prepared the model without a memory" in two["late"]["ddp"]
    assert "fully_shard has prepared the model without a memory" in two["late"]["fsdp"]
