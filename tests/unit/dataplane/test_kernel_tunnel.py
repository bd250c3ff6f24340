"""Tunnels whose records the kernel takes over: when it does, what goes on until then, and how they end. The kernel is the kit's."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.kit.kernel_tls import KernelRules, KernelSocket
from tests.kit.wire import Wire, received
from ztunnel.dataplane.kernel_tls import KernelHalfway
from ztunnel.dataplane.sockets import Farewell
from ztunnel.hbone.records import RecordError
from ztunnel.hbone.records_own import OwnRecords
from ztunnel.mesh.errors import MeshError

GOOD = KernelRules()
NONE = KernelRules(ulp=errno.ENOENT)
HANDSHAKE, UPDATE_REQUESTED = 22, bytes((24, 0, 0, 1, 1))


@pytest.fixture(name="make")
def fixture_make() -> Iterator[Callable[..., Wire]]:
    """Makes wires that are closed in the end, and must not have met a bug."""
    made: list[Wire] = []

    def make(client: KernelRules | None = None, server: KernelRules | None = None, *, own: tuple[bool, bool] = (True, True)) -> Wire:
        made.append(Wire(own=own, kernel=(client, server)))
        return made[-1]

    yield make
    for wire in made:
        wire.close()
        assert wire.loop.bugs == 0


def joined(wire: Wire) -> tuple[socket.socket, socket.socket]:
    """A stream with an application at each end, over which something has gone."""
    near, _ = wire.open()
    near.send(b"hello")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"hello")
    return near, far


def kernel_of(wire: Wire, side: int) -> KernelSocket:
    sock = wire.sockets[side]
    assert isinstance(sock, KernelSocket)
    return sock


@pytest.mark.parametrize(
    ("client", "server", "own"),
    [
        (GOOD, None, (True, False)),
        (None, GOOD, (False, True)),
        (GOOD, None, (True, True)),
        (GOOD, GOOD, (True, True)),
        (NONE, GOOD, (True, True)),
    ],
    ids=["client-openssl", "openssl-server", "client-own", "both", "refused-server"],
)
def test_bytes_both_ways(make: Callable[..., Wire], client: KernelRules | None, server: KernelRules | None, own: tuple[bool, bool]) -> None:
    wire = make(client, server, own=own)
    near, far = joined(wire)
    data = os.urandom(3_000_000)
    for sender, receiver in ((near, far), (far, near)):
        assert hashlib.sha256(wire.exchange(sender, receiver, data)).digest() == hashlib.sha256(data).digest()
    assert wire.client.tunnel.is_in_kernel is (client is GOOD)
    assert wire.server.tunnel.is_in_kernel is (server is GOOD)


def test_many_streams_at_once(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, GOOD)
    pairs = [wire.open()[0] for _ in range(50)]
    for number, near in enumerate(pairs):
        near.send(b"%03d" % number)
    wire.run_until(lambda: len(wire.server.apps) == 50)
    told: set[bytes | None] = set()

    def all_told() -> bool:
        told.update(received(app) for app in wire.server.apps)
        return len(told - {None}) == 50

    wire.run_until(all_told)


def test_records_that_come_in_part_are_ours_until_they_are_whole(make: Callable[..., Wire]) -> None:
    """The kernel must get them from a record's start."""
    wire = make(None, GOOD)
    outlet = wire.client.tunnel._outlet
    held = bytearray()

    class Held:
        def send(self, data: memoryview, flags: int, /) -> int:
            held.extend(data)
            return len(data)

        def sendmsg(self, buffers: list[memoryview], ancillary: tuple[()], flags: int, /) -> int:
            raise AssertionError("nothing waits")

    outlet._sock = Held()
    wire.open()[0].send(b"slowly")
    wire.run_until(lambda: wire.client.tunnel.is_ready and not wire.client.tunnel._dirty)
    # The handshake's last flight and, in one segment with it, all but the end of the first record.
    sock, server = wire.sockets[0], wire.server.tunnel
    at = sock.send(held[:-1])
    wire.run_until(lambda: server._partial)
    assert server.is_ready
    assert not server.is_in_kernel

    def arrives() -> bool:
        nonlocal at
        at += sock.send(held[at : at + 1])
        assert not (server.is_in_kernel and server._partial)
        return bool(wire.server.apps) and received(wire.server.apps[0]) == b"slowly"

    wire.run_until(arrives)
    assert server.is_in_kernel


