"""The equations of `emt.py` in plain loops: one row, one slot, one head and one token at a time.

Slow on purpose. The tests compare it with the fast path, forward and gradients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.emt import EMT


def emt_naive(memory: EMT, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[Tensor, State]:
    """Reads every token of one segment where it reads first, then writes the segment; shapes as in `Memory`."""
    layer, width = memory.reads[0].layer, memory.width
    write = {"segment": _write_segment, "token": _write_tokens, "allocation": _write_allocated}[memory.config.write]
    outputs, rows = [], []
    for b in range(hidden_btd.shape[0]):
        kept = [t for t in range(hidden_btd.shape[1]) if keep_bt is None or keep_bt[b, t]]
        outputs.append(torch.stack([_read(memory, layer, token[:width], state["slots"][b]) for token in hidden_btd[b]]))
        stacked = []
        for k, writer in enumerate(memory.writers):
            row = {name: list(tensor[b, k]) for name, tensor in state.items()}
            stacked.append(write(writer, [hidden_btd[b, t] for t in kept], row))
        rows.append({name: torch.stack([torch.stack(row[name]) for row in stacked]) for name in state})
    return torch.stack(outputs), {name: torch.stack([row[name] for row in rows]) for name in state}


def _read(memory: EMT, layer: int, token_d: Tensor, slots_ksm: Tensor) -> Tensor:
    read_d = token_d
    for reader, slots_sm in zip(memory.readers[str(layer)], slots_ksm, strict=True):  # pyright: ignore[reportArgumentType]
        read_d = _read_one(reader, read_d, slots_sm)
    if layer == memory.output_layer:
        blend = memory.config.final_blend
        read_d = blend * read_d + (1 - blend) * token_d
    return read_d


def _read_one(reader: Any, token_d: Tensor, slots_sm: Tensor) -> Tensor:
    slots = [reader.norm_slots(slot) for slot in slots_sm]
    query = reader.query(reader.prepare(token_d))
    size = len(query) // reader.heads
    allocated = hasattr(reader, "alpha")
    heads = []
    for head in range(reader.heads):
        part = slice(head * size, (head + 1) * size)
        if allocated:
            cosines = [F.cosine_similarity(query[part], reader.key(slot)[part], dim=0) for slot in slots]
            scores = [reader.scale[head, 0, 0].exp() * cosine for cosine in cosines]
        else:
            scores = [torch.dot(query[part], reader.key(slot)[part]) / math.sqrt(size) for slot in slots]
        weights = torch.stack(scores).softmax(0)
        heads.append(
            sum((w * reader.value(slot)[part] for w, slot in zip(weights, slots, strict=True)), query.new_zeros(size))
        )
    attended = reader.output(torch.cat(heads))
    enhanced = token_d + (reader.alpha * attended if allocated else attended)
    enhanced = enhanced + reader.contract(F.gelu(reader.expand(reader.norm_feed(enhanced))))
    return token_d + reader.feedback * (enhanced - token_d)


def _write_segment(writer: Any, tokens: list[Tensor], row: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    tokens = [writer.prepare(token) for token in tokens]
    after = []
    for slot in row["slots"]:
        query = writer.query(slot)
        weights = torch.stack([torch.dot(query, writer.key(token)) / math.sqrt(len(slot)) for token in tokens]).softmax(
            0
        )
        content = sum(
            (w * writer.value(token) for w, token in zip(weights, tokens, strict=True)), torch.zeros_like(slot)
        )
        gate = torch.sigmoid(writer.gate(torch.cat([content, slot])))
        after.append((1 - gate) * slot + gate * writer.gru(content[None], slot[None])[0])
    return {"slots": after}


def _write_allocated(writer: Any, tokens: list[Tensor], row: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    slots, size, last = row["slots"], len(row["slots"][0]), torch.stack(row["last"])
    pairs, shares, used = [], [], row.get("usage", list(torch.zeros(len(slots)).to(slots[0])))
    taken = writer.usage_weight * torch.stack(used)
    for token in tokens:
        entered, hidden = token.chunk(2)
        hidden = writer.whiten(writer.norm_hidden(hidden))
        content = writer.content(writer.whiten_entered(writer.norm_entered(entered)))
        pair, last = torch.cat([last, content]), writer.address(hidden)
        key = writer.key(F.layer_norm(pair, (size,)))
        claims = [claim + writer.claim_more(slot) for claim, slot in zip(writer.claim, slots, strict=True)]
        cosines = torch.stack([F.cosine_similarity(claim, key, dim=0) for claim in claims])
        scores = 2 * math.sqrt(size) * writer.sharpness * (cosines - taken)
        pairs.append(pair)
        shares.append(torch.sigmoid(writer.keep(hidden)) * scores.softmax(0))
        taken = taken + shares[-1]
    after = []
    for place, slot in enumerate(slots):
        mass = sum((share[place] for share in shares), torch.zeros(()).to(slot))
        mean = sum((share[place] * pair for share, pair in zip(shares, pairs, strict=True)), torch.zeros_like(slot))
        content = F.layer_norm(mean / mass, (size,))
        gate = torch.sigmoid(writer.gate(torch.cat([content, slot]))) * (1 - torch.exp(-3 * mass))
        after.append((1 - gate) * slot + gate * writer.gru(content[None], slot[None])[0])
        used = [*used[:place], 0.99 * (used[place] + mass), *used[place + 1 :]]
    return {"slots": after, "last": list(last)} | ({"usage": used} if "usage" in row else {})


def _write_tokens(writer: Any, tokens: list[Tensor], row: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    slots, usage, age = row["slots"], row["usage"], row["age"]
    for token in tokens:
        address, value = F.normalize(writer.address(token), dim=0), writer.value(token)
        score = [torch.dot(address, m) - 0.1 * a - 0.2 * u for m, a, u in zip(slots, age, usage, strict=True)]
        weights = torch.softmax(-torch.stack(score), 0)
        candidates = [writer.gru(value[None], slot[None])[0] for slot in slots]
        slots = [
            F.normalize((1 - writer.rate * w) * slot + writer.rate * w * candidate, dim=0)
            for w, slot, candidate in zip(weights, slots, candidates, strict=True)
        ]
        usage = [0.99 * (u + w) for u, w in zip(usage, weights, strict=True)]
        age = [0.98 * a + 1 for a in age]
    return {"slots": slots, "usage": usage, "age": age}
