"""From `Settings` fields to a command line, and from four sources to one `Settings`.

Precedence, strongest first: command line, VENEER_* environment, --config file (YAML), defaults. Every value remembers
where it came from, so that an error and `veneer config show` can say so.

Running example: `VENEER_PORT=9000 veneer serve ./llama --config veneer.yaml --max-num-seqs 64`
    layered.settings.port            == 9000
    layered.origins["port"]          == "VENEER_PORT"
    layered.origins["max_num_seqs"]  == "--max-num-seqs"
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from server.setting_groups.values import LoraModule
from server.settings import GROUPS, Settings

ENV_PREFIX = "VENEER_"
# Read by other commands, never settings of the server.
_OTHER_ENV = {"VENEER_CONFIG", "VENEER_URL", "VENEER_SOURCE_TOKEN"}
_VLLM_ENV = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "allow_runtime_lora_updating"}
# Kubernetes sets these in every pod when a Service is called "veneer"; VENEER_PORT is then "tcp://...".
_SERVICE_LINK = re.compile(r"VENEER_(SERVICE_.*|PORT_\d+_.*)")

# `--flag a b`, as vLLM's users write these two; other lists repeat their flag.
_MANY_AFTER_ONE_FLAG = {"lora_modules", "served_model_name"}


class SettingsError(Exception):
    """A value no setting takes, or a setting nobody knows. The message is for the person who typed it."""


@dataclass(frozen=True, slots=True)
class LayeredSettings:
    settings: Settings
    origins: Mapping[str, str]  # field -> "--port", "VENEER_PORT", "veneer.yaml" or "default"


def read_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> LayeredSettings:
    """Layer all sources and validate once.

    Raises:
        SettingsError: an unknown flag, variable or key, or a value that does not fit, with its origin.
        SystemExit: `--help` was asked for.
    """
    given = vars(_parse(arguments))
    config = given.pop("config", None) or environ.get("VENEER_CONFIG")
    values: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    layers = [
        _from_file(Path(config)) if config else ({}, {}),
        _from_environment(environ),
        (given, {name: _flag(name) for name in given}),
    ]
    for layer, layer_origins in layers:
        values |= layer
        origins |= layer_origins
    try:
        return LayeredSettings(Settings.model_validate(values), origins)
    except ValidationError as error:
        raise SettingsError(_readable(error, origins)) from None


def show(layered: LayeredSettings) -> str:
    """`name  value  origin` lines, secrets masked, in the order of `--help`."""
    lines = []
    for name in Settings.model_fields:
        value = _shown(getattr(layered.settings, name))
        lines.append(f"{name:24}{value:32}{layered.origins[name]}")
    return "\n".join(lines)


def changed(layered: LayeredSettings) -> str:
    """The settings that are not at their default, in one line; secrets masked."""
    given = [name for name, origin in layered.origins.items() if origin != "default"]
    return ", ".join(f"{name}={_shown(getattr(layered.settings, name))} ({layered.origins[name]})" for name in given)


def settings_table() -> str:
    """The settings as a Markdown table, for the README; a test compares the two."""
    lines = ["| flag | environment | default | what it does |", "|---|---|---|---|"]
    for group in GROUPS:
        lines.append(f"| **{group.heading}** | | | |")
        for name, field in group.model_fields.items():
            spelled = "MODEL" if name == "model" else " ".join(f"`{flag}`" for flag in _spellings(name, field))
            default = _shown(field.default)
            text = (field.description or "").replace("|", "\\|")
            lines.append(f"| {spelled} | `{ENV_PREFIX}{name.upper()}` | {default} | {text} |")
    return "\n".join(lines)


_DESCRIPTION = """Serve one frozen base model and any number of adapters on it.

  veneer serve                                       the small built-in base with its adapters
  veneer serve ./llama --adapters-dir ./adapters     a model on this machine, every adapter below a directory
  veneer serve org/model --lora-modules sql=./sql    a model from the Hub, one adapter by name

