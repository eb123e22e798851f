"""The whole front with a real engine, loader and store: a tiny random model and a real adapter."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters_store.layout import Layout
from server.engine.launch import Launched, in_process
from server.engine.request import SamplingParams
from server.front.errors import CannotStart, FrontError
from server.front.front import Front
from server.front.text import TextRequest
from server.front.tokenizer import TextTokenizer
from server.settings import Settings
from tests.front.letters import save_letters
from tests.tiny_models import all_targets, load_oracle, make_lora, make_model

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model("llama", seed=1).save_pretrained(directory)
    return save_letters(directory)


@pytest.fixture(scope="module")
def adapters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    make_lora(make_model("llama", seed=1), directory / "sql", rank=4, alpha=8, targets=all_targets("llama"), seed=2)
    return directory


def oracle_text(adapter: Path | None) -> list[int]:
    """Greedy continuation of "hello" by the model's own generate, with HF PEFT where there is an adapter."""
    import torch

    model = make_model("llama", seed=1)
    chosen = model if adapter is None else load_oracle(model, adapter)
    prompt = torch.tensor([list(b"hello")])
    out = chosen.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False
    )
    return [int(token_id) for token_id in out[0, 5:]]


async def tokens_of(front: Front, adapter: str | None) -> list[int]:
    request = TextRequest("hello", SamplingParams(NUM_TOKENS), adapter)
    return [token.id async for delta in front.generate(request) for token in delta.tokens]


async def tokens_after_restart(front: Front, adapter: str) -> list[int]:
    while True:
        try:
            return await tokens_of(front, adapter)
        except FrontError as error:
            if not error.retryable:
                raise
        await asyncio.sleep(0.1)


def test_text_is_that_of_transformers_and_peft_also_after_the_engine_was_killed(
    model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    settings = Settings(model=str(model_dir), store_dir=tmp_path, adapters_dir=adapters_dir, num_threads=1)

    async def scene() -> None:
        front = await Front.start(settings)
        try:
            base, sql = await asyncio.gather(tokens_of(front, None), tokens_of(front, "sql"))
            assert base == oracle_text(None)
            assert sql == oracle_text(adapters_dir / "sql")
            assert base != sql
            assert front.engine.pid is not None
            os.kill(front.engine.pid, signal.SIGKILL)
            assert await tokens_after_restart(front, "sql") == sql
            assert front.engine.num_restarts == 1
            assert front.library.catalog.leases.total() == 0
        finally:
            await front.close()

    asyncio.run(asyncio.wait_for(scene(), 120))


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    fake = in_process("tests.engine.fake_engine:build_engine")

    async def scene() -> None:
        with pytest.raises(CannotStart, match="attention is not supported"):
            await Front.start(Settings(model="fake fail_start=1", store_dir=tmp_path), launch=fake)
        with pytest.raises(CannotStart, match=r"tokenizer\.json"):
            await TextTokenizer.load(str(tmp_path))

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_wrong_paths_are_refused_before_anything_is_started(
    model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "config.json").write_text("{}")
    Layout(tmp_path / "used").close()
    used = (tmp_path / "used" / "lock").open("rb")
    fcntl.flock(used, fcntl.LOCK_EX)  # as a release does that does not share a store

    async def refuse(match: str, **settings: Any) -> None:
        async def launch(*_: Any) -> Launched:
            raise AssertionError("the engine was started")

        with pytest.raises(CannotStart, match=match):
            await Front.start(Settings(**{"store_dir": store, **settings}), launch=launch)

    async def scene() -> None:
        await refuse("there is no directory /nowhere/llama", model="/nowhere/llama")
        await refuse("there is no directory ./llama", model="./llama")
        await refuse("config.json is missing", model=str(tmp_path))
        await refuse(r"tokenizer\.json", model=str(tmp_path / "mute"))
        await refuse("is an adapter", model=str(adapters_dir / "sql"))
        await refuse("does not exist", model=str(model_dir), adapters_dir=tmp_path / "none")
        await refuse("open in another process", model=str(model_dir), store_dir=tmp_path / "used")
        with pytest.raises(AssertionError, match="was started"):
            await refuse("nothing is wrong here", model=str(model_dir))

    asyncio.run(asyncio.wait_for(scene(), 60))
    used.close()


def test_the_generate_command_answers_lines_and_tells_failures_by_its_status(
    model_dir: Path, adapters_dir: Path
) -> None:
    lines = '{"prompt": "hello", "adapter": "sql"}\n{"prompt": "hello", "adapter": null}\n{"prompt": ""}\n'
    adapter = f"sql={adapters_dir / 'sql'}"
    command = [sys.executable, "-m", "server", "generate", str(model_dir), "--adapter", adapter, "--format", "jsonl"]
    command += ["--max-new-tokens", str(NUM_TOKENS), "--num-threads", "1"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    sql, base, empty = (json.loads(line) for line in done.stdout.splitlines())
    assert (sql["adapter"], base["adapter"]) == ("sql", None)
    assert sql["text"] == bytes(oracle_text(adapters_dir / "sql")).decode(errors="replace")
    assert base["text"] == bytes(oracle_text(None)).decode(errors="replace")
    assert empty["error"]["code"] == "validation"
    assert "3 prompts" in done.stderr
    assert "1 failed" in done.stderr
