"""A node's proxy in one loop and one process: pods with their own loopback addresses, real sockets, real tunnels, no namespaces.

    node = LoopbackNode()
    client, server = node.pod("client"), node.pod("server")
    with node.listener(server) as app: near = node.connect(client, (server.ip, app.port)) ...

What nftables does in a real pod is said here instead: `Redirected` is an accepted socket that knows its original destination. Sockets
for dialling are plain ones, given to whoever runs short of them in the next round, as the supervisor does it.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.kit.builders import index as index_of
from tests.kit.pki import FakePki
from tests.kit.wire import tcp_pair
from ztunnel.dataplane.addresses import SO_ORIGINAL_DST, Address
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.channel import Configure
from ztunnel.dataplane.flow import Direction, FlowFailure, FlowNews, FlowPath
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.sockets import Acceptor, adopt, reset_on_close
from ztunnel.hbone.handshake import Credentials, TlsContexts
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import Flag, LocalError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.ports import INBOUND_HBONE
from ztunnel.mesh.rules import Policy
from ztunnel.mesh.workloads import Protocol, Service, Workload
from ztunnel.node.sockets import IP_BIND_ADDRESS_NO_PORT
from ztunnel.proxy.connections import ConnectionTable
from ztunnel.proxy.inbound import Inbound
from ztunnel.proxy.ledger import Ledger
from ztunnel.proxy.outbound import Outbound
from ztunnel.proxy.passthrough import Passthrough
from ztunnel.proxy.pods import Node, Pod
from ztunnel.proxy.pool import Pool
from ztunnel.proxy.stock import SocketStock

_numbers = itertools.count(1)

SETTINGS = Configure(
    prefix="",
    own_records=True,
    kernel_records=False,
    optimistic_data=True,
    same_node_plaintext=False,
    idle_seconds=60,
    max_streams=200,
    tunnels_per_peer=4,
    handshake_seconds=5,
    connect_seconds=5,
    response_seconds=5,
    report_seconds=5,
    max_connections=1000,
    max_handshakes_per_pod=100,
    ping_seconds=10,
    ping_timeout_seconds=20,
)


class Redirected(socket.socket):
    """An accepted socket whose client dialled `destination`; None: nobody redirected it."""

    destination: Address | None = None

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:  # type: ignore[override]  # three overloads in one
        if option != SO_ORIGINAL_DST or level not in (socket.SOL_IP, socket.IPPROTO_IPV6):
            return super().getsockopt(level, option, size) if size else super().getsockopt(level, option)
        if self.destination is None:
            raise FileNotFoundError("no conntrack entry")
        ip, port = self.destination
        if ":" in ip:
            return struct.pack("!HHI16sI", 10, port, 0, socket.inet_pton(socket.AF_INET6, ip), 0)
        return struct.pack("!HH4s8x", 2, port, socket.inet_aton(ip))


@dataclass
class LoopbackPod:
    """One pod, and the application's side of its sockets."""

    pod: Pod
    workload: Workload
    listener: socket.socket
    asked: list[int] = field(default_factory=list)
    given: int = 0
    """Batches of sockets."""

    @property
    def ip(self) -> str:
        return self.workload.addresses[0]

    @property
    def uid(self) -> str:
        return self.workload.uid


@dataclass(frozen=True)
class Told:
    """One record of a connection, as the ledger has it."""

    path: FlowPath
    opened: bool
    closed: bool
    up_bytes: int
    down_bytes: int
    number: int = 0
    source: Address = ("", 0)
    trace: str = ""
    total_up_bytes: int = 0
    total_down_bytes: int = 0
    flag: Flag = Flag.NONE
    error: str = ""


def told(news: FlowNews) -> Told:
    """The only record of some news."""
    assert news.records == 1
    ends = [*news.ends, *news.failures]
    assert news.changed == (news.opened != len(ends))
    assert (news.with_up, news.with_down) == (bool(news.up_bytes), bool(news.down_bytes))
    record = Told(news.path, bool(news.opened), bool(ends), news.up_bytes, news.down_bytes)
    for end in ends:
        record = replace(record, number=end.number, source=(end.ip, end.port), trace=end.trace)
        record = replace(record, total_up_bytes=end.up_bytes, total_down_bytes=end.down_bytes)
        if isinstance(end, FlowFailure):
            record = replace(record, flag=end.flag, error=end.error)
    return record


