"""One unary gRPC call on trio: connect, TLS, ask, take the answer, close.

A connection for each call: callers here ask a few times in an hour, and a connection that is not kept cannot be stale, goes to whichever
replica is there, and trusts the roots of this moment. Bounded: the answer's bytes, and by the caller's deadline everything else.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import trio

from ztunnel.rpc.messages import Messages, RpcError, Status, check_answer, check_status, framed, request_headers

_CHUNK = 16 << 10
_MOST_BYTES = 4 << 20
"""That a server may send in one call, frames that carry nothing included."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    Args:
        server_name: what its certificate must be for, if not `host`.
    """

    host: str
    port: int
    server_name: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def target_of(address: str, server_name: str = "") -> Target:
    """What settings say as `host:port`; an IPv6 address in brackets."""
    host, _, port = address.rpartition(":")
    return Target(host.strip("[]"), int(port), server_name)


async def unary(
    target: Target, context: ssl.SSLContext, path: str, message: bytes, metadata: Mapping[str, str], seconds: float, limit: int = 1 << 20
) -> bytes:
    """The answer's message.

    Args:
        path: `/package.Service/Method`.
        metadata: names in lower case.
        seconds: for all of it.
        limit: bytes of the answer.
    Raises:
        RpcError: anything but an answer with status OK. UNAVAILABLE: the server cannot be reached, or its certificate is not trusted.
    """
    try:
        with trio.fail_after(seconds):
            async with _connected(target, context) as stream:
                return await _Exchange(stream, limit).ask(request_headers(str(target), path, seconds, metadata), message)
    except trio.TooSlowError:
        raise RpcError(Status.DEADLINE_EXCEEDED, f"{target} did not answer within {seconds:g} s") from None


@asynccontextmanager
async def _connected(target: Target, context: ssl.SSLContext) -> AsyncIterator[trio.SSLStream[trio.SocketStream]]:
    try:
        transport = await trio.open_tcp_stream(target.host, target.port)
    except OSError as error:
        raise RpcError(Status.UNAVAILABLE, f"cannot connect to {target}: {_reason(error)}") from error
    try:
        stream = trio.SSLStream(transport, context, server_hostname=target.server_name or target.host, https_compatible=True)
        await stream.do_handshake()
        if stream.selected_alpn_protocol() != "h2":
            raise RpcError(Status.UNAVAILABLE, f"{target} does not speak HTTP/2")
        yield stream
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        reason = cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause or "it closed the connection")
        raise RpcError(Status.UNAVAILABLE, f"TLS with {target}: {reason}") from error
    finally:
        await trio.aclose_forcefully(transport)


def _reason(error: OSError) -> str:
    group = error.__cause__
    first = group.exceptions[0] if isinstance(group, BaseExceptionGroup) else error
    return getattr(first, "strerror", None) or str(first)


class _Exchange:
    """The HTTP/2 of one call."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream], limit: int) -> None:
        self._stream = stream
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self._messages = Messages(limit)
        self._answers: list[bytes] = []
        self._answered = False
        self._number = 0

    async def ask(self, headers: list[tuple[bytes, bytes]], message: bytes) -> bytes:
        self._http.initiate_connection()
        self._number = self._http.get_next_available_stream_id()
        self._http.send_headers(self._number, headers)
        unsent, received = framed(message), 0
        try:
            while True:
                unsent = self._send(unsent)
                await self._stream.send_all(self._http.data_to_send())
                data = await self._stream.receive_some(_CHUNK)
                received += len(data)
                if not data or received > _MOST_BYTES:
                    raise RpcError(Status.UNAVAILABLE, "the server closed the connection" if not data else "the server sends without end")
                for event in self._http.receive_data(bytes(data)):
                    if self._take(event):
                        return self._one_answer()
        except h2.exceptions.ProtocolError as error:
            raise RpcError(Status.INTERNAL, f"the server broke HTTP/2: {error}") from error

    def _send(self, unsent: bytes) -> bytes:
        """As much as the server takes now; what remains."""
        while unsent:
            room = min(self._http.local_flow_control_window(self._number), self._http.max_outbound_frame_size)
            if room <= 0:
                break
            self._http.send_data(self._number, unsent[:room], end_stream=len(unsent) <= room)
            unsent = unsent[room:]
        return unsent

    def _take(self, event: h2.events.Event) -> bool:
        """Whether the call is over, and well."""
        match event:
            case h2.events.ResponseReceived(headers=headers):
                found = [(bytes(name), bytes(value)) for name, value in headers or ()]
                check_answer(found)
                self._answered = True
                if event.stream_ended is not None:
                    check_status(found)
                    return True
            case h2.events.DataReceived(data=data, flow_controlled_length=int() as length):
                self._http.acknowledge_received_data(length, self._number)
                self._answers += self._messages.feed(bytes(data or b""))
            case h2.events.TrailersReceived(headers=headers):
                check_status([(bytes(name), bytes(value)) for name, value in headers or ()])
                return True
            case h2.events.StreamEnded():
                # Trailers have returned before; an answer without any is none.
                raise RpcError(Status.UNKNOWN, "the answer has no status")
            case h2.events.StreamReset(error_code=code):
                raise RpcError(Status.UNAVAILABLE, f"the server took the call back ({code!r})")
            case h2.events.ConnectionTerminated(error_code=code):
                # Perhaps it would still answer, but h2 understands nothing after a GOAWAY.
                raise RpcError(Status.UNAVAILABLE, f"the server ended the connection ({code!r})")
            case _:
                pass
        return False

    def _one_answer(self) -> bytes:
        if len(self._answers) != 1 or not self._messages.is_empty:
            raise RpcError(Status.INTERNAL, f"the answer has {len(self._answers)} messages; one is expected")
        return self._answers[0]
