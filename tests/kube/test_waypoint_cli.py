"""`ztunnel waypoint` in a Kubernetes cluster: a real API server, and no controller but the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from tests.kit.kube_api import ApiServer
from ztunnel.cli.main import main
from ztunnel.mesh.manifests.tree import strings

GATEWAYS = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways"


@pytest.fixture(scope="module", name="api")
def fixture_api() -> Iterator[ApiServer]:
    with ApiServer.started() as api:
        api.crds()
        api.namespace("shop", {"istio.io/dataplane-mode": "ambient"})
        spec = {"ports": [{"port": 80}]}
        api.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}, "spec": spec})
        yield api


def lines(api: ApiServer, *words: str, code: int = 0) -> list[str]:
    result = CliRunner().invoke(main, ["waypoint", *words, "--kubeconfig", str(api.admin_kubeconfig)])
    assert result.exit_code == code, result.output
    return result.output.splitlines()


def programmed(api: ApiServer, name: str) -> None:
    """What the controller would say."""
    condition = {
        "type": "Programmed",
        "status": "True",
        "reason": "Programmed",
        "message": "ready",
        "lastTransitionTime": "2030-01-01T00:00:00Z",
    }
    api.request("PATCH", f"{GATEWAYS}/{name}/status", {"status": {"conditions": [condition]}})


def test_its_whole_life(api: ApiServer) -> None:
    assert lines(api, "list", "-n", "shop") == ["No waypoints found."]
    applied = lines(api, "apply", "-n", "shop", "--enroll-namespace", "--enroll-service", "web")
    assert applied == [
        "waypoint shop/waypoint applied",
        'namespace shop labeled with "istio.io/use-waypoint: waypoint"',
        'service web labeled with "istio.io/use-waypoint: waypoint"',
    ]
    assert strings(api.request("GET", "/api/v1/namespaces/shop"), "metadata", "labels")["istio.io/use-waypoint"] == "waypoint"
    programmed(api, "waypoint")
    again = lines(api, "apply", "-n", "shop", "--for", "all", "--wait", "--waypoint-timeout", "30")
    assert again == ["waypoint shop/waypoint applied"]
    assert [line.split() for line in lines(api, "list", "-A")[1:]] == [["shop", "waypoint", "default", "all", "True"]]
    shown = lines(api, "status", "-n", "shop")
    assert ["waypoint", "shop", "waypoint", "True", "Programmed"] in [line.split()[:5] for line in shown]
    left = "still asks for waypoint, and is refused until that label goes: kubectl label"
    assert lines(api, "delete", "-n", "shop", "--all") == [
        "waypoint shop/waypoint deleted",
        f"Warning: namespace shop {left} namespace shop istio.io/use-waypoint-",
        f"Warning: service web {left} service web -n shop istio.io/use-waypoint-",
    ]
    assert lines(api, "delete", "-n", "shop", "waypoint", code=1) == ['Error from server (NotFound): waypoint "shop/waypoint" not found']


def test_what_is_not_there_is_said(api: ApiServer) -> None:
    (said,) = lines(api, "apply", "-n", "shop", "--enroll-service", "nobody", code=1)
    assert said == 'Error from server (NotFound): services "nobody" not found'


def test_a_missing_kubeconfig_is_said() -> None:
    result = CliRunner().invoke(main, ["waypoint", "list", "--kubeconfig", "/nonexistent/config"])
    assert result.exit_code == 1
    assert "/nonexistent/config" in result.output
