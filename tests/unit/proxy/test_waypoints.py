"""Connections to a waypoint, and those that a foreign proxy gets as one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from tests.kit.builders import service
from tests.kit.proxies import SETTINGS, LoopbackNode
from tests.kit.wire import received
from ztunnel.dataplane.flow import Direction
from ztunnel.hbone.proxy_protocol import header
from ztunnel.mesh.workloads import Sandwich, WaypointRef

VIP = "10.96.0.1"


class Waypoint:
    """A client, and a foreign proxy behind which there is a service."""

    def __init__(self, sandwich: Sandwich | None) -> None:
        # Between neighbours without a tunnel nobody could tell the proxy what was dialled.
        self.node = LoopbackNode(msgspec.structs.replace(SETTINGS, same_node_plaintext=True))
        self.client, self.proxy = self.node.pod("client"), self.node.pod("proxy")
        front = service("waypoint", "10.96.0.9", ports={80: 80}, behind=[self.proxy.workload])
        reference = WaypointRef("default/waypoint", self.proxy.workload.identity, ("10.96.0.9",), (front.hostname,))
        self.node.apply(
            replace(self.proxy.workload, sandwich=sandwich), front, replace(service("web", VIP, ports={80: 8080}), waypoint=reference)
        )

    def connect(self) -> socket.socket:
        return self.node.connect(self.client, (VIP, 80))

    def first_bytes(self, listener: socket.socket, near: socket.socket) -> bytes:
        """What the proxy reads before it answers."""
        near.send(b"request")
        far = self.node.accepted(listener)
        found = bytearray()

        def all_there() -> bool:
            found.extend(received(far) or b"")
            return found.endswith(b"request")

        self.node.run_until(all_there)
        far.send(b"answer")
        self.node.run_until(lambda: received(near) == b"answer")
        far.close()
        return bytes(found)


@pytest.fixture(name="make")
def fixture_make() -> Iterator[type[Waypoint]]:
    made: list[Waypoint] = []

    class Made(Waypoint):
        def __init__(self, sandwich: Sandwich | None) -> None:
            super().__init__(sandwich)
            made.append(self)

    yield Made
    for each in made:
        each.node.close()


def test_a_foreign_proxy_reads_what_was_dialled_and_by_whom(make: type[Waypoint]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        waypoint = make(Sandwich("PROXY", listener.getsockname()[1]))
        near = waypoint.connect()
        read = waypoint.first_bytes(listener, near)
        inbound = next(each.facts for each in waypoint.node.table.live() if each.facts.direction is Direction.INBOUND)
        assert read == header(inbound.source, (VIP, 80), str(waypoint.client.workload.identity)) + b"request"
        assert inbound.target == f"{VIP}:80"
    near.close()


def test_without_a_header_it_gets_plain_bytes_and_the_record_names_the_waypoint(make: type[Waypoint]) -> None:
    waypoint = make(Sandwich("NONE", 8181))
    listener = waypoint.node.listen(waypoint.proxy, 8181)
    near = waypoint.connect()
    listed = {each.facts.direction: each.state(waypoint.node.loop.now).waypoint for each in waypoint.node.table.live()}
    assert listed == {Direction.OUTBOUND: "default/waypoint"}
    assert waypoint.first_bytes(listener, near) == b"request"
    near.close()
    waypoint.node.run_until(lambda: any(each.path.direction is Direction.OUTBOUND for each in waypoint.node.ended()))
    path, _ = waypoint.node.way(Direction.OUTBOUND)
    assert (path.waypoint, path.target, path.destination) == ("default/waypoint", f"{VIP}:80", (waypoint.proxy.ip, 15008))
    assert (path.destination_uid, path.service) == (waypoint.proxy.uid, "web.default.svc.cluster.local")


def test_a_pod_that_is_no_waypoint_does_not_play_one(make: type[Waypoint]) -> None:
    waypoint = make(None)
    near = waypoint.connect()
    with pytest.raises(ConnectionResetError):
        waypoint.node.run_until(lambda: received(near) == b"never")
    assert any("ip mismatch" in each.error for each in waypoint.node.ended())


def test_nothing_listens_where_the_annotation_says(make: type[Waypoint]) -> None:
    waypoint = make(Sandwich("PROXY", 1))
    near = waypoint.connect()
    with pytest.raises(ConnectionResetError):
        waypoint.node.run_until(lambda: received(near) == b"never")
    assert any("127.0.0.1:1" in each.error for each in waypoint.node.ended())
