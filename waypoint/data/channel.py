"""The messages between the waypoint's supervisor and its workers; their framing is `ztunnel.dataplane.channel`'s."""

from __future__ import annotations

from waypoint.telemetry.increments import Increment
from ztunnel.dataplane.channel import Certificate, Drain, Drained, Message, Query, Withdraw
from ztunnel.mesh.l7.config import ProxyConfig


class ConfigureWaypoint(Message, frozen=True):
    """First message to a worker. Times in seconds."""

    prefix: str
    """Stands before the names of this worker's tunnels, where there are several workers."""
    hostname: str
    own_records: bool
    idle_seconds: float
    max_streams: int
    tunnels_per_endpoint: int
    handshake_seconds: float
    ping_seconds: float
    ping_timeout_seconds: float
    max_tunnels: int
    max_handshakes: int
    max_connections: int


class ServeConfig(Message, frozen=True):
    """What to do from now on."""

    config: ProxyConfig


class ChangeConfig(Message, frozen=True):
    """What is different from now on (`data.changes`)."""

    config: ProxyConfig
    """What is new or has changed; servers, options and names in full."""
    gone: dict[str, tuple[str, ...]]
    """Keys of what is there no more, by the name of its part."""


class KeySetFetched(Message, frozen=True):
    """Keys of a token issuer; empty when they could not be had."""

    source: str
    jwks: str


class Resolved(Message, frozen=True):
    """What DNS says of a name that clusters use; of one that a worker wanted, `port` is 0 and addresses may be none."""

    name: str
    port: int
    addresses: tuple[str, ...]


class WantAddresses(Message, frozen=True):
    """A request names this host: `Resolved` answers, with port 0."""

    name: str


class Listen(Message, frozen=True):
    """Accept connections on the listeners that come as descriptors. `port`: of a gateway, 0 for HBONE."""

    port: int


class Unlisten(Message, frozen=True):
    """Accept no more on a gateway's port; what is there goes on."""

    port: int


class WorkerActivity(Message, frozen=True):
    """Limits hit and bugs met since the last message."""

    limits: dict[str, int]
    bugs: int


class DryRunVerdicts(Message, frozen=True):
    """How often a dry-run policy said something."""

    policy: str
    action: str
    result: str
    count: int


class Counted(Message, frozen=True):
    """Requests and connections since the last message."""

    increments: tuple[Increment, ...]
    shadow: tuple[DryRunVerdicts, ...] = ()
    dropped: int = 0
    """Increments and lines that were lost because we did not keep up."""
    lines: bytes = b""
    """Of access logs."""


class WorkerState(Message, frozen=True):
    """Answer to `Query`: counts and listings, as JSON text."""

    id: int
    state: str


ToWorker = (
    ConfigureWaypoint | ServeConfig | ChangeConfig | Certificate | Withdraw | KeySetFetched | Resolved | Listen | Unlisten | Drain | Query
)
ToSupervisor = WantAddresses | WorkerActivity | Counted | WorkerState | Drained
