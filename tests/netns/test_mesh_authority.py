"""A mesh whose agents get their certificates from `ztunnel ca`: a replica beside each agent, one root, keys that stay where they are."""

from __future__ import annotations

from contextlib import ExitStack

from tests.kit import apps
from tests.kit.authorities import agents_as_pods, replica, tell
from tests.kit.mesh import Mesh
from tests.kit.polling import eventually

APP = 8080


def test_tunnels_are_made_with_certificates_of_an_authority_and_outlive_it() -> None:
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh(nodes=2, start=False))
        agents_as_pods(mesh)
        replicas = [replica(mesh, stack, number) for number in range(2)]
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        tell(mesh)
        eventually((mesh.root / "roots.pem").exists, within=60)
        mesh.start()
        mesh.settle()
        with apps.Echo(server, APP):
            assert apps.outcome(client, (server.v4, APP)) == "echoed"
            assert mesh.agents[0].rows("tunnels")
            old = stack.enter_context(client.connect((server.v4, APP)))
            assert apps.ping(old)
            replicas[0].says(f"identity={mesh.identity('client')}")
            assert "ns/default/sa/server" not in replicas[0].log()
            assert not (mesh.root / "ca").exists()
            for each in replicas:
                assert each.end() == 0
            # Nobody to ask: what there is goes on, and who is new waits, with the reason in the agent's problems.
            assert apps.outcome(client, (server.v4, APP)) == "echoed"
            newcomer = mesh.pod("newcomer", node=0, ambient=True)
            tell(mesh)
            identity = str(mesh.identity("newcomer"))
            eventually(lambda: any(identity in each and "cannot connect" in each for each in mesh.agents[0].problems), within=60)
            replica(mesh, stack, 0)
            eventually(lambda: apps.outcome(newcomer, (server.v4, APP)) == "echoed", within=60)
            assert apps.ping(old)
