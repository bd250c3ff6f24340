"""The authority's settings: documented, and nothing accepted that could not be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.settings import undocumented
from ztunnel.ca_settings import CaServerSettings, parse, variable
from ztunnel.mesh.errors import ConfigError


def test_nothing_needs_to_be_said() -> None:
    settings = parse({}, {})
    assert (settings.listen.port, settings.trust_domain, settings.kubernetes.audience) == (15012, "cluster.local", "istio-ca")
    assert settings.root.given is None
    assert settings.leaf_hours == 24.0


def test_every_setting_is_documented() -> None:
    assert undocumented(CaServerSettings) == []


def test_the_environment_wins() -> None:
    environ = {variable("agents"): "a/b,c/d", variable("kubernetes.kubeconfig"): "/k"}
    settings = parse({"agents": ["x/y"]}, environ)
    assert settings.agents == ("a/b", "c/d")
    assert settings.kubernetes.kubeconfig == Path("/k")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"agents": []}, "agents: without any"),
        ({"agents": ["ztunnel"]}, "agents: namespace/service-account is expected"),
        ({"listen": {"names": []}}, "listen.names: at least one"),
        ({"listen": {"names": ["UPPER"]}}, "listen.names: a DNS name is expected"),
        ({"listen": {"address": "host"}}, "listen.address: an IP address"),
        ({"listen": {"port": 15020}}, "two of them are the same"),
        ({"files": {"pods": "/x"}}, "callers and pods are given together"),
        ({"publish": {"namespaces": ["a b"]}}, "publish.namespaces: a namespace or"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(config, {})
