"""Every live connection of the worker: what it is, what it carried, and how it ended.

A connection is registered in the event in which its first verdict is asked for, so that every later policy change finds it. It owns
its dial and its relay through this object, and ends exactly once; news of it are written in the `Ledger`.
"""

from __future__ import annotations

from typing import Final

from ztunnel.dataplane.addresses import text
from ztunnel.dataplane.flow import ConnectionState, Direction
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.relay import StreamRelay
from ztunnel.dataplane.sockets import Dialling
from ztunnel.dataplane.splice import Splice
from ztunnel.mesh.errors import MeshError, UpstreamTimeout
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.ledger import Account, Ledger

_TIMES_WHAT_IS_LEFT: Final = 2
_OUTBOUND: Final = Direction.OUTBOUND
_TOLD_AT_ONCE: Final = 64
"""Connections whose progress is told in one go, about a millisecond's work: of ten thousand, nobody's bytes wait for all."""
_PAUSE_SECONDS: Final = 0.001


class Connection:
    """One connection through the node. Implements `RelayOwner`."""

    __slots__ = (
        "_down_told",
        "_opened_told",
        "_table",
        "_up_told",
        "dial",
        "facts",
        "is_over",
        "number",
        "opened_at",
        "relay",
        "unanswered",
    )

    def __init__(self, table: ConnectionTable, number: int, facts: Facts, now: float) -> None:
        self._table = table
        self._up_told = 0
        self._down_told = 0
        self._opened_told = False
        self.number = number
        self.facts = facts
        self.opened_at = now
        self.is_over = False
        self.relay: StreamRelay | Splice | None = None
        self.dial: Dialling | None = None
        self.unanswered: Unanswered | None = None

    def moved(self) -> tuple[int, int]:
        """Bytes from client to server and from server to client, so far."""
        relay = self.relay
        if relay is None:
            return 0, 0
        if isinstance(relay, Splice):
            return relay.up, relay.down
        if self.facts.direction is _OUTBOUND:
            return relay.to_stream, relay.from_stream
        return relay.from_stream, relay.to_stream

    def relay_answered(self) -> None:
        if self.unanswered is not None:
            self.unanswered.remove(self)

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
        if self.unanswered is not None:
            self.unanswered.remove(self)
        self._table.ended(self, error)
        # It knows us, we know it: nobody but the garbage collector would ever free the two.
        self.relay = None

    @property
    def has_news(self) -> bool:
        """Whether there is anything that was not told."""
        return not self._opened_told or self.moved() != (self._up_told, self._down_told)

    def tell(self, account: Account) -> None:
        """Writes down what is new since the last time, as a record of a connection that goes on unless it is over."""
        up, down = self.moved()
        account.add(not self._opened_told, self.is_over, up - self._up_told, down - self._down_told)
        self._opened_told, self._up_told, self._down_told = True, up, down

    def tell_end(self, account: Account, now: float, error: MeshError | None) -> None:
        """The last record."""
        self.tell(account)
        account.end(self.facts, self.number, self._up_told, self._down_told, now - self.opened_at, error)

    def state(self, now: float, prefix: str = "") -> ConnectionState:
        """The row of the listing; `prefix` stands before the connection's name."""
        facts = self.facts
        peer = facts.source_identity if facts.direction is Direction.INBOUND else facts.destination_identity
        up, down = self.moved()
        return ConnectionState(
            id=f"{prefix}c{self.number}",
            direction=facts.direction,
            protocol=facts.protocol,
            pod_uid=facts.pod_uid,
            source=text(facts.source),
            source_identity=str(facts.source_identity or ""),
            destination=text(facts.destination),
            target=facts.target,
            service=facts.service,
            peer_identity=str(peer or ""),
            up_bytes=up,
            down_bytes=down,
            age_seconds=now - self.opened_at,
            policy=facts.policy,
            state=self.relay.state if self.relay else "connecting",
            waypoint=facts.waypoint,
        )


class Unanswered:
    """Outbound connections whose CONNECT has no answer yet. Each waits for equally long, so that one timer is enough for all."""

    def __init__(self, loop: Loop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._waiting: dict[Connection, float] = {}
        """When the time of each is over, the first one first."""
        self._has_timer = False

    def add(self, connection: Connection) -> None:
        """The connection ends after that time unless it is answered, or over, before."""
        self._waiting[connection] = self._loop.now + self._seconds
        connection.unanswered = self
        if not self._has_timer:
            self._wait(self._seconds)

    def remove(self, connection: Connection) -> None:
        """It waits no more."""
        connection.unanswered = None
        self._waiting.pop(connection, None)

    def _wait(self, seconds: float) -> None:
        self._has_timer = True
        self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._has_timer = False
        while self._waiting:
            connection, due = next(iter(self._waiting.items()))
            if due > self._loop.now:
                self._wait(due - self._loop.now)
                return
            self.remove(connection)
            connection.abort(UpstreamTimeout(f"{connection.facts.target}: no answer to CONNECT in time"))


class ConnectionTable:
    """The live connections, bounded; writes news of each in the ledger, at its end and at intervals."""

    def __init__(self, loop: Loop, ledger: Ledger, limit: int) -> None:
        self._loop = loop
        self._ledger = ledger
        self._limit = limit
        self._number = 0
        self._live: dict[int, Connection] = {}
        self._untold: list[Connection] = []
        """Whose progress is still to be told."""
        self.active: dict[str, int] = {}
        """Live connections by pod."""
        self.towards: dict[str, int] = {}
        """Live outbound connections by the workload that they go to."""

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
        return self.is_full or self.active.get(uid, 0) >= _TIMES_WHAT_IS_LEFT * (self._limit - len(self._live))

    def register(self, facts: Facts) -> Connection:
        """A new connection; the caller checked `is_full_for`."""
        self._number += 1
        connection = Connection(self, self._number, facts, self._loop.now)
        self._live[self._number] = connection
        _increment(self.active, facts.pod_uid)
        self._ledger.stir()
        return connection

    def count_towards(self, connection: Connection) -> None:
        """The connection's destination workload is known: count it as that one's load until it ends."""
        _increment(self.towards, connection.facts.destination_uid)

    def load(self, uid: str) -> int:
        """Live outbound connections to a workload: what balancing looks at."""
        return self.towards.get(uid, 0)

    def ended(self, connection: Connection, error: MeshError | None) -> None:
        """For `Connection.end`."""
        facts = connection.facts
        del self._live[connection.number]
        _decrement(self.active, facts.pod_uid)
        if facts.direction is _OUTBOUND and facts.destination_uid:
            _decrement(self.towards, facts.destination_uid)
        connection.tell_end(self._ledger.account(facts), self._loop.now, error)
        self._ledger.added()

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
                connection.tell(self._ledger.account(connection.facts))
                self._ledger.added()
        del self._untold[-_TOLD_AT_ONCE:]
        if self._untold:
            self._loop.call_later(_PAUSE_SECONDS, self._tell_some)


def _increment(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _decrement(counts: dict[str, int], key: str) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
