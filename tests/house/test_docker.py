"""The image and the compose file speak of settings and files that exist."""

from __future__ import annotations

import re

import pytest
import yaml

from server.settings import Settings
from tests.house.tracked import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = (ROOT / "docker/compose.yaml").read_text()


def unknown_settings(text: str) -> list[str]:
    """VENEER_* names in a text that no setting answers to."""
    names = sorted(set(re.findall(r"VENEER_([A-Z0-9_]+)", text)))
    return [name for name in names if name.lower() not in Settings.model_fields]


def copied(text: str) -> list[str]:
    """What the COPY lines take from the tree, not from another stage."""
    lines = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    return [source for sources in lines for source in sources]


@pytest.mark.parametrize("text", [DOCKERFILE, COMPOSE], ids=["Dockerfile", "compose.yaml"])
def test_every_environment_variable_is_a_setting(text: str) -> None:
    assert unknown_settings(text) == []


def test_a_variable_that_is_no_setting_is_found() -> None:
    assert unknown_settings("ENV VENEER_PORT=1 VENEER_PROT=2") == ["PROT"]


def test_what_the_image_copies_exists_and_is_let_through() -> None:
    ignore = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    sources = copied(DOCKERFILE)
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if f"!{source}" not in ignore] == []


def test_the_image_serves_on_the_default_port_as_a_plain_user() -> None:
    assert 'ENTRYPOINT ["veneer", "serve"]' in DOCKERFILE
    assert f"EXPOSE {Settings().port}" in DOCKERFILE
    assert "USER 1000:0" in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE


def test_the_compose_file_has_a_service_for_each_variant() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    variants = {service["build"]["args"]["VARIANT"] for service in services.values()}
    assert variants == {"cpu", "cuda"}
    assert all((ROOT / service["build"]["dockerfile"]).is_file() for service in services.values())


def test_a_container_gets_longer_to_stop_than_requests_get_to_finish() -> None:
    grace = yaml.safe_load(COMPOSE)["x-veneer"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > Settings().graceful_timeout_s
