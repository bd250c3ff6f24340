"""Which PeerAuthentication counts, and what it becomes."""

from __future__ import annotations

from tests.kit.builders import authentication, identity, selecting
from ztunnel.mesh.authentication import PERMISSIVE, Authentication, Effective, selects
from ztunnel.mesh.manifests.authentication import PeerAuthenticationObject
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.policy import Connection, decide

WEB = {"app": "web"}


def made(*bodies: object) -> Authentication:
    objects = [parse(body, "test") for body in bodies]
    return Authentication([each for each in objects if isinstance(each, PeerAuthenticationObject)], "istio-system")


def plaintext(effective: Effective, port: int) -> bool:
    """Whether plaintext may reach a port; peers with an identity always may."""
    policies = () if effective.policy is None else (effective.policy,)
    assert decide(policies, Connection("10.0.0.1", identity(), "10.0.0.2", port)).allowed
    return decide(policies, Connection("10.0.0.1", None, "10.0.0.2", port)).allowed


def named(effective: Effective) -> str | None:
    return None if effective.policy is None else effective.policy.key


def test_without_any_plaintext_is_welcome() -> None:
    assert made().effective("default", WEB) == PERMISSIVE
    assert made().policies() == []


def test_the_mesh_then_the_namespace_then_the_workload() -> None:
    found = made(
        authentication("mesh", "STRICT", namespace="istio-system"),
        authentication("open", "PERMISSIVE", namespace="open"),
        authentication("web", "STRICT", namespace="open", selector=selecting(app="web")),
        authentication("unset", namespace="default"),
    )
    assert named(found.effective("shop", WEB)) == "PeerAuthentication/istio-system/mesh"
    assert named(found.effective("default", WEB)) == "PeerAuthentication/istio-system/mesh", "UNSET inherits"
    assert found.effective("open", {}) == PERMISSIVE, "a namespace lifts the mesh's STRICT"
    assert named(found.effective("open", WEB)) == "PeerAuthentication/open/web"
    assert found.effective("shop", {}).strict
    assert not plaintext(found.effective("shop", {}), 80)
    assert {policy.key for policy in found.policies()} == {"PeerAuthentication/istio-system/mesh", "PeerAuthentication/open/web"}


def test_the_oldest_counts_then_the_first_by_name() -> None:
    found = made(
        authentication("a", "STRICT", created="2026-01-02T00:00:00Z"),
        authentication("b", "PERMISSIVE", created="2026-01-01T00:00:00Z"),
        authentication("y", "PERMISSIVE", selector=selecting(app="web")),
        authentication("x", "STRICT", selector=selecting(app="web")),
    )
    assert found.effective("default", {}) == PERMISSIVE
    assert named(found.effective("default", WEB)) == "PeerAuthentication/default/x"


def test_ports_that_are_open_under_strict() -> None:
    found = made(
        authentication("x", "STRICT", selector=selecting(app="web"), portLevelMtls={8080: {"mode": "DISABLE"}, 9: {"mode": "UNSET"}})
    )
    effective = found.effective("default", WEB)
    assert plaintext(effective, 8080)
    assert not plaintext(effective, 9)
    assert not plaintext(effective, 80)
    assert not effective.strict


def test_ports_that_are_strict_under_permissive() -> None:
    found = made(authentication("x", selector=selecting(app="web"), portLevelMtls={8080: {"mode": "STRICT"}, 81: {"mode": "PERMISSIVE"}}))
    effective = found.effective("default", WEB)
    assert not plaintext(effective, 8080)
    assert plaintext(effective, 81)
    assert not effective.strict


def test_ports_refine_what_is_inherited() -> None:
    mesh = authentication("mesh", "STRICT", namespace="istio-system")
    refined = made(mesh, authentication("x", selector=selecting(app="web"), portLevelMtls={8080: {"mode": "PERMISSIVE"}}))
    assert plaintext(refined.effective("default", WEB), 8080)
    assert not plaintext(refined.effective("default", WEB), 80)
    assert named(refined.effective("default", WEB)) == "PeerAuthentication/default/x"
    inherited = made(mesh, authentication("x", selector=selecting(app="web"), portLevelMtls={8080: {"mode": "STRICT"}}))
    assert named(inherited.effective("default", WEB)) == "PeerAuthentication/istio-system/mesh", "it adds nothing, so the mesh's is named"


def test_a_permissive_workload_lifts_its_namespaces_strict() -> None:
    found = made(authentication("ns", "STRICT"), authentication("x", "PERMISSIVE", selector=selecting(app="web")))
    assert found.effective("default", WEB) == PERMISSIVE
    assert found.effective("default", {}).strict


def test_selectors_of_the_root_namespace_select_only_there() -> None:
    found = made(authentication("x", "STRICT", namespace="istio-system", selector=selecting(app="web")))
    assert found.effective("istio-system", WEB).strict
    assert found.effective("default", WEB) == PERMISSIVE


def test_selectors() -> None:
    assert selects({}, WEB)
    assert selects(WEB, {"app": "web", "more": "x"})
    assert not selects({"app": "web", "more": "x"}, WEB)
