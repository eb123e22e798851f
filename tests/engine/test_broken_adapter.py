"""A broken adapter fails its own requests, never the engine's; a slow one makes nobody else wait."""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from peft_core.image import Image, pack, read_header, unpack, write_image
from server.engine.request import AdapterTicket, FinishReason
from tests.tiny_engine import Answer, Ask, TinyEngine
from tests.tiny_models import make_lora, make_model, random_prompt


class House(NamedTuple):
    engine: TinyEngine
    good: AdapterTicket
    asks: list[Ask]
    undisturbed: dict[str, Answer]


@pytest.fixture
def house(tmp_path: Path) -> House:
    """An engine with one good adapter, and what two requests answer when nothing is wrong."""
    model = make_model("qwen2")
    engine = TinyEngine(model, tmp_path, chunk_size=32, enable_prefix_caching=False)
    good = engine.add("good", make_lora(model, tmp_path / "good", rank=8, seed=1))
    asks = [Ask("base", random_prompt(20), None, 12), Ask("good", random_prompt(40, seed=1), good, 12)]
    return House(engine, good, asks, engine.run(asks))


def broken_copy(house: House, damage: str) -> AdapterTicket:
    source = Path(house.good.image_path)
    target = source.with_name(f"{damage}.img")
    header, start = read_header(source)
    content = bytearray(source.read_bytes())
    if damage == "KeyError":
        text = json.dumps({name: value for name, value in header.items() if name != "num_bytes"}).encode()
        content[8 : 16 + len(text)] = struct.pack("<II", len(text), zlib.crc32(text)) + text
    elif damage == "damaged header":  # JSON all the same
        place = content.index(b'"num_bytes"') + 13
        content[place] ^= 1
    if damage == "truncated":
        del content[start + header["num_bytes"] // 2 :]
    elif damage == "flipped bit":
        content[start + 1000] ^= 1
    elif damage == "no image":
        content[:8] = b"PK\x03\x04 zip"
    target.write_bytes(content)
    return replace(house.good, key=damage, name=damage, image_path=str(target))


def repacked(house: House, name: str, image: Image) -> AdapterTicket:
    path = Path(house.good.image_path).with_name(f"{name}.img")
    write_image(path, image)
    return AdapterTicket(name, name, str(path), image.num_bytes)


def run_beside(house: House, broken: AdapterTicket) -> dict[str, Answer]:
    sick = [Ask(f"sick{index}", random_prompt(10, seed=index), broken, 12) for index in range(3)]
    answers = house.engine.run([*house.asks, *sick])
    for ask in house.asks:
        assert np.array_equal(answers[ask.name].logprobs, house.undisturbed[ask.name].logprobs)
    return {name: answer for name, answer in answers.items() if name.startswith("sick")}


def unfinished(answers: dict[str, Answer], asks: list[Ask]) -> bool:
    return any(answers[ask.name].finish is None for ask in asks)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "damaged header", "no image", "KeyError"])
def test_a_damaged_image_fails_its_own_requests_only(house: House, damage: str) -> None:
    for answer in run_beside(house, broken_copy(house, damage)).values():
        assert answer.finish is FinishReason.FAILED
        assert answer.error.kind == "AdapterLoadFailed"
        assert damage in answer.error.message
    stats = house.engine.engine.stats()
    assert stats.units_kv == stats.units_adapters_pinned == 0


def test_a_missing_image_fails_its_own_requests_only(house: House) -> None:
    gone = replace(house.good, key="gone", name="gone", image_path="/nowhere/gone.img")
    for answer in run_beside(house, gone).values():
        assert "No such file" in answer.error.message


def test_an_image_of_another_dtype_fails_its_own_requests_only(house: House) -> None:
    header, start = read_header(Path(house.good.image_path))
    payload = torch.frombuffer(bytearray(Path(house.good.image_path).read_bytes()[start:]), dtype=torch.float32)
    forms = unpack(Image(header, payload), house.engine.spec)
    other = repacked(house, "other-dtype", pack(forms, house.engine.spec, "bfloat16"))
    for answer in run_beside(house, other).values():
        assert "dtype bfloat16" in answer.error.message


def test_nan_weights_fail_their_own_rows_only(house: House) -> None:
    header, start = read_header(Path(house.good.image_path))
    payload = torch.frombuffer(bytearray(Path(house.good.image_path).read_bytes()[start:]), dtype=torch.float32)
    payload[::7] = torch.nan
    for answer in run_beside(house, repacked(house, "nan", Image(header, payload))).values():
        assert answer.finish is FinishReason.FAILED
        assert answer.error.kind == "InvalidLogits"
    again = house.engine.run(house.asks)  # blocks that held NaN are used anew
    for ask in house.asks:
        assert np.array_equal(again[ask.name].logprobs, house.undisturbed[ask.name].logprobs)


def test_running_streams_go_on_while_an_adapter_loads(house: House, tmp_path: Path) -> None:
    """The read does not end before the others have."""
    content = Path(house.good.image_path).read_bytes()
    released = threading.Event()
    slow = replace(house.good, key="slow", name="slow", image_path=str(tmp_path / "slow.img"))
    original = house.engine.engine._adapters.reader._read  # type: ignore[attr-defined]

    def read_when_released(ticket: AdapterTicket, *order: Any) -> dict[str, object]:
        if ticket.key == "slow":
            assert released.wait(60)
        header: dict[str, object] = original(ticket, *order)
        return header

    house.engine.engine._adapters.reader._read = read_when_released  # type: ignore[attr-defined]
    Path(slow.image_path).write_bytes(content)
    late = Ask("late", random_prompt(40, seed=1), slow, 12)
    answers = {ask.name: Answer() for ask in [*house.asks, late]}
    for ask in [late, *house.asks]:
        house.engine.submit(ask)
    while unfinished(answers, house.asks):
        house.engine.step_into(answers)
    assert unfinished(answers, [late]), "the late one cannot have run yet"
    assert not answers["late"].tokens
    released.set()
    while unfinished(answers, [late]):
        house.engine.step_into(answers)
        os.sched_yield()
    assert answers["late"].tokens == house.undisturbed["good"].tokens
