"""A connection that is over leaves nothing for the garbage collector, however it ended: each of its rounds is a pause for everybody.

Here and not with the unit tests because a compiled closure keeps cycles that an interpreted one does not: these run on both forms.
"""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest

from tests.kit.builders import ANYBODY, deny
from tests.kit.proxies import SETTINGS, LoopbackNode, LoopbackPod
from tests.kit.wire import received
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.sockets import reset
from ztunnel.mesh.rules import Match

_WARM_UP = 3
"""Connections before the first that counts: tunnels are made, memos filled."""
_COUNTED = 4


@dataclass
class Scene:
    """A client in the mesh, its applications' peers, and what a test calls a connection."""

    node: LoopbackNode
    client: LoopbackPod
    server: LoopbackPod
    outsider: LoopbackPod
    app: socket.socket
    """The server's application."""
    outside: socket.socket

    def exchange(self, near: socket.socket, listener: socket.socket) -> socket.socket:
        near.send(b"request")
        far = self.node.accepted(listener)
        self.node.run_until(lambda: received(far) == b"request")
        far.send(b"answer")
        self.node.run_until(lambda: received(near) == b"answer")
        return far

    def to(self, destination: Address, listener: socket.socket) -> None:
        """One that ends well."""
        near = self.node.connect(self.client, destination)
        far = self.exchange(near, listener)
        near.close()
        self.node.run_until(lambda: received(far) == b"")
        far.close()

    def turned_away(self, near: socket.socket) -> None:
        self.node.run_until(lambda: _is_reset(near))
        near.close()


def _is_reset(sock: socket.socket) -> bool:
    try:
        received(sock)
    except ConnectionResetError:
        return True
    return False


def _tunnelled(scene: Scene) -> None:
    scene.to((scene.server.ip, 8080), scene.app)


def _cut(scene: Scene) -> None:
    near = scene.node.connect(scene.client, (scene.server.ip, 8080))
    far = scene.exchange(near, scene.app)
    reset(near)
    scene.node.run_until(lambda: _is_reset(far))


def _refused(scene: Scene) -> None:
    scene.turned_away(scene.node.connect(scene.client, (scene.server.ip, 8081)))


def _denied(scene: Scene) -> None:
    # Just connected: no request is answered without the policy.
    policy = deny("nobody", Match(destination_ports=(8082,)))
    scene.node.apply(policy)
    scene.turned_away(scene.node.connect(scene.client, (scene.server.ip, 8082)))


def _plain(scene: Scene) -> None:
    scene.to((scene.outsider.ip, 8080), scene.outside)


def _plain_refused(scene: Scene) -> None:
    scene.turned_away(scene.node.connect(scene.client, (scene.outsider.ip, 8081)))


def _passed_through(scene: Scene) -> None:
    near = scene.node.plain(scene.server, (scene.server.ip, 8080), scene.outsider.ip)
    far = scene.exchange(near, scene.app)
    far.close()
    near.close()


def _plain_denied(scene: Scene) -> None:
    scene.node.apply(deny("no-strangers", Match(not_principals=ANYBODY, destination_ports=(8083,))))
    scene.turned_away(scene.node.plain(scene.server, (scene.server.ip, 8083), scene.outsider.ip))


KINDS: dict[str, Callable[[Scene], None]] = {
    "tunnelled": _tunnelled,
    "cut": _cut,
    "refused": _refused,
    "denied": _denied,
    "plain": _plain,
    "plain refused": _plain_refused,
    "passed through": _passed_through,
    "plain denied": _plain_denied,
}


@pytest.fixture(name="scene", params=[False, True], ids=["tunnels", "neighbours in plain"])
def fixture_scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    node = LoopbackNode(msgspec.structs.replace(SETTINGS, same_node_plaintext=request.param))
    client, server, outsider = node.pod("client"), node.pod("server"), node.pod("outsider", hbone=False)
    yield Scene(node, client, server, outsider, node.listen(server), node.listen(outsider))
    node.close()


def left_over(scene: Scene, connect: Callable[[Scene], None]) -> Counter[str]:
    """The types of what only the collector could free after some connections."""
    for _ in range(_WARM_UP):
        once(scene, connect)
    gc.collect()
    was = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.disable()
    try:
        for _ in range(_COUNTED):
            once(scene, connect)
        gc.collect()
        return Counter(type(each).__qualname__ for each in gc.garbage)
    finally:
        gc.enable()
        gc.set_debug(was)
        gc.garbage.clear()


def once(scene: Scene, connect: Callable[[Scene], None]) -> None:
    connect(scene)
    scene.node.run_until(lambda: not len(scene.node.table))
    # The round in which the last one ends still holds it.
    scene.node.loop.run_once(0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_for_the_collector(scene: Scene, kind: str) -> None:
    assert left_over(scene, KINDS[kind]) == Counter()
