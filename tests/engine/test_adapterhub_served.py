"""Adapters of AdapterHub in the running engine: all of a base's in one batch, and each answers as the library did."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.methods import decode
from server.convert.conversion import convert
from server.engine.request import AdapterTicket
from server.loader.adapter_tensors import AdapterTensors
from server.loader.prepare import read_config
from tests.adapterhub_goldens import BASES, DIRECTORY, INDEX, Golden, assert_is_the_library_s, golden_model, read_golden
from tests.tiny_engine import Ask, TinyEngine


def goldens_of(base: str) -> list[Golden]:
    return [read_golden(base, name) for name in INDEX["bases"][base]]


def add(engine: TinyEngine, golden: Golden) -> AdapterTicket | None:
    if golden.name == "base":
        return None
    config, tensors = golden.files()
    return engine.add_forms(golden.name, decode(config, tensors, engine.spec, engine.base).forms)


@pytest.mark.parametrize("base", BASES)
def test_all_adapters_of_a_base_in_one_batch(base: str, tmp_path: Path) -> None:
    engine = TinyEngine(golden_model(base), tmp_path, chunk_size=16)
    goldens = goldens_of(base)
    asks = [Ask(one.name, one.prompt, add(engine, one), num_tokens=len(one.answer)) for one in goldens]
    answers = engine.run(asks, stagger_steps=2)
    for golden in goldens:
        assert_is_the_library_s(golden, answers[golden.name])


def test_what_the_library_writes_is_converted_and_served(tmp_path: Path) -> None:
    """Its pickles, with the head beside them, as it writes them where nobody asks for anything else."""
    convert(DIRECTORY / "as_written", tmp_path / "converted")
    files = {path.name: str(path) for path in (tmp_path / "converted").iterdir()}
    engine = TinyEngine(golden_model("qwen2"), tmp_path, chunk_size=16)
    config, tensors = read_config(Path(files["adapter_config.json"])), AdapterTensors(files)
    ticket = engine.add_forms("converted", decode(config, tensors, engine.spec, engine.base).forms)
    golden = read_golden("qwen2", "seq_bn")
    answers = engine.run([Ask("converted", golden.prompt, ticket, num_tokens=len(golden.answer))])
    assert_is_the_library_s(golden, answers["converted"])


def test_a_second_wave_finds_cached_blocks_and_answers_the_same(tmp_path: Path) -> None:
    """Blocks with a prefix in them belong to its adapter alone; Mistral's window ends inside the sequences."""
    engine = TinyEngine(golden_model("mistral"), tmp_path, chunk_size=16)
    goldens = goldens_of("mistral")
    tickets = {golden.name: add(engine, golden) for golden in goldens}
    for wave in range(2):
        asks = [Ask(one.name, one.prompt, tickets[one.name], num_tokens=len(one.answer)) for one in goldens]
        answers = engine.run(asks)
        for golden in goldens:
            assert_is_the_library_s(golden, answers[golden.name])
        assert (answers["prefix"].num_cached_tokens > 0) == bool(wave)
