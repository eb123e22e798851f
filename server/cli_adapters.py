"""`veneer adapters`: a running server's adapters from the command line; `inspect` and `convert` need no server.

Exit codes: 0 done, 1 the server said no, 2 wrong usage, 3 the server cannot be reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server import cli_inspect, cli_pull, cli_store
from server.cli_server import DEFAULT_URL, AsJson, Key, Url, ask
from server.library.directory import adapter_in

app = typer.Typer(help="The adapters of a running server; `inspect` and `convert` need none.", no_args_is_help=True)
app.command("inspect")(cli_inspect.inspect_adapter)
app.command("convert")(cli_inspect.convert_adapter)
app.command("pull")(cli_pull.pull)
cli_store.register(app)
AdapterName = Annotated[str, typer.Argument(metavar="NAME")]


@app.command("list")
def list_adapters(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False, prefix: str = "") -> None:
    """The registered adapters, and where they are."""
    found = ask(url, key, lambda client: client.list(prefix))
    if as_json:
        print(json.dumps(found))
        return
    print(f"{'NAME':32}{'VERSION':>8}  {'STATE':14}{'DEVICE':10}{'BYTES':>12}  ALIASES")
    for adapter in found:
        print(_line(adapter))


@app.command()
def show(name: AdapterName, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Everything about one adapter, as JSON."""
    print(json.dumps(ask(url, key, lambda client: client.show(name)), indent=2))


@app.command()
def push(
    name: AdapterName,
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="As PEFT's save_pretrained left it.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    alias: Annotated[str | None, typer.Option(help="An alias to point to the new version.")] = None,
    promote: Annotated[bool, typer.Option(help="Whether the bare name means the new version.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and keep nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter; a known name gets a new version, known content does not."""
    answer = ask(
        url,
        key,
        lambda client: client.push(name, adapter_in(directory), alias=alias, promote=promote, dry_run=dry_run),
    )
    if as_json:
        print(json.dumps(answer))
        return
    if dry_run:
        print(f"{name} would be taken: {answer['bytes']:,} bytes, {answer['digest'][:19]}")
    else:
        print(f"{answer['name']}@{answer['version']} is {answer['state']}: {answer['bytes']:,} bytes")
    for warning in answer["report"].get("warnings", ()):
        print(f"warning: {warning}")


@app.command()
def load(name: AdapterName, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Bring an adapter to the device now; requests do that by themselves."""
    answer = ask(url, key, lambda client: client.load(name))
    print(f"{answer['name']}@{answer['version']} is on the device")


@app.command()
def evict(name: AdapterName, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Take an adapter off the device; it stays registered."""
    ask(url, key, lambda client: client.evict(name))
    print(f"{name} is off the device")


@app.command()
def rm(name: AdapterName, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Delete an adapter with all its versions; requests that run on it finish."""
    answer = ask(url, key, lambda client: client.delete(name))
    left = f", {answer['requests_left']} requests still run on it" if answer["requests_left"] else ""
    print(f"{name} is deleted{left}")


def _line(adapter: dict[str, Any]) -> str:
    version = next((item for item in adapter["versions"] if item["version"] == adapter["latest_version"]), None)
    device = (version or {}).get("residency", {}).get("device")
    aliases = ", ".join(f"{alias}={number}" for alias, number in sorted(adapter["aliases"].items()))
    return (
        f"{adapter['name']:32}{adapter['latest_version'] or '-':>8}  {adapter['state']:14}"
        f"{device['state'] if device else '-':10}{version['bytes'] if version else 0:>12,}  {aliases}"
    )
