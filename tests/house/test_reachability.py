"""No module lies around unused: each is reached from something that is started, by imports outside of tests."""

from __future__ import annotations

from tests.house.layers import imports_of
from tests.house.tracked import ROOT, tracked_files

PACKAGES = ("server/", "peft_core/", "adapters_store/")
STARTED = (
    "server.__main__",  # the command
    "server.engine.worker",  # a process of its own, which builds its engine with
    "server.engine.assembly",  # by name
    "server.engine.local",  # the same door for programs that want no second process
    "server.loader.worker",  # a process of its own
    "server.convert.pickle_child",  # a process of its own, for one file
    "server.demo.train",  # how the built-in base and its adapters were made
    "server.demo.evaluate",  # how they are judged
)


def unreached(sources: dict[str, str], started: tuple[str, ...]) -> list[str]:
    """Modules (dotted name -> source) that no chain of imports leads to from the started ones."""
    reached: set[str] = set()
    waiting = list(started)
    while waiting:
        module = waiting.pop()
        if module in reached or module not in sources:
            continue
        reached.add(module)
        for _, name in imports_of(sources[module]):
            waiting += [name, name.rpartition(".")[0]]
    return sorted(set(sources) - reached)


def modules() -> dict[str, str]:
    """Dotted name -> source of all modules; a package stands for its `__init__.py`, if that holds anything."""
    paths = [path for path in tracked_files("*.py") if path.startswith(PACKAGES)]
    named = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in paths}
    sources = {name: (ROOT / path).read_text() for name, path in named.items()}
    return {name: source for name, source in sources.items() if source.strip()}


def test_every_module_is_reached_from_something_that_is_started() -> None:
    assert unreached(modules(), STARTED) == []


def test_everything_that_is_started_exists() -> None:
    assert [module for module in STARTED if module not in modules()] == []


def test_a_module_that_nobody_imports_is_found() -> None:
    sources = {"a": "from b import thing\n", "b": "def late():\n    import c\n", "c": "", "d": "import a\n"}
    assert unreached(sources, ("a",)) == ["d"]
