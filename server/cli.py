"""The `veneer` command: its tree, and the commands that need no server.

    veneer serve [MODEL] [flags]      veneer adapters push|pull|ls|show|alias|canary|rm ...
    veneer generate MODEL [PROMPT]    veneer config show [flags]
    veneer keys add|list|revoke|usage veneer version
    veneer demo

Heavy modules are imported by the command that needs them, so that `--help` and `version` answer at once.
"""

from __future__ import annotations

import os
import sys

import typer

from server import cli_adapters, cli_generate, cli_keys
from server.flags import SettingsError, changed, read_settings, show
from server.version import VERSION

USAGE_ERROR = 2
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="veneer",
    help="Serve one frozen base model and any number of adapters on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at the settings.", no_args_is_help=True)
app.add_typer(cli_adapters.app, name="adapters")
app.add_typer(cli_keys.app, name="keys")
app.add_typer(config_app, name="config")
app.command()(cli_generate.generate)


def main() -> None:
    """Run the command line; leaves by SystemExit."""
    try:
        app()
    except SettingsError as error:
        print(f"veneer: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a model; without MODEL the small built-in base with its adapters. `veneer serve --help` lists the flags."""
    layered = read_settings(context.args, os.environ)
    print(f"settings: {changed(layered) or 'all at their defaults'}", file=sys.stderr, flush=True)
    from server.serve import serve as run

    raise typer.Exit(run(layered.settings))


@app.command()
def demo() -> None:
    """A tour: one prompt through the built-in base and every adapter, one uploaded, used and evicted under load."""
    from server.demo.tour import take_tour

    raise typer.Exit(take_tour())


@app.command()
def version() -> None:
    """Print the version."""
    print(VERSION)


@config_app.command("show", context_settings=_PASS_THROUGH, add_help_option=False)
def config_show(context: typer.Context) -> None:
    """Every setting with its value and where it comes from; takes the flags of `veneer serve`. Keys are masked."""
    print(show(read_settings(context.args, os.environ)))
