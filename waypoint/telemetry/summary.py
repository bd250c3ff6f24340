"""What an exchange leaves behind: all that metrics, access logs and spans tell of one request or one connection.

The engine fills it in as things become known. Times are seconds: `started` since the epoch, everything else on the loop's clock.
"""

from __future__ import annotations

from waypoint.http.messages import Client, Headers, Request, Response
from waypoint.telemetry.service import ServiceTelemetry
from waypoint.telemetry.tracing import Span
from ztunnel.mesh.l7.clusters import Endpoint


class Summary:
    """Of one request."""

    __slots__ = (
        *(
            "attempts",
            "audited",
            "bytes_in",
            "bytes_out",
            "client",
            "cluster",
            "details",
            "duration",
            "endpoint",
            "flags",
            "grpc_status",
            "is_grpc",
        ),
        *(
            "mirrored",
            "request",
            "request_bytes",
            "request_messages",
            "response",
            "response_bytes",
            "response_messages",
            "route",
            "service",
        ),
        *("shadow", "span", "started", "status", "termination", "trailers", "transport_failure", "upstream_local", "upstream_seconds"),
    )

    def __init__(self, service: ServiceTelemetry, request: Request, client: Client, started: float) -> None:
        self.service = service
        self.request = request
        """As it was sent on, or came if it was not; `original_path` is what the client asked for."""
        self.is_grpc = request.is_grpc
        self.client = client
        self.started = started
        self.duration = 0.0
        self.status = 0
        """0: the client went away before there was one."""
        self.flags = ""
        """Response flags, joined with commas."""
        self.details = ""
        self.termination = ""
        """Why the connection ended (connection termination details)."""
        self.transport_failure = ""
        self.response: Response | None = None
        self.trailers: Headers = []
        self.grpc_status: int | None = None
        """Filled in from trailers or headers by the recorder if it is not given."""
        self.endpoint: Endpoint | None = None
        self.upstream_local = ""
        """`address:port` that we spoke to the endpoint from."""
        self.cluster = ""
        self.route = ""
        self.attempts = 0
        self.upstream_seconds = 0.0
        """From the last try's beginning to the answer's head; 0 without an answer of the endpoint."""
        self.bytes_in = 0
        """Of bodies."""
        self.bytes_out = 0
        self.request_bytes = 0
        """With heads, where the codec knows; for `request.total_size`."""
        self.response_bytes = 0
        self.request_messages = 0
        """gRPC."""
        self.response_messages = 0
        self.mirrored = False
        """A copy: it is not told of."""
        self.audited: tuple[str, ...] = ()
        """AUDIT policies that matched."""
        self.shadow: tuple[tuple[str, str, str], ...] = ()
        """(policy, action, result) of dry-run policies."""
        self.span: Span | None = None


class Flow:
    """Of one connection whose requests are not read. The engine keeps the counts up to date while it lives."""

    __slots__ = (
        *(
            "client",
            "cluster",
            "details",
            "duration",
            "endpoint",
            "flags",
            "received",
            "reported_received",
            "reported_sent",
            "route",
            "sent",
        ),
        *("service", "started", "termination", "transport_failure", "upstream_local"),
    )

    def __init__(self, service: ServiceTelemetry, client: Client, started: float) -> None:
        self.service = service
        self.client = client
        self.started = started
        self.duration = 0.0
        self.endpoint: Endpoint | None = None
        self.cluster = ""
        self.route = ""
        self.received = 0
        """Bytes from client to server."""
        self.sent = 0
        self.reported_received = 0
        """The recorder's: what of it has been counted."""
        self.reported_sent = 0
        self.flags = ""
        self.details = ""
        self.termination = ""
        self.transport_failure = ""
        self.upstream_local = ""


class MessageCounter:
    """Counts the gRPC messages in one direction of a stream, however its bytes are cut."""

    __slots__ = ("_left", "_prefix", "count")

    def __init__(self) -> None:
        self.count = 0
        self._left = 0
        self._prefix = b""

    def feed(self, data: bytes) -> None:
        """More of the body."""
        at, size = 0, len(data)
        while at < size:
            if self._left:
                step = min(self._left, size - at)
                self._left -= step
                at += step
                continue
            missing = 5 - len(self._prefix)
            self._prefix += data[at : at + missing]
            at += missing
            if len(self._prefix) == 5:
                self.count += 1
                self._left = int.from_bytes(self._prefix[1:5], "big")
                self._prefix = b""
