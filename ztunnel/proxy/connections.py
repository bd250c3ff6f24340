"""Every live connection of the worker: what it is, what it carried, and how it ended.

A connection is registered before its first verdict, so that a policy change in between finds it. It owns its dial and its relay
through this object, and ends exactly once; news of it leave as `FlowRecord`s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from ztunnel.dataplane.addresses import Address, text
from ztunnel.dataplane.flow import ConnectionState, Direction, FlowPath, FlowRecord
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.relay import StreamRelay
from ztunnel.dataplane.sockets import Dialling
from ztunnel.dataplane.splice import Splice
from ztunnel.mesh.errors import Flag, MeshError
from ztunnel.mesh.identity import SpiffeId

_TIMES_WHAT_IS_LEFT: Final = 2
_REMEMBERED_PATHS: Final = 4096
_TOLD_AT_ONCE: Final = 64
"""Connections whose progress is told in one go, about a millisecond's work: of ten thousand, nobody's bytes wait for all."""
_PAUSE_SECONDS: Final = 0.001


class Facts:
    """What is known of a connection; filled in as it is found out, before the first record leaves."""

    __slots__ = (
        "destination", "destination_identity", "destination_uid", "direction", "endpoint", "mutual_tls", "pod_uid", "policy", "protocol",
        "service", "service_name", "service_namespace", "source", "source_identity", "source_uid", "target", "trace", "waypoint",
    )  # fmt: skip

    def __init__(
        self, direction: Direction, pod_uid: str, source: Address, destination: Address, *, source_uid: str = "", destination_uid: str = ""
    ) -> None:
        self.direction = direction
        self.pod_uid = pod_uid
        self.source = source
        self.destination = destination
        """What was dialled: with a tunnel its far end, port 15008, whichever side tells."""
        self.target = ""
        self.endpoint: Address = ("", 0)
        """Inbound: the application's own address, which the verdict is about and which is dialled here."""
        self.protocol = "TCP"
        self.mutual_tls = False
        self.source_uid = source_uid
        self.destination_uid = destination_uid
        self.source_identity: SpiffeId | None = None
        self.destination_identity: SpiffeId | None = None
        self.service = ""
        self.service_name = ""
        self.service_namespace = ""
        self.policy = ""
        self.trace = ""
        self.waypoint = ""
        """Outbound: the waypoint that it goes to, `namespace/name`."""

    def inbound(self, pod_uid: str, endpoint: Address) -> Facts:
        """The same connection as the pod has it in which it ends."""
        inner = Facts(
            Direction.INBOUND,
            pod_uid,
            self.source,
            self.destination,
            source_uid=self.source_uid,
            destination_uid=self.destination_uid,
        )
        inner.target, inner.endpoint, inner.protocol, inner.mutual_tls = self.target, endpoint, self.protocol, self.mutual_tls
        inner.source_identity, inner.destination_identity = self.source_identity, self.destination_identity
        inner.service, inner.service_name, inner.service_namespace = self.service, self.service_name, self.service_namespace
        inner.trace = self.trace
        return inner


class Connection:
    """One connection through the node. Implements `RelayOwner`."""

    __slots__ = (
        "_down_told",
        "_opened_told",
        "_table",
        "_up_told",
        "dial",
        "facts",
        "id",
        "is_over",
        "on_answer",
        "on_end",
        "opened_at",
        "relay",
    )

    def __init__(self, table: ConnectionTable, name: str, facts: Facts, now: float) -> None:
        self._table = table
        self._up_told = 0
        self._down_told = 0
        self._opened_told = False
        self.id = name
        self.facts = facts
        self.opened_at = now
        self.is_over = False
        self.relay: StreamRelay | Splice | None = None
        self.dial: Dialling | None = None
        self.on_answer: Callable[[], None] | None = None
        self.on_end: Callable[[], None] | None = None

    @property
    def up_bytes(self) -> int:
        """From client to server, so far."""
        match self.relay:
            case StreamRelay() as relay:
                return relay.to_stream if self.facts.direction is Direction.OUTBOUND else relay.from_stream
            case Splice() as splice:
                return splice.up
            case None:
                return 0

    @property
    def down_bytes(self) -> int:
        """From server to client, so far."""
        match self.relay:
            case StreamRelay() as relay:
                return relay.from_stream if self.facts.direction is Direction.OUTBOUND else relay.to_stream
            case Splice() as splice:
                return splice.down
            case None:
                return 0

    def relay_answered(self) -> None:
        if self.on_answer is not None:
            self.on_answer()

    def relay_done(self, error: MeshError | None) -> None:
        self.end(error)

    def abort(self, error: MeshError) -> None:
        """Ends it now, with a reset on both sides."""
        if self.relay is not None:
            self.relay.abort(error)
        self.end(error)

    def end(self, error: MeshError | None) -> None:
        """The connection is over, `error` says why unless it ended well. Only the first call counts."""
        if self.is_over:
            return
        self.is_over = True
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        if self.on_end is not None:
            self.on_end()
            self.on_end = None
        self._table.ended(self, error)
        # It knows us, we know it: nobody but the garbage collector would ever free the two.
        self.relay = None

    def path(self) -> FlowPath:
        """What it has in common with others."""
        facts = self.facts
        source, destination = facts.source_identity, facts.destination_identity
        # Identities by their place in memory, since their hash is Python code; a remembered path keeps both, so that no other takes it.
        key = (
            facts.direction is Direction.OUTBOUND, facts.pod_uid, facts.destination, facts.target, facts.mutual_tls, facts.source_uid,
            facts.destination_uid, id(source), id(destination), facts.service, facts.service_name, facts.service_namespace, facts.policy,
            facts.waypoint,
        )  # fmt: skip
        known = _paths.get(key)
        if known is None:
            if len(_paths) >= _REMEMBERED_PATHS:
                _paths.clear()
            known = _paths[key] = (_path(facts), source, destination)
        return known[0]

    def record(self, now: float, error: MeshError | None, *, closed: bool) -> FlowRecord:
        """News since the last record."""
        facts = self.facts
        up, down = self.up_bytes, self.down_bytes
        record = FlowRecord(
            self.id,
            facts.source,
            error.flag if error else Flag.NONE,
            str(error) if error else "",
            facts.trace,
            not self._opened_told,
            closed,
            up - self._up_told,
            down - self._down_told,
            up,
            down,
            now - self.opened_at,
        )
        self._opened_told = True
        self._up_told, self._down_told = up, down
        return record

    @property
    def has_news(self) -> bool:
        """Whether a record would say anything new."""
        return not self._opened_told or self.up_bytes != self._up_told or self.down_bytes != self._down_told

    def state(self, now: float) -> ConnectionState:
        """The row of the listing."""
        facts = self.facts
        peer = facts.source_identity if facts.direction is Direction.INBOUND else facts.destination_identity
        return ConnectionState(
            id=self.id,
            direction=facts.direction,
            protocol=facts.protocol,
            pod_uid=facts.pod_uid,
            source=text(facts.source),
            source_identity=str(facts.source_identity or ""),
            destination=text(facts.destination),
            target=facts.target,
            service=facts.service,
            peer_identity=str(peer or ""),
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            age_seconds=now - self.opened_at,
            policy=facts.policy,
            state=self.relay.state if self.relay else "connecting",
            waypoint=facts.waypoint,
        )


