"""Settings: every problem at once, and nothing accepted that could not be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.settings import undocumented
from ztunnel.configuration import leaves_of
from ztunnel.mesh.errors import ConfigError
from ztunnel.settings import LogFormat, LogLevel, RecordLayer, Settings, parse, variable

LEAST: dict[str, object] = {"node": "node-1", "sources": {"files": "/etc/mesh"}}


def problems(config: dict[str, object], environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(config, environ or {})
    return caught.value.problems


def test_the_least_that_can_be_said_gives_the_documented_defaults() -> None:
    settings = parse(LEAST, {})
    assert settings.node == "node-1"
    assert settings.sources.files == Path("/etc/mesh")
    assert settings.sources.redirection_status is None
    assert settings.trust_domain == "cluster.local"
    assert settings.root_namespace == "istio-system"
    assert (settings.admin.metrics_port, settings.admin.readiness_port) == (15020, 15021)
    assert settings.pods.status_directory is None
    assert settings.tunnel.records is RecordLayer.OWN
    assert settings.tunnel.optimistic_data is True
    assert (settings.deadlines.handshake_seconds, settings.deadlines.connect_seconds) == (10.0, 10.0)
    assert settings.workers == 1


def test_file_values_are_taken_in_their_types() -> None:
    settings = parse(
        {
            **LEAST,
            "workers": 0,
            "drain_seconds": 3,
            "pods": {"status_directory": "/run/status"},
            "log": {"format": "json", "level": "debug"},
            "tunnel": {"records": "openssl", "optimistic_data": False},
        },
        {},
    )
    assert settings.workers == 0
    assert settings.drain_seconds == 3.0
    assert isinstance(settings.drain_seconds, float)
    assert settings.pods.status_directory == Path("/run/status")
    assert (settings.log.format, settings.log.level) == (LogFormat.JSON, LogLevel.DEBUG)
    assert settings.tunnel.records is RecordLayer.OPENSSL
    assert settings.tunnel.optimistic_data is False


def test_environment_wins_over_the_file() -> None:
    settings = parse(
        {**LEAST, "admin": {"metrics_port": 1}},
        {
            "ZTUNNEL_ADMIN_METRICS_PORT": "0",
            "ZTUNNEL_TUNNEL_OPTIMISTIC_DATA": "False",
            "ZTUNNEL_CA_LEAF_HOURS": "0.5",
            "ZTUNNEL_NODE": "node-2",
            "ZTUNNEL_LOG_FORMAT": "json",
            "HOME": "/root",
        },
    )
    assert settings.admin.metrics_port == 0
    assert settings.tunnel.optimistic_data is False
    assert settings.ca.leaf_hours == 0.5
    assert settings.node == "node-2"
    assert settings.log.format is LogFormat.JSON


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        {
            "nod": "x",
            "trust_domain": "Has Capitals",
            "workers": 700,
            "drain_seconds": True,
            "metrics_port": 9,
            "admin": {"metrics_prt": 1, "readiness_port": "15021", "socket": "/" + "a" * 200},
            "log": "json",
            "tunnel": {"records": "kernal", "optimistic_data": "maybe", "idle_seconds": float("nan")},
            "pods": {"netns_directory": ""},
        },
        {"ZTUNNEL_LOG_LEVL": "debug", "ZTUNNEL_DEADLINES_CONNECT_SECONDS": "soon"},
    )
    text = "\n".join(found)
    for expected in (
        "nod: no such setting; did you mean node?",
        "node: required",
        "trust_domain: a trust domain",
        "workers: between 0 and 64 is expected, found 700",
        "drain_seconds: a number is expected, found true",
        "metrics_port: no such setting; did you mean admin.metrics_port?",
        "admin.metrics_prt: no such setting; did you mean admin.metrics_port?",
        "admin.readiness_port: a whole number is expected, found '15021'",
        "admin.socket: longer than 107 bytes",
        "log: a mapping is expected, found 'json'",
        "tunnel.records: one of own, openssl, kernel is expected, found 'kernal'",
        "tunnel.optimistic_data: true or false is expected, found 'maybe'",
        "tunnel.idle_seconds: between 1 and 86400",
        "pods.netns_directory: a path is expected",
        "ZTUNNEL_LOG_LEVL: no such variable; did you mean ZTUNNEL_LOG_LEVEL?",
        "ZTUNNEL_DEADLINES_CONNECT_SECONDS: a number is expected, found 'soon'",
    ):
        assert expected in text
    assert len(found) == 16


@pytest.mark.parametrize("name", ["ZTUNNEL_SERVICE_HOST", "ZTUNNEL_PORT", "ZTUNNEL_PORT_15020_TCP", "ZTUNNEL_SOCKET", "ZTUNNEL_LAB_DIR"])
def test_variables_that_are_not_settings_are_let_be(name: str) -> None:
    assert parse(LEAST, {name: "tcp://10.0.0.1"}).node == "node-1"


def test_an_empty_section_is_its_defaults_and_nothing_clears_an_optional_path() -> None:
    settings = parse({**LEAST, "admin": None, "pods": {"status_directory": None}}, {})
    assert settings.admin.metrics_port == 15020
    assert settings.pods.status_directory is None


def test_unknown_section_and_key_that_resembles_nothing() -> None:
    assert problems({**LEAST, "zzzzqqqq": {"a": 1}}) == ["zzzzqqqq: no such setting"]
    assert problems({**LEAST, "drain_seconds": [1]}) == ["drain_seconds: a number is expected, found a list"]
    assert problems({**LEAST, "drain_seconds": {"a": 1}}) == ["drain_seconds: a number is expected, found a mapping"]
    assert problems({**LEAST, "node": None}) == ["node: text is expected, found nothing"]
    assert problems({**LEAST, "node": b"x"}) == ["node: text is expected, found bytes"]


def test_values_that_contradict_each_other() -> None:
    assert problems({**LEAST, "admin": {"metrics_port": 15021}}) == ["admin.readiness_port: 15021 is admin.metrics_port as well"]
    assert problems({**LEAST, "admin": {"readiness_port": 15008}}) == ["admin.readiness_port: 15008 belongs to the data plane"]
    assert problems({**LEAST, "admin": {"address": "localhost"}}) == ["admin.address: an IP address or * is expected, found 'localhost'"]
    assert parse({**LEAST, "admin": {"address": "::1"}}, {}).admin.address == "::1"


def test_every_setting_is_documented_and_has_its_own_variable() -> None:
    leaves = dict(leaves_of(Settings, ""))
    assert len({variable(key) for key in leaves}) == len(leaves)
    assert undocumented(Settings) == []
