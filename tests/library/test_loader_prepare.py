from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from peft_core.image import DTYPES, Image, read_header, unpack
from peft_core.traits import AdapterTraits
from server.loader.errors import AdapterRefused
from server.loader.job import Prepared, PrepareJob
from server.loader.prepare import MAX_CONFIG_BYTES, Packer
from tests.library.library_samples import (
    PREFIX,
    make_config,
    make_files,
    make_spec,
    make_target,
    make_tensors,
    write_files,
)


def prepare(directory: Path, files: dict[str, bytes], dtype: str = "float32") -> Prepared:
    job = PrepareJob(write_files(directory, files), str(directory / "image"))
    return Packer(make_target(dtype=dtype)).prepare(job)


def load_image(path: Path) -> Image:
    header, start = read_header(path)
    payload = bytearray(path.read_bytes()[start : start + header["num_bytes"]])
    return Image(header, torch.frombuffer(payload, dtype=DTYPES[header["dtype"]]))


def refusal(directory: Path, files: dict[str, bytes]) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        prepare(directory, files)
    assert not (directory / "image").exists()
    return caught.value


def with_tensors(tensors: dict[str, torch.Tensor], **fields: Any) -> dict[str, bytes]:
    return make_files(**fields) | {"adapter_model.safetensors": save(tensors)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_image_holds_what_the_files_say(tmp_path: Path, dtype: str) -> None:
    prepared = prepare(tmp_path, make_files(seed=3), dtype)
    image = load_image(tmp_path / "image")
    assert (prepared.num_bytes, image.header["dtype"]) == (image.num_bytes, dtype)
    forms = unpack(image, make_spec())
    tensors = make_tensors(seed=3)
    for path in make_spec().sites:
        expected = tensors[f"{PREFIX}{path}.lora_A.weight"].to(DTYPES[dtype])
        assert torch.equal(forms.linear[path].down, expected)
        scaled = (2.0 * tensors[f"{PREFIX}{path}.lora_B.weight"]).to(DTYPES[dtype])  # alpha / rank = 8 / 4
        assert torch.equal(forms.linear[path].up, scaled)


def test_the_report_tells_what_was_matched_and_what_it_takes(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, make_files(rank=4, lora_dropout=0.1))
    assert prepared.base_model == "org/base"
    assert prepared.report["ranks"] == [4]
    assert len(prepared.report["sites"]) == 4
    assert prepared.report["device_bytes"] == prepared.num_bytes
    assert "lora_dropout" in prepared.report["irrelevant_fields"]
    json.dumps(prepared.report, allow_nan=False)


def test_the_same_effect_has_the_same_digest_in_any_dtype(tmp_path: Path) -> None:
    one = prepare(tmp_path / "1", make_files(lora_dropout=0.1))
    two = prepare(tmp_path / "2", make_files(lora_dropout=0.2), "bfloat16")
    three = prepare(tmp_path / "3", make_files(seed=1))
    assert one.effect_digest == two.effect_digest
    assert one.effect_digest != three.effect_digest


def test_images_for_other_bases_and_dtypes_are_of_other_variants() -> None:
    variants = {Packer(make_target(base, dtype)).variant for base in ("sha256:a", "sha256:b") for dtype in DTYPES}
    assert len(variants) == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    tensors = make_tensors()
    name = list(tensors)[3]
    tensors[name][0, 0] = bad
    assert refusal(tmp_path, with_tensors(tensors)).tensor == name


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    files = make_files()
    files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1]
    error = refusal(tmp_path, files)
    assert error.code == "invalid_safetensors"
    assert "truncated" in error.message


def test_another_base_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    tensors = {name: torch.cat([value, value], dim=-1) for name, value in make_tensors().items()}
    error = refusal(tmp_path, with_tensors(tensors))
    assert error.tensor in tensors


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"swirl_factor": 3}, "swirl_factor"),
        ({"peft_type": "LILY"}, "peft_type"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    error = refusal(tmp_path, make_files(**fields))
    assert error.field == field
    assert AdapterRefused.from_details(error.details()).details() == error.details()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"r": 1, "r": 2}', "twice"),
        (b" " * (MAX_CONFIG_BYTES + 1), "limit"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    error = refusal(tmp_path, make_files() | {"adapter_config.json": text})
    assert error.code == "malformed_adapter"
    assert message in error.message


def test_a_gap_in_a_decoder_is_told_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patch:
        patch.setattr("server.loader.prepare.decode", explode)
        assert refusal(tmp_path, make_files()).code == "decoder_failed"
    assert prepare(tmp_path, make_files()).num_bytes > 0


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    files = write_files(tmp_path, {"adapter_config.json": json.dumps(make_config()).encode()})
    job = PrepareJob({**files, "adapter_model.safetensors": str(tmp_path / "nowhere")}, str(tmp_path / "image"))
    with pytest.raises(AdapterRefused, match="cannot be read"):
        Packer(make_target()).prepare(job)


def test_an_untrained_adapter_is_told_to_change_nothing(tmp_path: Path) -> None:
    trained = prepare(tmp_path / "trained", make_files())
    assert not any("changes nothing" in warning for warning in trained.report["warnings"])
    tensors = {name: value if "lora_A" in name else 0 * value for name, value in make_tensors().items()}
    untrained = prepare(tmp_path / "untrained", with_tensors(tensors))
    assert any("changes nothing" in warning for warning in untrained.report["warnings"])


def test_the_report_carries_what_the_engine_must_know_before_it_loads(tmp_path: Path) -> None:
    traits = prepare(tmp_path, make_files()).report["traits"]
    assert AdapterTraits.from_json(json.loads(json.dumps(traits))) == AdapterTraits()


def test_images_for_a_base_in_another_dtype_are_of_another_variant() -> None:
    target = make_target()
    assert Packer(target).variant != Packer(replace(target, base_dtype="bfloat16")).variant


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    weights = make_files()["adapter_model.safetensors"]
    error = refusal(tmp_path, make_files() | {"model_head.safetensors": weights})
    assert "another file" in error.message
