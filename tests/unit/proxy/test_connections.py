"""The table of connections: records, counts, and that each ends exactly once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.builders import identity
from tests.kit.proxies import Told, told
from tests.kit.wire import Wire, received, tcp_pair
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.flow import Direction
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.sockets import Dial
from ztunnel.dataplane.splice import Splice
from ztunnel.mesh.errors import Flag, LocalError, PolicyDenied
from ztunnel.proxy.connections import Connection, ConnectionTable, Unanswered
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.ledger import Ledger

POD, CLIENT, SERVER = "uid-pod", ("10.0.0.1", 4000), ("10.0.0.2", 8080)


class Book:
    """A table and what it reported."""

    def __init__(self, loop: Loop | None = None, limit: int = 3) -> None:
        self.records: list[Told] = []
        self.new = 0
        self.loop = loop or Loop()
        self.ledger = Ledger(self._take_news, lambda: None)
        self.table = ConnectionTable(self.loop, self.ledger, limit)

    def _take_news(self) -> None:
        self.new += 1
        self.records += map(told, self.ledger.take())

    def register(self, direction: Direction = Direction.INBOUND, towards: str = "") -> Connection:
        connection = self.table.register(Facts(direction, POD, CLIENT, SERVER, destination_uid=towards))
        if towards and direction is Direction.OUTBOUND:
            self.table.count_towards(connection)
        return connection


@pytest.fixture(name="book")
def fixture_book() -> Iterator[Book]:
    book = Book()
    yield book
    book.loop.close()


def test_a_connection_is_counted_while_it_lives(book: Book) -> None:
    first = book.register(Direction.OUTBOUND, "uid-server")
    second = book.register(Direction.OUTBOUND, "uid-server")
    assert book.new == len(book.table) == 2
    assert book.table.active == {POD: 2}
    assert book.table.towards == {"uid-server": 2}
    first.end(None)
    assert book.table.active == {POD: 1}
    assert book.table.towards == {"uid-server": 1}
    assert book.table.live() == [second]
    second.end(None)
    assert (book.table.active, book.table.towards, len(book.table)) == ({}, {}, 0)


def test_what_comes_in_is_no_load_of_a_workload(book: Book) -> None:
    connection = book.register(Direction.INBOUND, "uid-server")
    assert book.table.towards == {}
    connection.end(None)
    assert book.table.towards == {}


def test_the_table_says_when_it_is_full(book: Book) -> None:
    connections = [book.register() for _ in range(3)]
    assert book.table.is_full
    connections[0].end(None)
    assert not book.table.is_full


def test_a_pod_that_is_flooded_leaves_room_for_the_others() -> None:
    book = Book(limit=900)
    for victim in ("one", "two", "three"):
        while not book.table.is_full_for(victim):
            book.table.register(Facts(Direction.INBOUND, victim, CLIENT, SERVER))
    assert book.table.active == {"one": 600, "two": 200, "three": 67}
    assert not book.table.is_full_for("bystander")
    book.loop.close()


def test_a_short_connection_has_one_record(book: Book) -> None:
    connection = book.register()
    facts = connection.facts
    facts.mutual_tls, facts.source_identity, facts.policy, facts.service = True, identity(account="client"), "default/p", "web"
    connection.end(PolicyDenied("no", "default/p"))
    connection.end(None)
    connection.abort(LocalError("too late"))
    (record,) = book.records
    path = record.path
    assert record.opened
    assert record.closed
    assert (record.flag, record.error, path.policy) == (Flag.DENY, "no", "default/p")
    assert path.source_identity == "spiffe://cluster.local/ns/default/sa/client"
    assert (record.source, path.destination, path.pod_uid, path.service) == (CLIENT, SERVER, POD, "web")


def test_an_orderly_end_has_no_flag(book: Book) -> None:
    book.register().end(None)
    assert (book.records[0].flag, book.records[0].error) == (Flag.NONE, "")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.book = Book(Loop(lambda: self.now), limit=10)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.book.loop.run_once(0)


def test_who_waits_for_an_answer_waits_for_so_long() -> None:
    clock = Clock()
    book, unanswered = clock.book, Unanswered(clock.book.loop, 10)
    first, answered, over = book.register(), book.register(), book.register()
    for each in (first, answered, over):
        unanswered.add(each)
    answered.relay_answered()
    over.end(None)
    clock.passes(5)
    later = book.register()
    later.facts.target = "10.0.0.2:8080"
    unanswered.add(later)
    clock.passes(5)
    assert [first.is_over, later.is_over] == [True, False]
    clock.passes(4.9)
    assert not later.is_over
    clock.passes(0.1)
    assert [answered.is_over, later.is_over] == [False, True]
    assert book.records[-1].error == "10.0.0.2:8080: no answer to CONNECT in time"
    again = book.register()
    unanswered.add(again)
    clock.passes(10)
    assert again.is_over
    book.loop.close()


def test_the_end_of_a_connection_is_the_end_of_its_dial(book: Book) -> None:
    near, far = tcp_pair()
    connection = book.register()
    connection.dial = Dial(book.loop, near, 5, lambda _sock, _error: pytest.fail("cancelled"))
    connection.abort(LocalError("enough"))
    far.close()
    assert near.fileno() == -1


# Bytes


def spliced(book: Book) -> tuple[Connection, Splice]:
    connection = book.register()
    client, _near = tcp_pair()
    splice = Splice(book.loop, Scratch(), client, connection)
    connection.relay = splice
    _near.close()
    return connection, splice


def test_progress_is_told_as_what_moved_since_the_last_time(book: Book) -> None:
    connection, splice = spliced(book)
    book.table.tell_progress()
    book.table.tell_progress()
    splice.up, splice.down = 10, 100
    book.table.tell_progress()
    splice.up = 15
    splice.abort(LocalError("enough"))
    opened, moved, closed = book.records
    assert (opened.opened, opened.closed, opened.up_bytes) == (True, False, 0)
    assert (moved.opened, moved.closed, moved.up_bytes, moved.down_bytes) == (False, False, 10, 100)
    assert (closed.opened, closed.closed) == (False, True)
    assert (closed.up_bytes, closed.down_bytes, closed.total_up_bytes, closed.total_down_bytes) == (5, 0, 15, 100)
    assert connection.is_over


def test_the_progress_of_many_is_told_in_turns_and_once_each(book: Book) -> None:
    """Otherwise a worker with ten thousand connections would move nobody's bytes for a tenth of a second."""
    many = [book.register() for _ in range(200)]
    book.table.tell_progress()
    told = len(book.records)
    assert 0 < told < 200
    book.table.tell_progress()
    assert len(book.records) == told, "the first is still going on"
    for connection in many[:10]:
        connection.end(None)
    while len(book.records) < 200:
        book.loop.run_once(0.1)
    book.loop.run_once(0.01)
    assert all(record.opened for record in book.records)
    assert sorted(record.number for record in book.records if record.closed) == [connection.number for connection in many[:10]]


