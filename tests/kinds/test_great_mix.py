"""Adapters of more than twenty kinds and the bare base in one running engine that is short of everything.

Prompts of very different lengths are computed in small chunks, the pool is too small for all sequences at once, so that
some are preempted, and prompts that begin alike find each other's blocks. Every answer equals what the library that
wrote the adapter gives alone: HF PEFT, or AdapterHub as its goldens tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.request import AdapterTicket
from tests.adapterhub_goldens import Golden, assert_is_the_library_s, golden_model, read_golden
from tests.kinds.served import Served, serve_every_kind
from tests.kinds.zoo import INVOCATION
from tests.tiny_engine import Answer, Ask
from tests.tiny_models import random_prompt

KINDS = (
    "lora", "rslora", "lora-bias", "lora-norms", "lora-embedding", "lora-head", "lora-tables", "lora-tokens", "dora",
    "pissa", "alora", "adalora", "ia3", "loha", "lokr", "vera", "vblora", "hra", "oft", "road", "c3a", "ln-tuning",
    "trainable-tokens", "prefix", "prompt", "p-tuning", "multitask", "cpt",
)  # fmt: skip
HUB_ADAPTERS = ("prefix", "mam", "double_seq_bn", "par_bn", "compacter", "ia3", "dora")
LENGTHS = (3, 20, 45, 70)
CHUNK = 16


class Mix(NamedTuple):
    served: Served
    goldens: dict[str, Golden]
    hub: dict[str, AdapterTicket]
    num_tokens: int

    def ask(self, name: str, what: str, length: int, seed: int) -> Ask:
        """`what` is a kind, "base", or "hub/" and the name of a golden, which brings its own prompt."""
        if what.startswith("hub/"):
            golden = self.goldens[what.removeprefix("hub/")]
            return Ask(name, golden.prompt, self.hub[golden.name], len(golden.answer))
        prompt = random_prompt(length, seed=seed)
        if what == "alora" and length >= 2 * CHUNK:
            prompt[2 * CHUNK - 1 : 2 * CHUNK + 2] = INVOCATION  # begins in one chunk and ends in the next
        return self.served.ask(what, prompt, name=name, num_tokens=self.num_tokens)

    def check(self, what: str, ask: Ask, answer: Answer) -> None:
        if what.startswith("hub/"):
            assert_is_the_library_s(self.goldens[what.removeprefix("hub/")], answer)
        else:
            self.served.check(what, ask, answer)


def make_mix(directory: Path, pool_bytes: int, num_tokens: int) -> Mix:
    served = serve_every_kind(
        "llama",
        directory,
        kinds=KINDS,
        model=golden_model("llama"),
        chunk_size=CHUNK,
        pool_bytes=pool_bytes,
        max_num_seqs=32,
    )
    assert not served.refused, {kind: error.message for kind, error in served.refused.items()}
    goldens = {name: read_golden("llama", name) for name in HUB_ADAPTERS}
    hub = {name: served.engine.add(f"hub-{name}", goldens[name].directory) for name in HUB_ADAPTERS}
    return Mix(served, goldens, hub, num_tokens)


EVERYTHING = (*KINDS, *(f"hub/{name}" for name in HUB_ADAPTERS))


def test_many_kinds_share_an_engine_that_is_short_of_memory(tmp_path: Path) -> None:
    mix = make_mix(tmp_path, pool_bytes=1_450_000, num_tokens=48)
    asks: dict[str, tuple[str, Ask]] = {}
    for round_ in range(2):
        for index, what in enumerate([*EVERYTHING, "base", "base"]):
            name = f"{what}-{index}-{round_}"
            asks[name] = (what, mix.ask(name, what, LENGTHS[index % len(LENGTHS)], seed=index))
    for twin in range(6):  # each waits until there is room, and then finds what the one before it computed
        asks[f"twin-{twin}"] = ("prompt", mix.ask(f"twin-{twin}", "prompt", LENGTHS[-1], seed=77))
    answers = mix.served.engine.run([ask for _, ask in asks.values()])
    for name, (what, ask) in asks.items():
        mix.check(what, ask, answers[name])
    stats = mix.served.engine.engine.stats()
    assert mix.served.engine.most_adapters >= 16  # how many exactly depends on how fast they are read
    assert stats.total_preemptions > 0, "the pool was large enough for all"
    assert sum(answer.num_cached_tokens for answer in answers.values()) > 0, "no prompt found another's blocks"


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Mix:
    return make_mix(tmp_path_factory.mktemp("roomy"), pool_bytes=48 << 20, num_tokens=6)


def test_more_than_24_adapters_share_a_step(roomy: Mix) -> None:
    for _ in range(2):  # the second time all of them are there
        asks = {what: roomy.ask(f"all-{what}", what, LENGTHS[2], seed=index) for index, what in enumerate(EVERYTHING)}
        answers = roomy.served.engine.run(asks.values())
    assert roomy.served.engine.most_adapters >= 24
    for what, ask in asks.items():
        roomy.check(what, ask, answers[ask.name])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wishes=st.lists(
        st.tuples(st.sampled_from((*EVERYTHING, "base")), st.sampled_from(LENGTHS[:3]), st.integers(0, 3)),
        min_size=2,
        max_size=14,
    ),
    stagger_steps=st.integers(0, 3),
    salt=st.integers(0, 2**30),
)
def test_any_subset_in_any_order_at_any_time(
    roomy: Mix, wishes: list[tuple[str, int, int]], stagger_steps: int, salt: int
) -> None:
    asks = {f"{salt}-{index}": (what, roomy.ask(f"{salt}-{index}", what, length, seed))
            for index, (what, length, seed) in enumerate(wishes)}  # fmt: skip
    answers = roomy.served.engine.run([ask for _, ask in asks.values()], stagger_steps=stagger_steps)
    for name, (what, ask) in asks.items():
        roomy.check(what, ask, answers[name])
