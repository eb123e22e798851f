"""Who asks for what, and when: the request streams that the benchmarks replay.

A workload is plain numbers: arrival time, adapter, prompt and output length. It holds no text and knows no server;
the token ids of a prompt follow from the workload's seed and the request's index (`prompt_tokens`).

Four families, each written from its definition, so that published configurations can be replayed exactly:

    s_lora   Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters" (MLSys 2024), its trace generator
    punica   Chen et al., "Punica: Multi-Tenant LoRA Serving" (MLSys 2024), its text generation benchmark
    zipf     popularity by a true Zipf law, lognormal lengths, Poisson arrivals
    mixed    what breaks a server: short beside long, ranks and targets that differ, one neighbour of 4,096 tokens

Running example: s_lora(num_adapters=4, duration_s=1.0, rate=2.0) is two requests on adapters 1 and 3 of 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

BASE = -1  # the adapter of a request that wants none

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGET_SETS = (ALL_LINEAR, ATTENTION, ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"))

S_LORA_SEED = 42
PUNICA_SEED = 0xABCDABCD987


@dataclass(frozen=True, slots=True)
class AdapterShape:
    rank: int
    targets: tuple[str, ...] = ALL_LINEAR


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; its output length is exact, since the end-of-sequence token is ignored."""

    arrival_s: float  # since the start of the workload
    adapter: int  # index into the workload's adapters, or BASE
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    adapters: tuple[AdapterShape, ...]
    arrivals: tuple[Arrival, ...]  # by arrival time
    seed: int

    @property
    def num_tokens(self) -> int:
        """Tokens that must be computed: every prompt token, every output token but the last."""
        return sum(one.num_prompt_tokens + one.num_output_tokens - 1 for one in self.arrivals)

    @property
    def max_len(self) -> int:
        return max(one.num_prompt_tokens + one.num_output_tokens for one in self.arrivals)

    def prompt_tokens(self, index: int, vocab_size: int) -> list[int]:
        """Random token ids; the first 16 ids are left to special tokens. Prompts share no prefix."""
        rng = np.random.default_rng((self.seed, index))
        return [int(token) for token in rng.integers(16, vocab_size, self.arrivals[index].num_prompt_tokens)]

    def head(self, num_requests: int) -> Workload:
        return replace(self, arrivals=self.arrivals[:num_requests])


def s_lora(
    *,
    num_adapters: int,
    alpha: float = 1.0,
    rate: float = 2.0,
    cv: float = 1.0,
    duration_s: float = 300.0,
    input_range: tuple[int, int] = (8, 512),
    output_range: tuple[int, int] = (8, 512),
    ranks: tuple[int, ...] = (8,),
    seed: int = S_LORA_SEED,
) -> Workload:
    """S-LoRA's trace, bit for bit.

    Popularity is P(i) = ((i + 1) / n)^alpha - (i / n)^alpha: uniform at alpha 1, and the smaller alpha, the more
    requests go to adapter 0. Gaps come from one global Gamma process of mean 1 / rate; cv 1 is Poisson. The draws
    come from one legacy stream, in this order. Ranges exclude their upper end; ranks go round robin; adapters
    change attention only. With no adapters every request is the base's.
    """
    stream = np.random.RandomState(seed)
    total = int(rate * duration_s)
    adapters = (stream.power(alpha, total) * num_adapters).astype(int)
    inputs = stream.randint(input_range[0], input_range[1], total)
    outputs = stream.randint(output_range[0], output_range[1], total)
    arrivals = np.cumsum(stream.gamma(1 / (cv * cv), cv * cv / rate, total))
    shapes = tuple(AdapterShape(ranks[index % len(ranks)], ATTENTION) for index in range(num_adapters))
    if not num_adapters:
        adapters = np.full(total, BASE)
    return _workload("s_lora", shapes, arrivals, adapters, inputs, outputs, seed)


def punica(
    num_requests: int = 1024, popularity: str = "zipf:1.5", max_len: int = 2048, rank: int = 16, adapters: bool = True
) -> Workload:
    """Punica's text generation requests, bit for bit; all are there from the start, served first come first served.

    Prompts are lognormal (sigma 0.8, shifted by -1, scale 18); the total is uniform below max_len, at least two more
    than the prompt. Both stay fractions until the end, so lengths are cut, not rounded.
    """
    rng = np.random.Generator(np.random.PCG64(seed=PUNICA_SEED))
    prompts, outputs = np.empty(num_requests), np.empty(num_requests)
    for index in range(num_requests):
        prompts[index] = min(max(1.0, -1.0 + 18.0 * math.exp(0.8 * rng.standard_normal())), max_len - 2)
        outputs[index] = max(prompts[index] + 2, rng.integers(0, max_len)) - prompts[index]
    shares = punica_shares(num_requests, popularity)
    ids = np.repeat(np.arange(len(shares)), shares)
    np.random.Generator(np.random.PCG64(seed=PUNICA_SEED)).shuffle(ids)
    shapes = tuple(AdapterShape(rank) for _ in shares) if adapters else ()
    ids = ids if adapters else np.full(num_requests, BASE)
    times = np.zeros(num_requests)
    return _workload("punica", shapes, times, ids, prompts.astype(int), outputs.astype(int), PUNICA_SEED)


