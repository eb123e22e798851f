"""Row-wise kernels against the reference, on poisoned memory, for every popularity of adapters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from peft_core.batch import RowAdapters, Segment
from peft_core.errors import MalformedAdapter
from peft_core.forms import AdapterForms, LinearDelta
from peft_core.image import IMAGE_ALIGNMENT_BYTES, pack, unpack
from peft_core.kernels.gathers import GatherBuilder
from peft_core.kernels.reference import ReferenceKernels
from peft_core.kernels.rowwise import RowwiseKernels
from peft_core.residency import Residency
from peft_core.sites import site_groups, up_tile
from peft_core.spec import BaseModelSpec, Site

RANKS = (1, 2, 3, 4, 8, 15, 16, 17, 24, 33, 64, 256)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

WIDTHS = {"q": (48, 64), "k": (48, 32), "v": (48, 32), "o": (64, 48), "head": (48, 101)}


def make_spec(**values: object) -> BaseModelSpec:
    sites = {
        path: Site(path, "head" if path == "head" else "linear", *size, has_bias=False, transposed=False)
        for path, size in WIDTHS.items()
    }
    plain = {"model_type": "t", "hidden_size": 48, "num_layers": 1, "vocab_size": 101, "max_position": 64,
             "tie_word_embeddings": False, "fingerprint": "f", "other_modules": ()}  # fmt: skip
    return BaseModelSpec(**{**plain, "sites": sites, "input_groups": (("q", "k", "v"),), **values})  # type: ignore[arg-type]


SPEC = make_spec()


def make_forms(rank: int, seed: int, paths: tuple[str, ...] = tuple(WIDTHS)) -> AdapterForms:
    generator = torch.Generator().manual_seed(seed)
    linear = {}
    for path in paths:
        in_features, out_features = WIDTHS[path]
        down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        linear[path] = LinearDelta(down, torch.randn(out_features, rank, generator=generator) / rank**0.5)
    return AdapterForms(linear)


@dataclass
class Bench:
    residency: Residency
    poison: torch.Tensor


def bench(forms: list[AdapterForms], dtype: str = "float32") -> Bench:
    """All adapters resident in a pool that is NaN wherever no adapter lies."""
    images = [pack(form, SPEC, dtype) for form in forms]
    sizes = [-(-image.num_bytes // IMAGE_ALIGNMENT_BYTES) * IMAGE_ALIGNMENT_BYTES for image in images]
    pool = torch.full((sum(sizes) + 4096,), 0xFF, dtype=torch.uint8)
    residency = Residency(pool, site_groups(SPEC), up_tile(SPEC), dtype)
    offset = 1024
    for slot, (image, size) in enumerate(zip(images, sizes, strict=True)):
        pool[offset : offset + image.num_bytes] = image.payload.view(torch.uint8)
        residency.bind(slot, image.header, offset)
        offset += size
    return Bench(residency, pool)


def slots_by_popularity(popularity: str, num_rows: int, num_adapters: int) -> np.ndarray:
    random = np.random.default_rng(3)
    if popularity == "distinct":
        return np.arange(num_rows) % num_adapters
    if popularity == "identical":
        return np.zeros(num_rows, np.int64)
    if popularity == "uniform":
        return random.integers(0, num_adapters, num_rows)
    if popularity == "zipf":
        return np.minimum(random.zipf(1.5, num_rows) - 1, num_adapters - 1)
    return np.where(random.random(num_rows) < 0.9, 0, random.integers(0, num_adapters, num_rows))


def compare(residency: Residency, rows: RowAdapters, dtype: torch.dtype) -> float:
    """Largest difference from the reference over all groups, relative to the largest output."""
    fast, reference = RowwiseKernels(residency), ReferenceKernels(residency)
    worst = 0.0
    for group in residency.groups:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(rows.num_rows, group.in_features, generator=generator).to(dtype)
        y = torch.randn(rows.num_rows, sum(group.out_features), generator=generator).to(dtype)
        expected = y.float().clone()
        reference.apply(group, x, expected, reference.prepare(rows, is_head=group.is_head))
        fast.apply(group, x, y, fast.prepare(rows, is_head=group.is_head))
        worst = max(worst, float((y.float() - expected).abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical", "skewed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_rows_equal_the_reference(popularity: str, dtype: torch.dtype) -> None:
    forms = [make_forms(rank, seed) for seed, rank in enumerate(RANKS)]
    residency = bench(forms, str(dtype).removeprefix("torch.")).residency
    slots = slots_by_popularity(popularity, 23, len(RANKS)).astype(np.int64)
    rows = RowAdapters(30, np.arange(4, 27), slots, np.ones(23, np.float32))
    assert compare(residency, rows, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rank", RANKS)
def test_wide_segments_of_any_rank_equal_the_reference(rank: int) -> None:
    residency = bench([make_forms(rank, 1), make_forms(4, 2)]).residency
    segments = [Segment(0, 9, 0), Segment(9, 20, 1, 0.5), Segment(20, 21, 0), Segment(25, 40, 0, -2.0)]
    rows = RowAdapters.from_segments(41, segments)
    assert len(rows.wide) == 3
    assert compare(residency, rows, torch.float32) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_one_length_equal_the_reference_whatever_their_ranks(dtype: torch.dtype) -> None:
    forms = [make_forms(3, 1), make_forms(40, 2), make_forms(8, 3, ("v", "o")), make_forms(16, 4)]
    residency = bench(forms, str(dtype).removeprefix("torch.")).residency
    segments = [Segment(12 * index, 12 * index + 12, index, 1.0 + index) for index in range(4)]
    segments += [Segment(60, 72, 0), Segment(72, 81, 1)]  # after a gap, then of another length
    assert compare(residency, RowAdapters.from_segments(90, segments), dtype) <= TOLERANCE[dtype]


def test_missing_members_and_groups_do_nothing() -> None:
    forms = [make_forms(8, 1, ("q", "v")), make_forms(3, 2, ("o",)), make_forms(5, 3, ("k", "head"))]
    residency = bench(forms).residency
    rows = RowAdapters(9, np.arange(9), np.arange(9) % 3, np.ones(9, np.float32))
    assert compare(residency, rows, torch.float32) <= TOLERANCE[torch.float32]


def test_rows_may_be_scattered_scaled_and_composed() -> None:
    residency = bench([make_forms(rank, rank) for rank in (2, 7, 16)]).residency
    narrow_rows = np.array([0, 3, 3, 3, 8, 9])  # row 3 is on three adapters
    scales = np.array([1.0, 0.5, -1.0, 2.0, 0.0, 1.0], np.float32)
    rows = RowAdapters(10, narrow_rows, np.array([0, 0, 1, 2, 1, 2]), scales)
    assert compare(residency, rows, torch.float32) <= TOLERANCE[torch.float32]


def test_a_float32_adapter_adds_to_a_bfloat16_output_before_rounding() -> None:
    residency = bench([make_forms(8, 1), make_forms(3, 2)]).residency
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    group = residency.groups[0]
    for narrow_rows in (np.arange(4), np.array([0, 2])):
        y = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
        rows = RowAdapters(4, narrow_rows, narrow_rows % 2, np.ones(len(narrow_rows), np.float32))
        expected = y.float()
        ReferenceKernels(residency).apply(group, x, expected, ReferenceKernels(residency).prepare(rows))
        kernels = RowwiseKernels(residency)
        kernels.apply(group, x, y, kernels.prepare(rows))
        one_step = expected.bfloat16().float().abs().max() * 2**-8
        assert (y.float() - expected.bfloat16().float()).abs().max() <= one_step


def test_a_wrong_slot_is_seen() -> None:
    residency = bench([make_forms(8, 1), make_forms(8, 2)]).residency
    rows = RowAdapters(3, np.arange(3), np.array([0, 1, 0]), np.ones(3, np.float32))
    wrong = RowAdapters(3, np.arange(3), np.array([0, 0, 0]), np.ones(3, np.float32))
    group = residency.groups[0]
    x, outputs = torch.ones(3, 48), []
    for choice in (rows, wrong):
        kernels = RowwiseKernels(residency)
        y = torch.zeros(3, 128)
        kernels.apply(group, x, y, kernels.prepare(choice))
        outputs.append(y)
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert (outputs[0][1] - outputs[1][1]).abs().max() > 0.1


def test_plans_are_kept_until_the_members_or_the_slot_change() -> None:
    made = bench([make_forms(8, 1), make_forms(4, 2)])
    residency = made.residency
    kernels = RowwiseKernels(residency)
    rows = RowAdapters(2, np.arange(2), np.array([0, 1]), np.ones(2, np.float32))
    for _ in range(3):
        kernels.prepare(rows)
    assert kernels.num_plans_built == 1
    residency.free(1)
    image = pack(make_forms(4, 9), SPEC, "float32")
    made.poison[1024 : 1024 + image.num_bytes] = image.payload.view(torch.uint8)
    residency.bind(1, image.header, 1024)
    kernels.prepare(rows)
    assert kernels.num_plans_built == 2


def test_a_plan_that_could_not_be_built_takes_the_kept_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would lie in the same buffers: memory that runs out half-way must not mix up who is who."""
    residency = bench([make_forms(8, seed) for seed in range(4)]).residency
    kernels, fresh = RowwiseKernels(residency), RowwiseKernels(residency)
    kept = RowAdapters(2, np.arange(2), np.array([0, 1]), np.ones(2, np.float32))
    other = RowAdapters(2, np.arange(2), np.array([2, 3]), np.ones(2, np.float32))
    kernels.prepare(kept)

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(GatherBuilder, "_scales", fails)
        with pytest.raises(MemoryError):
            kernels.prepare(other)
    group, x = residency.groups[0], torch.ones(2, 48)
    mine, expected = torch.zeros(2, 128), torch.zeros(2, 128)
    kernels.apply(group, x, mine, kernels.prepare(kept))
    fresh.apply(group, x, expected, fresh.prepare(kept))
    assert torch.equal(mine, expected)
    fresh.apply(group, x, expected.zero_(), fresh.prepare(other))  # negative control
    assert not torch.equal(mine, expected)


