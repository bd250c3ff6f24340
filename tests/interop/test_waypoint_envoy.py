"""Our waypoint between real Envoys: one tunnels requests of curl into it, one stands in front of the application that it sends them to."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.kit import envoy
from tests.kit.mesh import Mesh
from tests.kit.polling import eventually
from tests.kit.waypoints import HttpApp, Waypoint
from ztunnel.ca.authority import Authority
from ztunnel.ca.root import open_root
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId

VIP = "10.96.0.50"
TUNNEL_IN = 9000
"""Port of Envoy's plain listener in its pod: what connects there is sent through a tunnel to the waypoint."""
BODY = b"x" * 300_000
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 300000\r\nx-app: yes\r\n\r\n" + BODY


def identity(account: str) -> SpiffeId:
    return SpiffeId("cluster.local", "default", account)


def credentials(mesh: Mesh, account: str) -> Credentials:
    """Of the mesh's own CA."""
    root = open_root(mesh.root / "ca", "cluster.local", time.time())
    return Authority(root).issue(identity(account), time.time())


@pytest.fixture(scope="module", name="mesh")
def fixture_mesh() -> Iterator[Mesh]:
    """No agent runs: Envoy stands in for them in the client's pod and in the application's."""
    with Mesh(nodes=1, start=False) as mesh:
        mesh.pod("client", node=0, ambient=True)
        app = mesh.pod("app", node=0, ambient=True)
        with Waypoint(mesh, node=0) as waypoint:
            waypoint.service("web", "app", VIP, [{"name": "http", "port": 80, "targetPort": 8080}])
            eventually(lambda: waypoint.serves(VIP), within=60, saying="the waypoint serves the service")
            client = envoy.hbone_client(
                credentials(mesh, "client"),
                peer=(waypoint.pod.v4, 15008),
                authority=f"{VIP}:80",
                server=identity("waypoint"),
                listen=("0.0.0.0", TUNNEL_IN),
            )
            server = envoy.hbone_server(
                credentials(mesh, "app"), app=("127.0.0.1", 8080), client=identity("waypoint"), listen=(app.v4, 15008)
            )
            with (
                envoy.running(client, prefix=("nsenter", f"--net={mesh.pods['client'].path}")),
                envoy.running(server, prefix=("nsenter", f"--net={app.path}")),
                HttpApp(app, 8080, ANSWER),
            ):
                yield mesh


def curl(mesh: Mesh, *words: str) -> bytes:
    client = mesh.pods["client"]
    command = ["nsenter", f"--net={client.path}", "curl", "-sS", "--max-time", "60", *words, f"http://127.0.0.1:{TUNNEL_IN}/x"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_requests_of_curl_through_two_envoys(mesh: Mesh, version: str) -> None:
    got = curl(mesh, version, "-i", "--next", version, "-i")
    head, _, body = got.partition(b"\r\n\r\n")
    assert b" 200" in head.splitlines()[0]
    assert b"server: istio-envoy" in head
    assert b"x-app: yes" in head
    assert body[: len(BODY)] == BODY


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_an_upload_of_curl(mesh: Mesh, version: str) -> None:
    got = curl(
        mesh, version, "-X", "POST", "-H", "content-type: text/plain", "-H", "expect:", "-d", "", "-o", "/dev/null", "-w", "%{http_code}"
    )
    assert got == b"200"


def test_policies_know_envoys_identity(mesh: Mesh) -> None:
    target = {"kind": "Service", "group": "", "name": "web"}
    principals = ["cluster.local/ns/default/sa/client"]
    rules = [{"from": [{"source": {"principals": principals}}]}]
    mesh.policy("no", {"targetRefs": [target], "action": "DENY", "rules": rules})
    eventually(lambda: curl(mesh, "-o", "/dev/null", "-w", "%{http_code}") == b"403", within=60, saying="the policy is in force")
    mesh.clear("AuthorizationPolicy")
    eventually(lambda: curl(mesh, "-o", "/dev/null", "-w", "%{http_code}") == b"200", within=60, saying="and out of it")
