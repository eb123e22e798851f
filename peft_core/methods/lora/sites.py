"""Which tensors of a LoRA file belong to one module, and whether they fit base and config.

    lora_A.weight          [rank, in]        [rank, in / blocks] as blocks, [rank, in / pool] pooled
    lora_B.weight          [out, rank]       [out, rank / blocks] as blocks
    lora_embedding_A, _B   [rank, vocabulary], [width, rank]
    lora_B.bias            [out]             lora_bias
    lora_magnitude_vector  [out] or [width]  DoRA
    lora_diag              [rank]            KaSA

The orientation is the same for `Conv1D`. Names and shapes only; nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter, shown
from peft_core.methods.lora.config import LoraConfig
from peft_core.methods.tensors import FLOAT_DTYPES, Header, require_matrix
from peft_core.methods.tuner.file import require_all
from peft_core.spec import Site

DOWN, UP = "lora_A.weight", "lora_B.weight"
EMBEDDING_DOWN, EMBEDDING_UP = "lora_embedding_A", "lora_embedding_B"
BIAS, DIAGONAL = "lora_B.bias", "lora_diag"
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
SUFFIXES = (DOWN, UP, EMBEDDING_DOWN, EMBEDDING_UP, BIAS, DIAGONAL, *MAGNITUDES)
_FEATURES = {"use_dora": "DoRA", "lora_bias": "a bias on the up projection", "kasa_config": "KaSA"}
TRAINING_SUFFIXES = ("lora_velora_embed", "lora_velora_embed.**", "lora_monteclora_sampler.**")


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One adapted module."""

    site: Site
    rank: int  # of the stored factors
    scaling: float
    down: str  # names of tensors
    up: str
    magnitude: str | None = None
    bias: str | None = None
    diagonal: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        parts = (self.down, self.up, self.magnitude, self.bias, self.diagonal)
        return tuple(name for name in parts if name is not None)


def match_site(
    site: Site, tensors: Mapping[str, str], header: Header, config: LoraConfig, num_rows: int | None
) -> LoraSite:
    """Check one module's tensors against the base and the config.

    Args:
        tensors: suffix -> tensor name.
        num_rows: of the adapter's vocabulary, None where the module is no table of it.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the tensor that is to blame.
    """
    is_embedding = site.kind == "embedding"
    sides = (EMBEDDING_DOWN, EMBEDDING_UP) if is_embedding else (DOWN, UP)
    require_all(tensors, site.path, sides)
    _refuse_other_sides(tensors, sides, site)
    down, up = tensors[sides[0]], tensors[sides[1]]
    if is_embedding:
        expected = num_rows or site.in_features, site.out_features
        rank = _require_factors(site, down, up, header, *expected)
        _refuse_on_embedding(config, down)
    else:
        outputs = num_rows or site.out_features
        rank = _require_blocks(site, down, up, header, config, outputs)
    _require_rank(site, rank, down, config)
    width = site.out_features if is_embedding or num_rows is None else num_rows
    return LoraSite(
        site=site,
        rank=rank,
        scaling=config.scaling(site.path, rank),
        down=down,
        up=up,
        magnitude=_vector(tensors, MAGNITUDES, config.has_magnitudes, "use_dora", width, header, site),
        bias=_vector(tensors, (BIAS,), config.has_bias, "lora_bias", width, header, site),
        diagonal=_vector(tensors, (DIAGONAL,), config.has_diagonal, "kasa_config", rank, header, site),
    )


def _require_blocks(site: Site, down: str, up: str, header: Header, config: LoraConfig, outputs: int) -> int:
    """As `_require_factors`, for factors that may be stored as blocks, or for pooled inputs."""
    inputs, num_blocks, side = site.in_features, 1, None
    if config.blocks is not None:
        num_blocks, side = config.blocks.num_blocks, config.blocks.side(site.path)
    if side == "down":
        inputs = _divided(site, down, inputs, num_blocks, "use_bdlora")
    inputs = _divided(site, down, inputs, config.pool, "qalora_group_size")
    rank = _require_factors(site, down, up, header, inputs, outputs, num_blocks if side == "up" else 1)
    if side is not None and (rank % num_blocks or (side == "up" and outputs % num_blocks)):
        _refuse_division(site, down, num_blocks, "use_bdlora")
    return rank


