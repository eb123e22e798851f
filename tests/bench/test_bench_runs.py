"""Every benchmark says what it does, and runs at tiny sizes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bench.models import EOS_TOKEN_ID, TINY, adapter_directory, base_directory, text_of
from bench.step_records import watching
from bench.workloads import AdapterShape
from server.engine.engine import Engine

# PEFT asks transformers for a property by its old name.
PEFT_USES_AN_OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BENCHES = (
    "versus_peft",
    "mixed",
    "registered",
    "host_time",
    "serving",
    "kinds",
    "loading",
    "cold_start",
    "over_capacity",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(name: str, cache: Path, tmp_path: Path, *more: str) -> dict[str, object]:
    """The JSON of one quick run."""
    path = tmp_path / f"{name}.json"
    module = importlib.import_module(f"bench.{name}")
    module.main(["--quick", "--threads", "1", "--cache", str(cache), "--json", str(path), *more])
    assert path.with_suffix(".png").exists()
    found: dict[str, object] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("name", BENCHES)
def test_help_is_worth_reading(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--json", "--plot", "--quick", "--rounds", "--cache"))
    assert len(text) > 800


@PEFT_USES_AN_OLD_NAME
def test_versus_peft_runs_and_everybody_answers_alike(cache: Path, tmp_path: Path) -> None:
    found = run("versus_peft", cache, tmp_path, "--only", "generate", "mixed", "veneer 0", "veneer 16")
    agreement = {row["contender"]: row["tokens"] for row in found["rows"]}  # type: ignore[attr-defined]
    assert agreement["Veneer, 0 adapters"] == "16/16 as generate"
    assert agreement["Veneer, 16 adapters"] == "16/16 as mixed"
    assert len(found["findings"]) == 4  # type: ignore[arg-type]


@pytest.mark.slow
@PEFT_USES_AN_OLD_NAME
def test_everybody_takes_part_in_versus_peft(cache: Path, tmp_path: Path) -> None:
    found = run("versus_peft", cache, tmp_path)
    assert len(found["rows"]) == 8  # type: ignore[arg-type]
    agreement = {row["contender"]: row["tokens"] for row in found["rows"]}  # type: ignore[attr-defined]
    assert agreement["transformers continuous batching"] == "16/16 as generate"
    assert agreement["PEFT one by one, 16 adapters"] == "16/16 as mixed"


def test_mixed_runs(cache: Path, tmp_path: Path) -> None:
    found = run("mixed", cache, tmp_path)
    assert [row["workload"] for row in found["rows"]] == ["mixed", "uniform twin"]  # type: ignore[attr-defined]


def test_host_time_runs_and_leaves_the_engine_as_it_was(cache: Path, tmp_path: Path) -> None:
    method = Engine.step
    found = run("host_time", cache, tmp_path)
    assert all(row["steps"] > 0 for row in found["rows"])  # type: ignore[attr-defined]
    assert Engine.step is method
    with watching():
        assert Engine.step is not method
    assert Engine.step is method


def test_kinds_runs_and_every_kind_acts_alike_in_any_company(cache: Path, tmp_path: Path) -> None:
    found = run("kinds", cache, tmp_path)
    rows = {row["16 rows of"]: row for row in found["rows"]}  # type: ignore[attr-defined]
    assert list(rows) == ["base", "LoRA", "IA3", "prefix", "bottleneck", "mixed"]
    assert all(row["unlike the base"] != "0/16" for name, row in rows.items() if name != "base")
    assert str(found["findings"][1]).endswith(": 16/16")  # type: ignore[index]


def test_loading_runs_and_only_some_kinds_read_the_base(cache: Path, tmp_path: Path) -> None:
    found = run("loading", cache, tmp_path)
    of_base = {row["kind"]: row["base ms"]["median"] for row in found["rows"]}  # type: ignore[attr-defined]
    assert {kind for kind, ms in of_base.items() if ms > 0} == {"DoRA", "PiSSA"}
    assert len(of_base) == 6


@pytest.mark.slow
def test_registered_runs(cache: Path, tmp_path: Path) -> None:
    found = run("registered", cache, tmp_path)
    assert len(found["rows"]) == 4  # type: ignore[arg-type]


@pytest.mark.slow
def test_serving_runs_all_parts(cache: Path, tmp_path: Path) -> None:
    found = run("serving", cache, tmp_path)
    failed = [row["value"] for row in found["rows"] if row["what"] == "failed"]  # type: ignore[attr-defined]
    assert failed == [0, 0]


@pytest.mark.slow
def test_serving_runs_its_open_loop(cache: Path, tmp_path: Path) -> None:
    found = run("serving", cache, tmp_path, "--only", "s_lora")
    values = {row["what"]: row["value"] for row in found["rows"]}  # type: ignore[attr-defined]
    assert values["failed"] == 0
    assert values["first token ms, p50"] > 0


def test_the_base_and_its_adapters_are_made_once_and_words_are_tokens(cache: Path) -> None:
    directory = base_directory(TINY, cache)
    weights = directory / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert base_directory(TINY, cache) == directory
    assert weights.stat().st_mtime_ns == made
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokens = [17, 16, 511, 300]
    assert tokenizer(text_of(tokens))["input_ids"] == tokens
    assert tokenizer.decode(tokens) == text_of(tokens)
    assert tokenizer.eos_token_id == EOS_TOKEN_ID
    one, other = (adapter_directory(TINY, AdapterShape(4), number, cache) for number in (0, 1))
    assert (one / "adapter_model.safetensors").read_bytes() != (other / "adapter_model.safetensors").read_bytes()


def test_cold_start_runs_and_every_cold_request_was_a_load(cache: Path, tmp_path: Path) -> None:
    found = run("cold_start", cache, tmp_path)
    rows = {row["phase"]: row for row in found["rows"]}  # type: ignore[attr-defined]
    assert set(rows) == {"calm", "resident", "cold"}
    assert rows["calm"]["requests"] == 0
    assert rows["cold"]["requests"] > 0
    loads = found["raw"]["cold"]["phases_s"]  # type: ignore[index]
    assert len(loads) == rows["cold"]["requests"]
    assert all({"queue", "read", "check", "bind"} <= set(load) for load in loads)


def test_over_capacity_runs_and_what_does_not_fit_is_loaded(cache: Path, tmp_path: Path) -> None:
    found = run("over_capacity", cache, tmp_path)
    rows = {(row["popularity"], row["set"]): row for row in found["rows"]}  # type: ignore[attr-defined]
    assert set(rows) == {(popularity, size) for popularity in ("zipf", "uniform") for size in ("1x", "4x")}
    assert rows["uniform", "4x"]["loads/request"] > 0
    assert "4x, Zipf" in found["findings"][0]  # type: ignore[index]
