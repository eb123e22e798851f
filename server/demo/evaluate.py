"""Judge a running server: `python -m server.demo.evaluate --url http://127.0.0.1:8000`.

Every adapter and the base answer held-out questions, all interleaved in one concurrent
load, so each step of the engine mixes them. Every answer goes through every judge. Prints
the confusion matrix and exits 1 when the demo does not keep its promise:
at least 95 % of each speaker's answers right, at most 5 % of the base's in any voice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from server.demo import ADAPTER_REGISTERS
from server.demo.confusion import Confusion
from server.demo.corpus import Question, questions
from server.demo.registers import PLAIN
from server.demo.visitor import Visitor

BASE = "base"  # the speaker's name in the matrix; no adapter
SPEAKERS = {BASE: PLAIN} | ADAPTER_REGISTERS  # speaker -> the register it should use
QUESTIONS_SEED = 90_210
MAX_NEW_TOKENS = 160
NUM_CONNECTIONS = 64


class Task(NamedTuple):
    speaker: str
    question: Question


def tasks(num_each: int, speakers: Mapping[str, str] = SPEAKERS) -> list[Task]:
    """`num_each` questions for every speaker, speakers taking turns; no question comes twice."""
    drawn = iter(questions(QUESTIONS_SEED, num_each * len(speakers)))
    return [Task(speaker, next(drawn)) for _ in range(num_each) for speaker in speakers]


def evaluate(visitor: Visitor, num_each: int, speakers: Mapping[str, str] = SPEAKERS) -> Confusion:
    """Ask everything at once, greedily, and judge every answer."""
    todo = tasks(num_each, speakers)

    def answer(task: Task) -> str:
        adapter = None if task.speaker == BASE else task.speaker
        return visitor.generate(task.question.prompt, adapter, max_new_tokens=MAX_NEW_TOKENS)

    confusion = Confusion()
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        for task, text in zip(todo, pool.map(answer, todo), strict=True):
            confusion.add(task.speaker, speakers[task.speaker], task.question.recipe, text)
    return confusion


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.demo.evaluate", description="Judge the demo's answers.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server answers")
    parser.add_argument("--num-each", type=int, default=50, metavar="N", help="questions for each speaker")
    args = parser.parse_args()
    confusion = evaluate(Visitor(args.url), args.num_each)
    print(confusion)
    for fault in confusion.faults:
        print(fault)
    broken = confusion.broken(SPEAKERS)
    sys.exit("\n".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
