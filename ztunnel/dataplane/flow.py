"""What the data plane tells about a connection: records for logs and metrics, rows for `ztunnel connections` and `tunnels`.

All are plain values that cross the channel from worker to supervisor. Byte counts follow Istio's convention: `up` is
downstream to upstream (what the client sent), `down` the way back, whichever side reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from ztunnel.mesh.errors import Flag


class Direction(Enum):
    """From the pod's view."""

    __hash__ = object.__hash__  # Enum's own is Python code, and this one is a key for every connection

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class FlowPath(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Between whom a connection is and which way it took: the same for thousands of connections, and told once for many of them."""

    direction: Direction
    pod_uid: str
    destination: tuple[str, int]
    """What was dialled: with HBONE the tunnel's far end, port 15008."""
    target: str
    """Where the bytes end: the authority of the CONNECT, or the destination once more."""
    mutual_tls: bool
    source_uid: str = ""
    destination_uid: str = ""
    source_identity: str = ""
    destination_identity: str = ""
    service: str = ""
    service_name: str = ""
    service_namespace: str = ""
    policy: str = ""
    waypoint: str = ""
    """`namespace/name` of the waypoint that it was sent to."""


class FlowRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """News of one connection: at its end, and at intervals while it lives. What its path says is not said here.

    A struct, unlike other values here: one is made for every connection, and a frozen dataclass of its size takes ten times as long.

    `up_bytes` and `down_bytes` are what moved since the last record of the same connection; the `total_` ones are the whole.
    `opened` is true in the first record of a connection, `closed` in its last; a short one has a single record with both.
    """

    id: str
    source: tuple[str, int]
    flag: Flag = Flag.NONE
    error: str = ""
    trace: str = ""
    opened: bool = False
    closed: bool = False
    up_bytes: int = 0
    down_bytes: int = 0
    total_up_bytes: int = 0
    total_down_bytes: int = 0
    duration_seconds: float = 0.0


FlowNews = tuple[FlowPath, tuple[FlowRecord, ...]]
"""Records of connections of one path."""


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """One live connection."""

    id: str
    direction: Direction
    protocol: str
    """HBONE, TCP, or LOCAL for a neighbour on this node that is reached without a tunnel."""
    pod_uid: str
    source: str
    source_identity: str
    destination: str
    target: str
    service: str
    peer_identity: str
    up_bytes: int
    down_bytes: int
    age_seconds: float
    policy: str
    state: str
    """connecting, open or half-closed."""
    waypoint: str = ""
    """`namespace/name`."""


@dataclass(frozen=True, slots=True)
class TunnelState:
    """One live tunnel."""

    id: str
    direction: Direction
    pod_uid: str
    peer: str
    peer_identity: str
    streams: int
    bytes_sent: int
    bytes_received: int
    age_seconds: float
    records: str
    """own, openssl or kernel."""
    state: str
    """connecting, handshake, open, draining."""
