"""What the sockets of a pod's namespace are made to do."""

from __future__ import annotations

import socket
import struct
from contextlib import closing

from tests.kit.netns import Pod
from ztunnel.dataplane.sockets import renew, unbind
from ztunnel.node.sockets import IP_BIND_ADDRESS_NO_PORT, IP_TRANSPARENT, KEEPALIVE_SECONDS, make_listeners, make_sockets


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


def test_a_socket_that_lives_again_is_still_the_proxys(client: Pod) -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_MARK),
        (socket.IPPROTO_IP, IP_TRANSPARENT),
        (socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    ]
    (sock,) = make_sockets(client.fd, socket.AF_INET, 1)
    made = [sock.getsockopt(*option) for option in options]
    with client.listener(8080, "127.0.0.1") as server, sock:
        server.settimeout(5)
        for source_ip in ("127.0.0.9", None, "127.0.0.8"):
            if source_ip is not None:
                sock.bind((source_ip, 0))
            sock.connect_ex(server.getsockname())
            accepted, peer = server.accept()
            assert peer[0] == (source_ip or "127.0.0.1")
            accepted.close()
            sock.shutdown(socket.SHUT_WR)
            assert renew(sock)
            unbind(sock)
            assert [sock.getsockopt(*option) for option in options] == made
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)
