"""What users send by mistake or malice, over HTTP to a running server: each a clear refusal, nobody else disturbed."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.running import RunningServer, is_idle
from tests.clients.served_model import ServedModel

PROMPT = "once upon"


@pytest.fixture
def steady(server: RunningServer) -> Iterator[None]:
    """Somebody else's requests, which must go on unchanged all the while."""
    body = {"inputs": PROMPT, "adapter": "poet", "parameters": {"max_new_tokens": 8}}
    expected = server.post("/generate", body).json()
    stop, wrong = threading.Event(), list[Any]()

    def visit() -> None:
        while not stop.is_set():
            answer = server.post("/generate", body).json()
            if answer != expected:
                wrong.append(answer)

    thread = threading.Thread(target=visit)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert wrong == []
    assert is_idle(server.wait_until_idle())


@pytest.mark.usefixtures("steady")
def test_requests_that_cannot_work_say_why(server: RunningServer) -> None:
    cases: list[tuple[dict[str, Any], int, str, list[str]]] = [
        ({"inputs": PROMPT, "adapter": "poett"}, 404, "adapter_not_found", ["poett", "'poet'"]),
        ({"inputs": PROMPT, "adapter": "poet@9"}, 404, "adapter_not_found", ["9"]),
        ({"inputs": PROMPT, "adapter": "po,et"}, 422, "validation", ["po,et"]),
        ({"inputs": ""}, 422, "validation", ["inputs"]),
        ({"inputs": "x" * 3000}, 422, "validation", ["3000", "2048"]),
        ({"inputs": PROMPT, "parameters": {"max_new_tokens": 2040}}, 422, "validation", ["2040", "2048", "2049"]),
        ({"inputs": PROMPT, "parameters": {"max_new_tokens": 2**62}}, 422, "validation", [str(2**62)]),
        ({"inputs": PROMPT, "parameters": {"max_new_tokens": 2**70}}, 422, "validation", ["max_new_tokens"]),
        ({"inputs": PROMPT, "parameters": {"top_k": 2**62}}, 422, "validation", ["top_k"]),
        ({"inputs": PROMPT, "parameters": {"stop_token_ids": [10**6]}}, 422, "validation", ["1000000"]),
        ({"inputs": PROMPT, "paramters": {}}, 422, "validation", ["parameters"]),
    ]
    for body, status, error_type, words in cases:
        answer = server.post("/generate", body)
        assert (answer.status_code, answer.json()["error_type"]) == (status, error_type), (body, answer.text)
        for word in words:
            assert word in answer.json()["error"], answer.text


Spoil = Callable[[Path], None]


def _truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _corrupt(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[10] ^= 0xFF
    path.write_bytes(bytes(content))


def _not_a_number(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")


def _infinite(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x7f")


def _set(**fields: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def _other_base(directory: Path) -> None:
    """The same kind of adapter, trained on a base of other widths."""
    from safetensors.numpy import load_file, save_file

    path = directory / "adapter_model.safetensors"
    wider = {name: tensor.repeat(2, axis=1) if "lora_A" in name else tensor for name, tensor in load_file(path).items()}
    save_file(wider, path)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_truncate, ["adapter_model.safetensors"]),
        (_corrupt, ["adapter_model.safetensors"]),
        (_not_a_number, ["lora_", "finite"]),
        (_infinite, ["lora_", "finite"]),
        (_other_base, ["lora_A", "128", "64"]),
        (_set(peft_type="UNHEARD_OF"), ["UNHEARD_OF"]),
        (_set(a_field_of_the_future=True), ["a_field_of_the_future"]),
        (_set(r=5), ["5"]),
        (_set(target_modules=["nowhere"]), ["nowhere"]),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_by_name(
    server: RunningServer, model: ServedModel, tmp_path: Path, spoil: Spoil, words: list[str]
) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(model.guest, spoiled)
    spoil(spoiled)
    answer = upload(server, "spoiled", spoiled)
    assert answer.status_code == 422, answer.text
    for word in words:
        assert word in answer.json()["error"]["message"]
    assert server.post("/generate", {"inputs": PROMPT, "adapter": "spoiled"}).status_code == 404
    assert upload(server, "guest", model.guest).status_code in (200, 201), "the unspoiled one is taken"


def upload(server: RunningServer, name: str, directory: Path) -> httpx.Response:
    files: list[Any] = [("metadata", (None, json.dumps({"name": name})))]
    files += [
        ("files", (file, (directory / file).read_bytes()))
        for file in ("adapter_config.json", "adapter_model.safetensors")
    ]
    return httpx.post(server.url + "/admin/v1/adapters", files=files, timeout=60)
