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


class FlowEnd(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A connection that is over, as its line in the log tells it. What its path says is not said here.

    A struct, unlike other values here: one is made for every connection, and a frozen dataclass of its size takes ten times as long.
    The bytes are those of its whole life.
    """

    number: int
    """Its worker's count."""
    ip: str
    port: int
    """The client's, as `ip`."""
    trace: str = ""
    up_bytes: int = 0
    down_bytes: int = 0
    duration_seconds: float = 0.0


class FlowFailure(FlowEnd, frozen=True, array_like=True, gc=False):
    """One that did not end well."""

    flag: Flag = Flag.CONNECT
    error: str = ""


class FlowNews(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What has happened to the connections of one path since it was last told: sums for the metrics, ends for the log.

    A record is one connection's news, of its beginning, of bytes that moved, of its end, or all at once; the sums are over records.
    """

    path: FlowPath
    records: int = 0
    opened: int = 0
    changed: int = 0
    """Records by which the number of open connections changed: of a beginning or of an end, not of both."""
    with_up: int = 0
    """Records that tell of bytes from the client to the server."""
    up_bytes: int = 0
    with_down: int = 0
    down_bytes: int = 0
    ends: tuple[FlowEnd, ...] = ()
    failures: tuple[FlowFailure, ...] = ()


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
