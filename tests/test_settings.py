"""What a setting may be: of its type, used by something, and with its default where a file does not name it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import mnemic
from families import VOCABULARY, make
from helpers import CONFIGS, SEGMENT, every_config, host, shake, tokens
from mnemic.attachment import CONFIG_FILE, WEIGHTS_FILE
from mnemic.bank import Bank
from mnemic.memory import Asked, Inside, Leaving, UnknownSetting
from mnemic.state import State, from_bytes, read_file, to_bytes, write_file
from mnemic.trainer import load_memory

WIDTH, DEPTH = 16, 3
CORE = {"segment_length", "window"}
"""What the core uses of every config."""
ELSEWHERE = {
    *(("knn", name) for name in ("exact_up_to", "size")),
    ("knn-lm", "exact_up_to"),
    *(("recall", name) for name in ("search", "wider")),
    *(("memoria", name) for name in ("correlation", "edges", "positive_edges", "random_ltm_seeds")),
}
"""A way to compute the same, limits beyond these streams, and rules of a search that finds the same in them."""


def others(config: mnemic.MemoryConfig, name: str) -> Iterator[mnemic.MemoryConfig]:
    """Configs that differ in this setting alone, where there can be any."""
    value, hint = getattr(config, name), get_type_hints(type(config))[name]
    hints = [hint, *get_args(hint)]
    choices = [choice for each in hints if get_origin(each) is Literal for choice in get_args(each)]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, int | float):
        choices = [*choices, value * 2, value + 1, value / 2 if isinstance(value, float) else value // 2, 1 - value, 3]
    elif isinstance(value, list):
        choices = [[each / 2 for each in value] if isinstance(value[0], float) else [1]]
    elif value is None:
        choices = [*choices, 0, 32, 2.0, [0]]
    for choice in choices:
        try:
            changed = config.replace(**{name: choice})
            with torch.device("meta"):
                changed.build(WIDTH, DEPTH)
        except ValueError:
            continue
        if changed != config:
            yield changed


def told(config: mnemic.MemoryConfig) -> list[Any]:
    """All that a memory is and does in a short stream."""
    torch.manual_seed(0)
    memory = config.build(WIDTH, DEPTH)
    shake(memory, scale=0.02)
    generator = torch.Generator().manual_seed(1)
    width, blocks = WIDTH * len(memory.writes), len(memory.attention_reads)
    if memory.writes_inside:  # queries of 4 heads
        memory.inside = Inside(blocks, 4, 2, 4, 4, (0.5,) * blocks)
        width = blocks * 4 * 4
    plain: list[Any] = [memory.reads, memory.writes, memory.beside, memory.span, memory.gradient_reach]
    plain += [memory.parameter_dtype(), memory.most_bytes(3), memory.sharing(False), *memory.state_dict()]
    state, found = memory.init_state(2), [*memory.state_dict().values()]
    for number in range(16 if config.kind == "memoria" else 6):  # until there are long-term engrams
        # of many lengths, so that one measure of likeness is told from another
        hidden = (
            torch.randn(2, SEGMENT, width, generator=generator) * torch.rand(2, SEGMENT, 1, generator=generator) * 3
        )
        length = getattr(config, "tokens", SEGMENT) if memory.writes_tokens_behind else SEGMENT
        kept = None if memory.writes_tokens_behind else torch.arange(SEGMENT).expand(2, -1) < SEGMENT - 1
        trace = {}
        for site in memory.hidden_reads:
            output, left = memory.read_and_trace(site, hidden[..., :WIDTH], state)
            found.append(output)
            trace = {key: trace.get(key, 0) + value.sum(1) for key, value in left.items()}
        beside = (memory.tokens_before(state), memory.tokens_behind(state))
        found += [part for each in beside if each is not None for part in (each.embeddings, *each.inputs.values())]
        left = [leaving(blocks, SEGMENT * number, generator) for _ in range(2)]
        beside_it = memory.known(tokens(2, length), left)
        if (loss := memory.auxiliary(hidden[:, :length], state, kept)) is not None:
            found.append(loss)
        state = {key: value + trace.get(key, 0) for key, value in state.items()}
        state = memory.write(hidden[:, :length], state, kept, **beside_it)
        found += state.values()
        for site in memory.logits_reads:
            found.append(memory.mix(site, torch.randn(2, SEGMENT, VOCABULARY, generator=generator), hidden, state))
    found += inside(memory, state)
    return [*plain, *(tensor.detach() for tensor in found)]


def turn(x, at, back=False):
    return x + (-1 if back else 1) * at[:, None] / 64


def leaving(blocks: int, first: int, generator: torch.Generator) -> Leaving:
    """A segment's keys and values, of 2 heads in each block, that leave behind a window of two segments."""
    keys, values, stays = torch.randn(3, blocks, 2, SEGMENT, 4, generator=generator)
    return Leaving(keys, values, first, first + 2 * SEGMENT, (turn,) * blocks, stays)


