"""A gRPC server of unary calls on trio: TLS, h2, and a method per path.

Everything that a caller controls is bounded: connections, their life and their silence, streams, headers, messages, the time in which a
call must arrive and the time in which its answer must be taken. HTTP/2's rules are h2's; this module keeps time and count.
Invariant: an error of ours costs one call, an error of the caller's one connection.
"""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from ztunnel.rpc.messages import CONTENT_TYPE, Messages, RpcError, Status, framed, status_headers, timeout_of

log = logging.getLogger(__name__)

_CHUNK = 16 << 10


@dataclass(frozen=True, slots=True)
class Bounds:
    """What callers may make the server hold or wait for."""

    connections: int = 1024
    """One more ends the one that has been idle longest; where none is idle it is closed itself."""
    connections_per_address: int = 64
    """Likewise among those of one address, so that no caller takes the places of all."""
    held_bytes: int = 256 << 10
    """Of the calls under way on one connection, together; one that would be more is refused. Never less than one call may have."""
    streams: int = 32
    """Calls under way on one connection."""
    header_bytes: int = 32 << 10
    """Of one call; tokens take one to three KiB."""
    message_bytes: int = 64 << 10
    handshake_seconds: float = 10.0
    idle_seconds: float = 60.0
    """A connection without calls is closed after this."""
    life_seconds: float = 600.0
    """A connection takes no further calls after this, so that callers spread over replicas."""
    calls: int = 1000
    """On one connection."""
    resets: int = 100
    """Calls that a caller may take back on one connection (CVE-2023-44487)."""
    request_seconds: float = 10.0
    """From a call's headers to its last byte."""
    answer_seconds: float = 20.0
    """For the method; a shorter deadline of the caller counts. The same again for the caller to take the answer."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a method is given."""

    message: bytes
    metadata: dict[str, str]
    """Names in lower case; the first of several values. Without HTTP/2's and gRPC's own."""
    peer: str
    """The caller's IP address."""


Method = Callable[[Call], Awaitable[bytes]]
"""Gives the answer's message, or raises RpcError."""


