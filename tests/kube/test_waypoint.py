"""A waypoint whose Gateway a user applies to a real API server: the controller makes its objects and rights, agents send traffic through
it, and it does what the published kinds say. The test plays the Deployment controller and the kubelet."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.kit.builders import authorization, gateway
from tests.kit.kube_api import ApiServer, Json
from tests.kit.kube_mesh import KubeMesh, Relay
from tests.kit.netns import Pod
from tests.kit.polling import eventually
from tests.kit.waypoints import GATEWAY_NAME, HttpApp, Waypoint
from ztunnel.mesh.manifests.tree import Tree, branches, text

VIP, WAYPOINT_VIP = "10.96.0.80", "10.96.0.15"
APP = 8080
SECONDS = 120.0
ROLES = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "gateway-rights.yaml"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

pytestmark = pytest.mark.netns


class KubeWaypoint(Waypoint):
    """One that reads the API server, as the service account that the controller has made for it."""

    def __init__(self, mesh: KubeMesh, name: str) -> None:
        self.mesh = mesh
        self.name = name
        self.pod = mesh.pod(name, node=1, account=name, labels={GATEWAY_NAME: name})
        self.directory = mesh.root / f"waypoint-{name}"
        self.directory.mkdir()
        self.socket = self.directory / "waypoint.sock"
        self.process = None
        self._relay = Relay(self.pod, mesh.api.port, (mesh.api.address, mesh.api.port))
        (self.directory / "kubeconfig").write_text(mesh.api.kubeconfig(mesh.api.account("default", name)))

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        self._relay.close()

    def _sources(self) -> str:
        return f"{{kubernetes: true, kubeconfig: {self.directory / 'kubeconfig'}, redirection_status: annotation}}"


@contextlib.contextmanager
def controlled(api: ApiServer, directory: Path) -> Iterator[None]:
    """With a controller at work, which may do everything: its rights are another test's."""
    config, log = directory / "controller.yaml", directory / "controller.log"
    settings: Json = {
        "kubernetes": {"kubeconfig": str(api.admin_kubeconfig), "namespace": "default"},
        "admin": {"address": "127.0.0.1", "metrics_port": 0, "readiness_port": 0},
    }
    config.write_text(yaml.safe_dump(settings))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ZTUNNEL_", "KUBE"))}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "ztunnel", "controller", "--config", str(config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield
    finally:
        process.kill()
        process.wait(SECONDS)
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module", name="mesh")
def fixture_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeMesh]:
    with ApiServer.started() as api:
        api.crds()
        api.kubectl("apply", "-f", str(ROLES))
        with controlled(api, tmp_path_factory.mktemp("controller")), KubeMesh(api) as mesh:
            mesh.pod("client", node=0, ambient=True)
            mesh.pod("server", node=1, ambient=True)
            mesh.settle()
            yield mesh


def served(mesh: KubeMesh, path: str) -> Tree:
    return mesh.api.request("GET", path)


def ask(client: Pod, path: str) -> str:
    """The status line of an answer; empty when there is none."""
    with client.connect((VIP, 80)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n".encode())
        try:
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode().partition("\r\n")[0]
        except ConnectionResetError:
            return ""


def is_answered(client: Pod, path: str, status: str) -> None:
    eventually(lambda: status in ask(client, path), within=SECONDS, saying=f"{path} is answered {status}")


def test_from_a_gateway_to_requests_that_are_judged_and_routed(mesh: KubeMesh) -> None:
    api, client, server = mesh.api, mesh.pods["client"], mesh.pods["server"]
    api.apply(gateway("waypoint"))
    account = "/api/v1/namespaces/default/serviceaccounts/waypoint"
    eventually(lambda: api.request("GET", account), within=SECONDS, saying="the service account is made")
    with KubeWaypoint(mesh, "waypoint"), HttpApp(server, APP, ANSWER) as app:
        ports = [{"name": "http", "port": 80, "targetPort": APP}]
        mesh.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web", "namespace": "default", "labels": {"istio.io/use-waypoint": "waypoint"}},
                "spec": {"clusterIP": VIP, "clusterIPs": [VIP], "selector": {"app": "server"}, "ports": ports},
            }
        )
        status: Json = {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1}
        api.request("PATCH", "/apis/apps/v1/namespaces/default/deployments/waypoint/status", {"status": status})
        place = "/apis/gateway.networking.k8s.io/v1/namespaces/default/gateways/waypoint"
        eventually(lambda: branches(served(mesh, place), "status", "addresses"), within=SECONDS, saying="the Gateway has addresses")
        is_answered(client, "/", "200 OK")
        assert any(b"x-request-id: " in head for head in app.heads), "the request went past the waypoint"

        rule = {"to": [{"operation": {"paths": ["/admin*"]}}]}
        target = {"group": "", "kind": "Service", "name": "web"}
        api.apply(authorization("no-admin", action="DENY", targetRefs=[target], rules=[rule]))
        is_answered(client, "/admin", "403 Forbidden")
        is_answered(client, "/", "200 OK")
        redirect = {"type": "RequestRedirect", "requestRedirect": {"hostname": "elsewhere.example"}}
        api.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": "web", "namespace": "default"},
                "spec": {
                    "parentRefs": [{**target, "port": 80}],
                    "rules": [
                        {"matches": [{"path": {"type": "PathPrefix", "value": "/old"}}], "filters": [redirect]},
                        {"backendRefs": [{"name": "web", "port": 80}]},
                    ],
                },
            }
        )
        is_answered(client, "/old/page", "302 Found")
        is_answered(client, "/new", "200 OK")
        route = "/apis/gateway.networking.k8s.io/v1/namespaces/default/httproutes/web"

        def conditions() -> dict[str, str]:
            parents = branches(served(mesh, route), "status", "parents")
            return {text(each, "type"): text(each, "status") for parent in parents for each in branches(parent, "conditions")}

        wanted = {"Accepted": "True", "ResolvedRefs": "True", "ResolvedWaypoints": "True"}
        eventually(lambda: conditions() == wanted, within=SECONDS, saying="the route is told")

        # Losing the API server changes nothing for what there is.
        api.stop()
        assert "200 OK" in ask(client, "/new")
        assert "403 Forbidden" in ask(client, "/admin")
        api.start()
        api.delete("/apis/security.istio.io/v1/namespaces/default/authorizationpolicies/no-admin")
        is_answered(client, "/admin", "200 OK")
