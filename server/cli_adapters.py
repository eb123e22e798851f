"""`veneer adapters`: a running server's adapters from the command line; `inspect` and `convert` need no server.

Exit codes: 0 done, 1 the server said no, 2 wrong usage, 3 the server cannot be reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server import cli_inspect, cli_pull, cli_releases, cli_store
from server.admin_client import AdminClient
from server.cli_releases import VersionName, name_and_version, shares_text, told
from server.cli_server import DEFAULT_URL, AsJson, Key, Url, ask
from server.library.directory import adapter_in

app = typer.Typer(help="The adapters of a running server; `inspect` and `convert` need none.", no_args_is_help=True)
app.command("inspect")(cli_inspect.inspect_adapter)
app.command("convert")(cli_inspect.convert_adapter)
app.command("pull")(cli_pull.pull)
cli_store.register(app)
cli_releases.register(app)
AdapterName = Annotated[str, typer.Argument(metavar="NAME")]
Tier = Annotated[Literal["device", "host"], typer.Option(help="Where to.")]
EvictTier = Annotated[Literal["device", "host", "all"], typer.Option(help="Where from.")]


@app.command("ls")
@app.command("list", hidden=True)
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
        lambda client: _push(client, name, directory, alias, promote, dry_run=dry_run, is_quiet=as_json),
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
def load(
    name: VersionName, url: Url = DEFAULT_URL, key: Key = None, tier: Tier = "device", as_json: AsJson = False
) -> None:
    """Bring an adapter near now; requests do that by themselves."""
    adapter, version = name_and_version(name)
    answer = ask(url, key, lambda client: client.load(adapter, version, tier))
    told(answer, f"{answer['name']}@{answer['version']} is on the {tier}", as_json)


@app.command()
def evict(
    name: VersionName,
    url: Url = DEFAULT_URL,
    key: Key = None,
    tier: EvictTier = "device",
    as_json: AsJson = False,
) -> None:
    """Send an adapter away from a tier; it stays registered."""
    adapter, version = name_and_version(name)
    answer = ask(url, key, lambda client: client.evict(adapter, version, tier))
    told(answer, f"{name} is off the device" if tier == "device" else f"{name} has left: {tier}", as_json)


@app.command()
def rm(
    name: VersionName,
    url: Url = DEFAULT_URL,
    key: Key = None,
    force: Annotated[bool, typer.Option("--force", help="Also what is pinned, or what an alias points to.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter with all its versions, or one version; requests that run on it finish."""
    adapter, version = name_and_version(name)
    answer = ask(url, key, lambda client: client.delete(adapter, version, force=force))
    left = f", {answer['requests_left']} requests still run on it" if answer["requests_left"] else ""
    told(answer, f"{name} is deleted{left}", as_json)


def _push(
    client: AdminClient,
    name: str,
    directory: Path,
    alias: str | None,
    promote: bool,
    *,
    dry_run: bool,
    is_quiet: bool,
) -> dict[str, Any]:
    """Uploads, with a bar where somebody looks."""
    console = Console(stderr=True, quiet=is_quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=is_quiet or not console.is_terminal) as bar:
        task = bar.add_task("uploading", total=None)

        def on_bytes(sent: int, total: int) -> None:
            step = "checking" if sent == total else "uploading"  # what is left then is the server's work
            bar.update(task, description=step, completed=sent, total=total)

        where = adapter_in(directory)
        return client.push(name, where, alias=alias, promote=promote, dry_run=dry_run, on_bytes=on_bytes)


def _line(adapter: dict[str, Any]) -> str:
    version = next((item for item in adapter["versions"] if item["version"] == adapter["latest_version"]), None)
    device = (version or {}).get("residency", {}).get("device")
    aliases = ", ".join(f"{alias}={shares_text(meaning)}" for alias, meaning in sorted(adapter["aliases"].items()))
    return (
        f"{adapter['name']:32}{adapter['latest_version'] or '-':>8}  {adapter['state']:14}"
        f"{device['state'] if device else '-':10}{version['bytes'] if version else 0:>12,}  {aliases}"
    )
