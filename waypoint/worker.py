"""A worker of the L7 proxy: builds the object graph, listens to its supervisor, runs the loop.

Composition root of the worker process (`python -m waypoint.worker --channel-fd N`). It knows the mesh only through the channel, and dies
with its supervisor. It holds no privilege and may open sockets, but no files: it dials endpoints itself.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import ssl
from collections import deque

from waypoint.data.changes import applied
from waypoint.data.channel import (
    ChangeConfig,
    ConfigureWaypoint,
    KeySetFetched,
    Listen,
    Resolved,
    ServeConfig,
    ToWorker,
    Unlisten,
    WantAddresses,
    WorkerActivity,
    WorkerState,
)
from waypoint.data.proxy import Proxy
from waypoint.data.tls import load_system_roots
from ztunnel.dataplane.channel import Certificate, ChannelError, Decoder, Drain, Drained, Message, Query, Withdraw, encode
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop
from ztunnel.hbone.handshake import BadCredentials, Credentials, TlsContexts
from ztunnel.hbone.rehearsal import rehearse
from ztunnel.runtime import logs
from ztunnel.runtime.worker_main import begin, confine_for_good

log = logging.getLogger("waypoint.worker")  # as a program this module is called __main__

_READ_BYTES = 1 << 18
_ANCILLARY = socket.CMSG_SPACE(256 * 4)
_TELL_SECONDS = 0.05
_MAX_ROOTS_BYTES = 16 << 20


class Worker:
    """Everything in the worker process. Handles the channel's socket as one more handler of the loop."""

    def __init__(self, channel: socket.socket) -> None:
        self._loop = Loop()
        self._channel = channel
        self._decoder = Decoder(to_worker=True, kinds=ToWorker)
        self._unsent: deque[memoryview] = deque()
        self._told_bugs = 0
        self._draining = False
        self._leaving = False
        self._proxy: Proxy | None = None
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
        """A message was not handled whole: this worker's picture may be wrong, so it must not go on."""
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
            try:
                for received in self._decoder.feed(data, _descriptors(ancillary), short=bool(flags & socket.MSG_CTRUNC)):
                    self._handle(received.message, received.descriptors)
            except ChannelError as error:
                log.critical("supervisor broke the channel", extra=logs.fields(error=error))
                self._loop.stop()
                return

    def _handle(self, message: object, descriptors: tuple[int, ...]) -> None:
        match message:
            case ConfigureWaypoint():
                self._proxy = Proxy(self._loop, message, random.Random())
                self._proxy.engine.names.ask = lambda host: self._send(WantAddresses(host))
                self._loop.call_later(_TELL_SECONDS, self._tell)
            case ServeConfig():
                self._required().serve(message.config)
            case ChangeConfig():
                self._change(message)
            case Certificate():
                self._certificate(message)
            case Withdraw():
                self._required().identity.renew(None)
            case KeySetFetched():
                self._required().key_sets.put(message.source, message.jwks)
            case Resolved():
                self._required().resolved(message.name, message.port, message.addresses)
            case Listen():
                self._required().listen(message.port, [socket.socket(fileno=descriptor) for descriptor in descriptors])
            case Unlisten():
                self._required().unlisten(message.port)
            case Drain():
                self._drain(message)
            case Query():
                self._send(WorkerState(message.id, json.dumps(self._required().state())))
            case _:
                raise ChannelError(f"unexpected {type(message).__name__}")

    def _change(self, change: ChangeConfig) -> None:
        proxy = self._required()
        if proxy.config is None:
            raise ChannelError("a change came before there was a configuration")
        proxy.serve(applied(proxy.config, change))

    def _required(self) -> Proxy:
        if self._proxy is None:
            raise ChannelError("a message came before ConfigureWaypoint")
        return self._proxy

    def _certificate(self, message: Certificate) -> None:
        credentials = Credentials(message.identity, message.chain_pem, message.key_pem, message.roots_pem)
        try:
            self._required().identity.renew(TlsContexts(credentials))
        except BadCredentials as error:
            log.error("certificate cannot be used", extra=logs.fields(identity=message.identity, error=error))

    def _send(self, message: Message) -> None:
        self._unsent.append(memoryview(encode(message)))
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
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                self._unsent.popleft()
        if self._leaving:
            self._loop.stop()

    def _tell(self) -> None:
        proxy = self._required()
        limits = proxy.take_limits()
        bugs, self._told_bugs = self._loop.bugs - self._told_bugs, self._loop.bugs
        if limits or bugs:
            self._send(WorkerActivity(limits, bugs))
        if not self._unsent and (counted := proxy.take_counted()) is not None:
            self._send(counted)
        self._loop.call_later(1.0, self._tell)

    # The end

    def _drain(self, message: Drain) -> None:
        """Stop accepting, tell the peers, wait for what is under way, cut what is left at the deadline."""
        if self._draining:
            return
        self._draining = True
        self._required().drain()
        self._await_end(self._loop.now + message.seconds)

    def _await_end(self, deadline: float) -> None:
        proxy = self._required()
        left = proxy.live()
        if left and self._loop.now < deadline:
            self._loop.call_later(_TELL_SECONDS, lambda: self._await_end(deadline))
            return
        proxy.close()
        if (counted := proxy.take_counted()) is not None:
            self._send(counted)
        self._leaving = True
        self._send(Drained(left))


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.extend(memoryview(raw[: len(raw) - len(raw) % 4]).cast("i"))
    return found


def serve(channel: socket.socket) -> None:
    """Runs a worker on a connected Unix stream socket until its supervisor goes away or it has drained."""
    Worker(channel).run()


def main() -> None:
    """Entry point of the worker process."""
    arguments = begin("python -m waypoint.worker", "Worker of the L7 proxy; started by `waypoint run`.")
    for own_records in (True, False):
        rehearse(own_records)
    _load_system_roots()
    confine_for_good(log, arguments.parent, frozenset(("socket",)))
    serve(socket.socket(fileno=arguments.channel_fd))


def _load_system_roots() -> None:
    """What this host trusts: for clusters whose TLS asks for it. Behind `confine` no file can be opened."""
    file = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    try:
        with open(file, "rb") as opened:
            load_system_roots(opened.read(_MAX_ROOTS_BYTES))
    except OSError as error:
        log.warning("this host's certificate authorities cannot be read", extra=logs.fields(file=file, error=error))


if __name__ == "__main__":
    main()
