"""Fields of a config that contradict the tensors, or mean nothing, are refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.errors import AdapterError
from tests.peft_core.adapter_files import load_adapter
from tests.peft_core.site_samples import SAMPLES
from tests.peft_core.spoilt import ONE_A_KIND, Spoilt, spoilt
from tests.peft_core.tuner_samples import make_sample

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

# name of a sample, field, a value that contradicts the tensors, what the error names besides
CONTRADICTIONS: tuple[tuple[str, str, Any], ...] = (
    ("ia3", "feedforward_modules", ["q_proj"]),
    ("ia3, outputs only", "feedforward_modules", ["down_proj"]),
    ("oft", "oft_block_size", 16),
    ("oft", "r", 2),
    ("oft, number of blocks", "r", 4),
    ("oft, shared", "block_share", False),
    ("oft", "block_share", True),
    ("boft", "boft_block_size", 8),
    ("boft", "boft_block_num", 4),
    ("road_1", "variant", "road_4"),
    ("road_1", "variant", "road_3"),
    ("road_1", "group_size", 7),
    ("road_1", "group_size", 96),
    ("lokr, low-rank", "r", 3),
    ("lokr, low-rank", "rank_pattern", {"q_proj": 5}),
    ("fourierft", "n_frequency", 200),
    ("fourierft", "n_frequency_pattern", {"q_proj": 20}),
    ("c3a", "block_size", 8),
    ("c3a", "block_size_pattern", {"q_proj": 4}),
    ("randlora", "r", 5),
    ("randlora", "save_projection", False),
    ("randlora, drawn again", "save_projection", True),
    ("hira", "r", 5),
    ("shira", "r", 5),
    ("supertuning", "sparsity", 0.5),
    ("supertuning", "r", 4),
    ("supertuning, lora", "r", None),
    ("supertuning, lora", "lora_alpha", None),
    ("waveft", "n_frequency", 200),
    ("waveft", "wavelet_family", "db11"),
    ("waveft", "wavelet_family", "coif5"),
    ("glora", "r", 5),
    ("glora", "config_A_B", "vector"),
    ("glora", "config_A_B", "none"),
    ("glora, vectors", "config_A_B", "constant"),
    ("glora", "config_A_B", "matrix"),
    ("frod", "save_projection", False),
)


@pytest.mark.parametrize(("name", "field", "value"), CONTRADICTIONS)
def test_a_config_that_contradicts_its_tensors(name: str, field: str, value: Any) -> None:
    adapter = spoilt(name)
    adapter.check()
    adapter.config[field] = value
    error = adapter.refusal()
    assert error.field or error.tensor


WRONG_VALUES: tuple[tuple[str, str, Any], ...] = (
    ("ia3", "feedforward_modules", 3),
    ("ia3", "feedforward_modules", "*("),
    ("ia3", "init_ia3_weights", "yes"),
    ("oft", "oft_block_size", -1),
    ("oft", "oft_block_size", "32"),
    ("oft", "oft_block_size", None),
    ("oft", "use_cayley_neumann", 1),
    ("oft", "num_cayley_neumann_terms", 10**9),
    ("oft", "eps", "small"),
    ("oft", "bias", "lora_only"),
    ("boft", "boft_n_butterfly_factor", 0),
    ("road_1", "variant", ["road_1"]),
    ("road_1", "group_size", 0),
    ("lokr", "alpha", "many"),
    ("lokr", "init_weights", "eager"),
    ("lokr", "init_weights", 0),
    ("c3a", "init_weights", "lycoris"),
    ("fourierft", "random_loc_seed", None),
    ("fourierft", "random_loc_seed", -1),
    ("fourierft", "random_loc_seed", 2**70),
    ("fourierft", "scaling", "150"),
    ("randlora", "projection_prng_key", 2**70),
    ("waveft", "random_loc_seed", None),
    ("waveft", "use_idwt", "no"),
    ("supertuning", "sparsity", -1e308),
    ("supertuning", "sparsity", 1),
    ("glora", "config_C", 3),
    ("glora", "bias", "all"),
    ("hira", "alpha_pattern", {"q_proj": 3}),
    ("norms", "bias", "all"),
)


@pytest.mark.parametrize(("name", "field", "value"), WRONG_VALUES)
def test_a_field_with_a_wrong_value(name: str, field: str, value: Any) -> None:
    adapter = spoilt(name)
    adapter.config[field] = value
    assert adapter.refusal().field == field


def test_zeros_that_are_none_are_refused() -> None:
    adapter = spoilt("glora, constants")
    tensor = adapter.first("glora_D.zeros")
    adapter.tensors[tensor] = torch.ones_like(adapter.tensors[tensor])
    assert "not 0" in str(adapter.refusal_of_values())


def test_oft_of_an_old_version_is_named() -> None:
    adapter = spoilt("oft")
    del adapter.config["oft_block_size"]
    assert "0.14" in str(adapter.refusal())
    adapter = spoilt("oft")
    adapter.config["peft_version"] = "0.17.1"
    assert any("0.18" in warning for warning in adapter.check().warnings)
    assert not any("0.18" in warning for warning in spoilt("oft").check().warnings)


def test_a_whole_factor_and_its_parts_contradict_each_other() -> None:
    adapter = spoilt("lokr, low-rank")
    tensor = adapter.first("lokr_w1_a")
    adapter.tensors[tensor.replace("_a", "")] = torch.ones(4, 4)
    assert "as a whole" in str(adapter.refusal())


@pytest.mark.parametrize("name", ["oft", "hira"])
def test_kinds_that_are_not_served_on_embeddings_say_so(name: str, tmp_path: Path) -> None:
    directory = make_sample(SAMPLES[name], "llama", tmp_path, target_modules=["embed_tokens", "q_proj"])
    error = Spoilt(*load_adapter(directory)).refusal()
    assert "embedding" in str(error)
    assert "embed_tokens" in str(error.tensor)


JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2**64,
    1e308,
    float("nan"),
    "",
    "all",
    "*(",
    [],
    ["q_proj"],
    {"q_proj": 1},
)


@pytest.mark.parametrize("name", ONE_A_KIND)
def test_junk_in_any_field_is_refused_or_read(name: str) -> None:
    """Whatever stands in a field, the decoder knows what to say: no other error ever."""
    for field in spoilt(name).config:
        for value in JUNK:
            adapter = spoilt(name)
            adapter.config[field] = value
            with contextlib.suppress(AdapterError):
                adapter.check()
                if value not in (None, True):  # most others are refused before
                    adapter.decode()