def inside(memory: mnemic.Memory, state: State) -> list[Any]:
    """What a memory inside attention gives to a few tokens."""
    found: list[Any] = []
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 3, 2, 37, 4, generator=generator)
    bank = Bank(stored=memory.stored).append(keys, values)
    state = {name: tensor[:1] for name, tensor in state.items()}
    for reading in (False, True):
        for place, site in enumerate(memory.attention_reads):
            query, position = torch.randn(4, 5, 4, generator=generator), torch.arange(60, 65)
            asked = Asked(query, position, 40, 0.5, bank, place, turn, 16, range(5), reading, None, state)
            more = memory.further(site, asked)
            found += [] if more is None else [more.keys_ktms, more.values_ktmv]
    return found


def same(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(
        (isinstance(b, torch.Tensor) and torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, two, strict=True)
    )


@every_config
@torch.no_grad()
def test_every_setting_is_used_or_refused(config):
    """One that is passed over silently would leave all that the memory is and does as it was."""
    before, unused = told(config), config.unused()
    assert same(told(config), before)
    ignored = []
    for field in dataclasses.fields(config):
        if field.name in CORE or field.name in unused or (config.kind, field.name) in ELSEWHERE:
            continue
        outcomes = (same(told(each), before) for each in others(config, field.name))
        if next(outcomes, False) and all(outcomes):
            ignored.append(field.name)
    assert ignored == []


@every_config
def test_what_nothing_uses_has_its_default(config):
    for name, mend in config.unused().items():
        value = next(f.default for f in dataclasses.fields(config) if f.name == name)
        other = {str: "", bool: not value}.get(type(value)) if isinstance(value, bool | str) else value + 1
        if isinstance(value, str):
            other = next(each for each in get_args(get_type_hints(type(config))[name]) if each != value)
        with pytest.raises(ValueError, match=f"{name} is .*, but nothing here uses it; leave it out, or") as error:
            config.replace(**{name: other})
        assert mend in str(error.value)
        # a file of an earlier release may have it
        assert type(config).from_file({**config.to_dict(), name: other}) == config


def test_a_blend_behind_the_last_block_needs_a_reader_there():
    config = mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=16, final_blend=0.5)
    with pytest.raises(ValueError, match=r"final_blend is 0\.5, but nothing is read after the last block; .* -1 into"):
        config.build(WIDTH, DEPTH)
    config.replace(read_layers=[-1]).build(WIDTH, DEPTH)


def test_an_encoder_has_no_window():
    with pytest.raises(ValueError, match=r"window is 16, but .* is an encoder and keeps no keys; leave it out"):
        mnemic.attach(make("bert"), CONFIGS["emt-0"].replace(window=16))


@pytest.mark.parametrize("kind", [kind for kind in mnemic.CONFIGS if hasattr(mnemic.CONFIGS[kind], "read_layers")])
@pytest.mark.parametrize("layers", [[1, 1], [-1, 1], [0, 1, -2]])
def test_a_block_is_named_once(kind, layers):
    config = CONFIGS[f"{kind}-0"].replace(read_layers=layers)
    with pytest.raises(
        ValueError, match=r"read_layers is \[.*\], which names block . of 2 twice; name each block once"
    ):
        mnemic.attach(make("llama"), config)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": np.int64(8)}, r"slots is .*8.*; use int"),
        ({"slots": 8.0}, "slots is 8.0; use int"),
        ({"slots": True}, "slots is True; use int"),
        ({"whiten": 1}, "whiten is 1; use bool"),
        ({"gate_bias": float("nan")}, "gate_bias is nan; use float"),
        ({"feedback": float("inf")}, "feedback is inf; use float"),
        ({"segment_length": "8"}, "segment_length is '8'; use int"),
        ({"read_layers": 1}, r"read_layers is 1; use list\[int\] or None"),
        ({"window": 16.0}, "window is 16.0; use int or None"),
    ],
)
def test_a_value_that_no_file_gives_back(changes, message):
    with pytest.raises(ValueError, match=message):
        mnemic.EMTConfig(**changes)