def _require_factors(
    site: Site, down: str, up: str, header: Header, inputs: int, outputs: int, num_blocks: int = 1
) -> int:
    """The rank of two factors that fit each other and the base."""
    rank, num_inputs = require_matrix(header, down)
    num_outputs, up_rank = require_matrix(header, up)
    _require_size(site, down, [rank, num_inputs], [rank, inputs])
    _require_size(site, up, [num_outputs, up_rank], [outputs, up_rank])
    if up_rank * num_blocks != rank:
        raise MalformedAdapter(
            f'tensor "{up}" has rank {up_rank * num_blocks} (its columns), but "{down}" has rank {rank} (its rows). '
            "The file is damaged; save the adapter again.",
            tensor=up,
        )
    return rank


def _require_rank(site: Site, rank: int, name: str, config: LoraConfig) -> None:
    stated = config.stated_rank(site.path)
    if stated is not None and stated != rank:
        raise MalformedAdapter(
            f'tensor "{name}" has rank {rank} (its rows), but the config says {shown(stated)} for this module, '
            "so its scaling is unclear. Correct r and rank_pattern; the first pattern that fits a module counts.",
            tensor=name,
        )


def _vector(
    tensors: Mapping[str, str],
    suffixes: tuple[str, ...],
    is_on: bool,
    field: str,
    size: int,
    header: Header,
    site: Site,
) -> str | None:
    """The name of a vector that a field of the config asks for, and that must not be there otherwise."""
    name = next((tensors[suffix] for suffix in suffixes if suffix in tensors), None)
    if name is None and not is_on:
        return None
    if name is None:
        raise MalformedAdapter(
            f'field "{field}" is on, but the file has no {suffixes[0]} for "{site.path}". '
            "The file is incomplete; save or upload the adapter again.",
            field=field,
            value=True,
        )
    if not is_on:
        raise UnsupportedAdapter(
            f'tensor "{name}" belongs to {_FEATURES[field]}, and field "{field}" is off; PEFT would drop it in '
            "silence. Switch the field on, or remove the tensor.",
            tensor=name,
        )
    if header[name].dtype not in FLOAT_DTYPES:
        raise MalformedAdapter(
            f'tensor "{name}" has dtype {header[name].dtype}; save the adapter in a floating-point type.', tensor=name
        )
    _require_size(site, name, list(header[name].shape), [size])
    return name


def _require_size(site: Site, name: str, got: list[int], expected: list[int]) -> None:
    if got == expected:
        return
    raise BaseMismatch(
        f'tensor "{name}" has shape {got}; "{site.path}" of this base needs {expected}. '
        "Use the base that the adapter was trained on.",
        tensor=name,
    )


def _divided(site: Site, name: str, size: int, divisor: int, field: str) -> int:
    if size % divisor:
        _refuse_division(site, name, divisor, field)
    return size // divisor


def _refuse_division(site: Site, name: str, divisor: int, field: str) -> NoReturn:
    raise MalformedAdapter(
        f'field "{field}" asks for {divisor} equal parts of "{site.path}", whose sizes (rank included) cannot be '
        "divided so. Use the base that the adapter was trained on.",
        field=field,
        value=divisor,
        tensor=name,
    )


def _refuse_other_sides(tensors: Mapping[str, str], sides: tuple[str, str], site: Site) -> None:
    for suffix in (DOWN, UP, EMBEDDING_DOWN, EMBEDDING_UP):
        if suffix in tensors and suffix not in sides:
            raise BaseMismatch(
                f'tensor "{tensors[suffix]}" is no factor of a module that is a {site.kind}, as "{site.path}" of this '
                "base is. Use the base that the adapter was trained on.",
                tensor=tensors[suffix],
            )


def _refuse_on_embedding(config: LoraConfig, name: str) -> None:
    on = {
        "lora_bias": config.has_bias,
        "use_bdlora": config.blocks is not None,
        "use_qalora": config.pool > 1,
        "kasa_config": config.has_diagonal,
        "alora_invocation_tokens": bool(config.invocation_tokens),
    }
    field = next((field for field, is_on in on.items() if is_on), None)
    if field is not None:
        raise UnsupportedAdapter(
            f'tensor "{name}" adapts an embedding, where field "{field}" has no meaning in PEFT. '
            "Leave the embedding out of target_modules.",
            field=field,
            value=True,
            tensor=name,
        )
