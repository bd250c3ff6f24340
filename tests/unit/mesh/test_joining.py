"""What is said before a namespace joins or leaves."""

from __future__ import annotations

import pytest

from tests.kit import builders
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.enrolment import MODE_LABEL
from ztunnel.mesh.joining import Plan, plan
from ztunnel.mesh.manifests.parse import KubeObject, key, parse

OPTIONS = MeshOptions()
AMBIENT = {MODE_LABEL: "ambient"}


def planned(joins: bool, *bodies: builders.Json, ambient: bool = False) -> Plan:
    objects: list[KubeObject] = [parse(body, "test") for body in (builders.namespace("shop", ambient=ambient), *bodies)]
    return plan({key(item): item for item in objects}, "shop", joins, OPTIONS)


def pod(name: str, labels: dict[str, str] | None = None) -> builders.Json:
    return builders.pod(name, "10.0.0.1", namespace="shop", labels=labels)


def test_each_pod_is_named_with_what_happens_to_its_connections() -> None:
    found = planned(True, pod("a"), pod("b", {MODE_LABEL: "none"}), pod("c", AMBIENT))
    assert [(each.name, each.becomes) for each in found.pods] == [("a", "captured"), ("b", ""), ("c", "")]
    assert found.changed == 1
    assert "until they end" in found.pods[0].connections
    assert "namespace shop is labelled" in found.pods[0].reason
    assert "labelled istio.io/dataplane-mode=none" in found.pods[1].reason


def test_a_pod_that_takes_no_plaintext_keeps_no_old_connection() -> None:
    found = planned(True, pod("a"), builders.authentication("strict", "STRICT", namespace="shop"))
    assert "are ended" in found.pods[0].connections
    assert any("1 pods take no plaintext" in each for each in found.warnings)


@pytest.mark.parametrize(("ambient", "changed"), [(True, 1), (False, 0)])
def test_leaving(ambient: bool, changed: int) -> None:
    found = planned(False, pod("a"), builders.authorization("allow", namespace="shop", rules=[{}]), ambient=ambient)
    assert found.changed == changed
    assert any("enforced by nobody" in each for each in found.warnings)
    if changed:
        assert found.pods[0].becomes == "released"
        assert "new ones are plaintext" in found.pods[0].connections


def test_policies_that_come_into_force_are_named() -> None:
    found = planned(True, pod("a"), *(builders.authorization(f"p{number}", namespace="shop", rules=[{}]) for number in range(9)))
    (warning,) = found.warnings
    assert "(p0, p1, p2, p3, p4, p5, p6, p7 …)" in warning


def test_of_a_namespace_that_is_in_the_mesh_already_nothing_is_new() -> None:
    policy = builders.authorization("allow", namespace="shop", rules=[{}])
    assert planned(True, pod("a"), policy, ambient=True).warnings == ()
    assert planned(True, pod("a"), policy).warnings != ()


def test_a_waypoint_that_is_not_there_is_a_warning() -> None:
    body = builders.labelled(builders.service_manifest("web", "10.96.0.1", namespace="shop"), labels={"istio.io/use-waypoint": "none-such"})
    warnings = planned(True, pod("a"), body).warnings
    assert any("service web: clients in the mesh are refused until its waypoint is ready" in each for each in warnings)


def test_an_empty_namespace_says_so() -> None:
    assert planned(True).warnings == ("it has no pods yet: what is started there from then on is in the mesh",)
