"""What the multiplexer tells its caller, in the order in which the peer sent it. Plain values; only `DataReceived` borrows memory.

Not frozen, unlike other values here: one is made for every DATA frame, and a frozen dataclass takes three times as long to make. What is
made for every connection says itself how: the `__init__` that `dataclass` would write stays interpreted in the compiled form.
"""

from __future__ import annotations

from dataclasses import dataclass

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True, init=False)
class RequestReceived:
    """A well-formed request, CONNECT or not: the caller answers what it does not serve. `ended`: no DATA and no StreamEnded will follow."""

    stream: int
    headers: Headers
    ended: bool

    def __init__(self, stream: int, headers: Headers, ended: bool) -> None:
        self.stream = stream
        self.headers = headers
        self.ended = ended


@dataclass(slots=True, init=False)
class ResponseReceived:
    """The final response. `ended`: no DATA and no StreamEnded will follow."""

    stream: int
    status: int
    headers: Headers
    ended: bool

    def __init__(self, stream: int, status: int, headers: Headers, ended: bool) -> None:
        self.stream = stream
        self.status = status
        self.headers = headers
        self.ended = ended


class DataReceived:
    """Bytes of a tunnel: a view into the caller's buffer, valid until the caller re-uses it. To be given back through `Mux.consumed`.

    Not a dataclass: mypyc 2.4 stumbles over one with a memoryview in it.
    """

    __slots__ = ("data", "stream")

    def __init__(self, stream: int, data: memoryview) -> None:
        self.stream = stream
        self.data = data

    def __repr__(self) -> str:
        return f"DataReceived(stream={self.stream}, data={bytes(self.data)!r})"


@dataclass(slots=True, init=False)
class StreamEnded:
    """The peer will send no more on this stream; we still may."""

    stream: int

    def __init__(self, stream: int) -> None:
        self.stream = stream


@dataclass(slots=True)
class TrailersReceived:
    """A trailer section; StreamEnded follows. Told only where `MuxLimits.messages` asks for it."""

    stream: int
    headers: Headers


@dataclass(slots=True)
class InterimReceived:
    """A 1xx response in front of the final one. Told only where `MuxLimits.messages` asks for it."""

    stream: int
    status: int
    headers: Headers


@dataclass(slots=True, init=False)
class StreamReset:
    """The stream is gone in both directions.

    `graceful` (NO_ERROR, CANCEL) ends reading like an orderly end, as Istio's proxy does; anything else is an abort.
    Also told when the peer's broken frame made us reset a stream that the caller knows, and for streams that a GOAWAY disowns.
    """

    stream: int
    code: int
    graceful: bool

    def __init__(self, stream: int, code: int, graceful: bool) -> None:
        self.stream = stream
        self.code = code
        self.graceful = graceful


@dataclass(slots=True, init=False)
class WindowOpened:
    """`sendable` had answered 0 for this stream (0: for the connection's window) and would not any more."""

    stream: int

    def __init__(self, stream: int) -> None:
        self.stream = stream


@dataclass(slots=True)
class PeerGoingAway:
    """The peer takes no new streams; those above `last_stream` follow as StreamReset with REFUSED_STREAM: safe to retry elsewhere."""

    last_stream: int
    code: int
    debug: bytes


@dataclass(slots=True)
class PongReceived:
    """The answer to a ping."""

    payload: bytes


@dataclass(slots=True)
class SettingsReceived:
    """The peer's SETTINGS are in force: `peer_max_frame` and `can_open` may have changed."""


Event = (
    RequestReceived
    | ResponseReceived
    | DataReceived
    | StreamEnded
    | TrailersReceived
    | InterimReceived
    | StreamReset
    | WindowOpened
    | PeerGoingAway
    | PongReceived
    | SettingsReceived
)
