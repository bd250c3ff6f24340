"""A data-plane worker: builds the object graph, listens to its supervisor, runs the loop.

Composition root of the worker process, which `worker_process` starts. It knows the mesh only through the channel, holds
no policy of its own and dies with its supervisor: when the channel ends, everything ends, and the rules in the pods refuse new
connections until somebody listens again.
"""

from __future__ import annotations

import logging
import random
import socket
from collections import deque
from collections.abc import Iterator

from ztunnel.dataplane.addresses import text
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.channel import (
    Activity,
    AddPod,
    Answer,
    Certificate,
    ChannelError,
    Configure,
    Decoder,
    Drain,
    Drained,
    Flows,
    Message,
    NeedSockets,
    PodAdded,
    PodRemoved,
    Query,
    RemovePod,
    Sockets,
    Update,
    Withdraw,
    encode,
)
from ztunnel.dataplane.flow import Direction, TunnelState
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop
from ztunnel.dataplane.sockets import Acceptor, Farewell, adopt
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.handshake import BadCredentials, Credentials, TlsContexts
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.index import Index
from ztunnel.proxy.connections import ConnectionTable
from ztunnel.proxy.inbound import Inbound, judge
from ztunnel.proxy.ledger import Ledger
from ztunnel.proxy.outbound import Outbound
from ztunnel.proxy.passthrough import Passthrough
from ztunnel.proxy.pods import Node, Pod
from ztunnel.proxy.pool import Pool
from ztunnel.proxy.stock import SocketStock
from ztunnel.runtime import logs

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 18
_ANCILLARY = socket.CMSG_SPACE(256 * 4)
_TELL_SECONDS = 0.05
"""News wait this long to travel together."""
_MAX_UNSENT = 1 << 24
"""Bytes that wait for a supervisor that does not read; beyond, flow records are dropped and counted."""
_MAX_WAITING_FOR_SOCKETS = 4096


