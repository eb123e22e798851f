"""What the README shows works as it is pasted, and its tables are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.demo import ADAPTERS_DIR
from server.flags import read_settings, settings_table
from tests.house.readme_blocks import Block, blocks_of, unaccounted
from tests.house.tracked import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = blocks_of(README)
ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):8000")
START_SECONDS = 120


def those(way: str) -> list[object]:
    return [pytest.param(block, id=f"line{block.line}") for block in BLOCKS if block.way == way]


def environment(folder: Path) -> dict[str, str]:
    """This environment's `veneer` and `python` first, and a home of its own."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder / "data"),
    }


def execute(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as pasted; a curl whose answer is an error fails, which the plain command would hide."""
    if block.language.startswith("py"):
        command = [sys.executable, "-c", block.text]
    else:
        strict = 'set -euo pipefail\ncurl() { command curl --silent --show-error --fail-with-body "$@"; }\n'
        command = ["bash", "-c", strict + block.text]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a server started as `make serve` starts it, stopped as Ctrl-C or an orchestrator stops it."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    offline = environment(folder) | {"HF_HUB_OFFLINE": "1", "VENEER_NUM_THREADS": "1"}
    with log.open("w") as sink:
        server = subprocess.Popen(command, cwd=ROOT, env=offline, stdout=sink, stderr=subprocess.STDOUT)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", server, log)
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=60)
    assert status == 0, f"the server ended with status {status}:\n{log.read_text()}"


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server did not start:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no healthy server after {START_SECONDS} s:\n{log.read_text()}")


def test_every_block_says_how_it_is_run() -> None:
    assert unaccounted(BLOCKS) == []
    assert {block.way for block in BLOCKS} >= {"targets", "served"}


@pytest.mark.parametrize("block", those("as is"))
def test_a_block_runs_as_pasted(block: Block, tmp_path: Path) -> None:
    run = execute(block, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("block", those("served"))
def test_a_block_runs_as_pasted_while_the_server_answers(block: Block, address: str, tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS_DIR / "pirate", tmp_path / "my-adapter")  # the adapter of the reader's own
    run = execute(block._replace(text=ADDRESS.sub(address, block.text)), tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()


def test_a_block_that_asks_for_an_unknown_adapter_fails(address: str, tmp_path: Path) -> None:
    text = f'curl {address}/generate -d \'{{"inputs": "x", "adapter": "nobody"}}\'\n'
    run = execute(Block(1, "sh", text, "served"), tmp_path)
    assert run.returncode != 0


def make_targets(text: str) -> list[str]:
    """The targets that lines like `make serve ARGS=...   # remark` name."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    words = [word for line in lines if "make" in line for word in line[line.index("make") + 1 :]]
    return [word for word in words if "=" not in word and not word.startswith("-")]


def knows_target(target: str) -> bool:
    return subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("block", those("targets"))
def test_the_targets_of_a_block_exist(block: Block) -> None:
    targets = make_targets(block.text)
    assert targets
    assert [target for target in targets if not knows_target(target)] == []


def test_a_target_that_does_not_exist_is_found() -> None:
    assert make_targets("PYTHON=python3.12 make serve ARGS='--port 1'  # make it so\n") == ["serve"]
    assert not knows_target("no-such-target")


@pytest.mark.parametrize("block", those("flags"))
def test_the_flags_of_a_block_are_read_by_the_real_parser(block: Block) -> None:
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("veneer serve")]
    assert commands
    for command in commands:
        read_settings(command[2:], {})


def test_the_table_of_settings_is_the_one_that_the_code_writes() -> None:
    table = re.search(r"<!-- settings -->\n+(.*?)\n+<!-- /settings -->", README, re.DOTALL)
    assert table, "README.md has no <!-- settings --> ... <!-- /settings -->"
    assert table[1] == settings_table(), "run: python -m tests.house.settings_in_readme"


def test_blocks_are_read_with_their_ways() -> None:
    text = "<!-- run: served -->\n\n```sh\ncurl x\n```\n\nprose\n\n```python\nprint(1)\n```\n```text\nhi\n```\n"
    blocks = blocks_of(text)
    assert [(block.line, block.language, block.way) for block in blocks] == [
        (3, "sh", "served"),
        (9, "python", None),
        (12, "text", None),
    ]
    assert len(unaccounted(blocks)) == 1


def test_a_block_that_is_never_closed_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 1 is never closed"):
        blocks_of("```sh\ncurl x\n")
