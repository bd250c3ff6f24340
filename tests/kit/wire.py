"""Two tunnels joined over loopback in one loop, with applications on both ends: the data plane without namespaces and mesh."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.kit.kernel_tls import KernelRules, KernelSocket
from tests.kit.pki import FakePki
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.endings import TunnelTimes
from ztunnel.dataplane.kernel_tls import KernelSwitch
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.relay import StreamRelay
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone import connect
from ztunnel.hbone.events import RequestReceived
from ztunnel.hbone.handshake import Handshake, TlsContexts
from ztunnel.mesh.errors import LocalError, MeshError

TIMES = TunnelTimes(handshake=5.0, ping=10.0, ping_timeout=20.0)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection over loopback, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for each in (near, far):
        each.setblocking(False)
    return near, far


@dataclass
class Ends:
    """What became of one relay. Implements `RelayOwner`."""

    answered: int = 0
    results: list[MeshError | None] = field(default_factory=list)

    def relay_answered(self) -> None:
        self.answered += 1

    def relay_done(self, error: MeshError | None) -> None:
        self.results.append(error)

    @property
    def is_over(self) -> bool:
        return bool(self.results)


class Side:
    """Owner of one tunnel. The server side answers each request with `status` and gives its stream to a new application socket."""

    def __init__(self, wire: Wire, *, client: bool, times: TunnelTimes, kernel: bool = False) -> None:
        self.wire = wire
        self.switch = KernelSwitch(kernel)
        self.tunnel = Tunnel(wire.loop, wire.scratch, self, times, client=client, switch=self.switch)
        self.closed: list[MeshError | None] = []
        self.ready = 0
        self.idle = 0
        self.status = 200
        self.hold = False
        """Leave requests without an answer."""
        self.apps: list[socket.socket] = []
        """Server side: the applications' ends, in the order of requests."""
        self.ends: list[Ends] = []
        self.relays: list[StreamRelay] = []

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        self.ready += 1

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        if self.status != 200:
            tunnel.mux.respond(request.stream, self.status, end=True)
            tunnel.mark_dirty()
            return
        ends = Ends()
        self.ends.append(ends)
        relay = StreamRelay(tunnel, request.stream, ends, answered=True, optimistic=True)
        self.relays.append(relay)
        tunnel.adopt(request.stream, relay)
        if self.hold:
            return
        near, far = tcp_pair()
        self.apps.append(far)
        tunnel.answer(request.stream)
        relay.attach(near)

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        self.idle += 1

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        self.closed.append(error)


class Wire:
    """A client tunnel and a server tunnel. `own` chooses each side's record layer, `kernel` what its kernel's TLS does, if it has any."""

    def __init__(
        self,
        *,
        own: tuple[bool, bool] = (True, True),
        times: TunnelTimes = TIMES,
        kernel: tuple[KernelRules | None, KernelRules | None] = (None, None),
    ) -> None:
        """`times` are the client's; the server's are long."""
        self.loop = Loop()
        self.scratch = Scratch()
        self.pki = FakePki()
        self.client = Side(self, client=True, times=times, kernel=kernel[0] is not None)
        self.server = Side(self, client=False, times=TIMES, kernel=kernel[1] is not None)
        self.sockets = [sock if rules is None else KernelSocket(sock, rules) for sock, rules in zip(tcp_pair(), kernel, strict=True)]
        client_id, server_id = self.pki.identity("client"), self.pki.identity("server")
        contexts = [TlsContexts(self.pki.credentials(identity)) for identity in (client_id, server_id)]
        accepting = Handshake(contexts[1], server=True, expected=None, own_records=own[1])
        dialling = Handshake(contexts[0], server=False, expected=frozenset({server_id}), own_records=own[0])
        self.server.tunnel.start(self.sockets[1], accepting, ("127.0.0.1", 1))
        self.client.tunnel.start(self.sockets[0], dialling, ("127.0.0.1", 2))

    def open(self, *, optimistic: bool = True) -> tuple[socket.socket, Ends]:
        """A new stream; the application's end of it, and what will become of it."""
        near, far = tcp_pair()
        tunnel = self.client.tunnel
        block = connect.RequestHead("10.0.0.1:80", b"", "").block(("10.0.0.2", 4000), "")
        stream = tunnel.mux.open_block(block)
        ends = Ends()
        relay = StreamRelay(tunnel, stream, ends, answered=False, optimistic=optimistic)
        tunnel.adopt(stream, relay)
        tunnel.mark_dirty()
        relay.attach(near)
        self.client.relays.append(relay)
        self.client.apps.append(far)
        return far, ends

    def run_until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        """Turns the loop until the condition holds; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            for sock in self.sockets:
                if isinstance(sock, KernelSocket):
                    sock.tick()
            self.loop.run_once(0.01)

    def exchange(self, sender: socket.socket, receiver: socket.socket, data: bytes) -> bytes:
        """Sends all of `data` on one socket while reading as much from the other."""
        sent = 0
        received = bytearray()

        def move() -> bool:
            nonlocal sent
            if sent < len(data):
                try:
                    sent += sender.send(data[sent : sent + 262144])
                except BlockingIOError:
                    pass
            try:
                received.extend(receiver.recv(1 << 20))
            except BlockingIOError:
                pass
            return len(received) >= len(data)

        self.run_until(move, 30.0)
        return bytes(received)

    def close(self) -> None:
        for side in (self.client, self.server):
            side.tunnel.close(LocalError("the test is over"))
        for side in (self.client, self.server):
            for app in side.apps:
                app.close()
        # Whoever was waiting for the other side's last word has it now.
        self.run_until(lambda: not self.loop._handlers)
        for sock in self.sockets:
            sock.close()
        self.loop.close()


def received(sock: socket.socket) -> bytes | None:
    """What has arrived; None if nothing has, b"" at the end of the stream."""
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return None