def test_resident_bytes_come_back() -> None:
    residency = bench([make_forms(8, 1), make_forms(4, 2)]).residency
    both = residency.num_bytes
    residency.free(0)
    assert residency.num_resident == 1
    assert residency.num_bytes == both - pack(make_forms(8, 1), SPEC, "float32").num_bytes
    assert residency.view(1, residency.groups[0])["q"].rank == 4


def test_packing_and_unpacking_give_the_same_matrices() -> None:
    forms = make_forms(17, 1, ("q", "v", "head"))
    back = unpack(pack(forms, SPEC, "float32"), SPEC)
    assert set(back.linear) == {"q", "v", "head"}
    for path, delta in forms.linear.items():
        assert torch.equal(delta.down, back.linear[path].down)
        assert torch.equal(delta.up, back.linear[path].up)


def test_a_weight_that_overflows_the_adapter_dtype_is_refused() -> None:
    forms = make_forms(4, 1, ("q",))
    forms.linear["q"].up[0, 0] = 1e20
    pack(forms, SPEC, "bfloat16")
    with pytest.raises(MalformedAdapter, match="q is not finite"):
        pack(forms, SPEC, "float16")


def test_an_image_for_another_dtype_or_base_is_refused() -> None:
    residency = bench([make_forms(4, 1)]).residency
    header = pack(make_forms(4, 1), SPEC, "bfloat16").header
    with pytest.raises(MalformedAdapter, match="dtype bfloat16"):
        residency.bind(1, header, 0)
    header = pack(make_forms(4, 1), SPEC, "float32").header
    header["sites"][0]["leader"] = "elsewhere"
    with pytest.raises(MalformedAdapter, match="elsewhere"):
        residency.bind(1, header, 0)