def punica_shares(num_requests: int, popularity: str) -> list[int]:
    """How many requests each adapter gets; there are as many adapters as entries.

    distinct: one each. identical: one adapter. uniform: about sqrt(n) adapters. zipf:A: a geometric series of ratio
    A, whole parts (Punica calls it Zipf; it is no Zipf law).

    Raises:
        ValueError: no such popularity.
    """
    if popularity == "identical":
        return [num_requests]
    if popularity == "distinct":
        return [1] * num_requests
    if popularity == "uniform":
        number = math.ceil(math.sqrt(num_requests))
        shares = [num_requests // number] * number
        return [share + (index < num_requests - sum(shares)) for index, share in enumerate(shares)]
    kind, _, ratio = popularity.partition(":")
    if kind != "zipf" or not ratio or float(ratio) <= 1:
        raise ValueError(f"popularity {popularity!r} is none of distinct, identical, uniform and zipf:RATIO above 1")
    shares, share = [], 1.0
    while sum(shares) + int(share) < num_requests:
        shares.append(int(share))
        share *= float(ratio)
    return sorted([*shares, num_requests - sum(shares)], reverse=True)


def zipf_probabilities(num_adapters: int, exponent: float) -> NDArray[np.float64]:
    """P(i) proportional to (i + 1)^-exponent."""
    weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def zipf(
    *, num_adapters: int, num_requests: int, rate: float, exponent: float = 1.0, rank: int = 16, seed: int = 0
) -> Workload:
    """A true Zipf law over adapters, lognormal lengths (medians 120 and 60 tokens), Poisson arrivals."""
    rng = np.random.default_rng(seed)
    adapters = rng.choice(num_adapters, num_requests, p=zipf_probabilities(num_adapters, exponent))
    prompts = lognormal_lengths(rng, num_requests, median=120.0, sigma=0.9, least=8, most=1500)
    outputs = lognormal_lengths(rng, num_requests, median=60.0, sigma=0.6, least=8, most=200)
    shapes = tuple(AdapterShape(rank) for _ in range(num_adapters))
    arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
    return _workload("zipf", shapes, arrivals, adapters, prompts, outputs, seed)


def mixed(
    *, num_requests: int = 160, rate: float = 8.0, num_adapters: int = 40, neighbour_tokens: int = 4096, seed: int = 0
) -> Workload:
    """Prompts of 8 to 1,500 and outputs of 8 to 200 tokens (lognormal), Poisson arrivals, Zipf(1.0) over adapters of
    ranks 4, 8, 16 and 64 with four sets of targets, and in the middle one prompt of `neighbour_tokens` tokens."""
    rng = np.random.default_rng(seed)
    ranks = (4, 8, 16, 64)
    shapes = tuple(AdapterShape(ranks[index % 4], TARGET_SETS[index // 4 % 4]) for index in range(num_adapters))
    adapters = rng.choice(num_adapters, num_requests, p=zipf_probabilities(num_adapters, 1.0))
    prompts = lognormal_lengths(rng, num_requests, median=120.0, sigma=1.1, least=8, most=1500)
    outputs = lognormal_lengths(rng, num_requests, median=50.0, sigma=0.8, least=8, most=200)
    arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
    middle = num_requests // 2
    prompts[middle], outputs[middle] = neighbour_tokens, 64
    return _workload("mixed", shapes, arrivals, adapters, prompts, outputs, seed)


def uniform_twin(workload: Workload, rank: int = 16) -> Workload:
    """The same number of requests at the same times, all of the mean lengths, adapters alike and equally popular."""
    arrivals, number = workload.arrivals, len(workload.adapters)
    prompt = round(sum(one.num_prompt_tokens for one in arrivals) / len(arrivals))
    output = round(sum(one.num_output_tokens for one in arrivals) / len(arrivals))
    twins = tuple(Arrival(one.arrival_s, index % number, prompt, output) for index, one in enumerate(arrivals))
    shapes = tuple(AdapterShape(rank) for _ in workload.adapters)
    return Workload(f"{workload.name}, uniform twin", shapes, twins, workload.seed)


def lognormal_lengths(
    rng: np.random.Generator, number: int, *, median: float, sigma: float, least: int, most: int
) -> NDArray[np.int64]:
    """Whole lengths; what falls outside is drawn again, so that no length is piled up at the ends."""
    lengths = np.zeros(number, dtype=np.int64)
    missing = np.arange(number)
    while missing.size:
        lengths[missing] = rng.lognormal(math.log(median), sigma, len(missing)).astype(np.int64)
        missing = np.flatnonzero((lengths < least) | (lengths > most))
    return lengths


def _workload(
    name: str,
    shapes: tuple[AdapterShape, ...],
    times: NDArray[np.float64],
    adapters: NDArray[np.int64],
    prompts: NDArray[np.int64],
    outputs: NDArray[np.int64],
    seed: int,
) -> Workload:
    columns = zip(times.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return Workload(name, shapes, tuple(Arrival(*row) for row in columns), seed)
