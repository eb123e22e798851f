"""`veneer adapters pull` against a real server that fetches from a Hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.library.sources.policy import SourcePolicy
from server.library.sources.puller import Puller
from tests.api.fake_server import FakeServer
from tests.library.loopback_hub import LoopbackHub, Repo
from tests.library.source_samples import adapter_files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LoopbackHub({"org/sql": Repo(adapter_files(), token="hf_right")}) as running:
        yield running


@pytest.fixture
def url(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    open_source = Puller.__init__

    def aimed(puller: Puller, library: object, policy: object) -> None:
        open_source(puller, library, SourcePolicy(hub_endpoint=hub.url))  # type: ignore[arg-type]

    monkeypatch.setattr(Puller, "__init__", aimed)
    with FakeServer(tmp_path / "store") as running:
        yield running.url


def veneer(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["adapters", "pull", *arguments], env=environment)


def test_a_pull_says_what_came_from_where(url: str, hub: LoopbackHub) -> None:
    done = veneer("sql", "org/sql@v2", "--url", url, VENEER_SOURCE_TOKEN="hf_right")
    assert done.exit_code == 0
    assert f"sql@1 is ready: {sum(map(len, list(adapter_files().values())[:2])):,} bytes" in done.stdout
    assert f"from hf://org/sql at {hub.repos['org/sql'].commit}" in done.stdout
    assert "hf_right" not in done.output
    again = veneer("sql", "org/sql", "--url", url, "--json", "--token", "hf_right", "--alias", "prod")
    assert json.loads(again.stdout)["version"] == 1


def test_a_dry_run_keeps_nothing(url: str) -> None:
    done = veneer("sql", "org/sql", "--url", url, "--token", "hf_right", "--dry-run")
    assert (done.exit_code, "sql would be taken" in done.stdout) == (0, True)
    assert json.loads(CliRunner().invoke(app, ["adapters", "list", "--url", url, "--json"]).stdout) == []


def test_exit_codes_and_reasons(url: str) -> None:
    for source, words in (("org/sql", "or it is private"), ("nonsense", "a source is"), ("/etc", "--adapter-roots")):
        done = veneer("sql", source, "--url", url)
        assert (done.exit_code, words in done.stderr) == (1, True), source
        assert done.stdout == ""
    assert veneer("sql", "org/sql", "--url", "http://127.0.0.1:9").exit_code == 3
