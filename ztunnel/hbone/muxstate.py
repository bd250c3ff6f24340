"""A multiplexer as plain data: what one process gives to the next so that a connection outlives it.

A module of its own because it is not compiled: whoever decodes it reads the annotations, which a compiled class does not keep.
"""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.hbone.budget import BudgetState
from ztunnel.hbone.headers import BlockState, CodecState
from ztunnel.hbone.limits import MuxLimits


@dataclass(frozen=True, slots=True)
class StreamState:
    """One live stream as data; the fields are those of `Stream`, `state` is the number of its `State`."""

    number: int
    state: int
    answered: bool
    receive_window: int
    send_window: int
    credit: int
    starved: bool


@dataclass(frozen=True, slots=True)
class TableState:
    """All streams of a connection as data."""

    live: tuple[StreamState, ...]
    resets: tuple[int, ...]
    """Streams that we have reset, oldest first."""
    next: int
    last: int


@dataclass(frozen=True, slots=True)
class ReceiverState:
    """Where reading stopped, and the receive windows of the connection; those of streams are with the streams."""

    greeted: bool
    acknowledged: bool
    window: int
    credit: int
    preface: int
    kept: bytes
    left: int
    skip: int
    ends: bool
    current: int
    """The stream of the current DATA frame; 0 when its bytes are dropped."""


@dataclass(frozen=True, slots=True)
class SenderState:
    """What the peer allows us."""

    initial_window: int
    max_frame: int
    streams: int
    window: int
    starved: bool
    early_data: bool


@dataclass(frozen=True, slots=True)
class MuxState:
    """Everything that the bytes and events to come depend on."""

    client: bool
    limits: MuxLimits
    table: TableState
    receiver: ReceiverState
    block: BlockState
    sender: SenderState
    codec: CodecState
    budget: BudgetState
    refusing: bool
    """We have sent GOAWAY."""
    peer_leaving: bool
    """The peer has sent GOAWAY."""
    failed: tuple[str, int] | None
    out: bytes