class Worker:
    """Everything in the worker process. Handles the channel's socket as one more handler of the loop."""

    def __init__(self, channel: socket.socket) -> None:
        self._loop = Loop()
        self._channel = channel
        self._decoder = Decoder(to_worker=True)
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._ledger = Ledger(self._tell_soon, self._tell_flows)
        self._lost = 0
        self._telling = False
        self._told_active: dict[str, int] = {}
        self._told_bugs = 0
        self._draining = False
        self._leaving = False
        self._node: Node | None = None
        self._pool: Pool | None = None
        channel.setblocking(False)
        self._loop.watch(channel.fileno(), self)

    def run(self) -> None:
        """Until the supervisor goes away or a drain has ended."""
        self._loop.run()
        self._channel.close()

    # The channel

    def on_event(self, events: int) -> None:
        if events & WRITABLE:
            self._send_more()
        if events & (READABLE | HANGUP):
            self._receive()

    def on_bug(self) -> None:
        """A message was not handled whole: this worker's picture of the mesh may be wrong, so it must not go on."""
        log.critical("a message of the supervisor could not be handled: leaving")
        self._loop.stop()

    def _receive(self) -> None:
        while True:
            try:
                data, ancillary, flags, _address = self._channel.recvmsg(_READ_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, ancillary, flags = b"", [], 0
            if not data:
                self._loop.stop()
                return
            short = bool(flags & socket.MSG_CTRUNC)
            if short and self._node is not None:
                # Somebody's connections use up our descriptors: that must not cost everybody theirs.
                self._node.hit("descriptors")
            try:
                for received in self._decoder.feed(data, _descriptors(ancillary), short=short):
                    self._handle(received.message, received.descriptors)
            except ChannelError as error:
                log.critical("supervisor broke the channel", extra=logs.fields(error=error))
                self._loop.stop()
                return

    def _handle(self, message: object, descriptors: tuple[int, ...]) -> None:
        match message:
            case Configure():
                self._configure(message)
            case Update():
                self._update(message)
            case Certificate():
                self._certificate(message)
            case Withdraw():
                self._require_node().contexts.pop(message.identity, None)
            case AddPod():
                self._add_pod(message, descriptors)
            case RemovePod():
                self._remove_pod(message)
            case Sockets():
                self._sockets(message, descriptors)
            case Drain():
                self._drain(message)
            case Query():
                self._answer(message)
            case _:
                raise ChannelError(f"unexpected {type(message).__name__}")

    def _send(self, *messages: Message) -> None:
        """Says something; several things that are said at once wake the supervisor once."""
        frame = b"".join([encode(message) for message in messages])
        self._unsent.append(memoryview(frame))
        self._unsent_bytes += len(frame)
        if len(self._unsent) == 1:
            self._send_more()

    def _send_more(self) -> None:
        while self._unsent:
            try:
                sent = self._channel.send(self._unsent[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._loop.stop()
                return
            self._unsent_bytes -= sent
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                self._unsent.popleft()
        if self._leaving:
            self._loop.stop()

    # News

    def _tell_soon(self) -> None:
        if not self._telling:
            self._telling = True
            self._loop.call_later(_TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        self._telling = False
        news = [*self._flows_to_tell(), *self._activity_to_tell()]
        if news:
            self._send(*news)

    def _tell_flows(self) -> None:
        if news := [*self._flows_to_tell()]:
            self._send(*news)

    def _flows_to_tell(self) -> Iterator[Flows]:
        news = self._ledger.take()
        if self._unsent_bytes > _MAX_UNSENT:
            self._lost += sum(each.records for each in news)
        elif news or self._lost:
            yield Flows(news, self._lost)
            self._lost = 0

    def _activity_to_tell(self) -> Iterator[Activity]:
        node = self._node
        if node is None:
            return
        active = node.connections.active
        if refused := node.scratch.waiting.take_refused():
            node.limits["waiting_bytes"] += refused
        changed = {uid: active.get(uid, 0) for uid in {*active, *self._told_active} if active.get(uid, 0) != self._told_active.get(uid, 0)}
        if changed or node.limits or self._loop.bugs != self._told_bugs:
            yield Activity(changed, dict(node.limits), self._loop.bugs - self._told_bugs)
            self._told_active = dict(active)
            self._told_bugs = self._loop.bugs
            node.limits.clear()

    def _progress(self) -> None:
        node = self._require_node()
        node.connections.tell_progress()
        for pod in node.pods.values():
            pod.ipv4.trim()
            pod.ipv6.trim()
        self._tell_soon()
        self._loop.call_later(node.settings.report_seconds, self._progress)

    def _answer(self, query: Query) -> None:
        node, pool = self._require_node(), self._pool
        now = self._loop.now
        outbound = [(Direction.OUTBOUND, uid, tunnel) for uid, tunnel in (pool.tunnels() if pool else [])]
        inbound = [(Direction.INBOUND, pod.uid, tunnel) for pod in node.pods.values() for tunnel in pod.inbound]
        tunnels = tuple(_tunnel_state(direction, uid, tunnel, now, node.settings) for direction, uid, tunnel in outbound + inbound)
        self._send(Answer(query.id, tuple(connection.state(now, node.settings.prefix) for connection in node.connections.live()), tunnels))

    # The mesh

    def _require_node(self) -> Node:
        if self._node is None:
            raise ChannelError("a message came before Configure")
        return self._node

    def _configure(self, settings: Configure) -> None:
        table = ConnectionTable(self._loop, self._ledger, settings.max_connections)
        self._node = Node(self._loop, Scratch(), Index(), settings, table, random.Random().randrange)
        self._pool = Pool(self._node)
        self._loop.call_later(settings.report_seconds, self._progress)

    def _update(self, update: Update) -> None:
        node = self._require_node()
        generation = node.index.policies_generation
        node.index.apply(update.delta)
        assert self._pool is not None
        for uid in update.delta.removed_workloads:
            self._pool.retire_workload(uid)
        if node.index.policies_generation != generation:
            self._judge_again(node)

    def _judge_again(self, node: Node) -> None:
        """Live connections are judged by today's policies, by the function that admitted them."""
        for connection in node.connections.live():
            facts = connection.facts
            if facts.direction is not Direction.INBOUND or connection.is_over:
                continue
            workload = node.index.workload(facts.pod_uid)
            if workload is None:
                continue
            denied = judge(node, workload, connection, "policy change")
            if denied is not None:
                connection.abort(denied)

    def _certificate(self, message: Certificate) -> None:
        node = self._require_node()
        credentials = Credentials(message.identity, message.chain_pem, message.key_pem, message.roots_pem)
        try:
            node.contexts[message.identity] = TlsContexts(credentials)
        except BadCredentials as error:
            log.error("certificate cannot be used", extra=logs.fields(identity=message.identity, error=error))

    # Pods

    def _add_pod(self, message: AddPod, descriptors: tuple[int, ...]) -> None:
        node = self._require_node()
        listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        assert self._pool is not None
        if len(listeners) != 3:
            # Not answered: the supervisor asks again later. Without a listener the pod's connections are refused, not carried in plain.
            log.error("pod came without all of its listeners", extra=logs.fields(uid=message.uid, listeners=len(listeners)))
            for listener in listeners:
                listener.close()
            return
        pod = node.pods.get(message.uid)
        if pod is not None and pod.identity != message.identity:
            self._close_pod(pod)
            pod = None
        if pod is None:
            pod = Pod(message.uid, message.identity, self._stock(message.uid, ipv6=False), self._stock(message.uid, ipv6=True))
            node.pods[pod.uid] = pod
        # One that was draining and is wanted again keeps its connections.
        for acceptor in pod.acceptors:
            acceptor.close()
        pod.acceptors.clear()
        inbound = Inbound(node)
        served: tuple[Outbound | Passthrough | Inbound, ...] = (Outbound(node, self._pool, inbound), Passthrough(node), inbound)
        for listener, service in zip(listeners, served, strict=True):
            pod.acceptors.append(self._acceptor(node, pod, listener, service))
        self._send(PodAdded(pod.uid))

    def _acceptor(self, node: Node, pod: Pod, listener: socket.socket, service: Outbound | Passthrough | Inbound) -> Acceptor:
        return Acceptor(self._loop, listener, lambda sock, peer: service.accept(pod, sock, peer), lambda: _count(node, "descriptors"))

    def _stock(self, uid: str, *, ipv6: bool) -> SocketStock:
        def need(count: int) -> None:
            self._send(NeedSockets(uid, ipv6, count))

        return SocketStock(need, _MAX_WAITING_FOR_SOCKETS, lambda: self._loop.now)

    def _sockets(self, message: Sockets, descriptors: tuple[int, ...]) -> None:
        # Said, not asked of the kernel: three system calls for each.
        family = socket.AF_INET6 if message.ipv6 else socket.AF_INET
        sockets = [adopt(family, descriptor) for descriptor in descriptors]
        pod = self._require_node().pods.get(message.uid)
        if pod is None:
            for sock in sockets:
                sock.close()
            return
        (pod.ipv6 if message.ipv6 else pod.ipv4).receive(sockets)

    def _remove_pod(self, message: RemovePod) -> None:
        node = self._require_node()
        pod = node.pods.get(message.uid)
        if pod is not None and message.drain:
            # Nothing new is redirected here; peers that have not yet heard that the pod left the mesh still come in on 15008.
            for acceptor in pod.acceptors[:2]:
                acceptor.close()
        elif pod is not None:
            del node.pods[message.uid]
            self._close_pod(pod)
        # First: whether the pod still has connections decides when its rules may go.
        self._send(*self._activity_to_tell(), PodRemoved(message.uid))

    def _close_pod(self, pod: Pod, reason: str = "the pod left the mesh") -> None:
        node = self._require_node()
        pod.is_gone = True
        gone = LocalError(reason)
        for acceptor in pod.acceptors:
            acceptor.close()
        for connection in node.connections.live():
            if connection.facts.pod_uid == pod.uid:
                connection.abort(gone)
        for tunnel in list(pod.inbound):
            tunnel.abort(gone)
        if self._pool is not None:
            self._pool.drop_pod(pod.uid)
        pod.ipv4.close()
        pod.ipv6.close()

    # The end

    def _drain(self, message: Drain) -> None:
        """Stop accepting, tell the peers, wait for the connections, cut what is left at the deadline."""
        node = self._require_node()
        if self._draining:
            return
        self._draining = True
        for pod in node.pods.values():
            for acceptor in pod.acceptors:
                acceptor.close()
            for tunnel in list(pod.inbound):
                tunnel.go_away()
        if self._pool is not None:
            self._pool.retire_all()
        deadline = self._loop.now + message.seconds
        self._await_end(node, deadline)

    def _await_end(self, node: Node, deadline: float) -> None:
        # What a connection sent last may still be on its way when it is over: a socket that its process's end closes can be reset.
        parting = any(tunnel.is_parting for pod in node.pods.values() for tunnel in pod.inbound)
        if (len(node.connections) or parting or self._loop.has(Farewell)) and self._loop.now < deadline:
            self._loop.call_later(_TELL_SECONDS, lambda: self._await_end(node, deadline))
            return
        cut = len(node.connections)
        for pod in list(node.pods.values()):
            self._close_pod(pod, "it outlived the drain deadline of the agent")
        self._tell()
        self._leaving = True
        self._send(Drained(cut))


def _count(node: Node, limit: str) -> None:
    node.hit(limit)


def _tunnel_state(direction: Direction, uid: str, tunnel: Tunnel, now: float, settings: Configure) -> TunnelState:
    return TunnelState(
        id=settings.prefix + tunnel.id,
        direction=direction,
        pod_uid=uid,
        peer=text(tunnel.peer_address),
        peer_identity=str(tunnel.peer or ""),
        streams=len(tunnel.relays),
        bytes_sent=tunnel.bytes_sent,
        bytes_received=tunnel.bytes_received,
        age_seconds=now - tunnel.opened_at,
        records="kernel" if tunnel.is_in_kernel else "own" if settings.own_records else "openssl",
        state=tunnel.stage,
    )


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.extend(memoryview(raw[: len(raw) - len(raw) % 4]).cast("i"))
    return found


def serve(channel: socket.socket) -> None:
    """Runs a worker on a connected Unix stream socket until its supervisor goes away or it has drained."""
    Worker(channel).run()
