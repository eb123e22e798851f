"""`task_id` in a native body."""

from __future__ import annotations

from tests.api.conftest import Door, Visit


def test_a_task_is_handed_on_from_either_place_and_two_are_refused(visit: Visit) -> None:
    async def test(door: Door) -> None:
        assert (await door.generate(task_id=2)).status_code == 200
        assert (await door.generate(parameters={"task_id": 3})).status_code == 200
        assert (await door.generate(task_id=0, parameters={"task_id": 0})).status_code == 200
        assert (await door.generate()).status_code == 200
        assert [request.task_id for request in door.front.requests] == [2, 3, 0, None]
        for body in ({"task_id": 1, "parameters": {"task_id": 2}}, {"task_id": -1}, {"task_id": "1"}, {"task_id": 1.5}):
            refused = await door.generate(**body)
            assert refused.status_code == 422
            assert "task" in refused.json()["error"]

    visit(test)