class ConnectionTable:
    """The live connections, bounded; tells `report` about each, at its end and at intervals, and `on_new` that there is one more."""

    def __init__(
        self, loop: Loop, report: Callable[[FlowPath, FlowRecord], None], on_new: Callable[[], None], limit: int, prefix: str = ""
    ) -> None:
        """`prefix` stands before each connection's name."""
        self._loop = loop
        self._report = report
        self._on_new = on_new
        self._limit = limit
        self._prefix = prefix
        self._number = 0
        self._live: dict[str, Connection] = {}
        self._untold: list[Connection] = []
        """Whose progress is still to be told."""
        self.active: Counter[str] = Counter()
        """Live connections by pod."""
        self.towards: Counter[str] = Counter()
        """Live outbound connections by the workload that they go to: the load that balancing looks at."""

    def __len__(self) -> int:
        return len(self._live)

    @property
    def is_full(self) -> bool:
        return len(self._live) >= self._limit

    def is_full_for(self, uid: str) -> bool:
        """Whether one more connection of this pod is one too many.

        A pod may have twice as many as are left for all, so that whoever floods one pod leaves room for the others: alone it gets two
        thirds of the table, the next one two thirds of the rest.
        """
        return self.is_full or self.active[uid] >= _TIMES_WHAT_IS_LEFT * (self._limit - len(self._live))

    def register(self, facts: Facts) -> Connection:
        """A new connection; the caller checked `is_full_for`."""
        self._number += 1
        connection = Connection(self, f"{self._prefix}c{self._number}", facts, self._loop.now)
        self._live[connection.id] = connection
        self.active[facts.pod_uid] += 1
        self._on_new()
        return connection

    def count_towards(self, connection: Connection) -> None:
        """The connection's destination workload is known: count it as that one's load until it ends."""
        self.towards[connection.facts.destination_uid] += 1

    def ended(self, connection: Connection, error: MeshError | None) -> None:
        """For `Connection.end`."""
        del self._live[connection.id]
        _decrement(self.active, connection.facts.pod_uid)
        if connection.facts.direction is Direction.OUTBOUND and connection.facts.destination_uid:
            _decrement(self.towards, connection.facts.destination_uid)
        self._report(connection.path(), connection.record(self._loop.now, error, closed=True))

    def live(self) -> list[Connection]:
        """A snapshot: connections may end while the caller goes through it."""
        return list(self._live.values())

    def tell_progress(self) -> None:
        """Reports live connections that have news, in several rounds of the loop if they are many. Not while that is still going on."""
        if not self._untold:
            self._untold = self.live()
            self._tell_some()

    def _tell_some(self) -> None:
        for connection in self._untold[-_TOLD_AT_ONCE:]:
            # One that is over meanwhile has told everything.
            if not connection.is_over and connection.has_news:
                self._report(connection.path(), connection.record(self._loop.now, None, closed=False))
        del self._untold[-_TOLD_AT_ONCE:]
        if self._untold:
            self._loop.call_later(_PAUSE_SECONDS, self._tell_some)


_paths: dict[tuple[object, ...], tuple[FlowPath, SpiffeId | None, SpiffeId | None]] = {}
"""One object for all connections of a path: to find it takes a fifth of the time of making it, and writing down two identities."""


def _path(facts: Facts) -> FlowPath:
    return FlowPath(
        facts.direction,
        facts.pod_uid,
        facts.destination,
        facts.target,
        facts.mutual_tls,
        facts.source_uid,
        facts.destination_uid,
        str(facts.source_identity or ""),
        str(facts.destination_identity or ""),
        facts.service,
        facts.service_name,
        facts.service_namespace,
        facts.policy,
        facts.waypoint,
    )


def _decrement(counter: Counter[str], key: str) -> None:
    if counter[key] > 1:
        counter[key] -= 1
    else:
        del counter[key]
