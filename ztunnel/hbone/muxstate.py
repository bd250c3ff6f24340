"""A multiplexer as plain data: what one process gives to the next so that a connection outlives it."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.hbone.headers import CodecState
from ztunnel.hbone.limits import MuxLimits


@dataclass(frozen=True, slots=True)
class StreamState:
    """One live stream; the fields are those of `streams.Stream`, `state` is the number of its `State`."""

    number: int
    state: int
    answered: bool
    receive_window: int
    send_window: int
    credit: int
    starved: bool


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the peer's byte stream reading stopped."""

    preface: int
    """Bytes of the client's preface still to come."""
    kept: bytes
    """The beginning of a frame that cannot be handled yet."""
    left: int
    """Bytes of tunnel data still to come in the current DATA frame."""
    skip: int
    """Bytes to be passed over after them: padding, or a frame that nobody wants."""
    ends: bool
    """The current DATA frame carries END_STREAM."""
    current: int
    """The stream of the current DATA frame; 0 when its bytes are dropped."""
    block: tuple[int, bool, bytes, int] | None
    """A header block that waits for CONTINUATION: stream, END_STREAM, fragments, frames so far."""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """What the peer's SETTINGS say, or HTTP/2's defaults before they came."""

    greeted: bool
    initial_window: int
    max_frame: int
    streams: int


@dataclass(frozen=True, slots=True)
class MuxState:
    """Everything that the bytes and events to come depend on."""

    client: bool
    limits: MuxLimits
    streams: tuple[StreamState, ...]
    resets: tuple[int, ...]
    """Streams that we have reset, oldest first."""
    next_stream: int
    last_stream: int
    peer: PeerSettings
    acknowledged: bool
    """The peer has acknowledged our SETTINGS."""
    send_window: int
    receive_window: int
    credit: int
    starved: bool
    earned: int
    refusing: bool
    """We have sent GOAWAY."""
    peer_leaving: bool
    """The peer has sent GOAWAY."""
    failed: tuple[str, int] | None
    position: Position
    codec: CodecState
    spent: tuple[int, ...]
    budget_until: float
    out: bytes
