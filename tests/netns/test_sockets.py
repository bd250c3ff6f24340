"""What the sockets of a pod's namespace are made to do."""

from __future__ import annotations

import socket
from contextlib import closing

from tests.kit.netns import Pod
from ztunnel.node.sockets import KEEPALIVE_SECONDS, make_listeners


def test_a_client_that_vanished_is_noticed(client: Pod) -> None:
    asked: list[tuple[int, int]] = []
    with closing(make_listeners(client.fd, "default/client")) as listeners:
        for listener in listeners:
            listener.settimeout(5)
            with client.connect(("127.0.0.1", listener.getsockname()[1])), listener.accept()[0] as accepted:
                kept = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                asked.append((kept, accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)))
    assert asked[:2] == [(1, KEEPALIVE_SECONDS)] * 2
    assert asked[2][0] == 0, "tunnels are asked by PING"
