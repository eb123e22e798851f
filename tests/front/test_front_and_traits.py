"""What an adapter asks of the front: a task, room for its virtual tokens, tokens of its own."""

from __future__ import annotations

import pytest

from server.front.errors import InvalidRequest, PromptTooLong
from server.front.text import TextRequest
from tests.front.test_front import answer, ask, house, run


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(task_id=1), "the base model has no tasks"),
        (ask(adapter="sql", task_id=0), "'sql' has no tasks; leave it out"),
        (ask(adapter="tasks"), "say which with task_id, 0 to 2"),
        (ask(adapter="tasks", task_id=3), "task_id is 3; .*0 to 2"),
        (ask(adapter="tasks", task_id=-1), "task_id is -1"),
    ],
)
def test_a_task_is_named_where_there_are_tasks_and_nowhere_else(request_: TextRequest, words: str) -> None:
    async def scene() -> None:
        async with house() as at:
            with pytest.raises(InvalidRequest, match=words):
                await at.front.open(request_)
            _, finish, _ = await answer(at.front, ask(adapter="tasks", task_id=2))
            assert finish.num_generated == 5

    run(scene())


def test_virtual_tokens_take_room_and_are_not_counted() -> None:
    async def scene() -> None:
        async with house("fake max_model_len=20") as at:
            _, finish, _ = await answer(at.front, ask("xxxx", 2**20, adapter="prompted", fit_length=True))
            assert (finish.num_prompt_tokens, finish.num_generated) == (4, 6)
            assert at.front.metrics.adapters["sql"].num_prompt_tokens == 4
            with pytest.raises(PromptTooLong, match=r"10 of which the adapter takes. Ask for at most 6"):
                await at.front.open(ask("xxxx", 7, adapter="prompted"))
            with pytest.raises(PromptTooLong, match="at most 9 tokens"):
                await at.front.open(ask("x" * 10, 1, adapter="prompted"))

    run(scene())


def test_an_adapter_with_tokens_of_its_own_reads_and_tells_them() -> None:
    async def scene() -> None:
        async with house() as at:
            _, finish, _ = await answer(at.front, ask("<|new|>A<more>", adapter="wide", num_tokens=2))
            assert finish.num_prompt_tokens == 3
            text, _, _ = await answer(at.front, ask("A<more>", 1, adapter="wide", echo=True))
            assert text.startswith("A<more>")
            _, finish, _ = await answer(at.front, ask("<|new|>A<more>", num_tokens=2))
            assert finish.num_prompt_tokens == 14  # letters of the base
            with pytest.raises(InvalidRequest, match="ids are 0 to 299"):
                await at.front.open(ask((301,)))
            with pytest.raises(InvalidRequest, match="ids are 0 to 301"):
                await at.front.open(ask((302,), adapter="wide"))

    run(scene())
