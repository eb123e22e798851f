"""`veneer adapters pull`: have a running server fetch an adapter, and watch it.

    veneer adapters pull sql org/sql-lora@v2 --alias prod

On a terminal a bar shows how far it is; elsewhere a line says what begins. Ctrl-C cancels the work on the server, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from server.admin_client import AdminClient, RequestFailed
from server.cli_server import DEFAULT_URL, SAID_NO, AsJson, Key, Url, ask

INTERRUPTED = 130
_LOOK_EVERY_S = 0.5


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="org/repo[@revision][#folder] of the Hub, s3://, gs://, https://, or a path on the server's machine.",
        ),
    ],
    url: Url = DEFAULT_URL,
    key: Key = None,
    alias: Annotated[str | None, typer.Option(help="An alias to point to the new version.")] = None,
    promote: Annotated[bool, typer.Option(help="Whether the bare name means the new version.")] = True,
    preload: Annotated[Literal["none", "cpu", "gpu"], typer.Option(help="Where to bring it.")] = "none",
    token: Annotated[
        str | None, typer.Option(envvar="VENEER_SOURCE_TOKEN", help="For this source alone; better in the environment.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Fetch it, check it and keep nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have the server fetch an adapter from where it lies; a known name gets a new version, known content does not."""
    order = {
        "name": name,
        "source": {"uri": source} | ({} if token is None else {"token": token}),
        "alias": alias,
        "promote": promote,
        "preload": preload,
    }
    ended = ask(url, key, lambda client: _carry_out(client, order, dry_run=dry_run, is_quiet=as_json))
    answer = ended["result"]
    if ended["status"] != "succeeded":
        reason = ended["error"]["message"] if ended["error"] else f"the operation was {ended['status']}"
        print(f"veneer: {reason}", file=sys.stderr)
        raise typer.Exit(SAID_NO)
    if as_json:
        print(json.dumps(answer))
    elif dry_run:
        print(f"{name} would be taken: {answer['bytes']:,} bytes, {answer['digest'][:19]}")
    else:
        came_from = answer["source"]["uri"]
        if answer["source"]["revision"]:
            came_from += f" at {answer['source']['revision']}"
        print(f"{answer['name']}@{answer['version']} is {answer['state']}: {answer['bytes']:,} bytes from {came_from}")


def _carry_out(client: AdminClient, order: dict[str, Any], *, dry_run: bool, is_quiet: bool) -> dict[str, Any]:
    """The operation when it has ended. Raises RequestFailed."""
    operation = client.call("POST", "/adapters" + ("?dry_run=true" if dry_run else ""), order)
    try:
        for seen in _shown(_watch(client, operation), is_quiet):
            operation = seen
    except KeyboardInterrupt:
        _cancel(client, operation["id"])
        print("veneer: cancelled", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    return operation


def _watch(client: AdminClient, operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The operation again and again, until it has ended."""
    yield operation
    while not operation["done"]:
        operation = client.call("GET", f"/operations/{operation['id']}?wait={_LOOK_EVERY_S}")
        yield operation


def _shown(operations: Iterator[dict[str, Any]], is_quiet: bool) -> Iterator[dict[str, Any]]:
    """What passes, with a bar where somebody looks."""
    console = Console(stderr=True)
    if is_quiet or not console.is_terminal:
        status = ""
        for operation in operations:
            if operation["status"] != status and not (is_quiet or operation["done"]):
                print(f"{operation['target']}: {operation['status']}", file=sys.stderr)
            status = operation["status"]
            yield operation
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task: TaskID = bar.add_task("", total=None)
        for operation in operations:
            progress = operation["progress"]
            bar.update(task, description=operation["status"], completed=progress["completed"], total=progress["total"])
            yield operation


def _cancel(client: AdminClient, operation_id: str) -> None:
    try:
        client.call("DELETE", f"/operations/{operation_id}")
    except RequestFailed as error:  # it has ended meanwhile
        print(f"veneer: {error}", file=sys.stderr)
