"""What the controller can be told, and what it refuses to hear."""

from __future__ import annotations

import pytest

from ztunnel.controller_settings import parse
from ztunnel.mesh.errors import ConfigError


def test_the_defaults_are_accepted_and_the_environment_wins() -> None:
    settings = parse({"election": {"lease": "a"}}, {"ZTUNNEL_CONTROLLER_ELECTION_LEASE": "b"})
    assert settings.election.lease == "b"
    assert settings.gateways.limits == ("memory=1Gi",)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"election": {"lease_seconds": 5, "renew_seconds": 5}}, "two replicas work at once"),
        ({"election": {"renew_seconds": 3, "retry_seconds": 2}}, "one try that fails"),
        ({"admin": {"metrics_port": 9000, "readiness_port": 9000}}, "are the same"),
        ({"admin": {"address": "somewhere"}}, "an IP address or *"),
        ({"gateways": {"requests": ["cpu"]}}, "gateways.requests"),
        ({"gateways": {"environment": ["x=1"]}}, "gateways.environment"),
        ({"gateways": {"image": "two words"}}, "gateways.image"),
    ],
)
def test_a_contradiction_is_named(config: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(config, {})
    assert said in " ".join(caught.value.problems)