class LoopbackNode:
    """Everything that a worker shares among its pods, and the pods. Close it in the end."""

    def __init__(self, settings: Configure = SETTINGS) -> None:
        self.loop = Loop()
        self.pki = FakePki()
        self.records: list[Told] = []
        self.news = 0
        self.ledger = Ledger(self._take_news, lambda: None)
        self.table = ConnectionTable(self.loop, self.ledger, settings.max_connections)
        self.node = Node(self.loop, Scratch(), index_of(), settings, self.table, random.Random(1).randrange)
        self.pool = Pool(self.node)
        self.inbound, self.passthrough = Inbound(self.node), Passthrough(self.node)
        self.outbound = Outbound(self.node, self.pool, self.inbound)
        self.pods: list[LoopbackPod] = []
        self.sockets_to_be_had = True
        self._apps: list[socket.socket] = []
        # Tests of several people on one machine do not meet: the pods of each node have a network of their own in 127.0.0.0/8.
        self._network = f"127.{os.getpid() % 200 + 20}.{next(_numbers) % 250 + 1}"

    def _now(self) -> float:
        return self.loop.now

    def _take_news(self) -> None:
        self.news += 1
        self.records += map(told, self.ledger.take())

    # The mesh

    def pod(self, name: str, *, hbone: bool = True, certified: bool = True) -> LoopbackPod:
        """A pod that is served, with an identity of its name."""
        ip = f"{self._network}.{len(self.pods) + 1}"
        identity = self.pki.identity(name)
        protocol = Protocol.HBONE if hbone else Protocol.TCP
        workload = Workload(f"uid-{name}", name, "default", identity, "node", (ip,), protocol)
        self.apply(workload)
        if certified:
            self.certify(identity, self.pki.credentials(identity))
        asked: list[int] = []
        pod = Pod(
            workload.uid,
            identity,
            SocketStock(lambda count: self._need(made, count), 4, self._now),
            SocketStock(asked.append, 4, self._now),
        )
        listener = socket.create_server((ip, INBOUND_HBONE), backlog=64)
        pod.acceptors.append(Acceptor(self.loop, listener, lambda sock, peer: self.inbound.accept(pod, sock, peer), lambda: None))
        self.node.pods[pod.uid] = pod
        made = LoopbackPod(pod, workload, listener, asked)
        self.pods.append(made)
        return made

    def certify(self, identity: SpiffeId, credentials: Credentials | None) -> None:
        """What `Certificate` and `Withdraw` do."""
        if credentials is None:
            self.node.contexts.pop(identity, None)
        else:
            self.node.contexts[identity] = TlsContexts(credentials)

    def apply(self, *values: Workload | Service | Policy) -> None:
        """More of the mesh."""
        self.node.index.apply(
            Delta(
                workloads=tuple(each for each in values if isinstance(each, Workload)),
                services=tuple(each for each in values if isinstance(each, Service)),
                policies=tuple(each for each in values if isinstance(each, Policy)),
            )
        )

    def remove(self, *workloads: Workload) -> None:
        """Workloads that are no more."""
        uids = tuple(each.uid for each in workloads)
        self.node.index.apply(Delta(removed_workloads=uids))
        for uid in uids:
            self.pool.retire_workload(uid)

    def used_up(self, pod: LoopbackPod) -> int:
        """How many of the sockets that came for a pod are not there any more."""
        self.run_until(lambda: pod.given == len(pod.asked))
        return 4 * pod.given - len(pod.pod.ipv4._sockets)

    def _need(self, pod: LoopbackPod, count: int) -> None:
        pod.asked.append(count)
        self.loop.call_later(0, lambda: self._give(pod, count))

    def _give(self, pod: LoopbackPod, count: int) -> None:
        made = [adopt(socket.AF_INET, socket.socket().detach()) for _ in range(min(count, 4) if self.sockets_to_be_had else 0)]
        for sock in made:
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
            sock.setblocking(False)
            reset_on_close(sock)
        pod.given += 1
        pod.pod.ipv4.receive(made)

    # Traffic

    def listen(self, pod: LoopbackPod, port: int = 8080) -> socket.socket:
        """The application of a pod."""
        listener = socket.create_server((pod.ip, port), backlog=64)
        listener.setblocking(False)
        self._apps.append(listener)
        return listener

    def captured(self, destination: Address | None) -> tuple[socket.socket, Redirected]:
        """A client's socket, and what a listener would accept of it."""
        near, far = tcp_pair()
        redirected = Redirected(fileno=far.detach())
        redirected.setblocking(False)
        redirected.destination = destination
        self._apps += [near, redirected]
        return near, redirected

    def connect(self, pod: LoopbackPod, destination: Address | None) -> socket.socket:
        """A connection that the pod's application opens: the application's end."""
        near, accepted = self.captured(destination)
        self.outbound.accept(pod.pod, accepted, (pod.ip, near.getsockname()[1]))
        return near

    def plain(self, pod: LoopbackPod, destination: Address | None, source: str) -> socket.socket:
        """A plaintext connection into the pod: the client's end."""
        near, accepted = self.captured(destination)
        self.passthrough.accept(pod.pod, accepted, (source, near.getsockname()[1]))
        return near

    def accepted(self, listener: socket.socket) -> socket.socket:
        """The next connection that the application accepts."""
        found: list[socket.socket] = []

        def came() -> bool:
            try:
                found.append(listener.accept()[0])
            except BlockingIOError:
                return False
            return True

        self.run_until(came)
        found[0].setblocking(False)
        self._apps.append(found[0])
        return found[0]

    def ended(self) -> list[Told]:
        """The records of connections that are over."""
        return [record for record in self.records if record.closed]

    def way(self, direction: Direction) -> tuple[FlowPath, Told]:
        """The last connection in this direction that is over, and its path."""
        return next((record.path, record) for record in reversed(self.ended()) if record.path.direction is direction)

    def run_until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        """Turns the loop until the condition holds; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"the condition did not come true: {[record.error for record in self.ended()]}"
            self.loop.run_once(0.01)

    def run_for(self, seconds: float) -> None:
        """Turns the loop for so long on its own clock."""
        over: list[bool] = []
        self.loop.call_later(seconds, lambda: over.append(True))
        self.run_until(lambda: over, seconds + 5)

    def close(self) -> None:
        """Ends everything; asserts that no handler met a bug, that no connection is left and that nothing is watched any more."""
        over = LocalError("the test is over")
        for connection in self.table.live():
            connection.abort(over)
        for pod in self.pods:
            for acceptor in pod.pod.acceptors:
                acceptor.close()
            for tunnel in list(pod.pod.inbound):
                tunnel.abort(over)
            self.pool.drop_pod(pod.uid)
            pod.pod.ipv4.close()
            pod.pod.ipv6.close()
        for app in self._apps:
            app.close()
        # Last words: each side waits for the other's.
        self.run_until(lambda: not self.loop._handlers)
        left = len(self.table), self.pool.tunnels(), dict(self.table.active), dict(self.table.towards)
        self.loop.close()
        assert self.loop.bugs == 0
        assert left == (0, [], {}, {})