def test_a_tuple_is_a_list():
    assert mnemic.EMTConfig(read_layers=(0, 1)) == mnemic.EMTConfig(read_layers=[0, 1])  # pyright: ignore


def test_a_config_that_was_edited_is_checked_when_it_is_attached():
    config = mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=16)
    config.heads = 5
    with pytest.raises(ValueError, match="dim 16 is not divisible by 5 heads"):
        mnemic.attach(make("llama"), config)


# --- settings of other releases --------------------------------------------------------------------------------------


def retold(tensors: dict[str, torch.Tensor], meta: dict[str, Any], memory: dict[str, Any]) -> bytes:
    return to_bytes(tensors, {**meta, "memory": memory})


@every_config
def test_a_setting_that_is_not_named_has_its_default(config):
    settings = config.to_dict()
    fields = dataclasses.fields(config)
    for name in [f.name for f in fields if f.default is not dataclasses.MISSING and settings.get(f.name) == f.default]:
        del settings[name]
    assert mnemic.MemoryConfig.from_file(settings) == config


def test_what_earlier_releases_wrote_is_read_and_what_later_ones_did_is_told(tmp_path):
    config = CONFIGS["emt-0"]
    model, again = host("llama", config), make("llama")
    session = mnemic.Session(model)
    session.read(tokens(1, 20))
    mnemic.attached(model).save_pretrained(tmp_path)
    tensors, meta = from_bytes(session.to_bytes())
    weights, description = read_file(tmp_path / WEIGHTS_FILE)

    def write(memory: dict[str, Any]) -> None:
        write_file(tmp_path / WEIGHTS_FILE, weights, {**description, "memory": memory})
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**description, "memory": memory}))

    known = {name: value for name, value in config.to_dict().items() if name not in ("zero_shot", "whiten")}
    known["update_rate"] = 0.25  # nothing used it, and nothing refused it
    write(known)
    assert mnemic.Session.from_bytes(retold(tensors, meta, known), model).stream.seen == (20,)
    assert mnemic.from_pretrained(again, tmp_path).config == config
    load_memory(model, tmp_path)

    later = {**config.to_dict(), "afterglow": 3}
    write(later)
    with mnemic.SessionStore(tmp_path / "s.db") as store:
        for load in (
            lambda: mnemic.Session.from_bytes(retold(tensors, meta, later), model),
            lambda: mnemic.from_pretrained(make("llama"), tmp_path),
            lambda: load_memory(model, tmp_path),
            lambda: store.put_bytes("a", retold(tensors, meta, later)),
        ):
            with pytest.raises(mnemic.StateError, match=r"written by a later release of mnemic.*no setting afterglow"):
                load()
        with pytest.raises(mnemic.StateError, match="says 'mood', which this release of mnemic does not know: it was"):
            mnemic.Session.from_bytes(to_bytes(tensors, {**meta, "mood": 1}), model)
        assert store.list() == []
    with pytest.raises(UnknownSetting, match="EMTConfig has no setting afterglow; known"):
        mnemic.MemoryConfig.from_dict(later)


def test_a_checkpoint_of_another_memory_is_refused_whole(tmp_path):
    config = CONFIGS["emt-0"]
    model = host("llama", config)
    mnemic.attached(model).save_pretrained(tmp_path)
    other = host("llama", config.replace(slots=5))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(mnemic.StateError, match=r"another memory \(slots 4 there, 5 here\)"):
        load_memory(other, tmp_path)
    weights, description = read_file(tmp_path / WEIGHTS_FILE)
    weights[next(name for name in weights if "weight" in name)].fill_(torch.nan)
    write_file(tmp_path / WEIGHTS_FILE, weights, description)
    for loaded in (other, model):
        with pytest.raises(mnemic.StateError):
            load_memory(loaded, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
