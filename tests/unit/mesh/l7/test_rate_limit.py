"""How an annotation says rate limits, and which routes they end up on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.builders import Json, mesh, namespace, pod, service_manifest
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.l7.rate_limit import parse_rate_limits
from ztunnel.mesh.l7.routes import RateLimit
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, parse


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("100/s", [RateLimit(100, 1.0, 100)]),
        ("6000/m burst 50", [RateLimit(6000, 60.0, 50)]),
        (" 10/h  per-client ", [RateLimit(10, 3600.0, 10, per_client=True)]),
        ("10/s per-client burst 20", [RateLimit(10, 1.0, 20, per_client=True)]),
        ("100/s burst 200, 10/s per-client", [RateLimit(100, 1.0, 200), RateLimit(10, 1.0, 10, per_client=True)]),
    ],
)
def test_limits(text: str, limits: list[RateLimit]) -> None:
    assert parse_rate_limits(text, "") == tuple(limits)
    assert parse_rate_limits(text, "Service a/b") == tuple(replace(each, origin="Service a/b") for each in limits)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "begins like"),
        ("100", "begins like"),
        ("0/s", "begins like"),
        ("-1/s", "begins like"),
        ("1.5/s", "begins like"),
        ("100/d", "begins like"),
        ("9999999999/s", "begins like"),
        ("100/s,", "begins like"),
        ("100/s burst", "burst is followed"),
        ("100/s burst 0", "burst is followed"),
        ("100/s burst per-client", "burst is followed"),
        ("100/s per-user", "'per-user' is neither"),
        (",".join(["1/s"] * 9), "at most 8"),
    ],
)
def test_what_is_no_limit(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_rate_limits(text, "")


def annotated(body: Json, text: object) -> Json:
    metadata = body["metadata"]
    assert isinstance(metadata, dict)
    return {**body, "metadata": {**metadata, "annotations": {"ztunnel.io/local-rate-limit": text}}}


SERVICE = service_manifest("web", "10.96.0.1", selector={"app": "web"}, ports=[{"port": 80, "name": "http"}])
ROUTE: Json = {
    "apiVersion": "gateway.networking.k8s.io/v1",
    "kind": "HTTPRoute",
    "metadata": {"name": "r", "namespace": "default"},
    "spec": {
        "parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
        "rules": [{"matches": [{"path": {"value": "/a"}}], "backendRefs": [{"name": "web", "port": 80}]}],
    },
}


@pytest.mark.parametrize("body", [SERVICE, ROUTE], ids=lambda body: str(body["kind"]))
@pytest.mark.parametrize("text", ["100 per second", 7])
def test_a_bad_annotation_is_refused_by_name(body: Json, text: object) -> None:
    with pytest.raises(ManifestError, match=r"local-rate-limit"):
        parse(annotated(body, text), "test")


def test_a_service_limits_all_of_its_routes_and_a_route_itself() -> None:
    bodies = (namespace("default"), annotated(SERVICE, "100/s"), annotated(ROUTE, "5/s"), pod("a", "10.0.0.1", labels={"app": "web"}))
    objects = {key(each): each for each in (parse(body, "test") for body in bodies)}
    bound = Bound(frozenset({"default/web.default.svc.cluster.local"}))
    config = derive_proxy(objects, mesh(*bodies), MeshOptions(), ObjectKey("Gateway", "default", "waypoint"), bound)
    (route,) = config.services[0].ports[0].routes
    assert route.rate_limits == (
        RateLimit(100, 1.0, 100, origin="Service default/web"),
        RateLimit(5, 1.0, 5, origin="HTTPRoute default/r"),
    )