@pytest.mark.parametrize("direction", Direction)
def test_up_is_what_the_client_sent_whichever_side_tells(direction: Direction) -> None:
    wire = Wire()
    book = Book(wire.loop)
    connection = book.register(direction)
    near, _ends = wire.open()
    near.send(b"four")
    wire.run_until(lambda: wire.server.apps)
    wire.server.apps[0].send(b"eleven byte")
    wire.run_until(lambda: received(near))
    connection.relay = wire.client.relays[0] if direction is Direction.OUTBOUND else wire.server.relays[0]
    # In any order: the answer may be there before the request was read.
    wire.run_until(lambda: connection.moved() == (4, 11))
    connection.relay = None
    assert connection.moved() == (0, 0)
    connection.end(None)
    wire.close()


# The listing


@pytest.mark.parametrize("direction", Direction)
def test_a_row_names_the_peer_from_the_pods_view(book: Book, direction: Direction) -> None:
    connection = book.register(direction)
    connection.facts.source_identity, connection.facts.destination_identity = identity(account="client"), identity(account="server")
    row = connection.state(book.loop.now + 2, "w1-")
    assert row.peer_identity.endswith("sa/client" if direction is Direction.INBOUND else "sa/server")
    assert (row.source, row.destination, row.state, row.age_seconds) == ("10.0.0.1:4000", "10.0.0.2:8080", "connecting", 2)
    assert row.id == f"w1-c{connection.number}"
    connection.end(None)


def test_a_row_of_a_plain_connection(book: Book) -> None:
    connection, splice = spliced(book)
    row = connection.state(book.loop.now)
    assert (row.protocol, row.peer_identity, row.state) == ("TCP", "", "connecting")
    splice.abort(LocalError("enough"))
