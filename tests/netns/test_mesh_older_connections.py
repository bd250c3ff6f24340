"""A pod joins the mesh with connections that say nothing while it does: they go on all the same, and new ones are tunnelled."""

from __future__ import annotations

import socket

import pytest

from tests.kit import apps
from tests.kit.mesh import Mesh
from tests.kit.polling import eventually
from tests.kit.traffic import accept, talk

APP = 8080
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@FAMILIES
@pytest.mark.parametrize("who", [("client",), ("server",), ("client", "server")], ids=["client", "server", "both"])
def test_an_idle_connection_outlives_enrolment(family: int, who: tuple[str, ...]) -> None:
    with Mesh(nodes=2) as mesh:
        client, server = mesh.pod("client", node=0), mesh.pod("server", node=1)
        mesh.settle()
        with server.listener(APP) as listener, client.connect((server.address(family), APP)) as near, accept(listener) as far:
            for name in who:
                mesh.enrol(name)
            mesh.settle()
            # Until everything is redirected: the guard that lets older connections alone is gone.
            eventually(lambda: not any("tcp flags" in mesh.pods[name].command("nft", "list", "ruleset") for name in who))
            talk(near, far)
            talk(far, near)
            assert not any(agent.rows("connections") for agent in mesh.agents)
            near.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
        with apps.Echo(server, APP + 1):
            assert apps.outcome(client, (server.address(family), APP + 1)) == "echoed"


def test_a_strict_pod_keeps_no_plaintext_connection() -> None:
    with Mesh(nodes=2) as mesh:
        client, server = mesh.pod("client", node=0), mesh.pod("server", node=1)
        mesh.policy("strict", {"mtls": {"mode": "STRICT"}}, kind="PeerAuthentication")
        mesh.settle()
        with server.listener(APP) as listener, client.connect((server.v4, APP)) as near, accept(listener) as far:
            talk(near, far)
            mesh.enrol("server")
            mesh.settle()
            eventually(lambda: not apps.ping(near))
