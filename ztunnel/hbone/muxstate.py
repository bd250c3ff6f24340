"""A multiplexer as plain data: what one process gives to the next so that a connection outlives it."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.hbone.budget import BudgetState
from ztunnel.hbone.headers import BlockState, CodecState
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.receiver import ReceiverState
from ztunnel.hbone.streams import TableState


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
