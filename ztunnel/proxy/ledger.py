"""What is to be told of connections, summed up by path while it waits to travel.

Whoever carries it takes all of it at a time; what is over fills up by connection, so it says when that is enough for a message. How many
paths are remembered is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.flow import Direction, FlowEnd, FlowFailure, FlowNews, FlowPath
from ztunnel.mesh.errors import MeshError
from ztunnel.proxy.facts import Facts

_REMEMBERED_PATHS: Final = 4096
_OUTBOUND: Final = Direction.OUTBOUND
_FULL: Final = 256
"""Records of a message: what the supervisor takes in about half a millisecond."""

# Bound here: a compiled module looks up what it imports of one that is not, each time.
_flow_end: Final = FlowEnd

_Key = tuple[bool, str, str, str, Address]


class Account:
    """What is to be told of the connections of one path, and the path itself: made once for many connections."""

    __slots__ = (
        "_destination_identity", "_destination_uid", "_mutual_tls", "_path", "_policy", "_service", "_service_name", "_service_namespace",
        "_source_identity", "_waypoint", "changed", "down_bytes", "ends", "failures", "opened", "records", "up_bytes", "with_down",
        "with_up",
    )  # fmt: skip

    def __init__(self, facts: Facts) -> None:
        self._path = _path(facts)
        self._mutual_tls = facts.mutual_tls
        self._destination_uid = facts.destination_uid
        self._source_identity = facts.source_identity
        self._destination_identity = facts.destination_identity
        self._service, self._service_name, self._service_namespace = facts.service, facts.service_name, facts.service_namespace
        self._policy = facts.policy
        self._waypoint = facts.waypoint
        self._clear()

    def _clear(self) -> None:
        self.records = 0
        self.opened = 0
        self.changed = 0
        self.with_up = 0
        self.up_bytes = 0
        self.with_down = 0
        self.down_bytes = 0
        self.ends: list[FlowEnd] = []
        self.failures: list[FlowFailure] = []

    def is_of(self, facts: Facts) -> bool:
        """Whether these facts, which have the account's key, have its path."""
        return (
            self._mutual_tls == facts.mutual_tls
            and self._policy == facts.policy
            and self._destination_uid == facts.destination_uid
            and self._service == facts.service
            and self._service_name == facts.service_name
            and self._service_namespace == facts.service_namespace
            and self._waypoint == facts.waypoint
            # Mostly they are the same object, and to compare two is Python code.
            and (self._source_identity is facts.source_identity or self._source_identity == facts.source_identity)
            and (self._destination_identity is facts.destination_identity or self._destination_identity == facts.destination_identity)
        )

    def add(self, opened: bool, closed: bool, up: int, down: int) -> None:
        """One record: whether it is a connection's first, its last, and what moved since the one before."""
        self.records += 1
        if opened:
            self.opened += 1
        if opened != closed:
            self.changed += 1
        if up:
            self.with_up += 1
            self.up_bytes += up
        if down:
            self.with_down += 1
            self.down_bytes += down

    def end(self, facts: Facts, number: int, up: int, down: int, seconds: float, error: MeshError | None) -> None:
        """A connection is over: what it carried in all, and why unless it ended well."""
        ip, port = facts.source
        if error is None:
            self.ends.append(_flow_end(number, ip, port, facts.trace, up, down, seconds))
        else:
            self.failures.append(FlowFailure(number, ip, port, facts.trace, up, down, seconds, error.flag, str(error)))

    def take(self) -> FlowNews:
        """All of it; nothing is left."""
        news = FlowNews(
            self._path,
            self.records,
            self.opened,
            self.changed,
            self.with_up,
            self.up_bytes,
            self.with_down,
            self.down_bytes,
            tuple(self.ends),
            tuple(self.failures),
        )
        self._clear()
        return news


class Ledger:
    """The accounts of all paths. `on_news` is called when there is something to tell again, `on_full` when it is enough for a message."""

    def __init__(self, on_news: Callable[[], None], on_full: Callable[[], None]) -> None:
        self._on_news = on_news
        self._on_full = on_full
        self._accounts: dict[_Key, Account] = {}
        self._untold: list[Account] = []
        self._records = 0
        self._is_quiet = True

    def stir(self) -> None:
        """There is something to tell, here or elsewhere. Heard once until the next `take`."""
        if self._is_quiet:
            self._is_quiet = False
            self._on_news()

    def account(self, facts: Facts) -> Account:
        """Where a record of this connection belongs, as its path is now. The caller writes one, and then says `added`."""
        key = (facts.direction is _OUTBOUND, facts.pod_uid, facts.source_uid, facts.target, facts.destination)
        account = self._accounts.get(key)
        if account is None or not account.is_of(facts):
            if account is None and len(self._accounts) >= _REMEMBERED_PATHS:
                self._accounts.clear()
            account = self._accounts[key] = Account(facts)
        if not account.records:
            self._untold.append(account)
        return account

    def added(self) -> None:
        """A record was written."""
        self._records += 1
        if self._records >= _FULL:
            self._on_full()
        self.stir()

    def take(self) -> tuple[FlowNews, ...]:
        """Everything that is to be told; nothing is left."""
        untold, self._untold, self._records, self._is_quiet = self._untold, [], 0, True
        return tuple([account.take() for account in untold])


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