@dataclass(slots=True)
class RpcServer:
    """Serves methods by their path.

    Args:
        methods: `/package.Service/Method` → method.
        context: asked for each connection, so that a certificate is renewed without a restart.
        on_bug: told of each error that a method let escape, after the log.
        on_limit: told of each connection that was one too many.
    """

    methods: Mapping[str, Method]
    context: Callable[[], ssl.SSLContext]
    bounds: Bounds = field(default_factory=Bounds)
    on_bug: Callable[[], None] = lambda: None
    on_limit: Callable[[], None] = lambda: None
    open_connections: int = 0
    is_draining: bool = False
    idle: dict[trio.CancelScope, str] = field(default_factory=dict, init=False)
    """Connections without calls, longest first, and whose they are."""
    _of_address: Counter[str] = field(default_factory=Counter, init=False)
    _emptied: trio.Event = field(default_factory=trio.Event, init=False)

    async def run(self, listeners: Sequence[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. "Started" means that connections are accepted. The listeners are closed at the end."""
        await trio.serve_listeners(self.serve, list(listeners), task_status=_Announce(task_status))

    async def drain(self) -> None:
        """Ends every connection that has no call, the others after their last answer, and returns when none is left."""
        self.is_draining = True
        while self.idle:
            self._evict("")
        if self.open_connections:
            await self._emptied.wait()

    async def serve(self, transport: trio.SocketStream) -> None:
        """Serve one connection to its end, and close it."""
        try:
            peer = _peer(transport)
            if peer is None or not self._has_room(peer):
                return
            self.open_connections += 1
            self._of_address[peer] += 1
            try:
                await self._serve(transport, peer)
            finally:
                self.open_connections -= 1
                self._of_address[peer] -= 1
                if not self._of_address[peer]:
                    del self._of_address[peer]
                if self.is_draining and not self.open_connections:
                    self._emptied.set()
        finally:
            await trio.aclose_forcefully(transport)

    def _has_room(self, peer: str) -> bool:
        """For one more connection of that address; if need be an idle one ends for it."""
        if self._of_address[peer] >= self.bounds.connections_per_address:
            self.on_limit()
            return self._evict(peer)
        if self.open_connections >= self.bounds.connections:
            self.on_limit()
            return self._evict("")
        return True

    async def _serve(self, transport: trio.SocketStream, peer: str) -> None:
        stream = trio.SSLStream(transport, self.context(), server_side=True, https_compatible=True)
        try:
            with trio.CancelScope() as shaking, trio.fail_after(self.bounds.handshake_seconds):
                self.idle[shaking] = peer
                try:
                    await stream.do_handshake()
                finally:
                    self.idle.pop(shaking, None)
            if not shaking.cancelled_caught and stream.selected_alpn_protocol() == "h2":
                await _Connection(self, stream, peer).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            # Strangers' handshakes, and callers that went away or kept us waiting: theirs to do, and nothing of ours is lost.
            log.debug("connection ended", extra={"fields": {"peer": peer}})
        except* Exception:
            # The boundary that keeps what nobody foresaw to its connection; beyond it is everybody's listener.
            log.exception("connection failed", extra={"fields": {"peer": peer}})
            self.on_bug()

    def _evict(self, peer: str) -> bool:
        """Ends the connection that is idle longest, of one address or of all."""
        longest = next((scope for scope, owner in self.idle.items() if not peer or owner == peer), None)
        if longest is None:
            return False
        del self.idle[longest]
        longest.cancel()
        return True


def _peer(transport: trio.SocketStream) -> str | None:
    """The caller's IP address; None when it has gone before we looked."""
    try:
        return str(transport.socket.getpeername()[0]).removeprefix("::ffff:")
    except OSError:
        return None


class _Announce:
    """`serve_listeners` reports its listeners; our own callers are told only that it has started."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status

    def started(self, value: object = None) -> None:
        del value
        self._status.started()


@dataclass(slots=True)
class _Stream:
    """One call under way."""

    headers: dict[bytes, bytes]
    messages: Messages
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    received: list[bytes] = field(default_factory=list)
    held_bytes: int = 0
    ended: trio.Event = field(default_factory=trio.Event)
    problem: RpcError | None = None


class _Connection:
    """One caller's connection: a reader, and a task for each call."""

    def __init__(self, server: RpcServer, stream: trio.SSLStream[trio.SocketStream], peer: str) -> None:
        self._server = server
        self._bounds = server.bounds
        self._stream = stream
        self._peer = peer
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self._http.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self._bounds.streams,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: self._bounds.header_bytes,
            },
        )
        self._sending = trio.Lock()
        self._streams: dict[int, _Stream] = {}
        self._changed = trio.Event()
        """Set when a window may have opened."""
        self._calls = 0
        self._resets = 0
        self._held_bytes = 0
        self._over = False
        self._waiting: trio.CancelScope | None = None

    async def run(self) -> None:
        self._http.initiate_connection()
        with trio.move_on_after(self._bounds.life_seconds + self._bounds.request_seconds + 2 * self._bounds.answer_seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._retire)
                try:
                    await self._flush()
                    await self._read(nursery)
                except h2.exceptions.ProtocolError as error:
                    log.info("caller broke HTTP/2", extra={"fields": {"peer": self._peer, "error": str(error)}})
                    # h2 has put its GOAWAY into the output.
                    await self._flush()
                nursery.cancel_scope.cancel()

    @property
    def _is_over(self) -> bool:
        return self._over or self._server.is_draining

    async def _retire(self) -> None:
        await trio.sleep(self._bounds.life_seconds)
        self._over = True
        if self._waiting is not None and not self._streams:
            self._waiting.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        code = h2.errors.ErrorCodes.NO_ERROR
        while not (self._is_over and not self._streams):
            data = await self._receive()
            if not data:
                break
            for event in self._http.receive_data(data):
                self._take(event, nursery)
            await self._flush()
            self._over = self._over or self._calls >= self._bounds.calls
            if self._resets > self._bounds.resets:
                code = h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
                break
        # Not before the last answer: clients are known that understand nothing after a GOAWAY. Calls that come meanwhile are refused in
        # the way that tells a caller to try another connection.
        self._http.close_connection(code)
        await self._flush()

    async def _receive(self) -> bytes:
        """Empty: the caller has ended, was silent for too long, or must make room."""
        with trio.CancelScope() as scope:
            if not self._streams:
                self._server.idle[scope] = self._peer
                scope.deadline = trio.current_time() + self._bounds.idle_seconds
            self._waiting = scope
            try:
                return bytes(await self._stream.receive_some(_CHUNK))
            finally:
                self._waiting = None
                self._server.idle.pop(scope, None)
        return b""

    def _take(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int() as number, headers=headers):
                if self._is_over or headers is None:
                    self._http.reset_stream(number, h2.errors.ErrorCodes.REFUSED_STREAM)
                    return
                self._calls += 1
                found: dict[bytes, bytes] = {}
                for name, value in headers:
                    found.setdefault(bytes(name), bytes(value))
                call = self._streams[number] = _Stream(found, Messages(self._bounds.message_bytes))
                self._hold(call, sum(len(name) + len(value) for name, value in found.items()))
                nursery.start_soon(self._serve, number, self._streams[number])
            case h2.events.DataReceived(stream_id=int() as number, data=data, flow_controlled_length=int() as length):
                self._http.acknowledge_received_data(length, number)
                self._feed(number, bytes(data or b""))
            case h2.events.StreamEnded(stream_id=int() as number):
                if number in self._streams:
                    self._streams[number].ended.set()
            case h2.events.StreamReset(stream_id=int() as number):
                self._resets += 1
                if number in self._streams:
                    self._streams[number].scope.cancel()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._changed.set()
                self._changed = trio.Event()
            case h2.events.ConnectionTerminated():
                self._over = True
            case _:
                pass

    def _feed(self, number: int, data: bytes) -> None:
        call = self._streams.get(number)
        if call is None or call.problem is not None:
            return
        if not self._hold(call, len(data)):
            return
        try:
            call.received += call.messages.feed(data)
            if len(call.received) > 1:
                raise RpcError(Status.INVALID_ARGUMENT, "this method takes one message")
        except RpcError as error:
            call.problem = error
            call.ended.set()

    def _hold(self, call: _Stream, count: int) -> bool:
        """Counts bytes of a call. False: they are too many, and the call is refused."""
        call.held_bytes += count
        self._held_bytes += count
        bounds = self._bounds
        if self._held_bytes > max(bounds.held_bytes, bounds.header_bytes + bounds.message_bytes):
            call.problem = RpcError(Status.RESOURCE_EXHAUSTED, "too much under way on this connection")
            call.ended.set()
        return call.problem is None

    async def _serve(self, number: int, call: _Stream) -> None:
        try:
            with call.scope:
                try:
                    answer = await self._answer(call)
                except RpcError as error:
                    await self._finish(number, status_headers(error.status, error.text))
                else:
                    await self._finish(number, status_headers(Status.OK, ""), answer)
        finally:
            del self._streams[number]
            self._held_bytes -= call.held_bytes
            if self._waiting is not None and not self._streams:
                # The reader waits since before this call ended; from now on it is idle.
                self._server.idle[self._waiting] = self._peer
                self._waiting.deadline = trio.current_time() + (0 if self._is_over else self._bounds.idle_seconds)

    async def _answer(self, call: _Stream) -> bytes:
        method = self._server.methods.get(call.headers.get(b":path", b"").decode("latin-1"))
        if call.headers.get(b":method") != b"POST" or not call.headers.get(b"content-type", b"").startswith(CONTENT_TYPE):
            raise RpcError(Status.INVALID_ARGUMENT, "gRPC calls are made here: POST with content-type application/grpc")
        if method is None:
            raise RpcError(Status.UNIMPLEMENTED, "no such method")
        seconds = min(self._bounds.answer_seconds, timeout_of(call.headers) or self._bounds.answer_seconds)
        with trio.move_on_after(self._bounds.request_seconds):
            await call.ended.wait()
        if call.problem is not None:
            raise call.problem
        if not call.ended.is_set():
            raise RpcError(Status.DEADLINE_EXCEEDED, "the call took too long to arrive")
        if len(call.received) != 1 or not call.messages.is_empty:
            raise RpcError(Status.INVALID_ARGUMENT, "one whole message is expected")
        metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in call.headers.items() if not name.startswith(b":")}
        try:
            with trio.fail_after(seconds):
                return await method(Call(call.received[0], metadata, self._peer))
        except trio.TooSlowError:
            raise RpcError(Status.DEADLINE_EXCEEDED, "no answer in time") from None
        except RpcError:
            raise
        # The one boundary at which an error of ours must not spread: it costs this call, is counted and has its traceback logged.
        except Exception:
            log.exception("call failed", extra={"fields": {"method": call.headers.get(b":path", b"").decode("latin-1")}})
            self._server.on_bug()
            raise RpcError(Status.INTERNAL, "internal error; see the server's log") from None

    async def _finish(self, number: int, trailers: list[tuple[bytes, bytes]], answer: bytes | None = None) -> None:
        """Headers, message and trailers, within `answer_seconds`; a caller that does not take them loses its connection."""
        head = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)]
        # Without a word: the call was taken back, or the caller has ended the connection while we worked (GOAWAY, or nonsense).
        with trio.fail_after(self._bounds.answer_seconds), suppress(h2.exceptions.ProtocolError):
            if answer is None:
                self._http.send_headers(number, head + trailers, end_stream=True)
            else:
                self._http.send_headers(number, head)
                await self._send_body(number, framed(answer))
                self._http.send_headers(number, trailers, end_stream=True)
            await self._flush()
            if number in self._streams and not self._streams[number].ended.is_set():
                # Answered before it had all been sent; nobody reads the rest.
                self._http.reset_stream(number, h2.errors.ErrorCodes.NO_ERROR)
                await self._flush()

    async def _send_body(self, number: int, data: bytes) -> None:
        while data:
            room = min(self._http.local_flow_control_window(number), self._http.max_outbound_frame_size)
            if room <= 0:
                await self._changed.wait()
                continue
            self._http.send_data(number, data[:room])
            data = data[room:]
            await self._flush()

    async def _flush(self) -> None:
        async with self._sending:
            data = self._http.data_to_send()
            if data:
                with trio.fail_after(self._bounds.answer_seconds):
                    await self._stream.send_all(data)
