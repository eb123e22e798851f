"""Adapters of many kinds through the whole house: uploaded, probed, asked, each equal to PEFT; bad ones told why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.clients.running import RunningServer
from tests.clients.served_model import VOCAB, ServedModel
from tests.front.letters import letters
from tests.kinds.zoo import NUM_VIRTUAL, TASKS, make_adapter, peft_logits
from tests.tiny_models import load_oracle, make_lora, make_model

PROMPT = "Preheat the oven"
KINDS = ("dora", "pissa", "ia3", "oft", "lokr", "fourierft", "lora-tables", "prefix", "prompt", "multitask")


def upload(server: RunningServer, name: str, directory: Path, **query: str) -> httpx.Response:
    files: list[tuple[str, Any]] = [("metadata", (None, json.dumps({"name": name})))]
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            files.append(("files", (path.name, path.read_bytes())))
    return httpx.post(server.url + "/admin/v1/adapters", files=files, params=query, timeout=120)


def ask(server: RunningServer, adapter: str, **body: Any) -> httpx.Response:
    parameters = {"max_new_tokens": 6, "details": True, "decoder_input_details": True, "ignore_eos_token": True}
    return server.post("/generate", {"inputs": PROMPT, "adapter": adapter, "parameters": parameters, **body})


@pytest.mark.parametrize("kind", KINDS)
def test_an_uploaded_adapter_answers_as_its_own_library_does(kind: str, server: RunningServer, tmp_path: Path) -> None:
    model = make_model("llama", seed=1, vocab_size=VOCAB)
    directory = make_adapter(kind, model, "llama", tmp_path / kind, seed=5)
    uploaded = upload(server, f"kind-{kind}", directory)
    assert uploaded.status_code == 201, uploaded.text
    report = uploaded.json()["report"]
    assert report["device_bytes"] > 0
    assert report["probe"]["largest_change"] > 1e-3
    assert uploaded.json()["residency"]["device"] is None  # the probe leaves nothing behind
    body = {"task_id": TASKS[kind]} if kind in TASKS else {}
    answer = ask(server, f"kind-{kind}", **body)
    assert answer.status_code == 200, answer.text
    details = answer.json()["details"]
    prompt = [token["id"] for token in details["prefill"]]
    assert details["prompt_tokens"] == len(prompt)  # virtual tokens are not the caller's
    tokens = [token["id"] for token in details["tokens"]]
    rows = peft_logits(kind, load_oracle(model, directory), prompt, tokens)
    assert rows.argmax(-1).tolist() == tokens


def test_tokens_that_an_adapter_adds_are_read_from_text_and_told_as_text(server: RunningServer, tmp_path: Path) -> None:
    wide = make_model("llama", seed=1, vocab_size=VOCAB)
    wide.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    directory = make_lora(wide, tmp_path / "wide", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = json.loads(letters().to_str())
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": VOCAB, "content": "<|call|>"},
        {**tokenizer["added_tokens"][0], "id": VOCAB + 1, "content": "<more>", "special": False},
    ]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    uploaded = upload(server, "wide", directory)
    assert uploaded.status_code == 201, uploaded.text
    report = uploaded.json()["report"]
    assert report["traits"]["vocab_size"] == VOCAB + 2
    assert report["added_tokens"] == [[VOCAB, "<|call|>", True], [VOCAB + 1, "<more>", False]]
    details = ask(server, "wide", inputs="<|call|>A<more>").json()["details"]
    prompt = [token["id"] for token in details["prefill"]]
    assert prompt == [VOCAB, ord("A"), VOCAB + 1]
    assert [token["text"] for token in details["prefill"]] == ["<|call|>", "A", "<more>"]
    tokens = [token["id"] for token in details["tokens"]]
    rows = peft_logits("lora", load_oracle(wide, directory), prompt, tokens)
    assert rows.argmax(-1).tolist() == tokens


def test_a_task_must_be_named_and_be_one(server: RunningServer, tmp_path: Path) -> None:
    model = make_model("llama", seed=1, vocab_size=VOCAB)
    assert upload(server, "tasks", make_adapter("multitask", model, "llama", tmp_path / "tasks")).status_code == 201
    shown = httpx.get(server.url + "/admin/v1/adapters/tasks").json()["versions"][0]["report"]
    assert (shown["traits"]["num_tasks"], shown["traits"]["num_virtual_tokens"]) == (3, NUM_VIRTUAL)
    assert ask(server, "tasks", task_id=2).status_code == 200
    for adapter, body, words in (
        ("tasks", {}, "say which with task_id, 0 to 2"),
        ("tasks", {"task_id": 3}, "task_id is 3"),
        ("poet", {"task_id": 0}, "has no tasks"),
    ):
        refused = ask(server, adapter, **body)
        assert refused.status_code == 422
        assert words in refused.json()["error"]


def test_an_adapter_without_an_effect_is_taken_and_told(
    server: RunningServer, model: ServedModel, tmp_path: Path
) -> None:
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "adapter_config.json").write_bytes((model.guest / "adapter_config.json").read_bytes())
    tensors = load_file(model.guest / "adapter_model.safetensors")
    still = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in tensors.items()}
    save_file(still, tmp_path / "zero" / "adapter_model.safetensors")
    report = upload(server, "zero", tmp_path / "zero", dry_run="true").json()["report"]
    assert report["probe"]["largest_change"] == 0
    assert any("changes nothing" in warning for warning in report["warnings"])
    report = upload(server, "moving", model.guest, dry_run="true").json()["report"]
    assert not any("changes nothing" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "XLORA"}, "X-LoRA mixes other adapters"),
        ({"peft_type": "NOVELTY"}, "unknown here"),
        ({"r": 10**9, "use_rslora": True}, "r"),
        ({"target_modules": "(([a-z_.0-9]+)+)+!"}, "given up"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"lora_alpha": float("nan")}, "NaN"),
        ({"swirl_factor": 2}, "swirl_factor"),
    ],
)
def test_a_hostile_config_is_refused_with_a_reason_and_the_server_goes_on(
    server: RunningServer, model: ServedModel, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    config = json.loads((model.guest / "adapter_config.json").read_text()) | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = (model.guest / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    refused = upload(server, "hostile", tmp_path)
    assert refused.status_code == 422, refused.text
    assert words in refused.json()["error"]["message"]
    assert ask(server, "poet").status_code == 200


def test_pickled_weights_are_refused_with_the_command_that_helps(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    refused = upload(server, "pickled", tmp_path)
    assert refused.status_code == 422
    assert "veneer adapters convert" in refused.json()["error"]["message"]
