"""Settings: four sources, one validated bundle, and messages for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.flags import SettingsError, build_parser, changed, read_settings, settings_table, show
from server.setting_groups.values import LoraModule
from server.settings import GROUPS, Settings


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    config = tmp_path / "veneer.yaml"
    config.write_text("port: 1\nmax-num-seqs: 2\nmax_queued_requests: 3\n")
    environ = {"VENEER_PORT": "10", "VENEER_MAX_NUM_SEQS": "20"}

    layered = read_settings(["--port", "100", "--config", str(config)], environ)

    settings = layered.settings
    assert (settings.port, settings.max_num_seqs, settings.max_queued_requests) == (100, 20, 3)
    assert settings.graceful_timeout_s == 90.0
    origins = layered.origins
    assert [origins[name] for name in ("port", "max_num_seqs", "max_queued_requests", "graceful_timeout_s")] == [
        "--port",
        "VENEER_MAX_NUM_SEQS",
        str(config),
        "default",
    ]


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--max-num-sequences", "3"], {}, ("--max-num-sequences", "did you mean --max-num-seqs")),
        ([], {"VENEER_PROT": "1"}, ("VENEER_PROT", "did you mean VENEER_PORT")),
        (["--port", "x"], {}, ("--port", "integer", "'x'")),
        (["--port", "70000"], {}, ("--port", "65535")),
        ([], {"VENEER_PORT": "x"}, ("VENEER_PORT", "'x'")),
        (["--pool-bytes", "2Q"], {}, ("--pool-bytes", "512M")),
        (["--no-enable-lora"], {}, ("--enable-lora", "always on")),
        (["--ssl-keyfile", "k.pem"], {}, ("--ssl-certfile",)),
        (["--lora-modules", "a=1", "a=2"], {}, ("'a'", "twice")),
        (["--lora-modules", "a"], {}, ("NAME=PATH",)),
        (["--lora-modules", '{"nam": "a"}'], {}, ("name",)),
        (["--dtype", "int8"], {}, ("--dtype", "bfloat16")),
        (["--config", "/nowhere.yaml"], {}, ("/nowhere.yaml", "No such file")),
        (["a", "b"], {}, ("argument 'b'",)),
    ],
)
def test_what_does_not_fit_is_refused_with_its_origin(
    arguments: list[str], environ: dict[str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(SettingsError) as refused:
        read_settings(arguments, environ)
    for word in words:
        assert word in str(refused.value)


def test_an_unknown_key_of_the_config_file_is_refused_with_the_near_one(tmp_path: Path) -> None:
    config = tmp_path / "veneer.yaml"
    config.write_text("max_num_seq: 2\n")
    with pytest.raises(SettingsError, match="did you mean max_num_seqs"):
        read_settings([], {"VENEER_CONFIG": str(config)})


def test_a_config_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "veneer.yaml"
    config.write_text("- port\n")
    with pytest.raises(SettingsError, match="found a list"):
        read_settings(["--config", str(config)], {})


def test_service_links_of_kubernetes_are_no_settings() -> None:
    links = {"VENEER_PORT": "tcp://10.0.0.1:80", "VENEER_SERVICE_HOST": "10.0.0.1", "VENEER_PORT_80_TCP_ADDR": "x"}
    assert read_settings([], links).settings.port == 8000


def test_variables_of_other_commands_do_not_stop_a_server() -> None:
    environ = {"VENEER_URL": "http://127.0.0.1:9", "VENEER_SOURCE_TOKEN": "hf_x", "VENEER_PORT": "9"}
    assert read_settings([], environ).settings.port == 9


def test_keys_are_never_shown() -> None:
    layered = read_settings(["--api-key", "hunter2", "--admin-api-key", "correcthorse"], {})
    assert changed(layered) == "api_key=******** (--api-key), admin_api_key=******** (--admin-api-key)"
    for text in (show(layered), repr(layered.settings)):
        assert "hunter2" not in text
        assert "correcthorse" not in text
    assert layered.settings.api_key[0].get_secret_value() == "hunter2"


def test_a_wrong_key_value_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    config = tmp_path / "veneer.yaml"
    config.write_text("api_key: {secret: hunter2}\n")
    with pytest.raises(SettingsError) as refused:
        read_settings(["--config", str(config)], {})
    assert "hunter2" not in str(refused.value)


def test_the_address_is_open_only_when_a_key_guards_it() -> None:
    assert Settings().bind_host == "127.0.0.1"
    assert read_settings(["--api-key", "k"], {}).settings.bind_host == "0.0.0.0"
    assert read_settings(["--admin-api-key", "k"], {}).settings.bind_host == "127.0.0.1", "anybody may generate"
    assert Settings(host="0.0.0.0").is_loopback is False
    assert Settings(host="127.0.0.2").is_loopback is True


@pytest.mark.parametrize(
    ("text", "number"), [("64k", 64_000), ("64K", 65_536), ("1.5G", 1_610_612_736), ("2GiB", 2**31), ("7", 7)]
)
def test_sizes_have_suffixes(text: str, number: int) -> None:
    assert read_settings(["--pool-bytes", text], {}).settings.pool_bytes == number


def test_command_lines_of_vllm_are_understood() -> None:
    line = ["m", "--enable-lora", "--max-loras", "4", "--lora-dtype", "float32", "--lora-modules", "a=/x"]
    settings = read_settings([*line, '{"name": "b", "path": "/y", "base_model_name": "m"}'], {}).settings
    assert settings.model == "m"
    assert (settings.max_loras, settings.adapter_dtype) == (4, "float32")
    assert settings.lora_modules == (LoraModule("a", "/x"), LoraModule("b", "/y"))


def test_lists_in_the_environment_are_comma_separated() -> None:
    settings = read_settings([], {"VENEER_API_KEY": "a, b", "VENEER_SERVED_MODEL_NAME": '["x","y"]'}).settings
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    assert settings.served_model_name == ("x", "y")


def test_every_setting_has_a_flag_a_group_a_text_and_a_line_in_the_table() -> None:
    table, text = settings_table(), build_parser().format_help()
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert flag in text
        assert f"VENEER_{name.upper()}" in table
        assert field.description
        assert field.description.endswith((".", "?"))
    for group in GROUPS:
        assert f"{group.heading}:" in text
    assert sorted(name for group in GROUPS for name in group.model_fields) == sorted(Settings.model_fields)


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1