Requests name an adapter, or none for the base. The last lines of the start are commands to try."""
_EPILOG = f"""Every flag is also {ENV_PREFIX}<NAME> in the environment (lists: comma-separated) and <name> in the
--config file. The command line wins over the environment, the environment over the file. `veneer config show` tells
what holds and why; `veneer adapters --help` is how adapters are added while the server runs."""


def build_parser() -> argparse.ArgumentParser:
    """`veneer serve`'s parser: one group a heading, nothing taken unless it is given."""
    parser = _Parser(
        prog="veneer serve",
        usage="veneer serve [MODEL] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=Settings.model_fields["model"].description)
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings, one `name: value` a line.")
    for group in GROUPS:
        section = parser.add_argument_group(group.heading)
        for name, field in group.model_fields.items():
            _add_flag(section, name, field)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    known, rest = parser.parse_known_args(arguments)
    if not rest:
        return known
    flags = [flag for name, field in Settings.model_fields.items() for flag in _spellings(name, field)]
    unknown = rest[0].split("=")[0]
    what = "flag" if unknown.startswith("-") else "argument"
    raise SettingsError(f"unknown {what} {unknown!r}{_hint(unknown, flags)}")


def _add_flag(section: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    spellings = _spellings(name, field)
    text = _help_text(name, field)
    if field.annotation is bool:
        section.add_argument(*spellings, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif name in _MANY_AFTER_ONE_FLAG:
        section.add_argument(*spellings, dest=name, action="extend", nargs="+", metavar=_metavar(field), help=text)
    elif _is_tuple(field):
        section.add_argument(*spellings, dest=name, action="append", metavar=_metavar(field), help=text)
    else:
        section.add_argument(*spellings, dest=name, metavar=_metavar(field), help=text)


def _help_text(name: str, field: FieldInfo) -> str:
    if name == "model":
        return "The same as MODEL."
    text = (field.description or "").replace("%", "%%")
    if field.default in (None, (), "") or (field.annotation is bool and not field.default):
        return text
    return f"{text} Default: {_shown(field.default)}."


def _metavar(field: FieldInfo) -> str:
    schema = field.json_schema_extra
    if isinstance(schema, dict) and schema["metavar"]:
        return str(schema["metavar"])
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        return "{" + ",".join(choices) + "}"
    kinds = {field.annotation, *get_args(field.annotation)}
    for kind, word in ((Path, "PATH"), (float, "SECONDS"), (int, "N"), (str, "TEXT")):
        if kind in kinds:
            return word
    return "TEXT"


def _is_tuple(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _spellings(name: str, field: FieldInfo) -> list[str]:
    schema = field.json_schema_extra
    aliases = schema["aliases"] if isinstance(schema, dict) else ()
    assert isinstance(aliases, tuple)
    return ["--" + name.replace("_", "-"), *map(str, aliases)]


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_ENV or _SERVICE_LINK.fullmatch(variable):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name == "port" and text.startswith(("tcp://", "udp://")):
            continue
        if name not in Settings.model_fields:
            known = [ENV_PREFIX + field.upper() for field in Settings.model_fields]
            raise SettingsError(f"unknown environment variable {variable}{_hint(variable, known)}")
        if text == "" and Settings.model_fields[name].default is None:
            continue
        values[name] = text
        origins[name] = variable
    for variable, name in _VLLM_ENV.items():
        if name not in values and environ.get(variable):
            values[name] = environ[variable]
            origins[name] = variable
    return values, origins


def _from_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read the config file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold `name: value` lines, found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in Settings.model_fields:
            raise SettingsError(f"{path}: unknown setting {key!r}{_hint(name, list(Settings.model_fields))}")
        values[name] = value
    return values, dict.fromkeys(values, str(path))


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ". See `veneer serve --help`."


def _readable(error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        if not name:
            lines.append(message)
            continue
        given = "" if name.endswith("api_key") else f" (given: {problem['input']!r})"
        lines.append(f"{origins[name]}: {message}{given}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, LoraModule):
        return f"{value.name}={value.path}"
    if isinstance(value, tuple):
        return ",".join(_shown(item) for item in value) or "-"
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**30}G" if value % 2**30 == 0 else f"{value // 2**20}M"
    return f"{value:g}" if isinstance(value, float) else str(value)
