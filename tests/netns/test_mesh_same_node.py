"""Two meshed pods of one node: encrypted unless the operator allows otherwise; judged and accounted for in either case."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.kit import apps
from tests.kit.mesh import DEFAULT_SETTINGS, Mesh
from tests.kit.polling import eventually
from tests.kit.traffic import accept, source_of, talk

APP = 8080
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module", name="mesh", params=["encrypt", "plaintext"])
def fixture_mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with Mesh(nodes=1, settings=f"{DEFAULT_SETTINGS}tunnel: {{same_node: {request.param}}}\n") as mesh:
        mesh.way = "HBONE" if request.param == "encrypt" else "LOCAL"  # type: ignore[attr-defined]  # what the tests below compare with
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("intruder", node=0, ambient=True)
        mesh.pod("server", node=0, ambient=True)
        mesh.settle()
        yield mesh


def way(mesh: Mesh) -> str:
    return mesh.way  # type: ignore[attr-defined, no-any-return]  # set by the fixture


@FAMILIES
def test_bytes_and_source_address_arrive(mesh: Mesh, family: int) -> None:
    client, server = mesh.pods["client"], mesh.pods["server"]
    with server.listener(APP) as listener, client.connect((server.address(family), APP)) as near:
        near.sendall(b"!")
        with accept(listener) as far:
            assert far.recv(1) == b"!"
            talk(near, far)
            assert source_of(far) == client.address(family)
            rows = {row["direction"]: row for row in mesh.agents[0].rows("connections")}
            assert {row["protocol"] for row in rows.values()} == {way(mesh)}
            assert rows["inbound"]["source_identity"] == str(mesh.identity("client"))
            assert rows["outbound"]["peer_identity"] == str(mesh.identity("server"))
            near.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
            far.sendall(b"late")
            assert apps.read_exactly(near, 4) == b"late"
    eventually(lambda: not mesh.agents[0].rows("connections"))


def test_policies_hold(mesh: Mesh) -> None:
    client, intruder, server = (mesh.pods[name] for name in ("client", "intruder", "server"))
    mesh.policy("only-client", {"action": "ALLOW", "rules": [{"from": [{"source": {"serviceAccounts": ["client"]}}]}]})
    mesh.settle()
    try:
        with apps.Echo(server, APP), client.connect((server.v4, APP)) as live:
            assert apps.ping(live)
            assert apps.outcome(intruder, (server.v4, APP)) == "reset"
            mesh.policy("nobody", {"action": "DENY", "rules": [{}]})
            eventually(lambda: not apps.ping(live))
    finally:
        mesh.clear("AuthorizationPolicy")
    mesh.settle()


def test_both_sides_are_counted(mesh: Mesh) -> None:
    client, server = mesh.pods["client"], mesh.pods["server"]
    agent = mesh.agents[0]
    reporters = ("source", "destination")
    before = [agent.metric("istio_tcp_received_bytes_total", reporter=reporter) for reporter in reporters]
    with apps.Echo(server, APP):
        assert apps.call(client, (server.v4, APP), b"x" * 1000) == b"x" * 1000
    eventually(
        lambda: (
            [agent.metric("istio_tcp_received_bytes_total", reporter=reporter) for reporter in reporters]
            == [count + 1000 for count in before]
        )
    )


def test_an_address_that_is_not_the_pods_hides_nobody(mesh: Mesh) -> None:
    """An application may bind to `::1` and connect outwards: the rules redirect it before the kernel objects."""
    client, server = mesh.pods["client"], mesh.pods["server"]
    with server.listener(APP) as listener, client.connect((server.v6, APP), ("::1", 0)) as near, accept(listener) as far:
        talk(near, far)
        assert source_of(far) == client.v6
    mesh.policy("not-from-there", {"action": "DENY", "rules": [{"from": [{"source": {"ipBlocks": [client.v6]}}]}]})
    mesh.settle()
    try:
        with apps.Echo(server, APP), client.tcp_socket(socket.AF_INET6, ("::1", 0)) as near:
            assert not reaches(near, (server.v6, APP))
    finally:
        mesh.clear("AuthorizationPolicy")
    mesh.settle()


def reaches(sock: socket.socket, to: tuple[str, int]) -> bool:
    """Whether an echo server answers."""
    try:
        sock.connect(to)
    except ConnectionResetError:
        return False
    return apps.ping(sock)