def test_ciphertext_that_waits_keeps_the_kernel_out(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    tunnel, sock = wire.client.tunnel, wire.sockets[0]
    full = True

    class Full:
        def send(self, data: memoryview, flags: int, /) -> int:
            if full:
                raise BlockingIOError(errno.EAGAIN, "full")
            return sock.send(data, flags)

        def sendmsg(self, buffers: list[memoryview], ancillary: tuple[()], flags: int, /) -> int:
            if full:
                raise BlockingIOError(errno.EAGAIN, "full")
            return sock.sendmsg(buffers, ancillary, flags)

    wire.run_until(lambda: tunnel._handshake is not None and tunnel._handshake._out == b"")
    tunnel._outlet._sock = Full()
    near, _ = wire.open()
    near.send(b"waits")
    wire.run_until(lambda: tunnel._outlet.has_backlog)
    for _ in range(5):
        wire.loop.run_once(0.01)
    assert not tunnel.is_in_kernel
    full = False
    tunnel._unblock()
    wire.run_until(lambda: wire.server.apps)
    wire.run_until(lambda: received(wire.server.apps[0]) == b"waits")
    wire.run_until(lambda: tunnel.is_in_kernel)
    far = wire.server.apps[0]
    far.send(b"answer")
    wire.run_until(lambda: received(near) == b"answer")


def test_plaintext_that_the_kernel_does_not_take_waits_in_order(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    wire.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    near, far = joined(wire)
    data = os.urandom(2_000_000)
    times = sent = 0
    got = bytearray()

    def move() -> bool:
        nonlocal sent, times
        times += wire.client.tunnel.blocked
        if sent < len(data):
            try:
                sent += near.send(data[sent : sent + 262144])
            except BlockingIOError:
                pass
        got.extend(received(far) or b"")
        return len(got) == len(data)

    wire.run_until(move, 30)
    assert got == data
    assert times


def test_a_kernel_without_tls_is_asked_once(make: Callable[..., Wire], caplog: pytest.LogCaptureFixture) -> None:
    wire = make(NONE, None)
    near, far = joined(wire)
    assert wire.exchange(near, far, b"on with our own" * 1000)
    assert isinstance(wire.client.tunnel._outlet.records, OwnRecords)
    assert not wire.client.switch.is_on
    assert sum("kernel TLS is not used" in record.message for record in caplog.records) == 1


def test_a_kernel_that_takes_half_ends_the_tunnel_and_is_not_asked_again(make: Callable[..., Wire]) -> None:
    wire = make(KernelRules(rx=errno.ENOMEM), None)
    _, ends = wire.open()
    wire.run_until(lambda: wire.client.closed)
    assert isinstance(wire.client.closed[0], KernelHalfway)
    assert isinstance(ends.results[0], KernelHalfway)
    assert not wire.client.switch.is_on


def test_key_updates_of_both_sides(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    near, far = joined(wire)
    server = wire.server.tunnel._outlet
    assert isinstance(server.records, OwnRecords)
    server.send_raw(server.records._control(HANDSHAKE, UPDATE_REQUESTED))
    server.records._tx.update()
    far.send(b"under the next key")
    wire.run_until(lambda: received(near) == b"under the next key")
    near.send(b"answered with the next key")
    wire.run_until(lambda: received(far) == b"answered with the next key")
    assert kernel_of(wire, 0).rekeys == 2


def test_a_peers_key_that_the_kernel_does_not_take_ends_the_tunnel_with_the_reason(make: Callable[..., Wire]) -> None:
    wire = make(KernelRules(rekey_rx=errno.EBUSY), None)
    joined(wire)
    server = wire.server.tunnel._outlet
    assert isinstance(server.records, OwnRecords)
    server.send_raw(server.records._control(HANDSHAKE, UPDATE_REQUESTED))
    wire.run_until(lambda: wire.client.closed)
    assert "does not take the peer's next TLS key: Device or resource busy" in str(wire.client.closed[0])


def test_a_key_of_ours_that_the_kernel_does_not_take_ends_the_tunnel_with_the_reason(make: Callable[..., Wire]) -> None:
    wire = make(KernelRules(rekey_tx=errno.EBUSY), None)
    near, _ = joined(wire)
    server = wire.server.tunnel._outlet
    assert isinstance(server.records, OwnRecords)
    server.send_raw(server.records._control(HANDSHAKE, UPDATE_REQUESTED))
    server.records._tx.update()
    wire.run_until(lambda: kernel_of(wire, 0).rekeys == 1)
    near.send(b"x")
    wire.run_until(lambda: wire.client.closed)
    assert "does not take our next TLS key: Device or resource busy" in str(wire.client.closed[0])


def test_a_damaged_record_ends_the_tunnel_and_the_peer_hears_why(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    joined(wire)
    server = wire.server.tunnel._outlet
    assert isinstance(server.records, OwnRecords)
    damaged = bytearray(server.records._control(HANDSHAKE, UPDATE_REQUESTED))
    damaged[-1] ^= 1
    server.send_raw(bytes(damaged))
    wire.run_until(lambda: wire.client.closed and wire.server.closed)
    mine, theirs = wire.client.closed[0], wire.server.closed[0]
    assert isinstance(mine, RecordError)
    assert "does not open" in str(mine)
    assert "bad_record_mac" in str(theirs)


def test_frames_that_break_the_rules_end_it_too(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    joined(wire)
    wire.server.tunnel._outlet.send_plain(bytearray(b"\0\0\x01\x06\0\0\0\0\0?"))  # a PING of one byte
    wire.run_until(lambda: wire.client.closed and wire.server.closed)
    assert isinstance(wire.client.closed[0], MeshError)


@pytest.mark.parametrize("kernel", [(GOOD, None), (None, GOOD), (GOOD, GOOD)], ids=["client", "server", "both"])
def test_both_ends_part_well(make: Callable[..., Wire], kernel: tuple[KernelRules | None, KernelRules | None]) -> None:
    wire = make(*kernel)
    near, far = joined(wire)
    wire.server.tunnel.go_away()
    far.close()
    near.close()
    wire.run_until(lambda: wire.client.closed and wire.server.closed)
    assert wire.client.closed == wire.server.closed == [None]
    wire.run_until(lambda: not wire.loop.has(Farewell))


def stuck(wire: Wire) -> KernelSocket:
    """A client tunnel without streams whose kernel has taken a record for which TCP has no room, because nobody reads."""
    near, far = joined(wire)
    near.close()
    far.close()
    wire.run_until(lambda: wire.client.idle and wire.server.idle)
    wire.loop.forget(wire.sockets[1].fileno())
    sock, outlet = kernel_of(wire, 0), wire.client.tunnel._outlet
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    while not sock.waiting:
        outlet.send_plain(bytearray((16375).to_bytes(3, "big") + b"\xee" + bytes(5 + 16375)))
    assert not outlet.has_backlog
    assert not outlet.is_settled
    return sock


def test_the_last_record_is_out_before_the_end_is_said(make: Callable[..., Wire]) -> None:
    """A FIN at the moment when the kernel holds a record back would cut it off."""
    wire = make(GOOD, None)
    sock = stuck(wire)
    tunnel = wire.client.tunnel
    tunnel.is_draining = True
    tunnel._end_if_idle()
    assert not wire.client.closed
    wire.loop.watch(wire.sockets[1].fileno(), wire.server.tunnel)
    wire.run_until(lambda: wire.client.closed and wire.server.closed)
    assert not sock.waiting
    assert wire.client.closed == [None]
    records = wire.server.tunnel._outlet.records
    assert records is not None
    assert records.peer_closed


def test_the_same_with_frames_behind_it(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    sock = stuck(wire)
    wire.client.tunnel.go_away()
    assert wire.client.tunnel._outlet.has_backlog
    assert not wire.client.closed
    wire.loop.watch(wire.sockets[1].fileno(), wire.server.tunnel)
    wire.run_until(lambda: wire.client.closed and wire.server.closed)
    assert not sock.waiting
    assert wire.client.closed == [None]


def test_whoever_ends_with_frames_that_wait_does_not_say_that_all_is_well(make: Callable[..., Wire]) -> None:
    wire = make(GOOD, None)
    stuck(wire)
    tunnel, records = wire.client.tunnel, wire.server.tunnel._outlet.records
    tunnel.mux.ping(b"waiting\0")
    tunnel.flush()
    tunnel.close()
    wire.loop.watch(wire.sockets[1].fileno(), wire.server.tunnel)
    wire.run_until(lambda: wire.server.closed)
    assert records is not None
    assert not records.peer_closed
