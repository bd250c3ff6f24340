"""Accepting, dialling and the last words of a TCP connection, over loopback."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

import pytest

from tests.kit.wire import received, tcp_pair
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.loop import READABLE, Loop
from ztunnel.dataplane.sockets import (
    ACCEPTS_PER_ROUND,
    Acceptor,
    Dial,
    Farewell,
    acknowledge,
    adopt,
    finish,
    renew,
    reset,
    reset_on_close,
    unbind,
)


class Turning:
    """A loop that a test turns."""

    def __init__(self, loop: Loop | None = None) -> None:
        self.loop = loop or Loop()

    def until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            self.loop.run_once(0.01)


@pytest.fixture(name="turning")
def fixture_turning() -> Iterator[Turning]:
    turning = Turning()
    yield turning
    turning.loop.close()
    assert turning.loop.bugs == 0


# Ending


def test_reset_and_finish_say_what_they_mean() -> None:
    near, far = tcp_pair()
    reset(near)
    with far, pytest.raises(ConnectionResetError):
        far.recv(1)
    near, far = tcp_pair()
    near.send(b"last words")
    finish(near)
    assert far.recv(16) == b"last words"
    assert far.recv(16) == b""
    far.close()


def test_a_handshake_that_waits_for_bytes_is_acknowledged_by_them_or_on_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for said, speak in ((b"", acknowledge), (b"bytes", lambda sock: sock.send(b"bytes"))):
            with socket.socket() as near:
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
                near.connect(listener.getsockname())
                with pytest.raises(BlockingIOError):
                    listener.accept()
                speak(near)
                far, _ = listener.accept()
                with far:
                    assert not said or far.recv(16) == said


def test_nobody_has_to_acknowledge_what_is_over() -> None:
    near, far = tcp_pair()
    reset(far)
    acknowledge(near)
    near.close()


@pytest.mark.parametrize("ends_first", [False, True])
def test_finish_delivers_what_the_other_side_has_not_taken_yet(ends_first: bool) -> None:
    near, far = tcp_pair()
    reset_on_close(near)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += near.send(bytes(65536))
    if ends_first:
        far.shutdown(socket.SHUT_WR)
    near.shutdown(socket.SHUT_WR)
    if not ends_first:
        far.shutdown(socket.SHUT_WR)
    finish(near)
    far.setblocking(True)
    taken = 0
    while data := far.recv(1 << 20):
        taken += len(data)
    assert taken == sent
    far.close()


def test_what_is_delivered_needs_no_option() -> None:
    near, far = tcp_pair()
    reset_on_close(near)
    near.send(b"last words")
    far.shutdown(socket.SHUT_WR)
    near.shutdown(socket.SHUT_WR)
    ended = NoOptions(fileno=near.detach())
    finish(ended)
    assert far.recv(16) == b"last words"
    assert far.recv(16) == b""
    far.close()


class NoOptions(socket.socket):
    """A socket on which nothing can be set."""

    def setsockopt(self, *arguments: object) -> None:
        raise AssertionError("an option was set")


@pytest.mark.parametrize("end", [reset, finish])
def test_ending_what_is_closed_already_is_no_error(end: Callable[[socket.socket], None]) -> None:
    near, far = tcp_pair()
    far.close()
    near.close()
    end(near)
    assert near.fileno() == -1


# Another life

IP_BIND_ADDRESS_NO_PORT = 24


@contextmanager
def dialled(server: socket.socket, sock: socket.socket, source_ip: str | None) -> Iterator[socket.socket]:
    """What the server accepts of the socket."""
    if source_ip is not None:
        sock.bind((source_ip, 0))
    sock.connect(server.getsockname()[:2])
    accepted, peer = server.accept()
    assert source_ip in (None, peer[0])
    accepted.settimeout(5)
    with accepted:
        yield accepted


def close_both(sock: socket.socket, accepted: socket.socket, first: str) -> None:
    if first == "we":
        sock.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        accepted.close()
        assert sock.recv(1) == b""
    else:
        accepted.close()
        assert sock.recv(1) == b""
        sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("first", ["we", "they"])
@pytest.mark.parametrize(("family", "home"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_socket_that_ended_well_lives_again_as_a_new_one(family: socket.AddressFamily, home: str, first: str) -> None:
    sock = adopt(family, socket.socket(family).detach())
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reset_on_close(sock)
    lives = [home, None, home] if family == socket.AF_INET6 else ["127.0.0.9", None, "127.0.0.8", None]
    with socket.create_server((home, 0), family=family) as server:
        for source_ip in lives:
            with dialled(server, sock, source_ip) as accepted:
                assert source_ip is not None or sock.getsockname()[0] == home, "nothing of its former life"
                sock.send(b"ping")
                assert accepted.recv(9) == b"ping"
                accepted.send(b"pong")
                assert sock.recv(9) == b"pong"
                close_both(sock, accepted, first)
            assert renew(sock)
            unbind(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[0] == 1
    sock.close()


def test_only_what_is_over_in_both_directions_lives_again() -> None:
    near, far = tcp_pair()
    assert not renew(near), "open"
    near.shutdown(socket.SHUT_WR)
    assert not renew(near), "they have not ended"
    assert far.recv(1) == b""
    far.send(b"late")
    assert near.recv(9) == b"late"
    finish(near)
    far.close()
    assert not renew(near), "closed"


def test_what_is_not_acknowledged_is_not_cut() -> None:
    near, far = tcp_pair()
    far.shutdown(socket.SHUT_WR)
    sent = 0
    near.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sent += near.send(bytes(65536))
    assert near.recv(1) == b""
    near.shutdown(socket.SHUT_WR)
    assert not renew(near), "the last bytes are on their way"
    finish(near)
    far.settimeout(5)
    while sent:
        sent -= len(far.recv(65536))
    assert far.recv(1) == b""
    far.close()


def test_one_that_was_reset_in_the_end_does_not_live_again() -> None:
    near, far = tcp_pair()
    reset(far)
    assert not renew(near)
    near.close()


# Farewells


def test_a_farewell_waits_for_the_peers_end(turning: Turning) -> None:
    near, far = tcp_pair()
    near.send(b"last words")
    far.send(b"what nobody reads any more")
    Farewell(turning.loop, near)
    turning.until(lambda: received(far) == b"last words")
    assert received(far) == b""
    assert near.fileno() != -1
    far.close()
    turning.until(lambda: near.fileno() == -1)


@pytest.mark.slow
def test_a_farewell_does_not_wait_for_ever(turning: Turning) -> None:
    near, far = tcp_pair()
    with far:
        Farewell(turning.loop, near)
        turning.until(lambda: near.fileno() == -1)
        assert received(far) == b""


def test_a_farewell_to_a_peer_that_floods_leaves_the_loop_to_others(turning: Turning) -> None:
    class Endless(socket.socket):
        """There is always more."""

        reads = 0

        def recvmsg(self, size: int, space: int = 0, flags: int = 0) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
            self.reads += 1
            return bytes(size) if self.reads < 1000 else b"", [], 0, None

    near, far = tcp_pair()
    flooded = Endless(fileno=near.detach())
    Farewell(turning.loop, flooded)
    for _ in range(10):
        before = flooded.reads
        turning.loop.run_once(0)
        assert flooded.reads <= before + 2
    assert flooded.reads >= 10
    turning.until(lambda: flooded.fileno() == -1)
    far.close()


def test_a_farewell_to_somebody_who_is_gone(turning: Turning) -> None:
    near, far = tcp_pair()
    reset(far)
    Farewell(turning.loop, near)
    turning.until(lambda: near.fileno() == -1)


def test_a_farewell_on_a_reset_that_comes_later(turning: Turning) -> None:
    near, far = tcp_pair()
    farewell = Farewell(turning.loop, near)
    reset(far)
    turning.until(lambda: near.fileno() == -1)
    farewell.on_event(READABLE)
    farewell.on_bug()


# Accepting


class Door:
    """A listener with an acceptor, and who came through it."""

    def __init__(self, turning: Turning) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = self.listener.getsockname()
        self.came: list[tuple[socket.socket, Address]] = []
        self.shortages = 0
        self.acceptor = Acceptor(turning.loop, self.listener, self._accept, self._short)
        self.clients: list[socket.socket] = []

    def _accept(self, sock: socket.socket, peer: Address) -> None:
        self.came.append((sock, peer))

    def _short(self) -> None:
        self.shortages += 1

    def knock(self, count: int = 1) -> None:
        self.clients += [socket.create_connection(self.address) for _ in range(count)]

    def close(self) -> None:
        self.acceptor.close()
        for sock in [*self.clients, *(sock for sock, _ in self.came)]:
            sock.close()


@pytest.fixture(name="door")
def fixture_door(turning: Turning) -> Iterator[Door]:
    door = Door(turning)
    yield door
    door.close()


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """The process may open no further descriptor inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_burst_is_accepted_in_turns(turning: Turning, door: Door) -> None:
    door.knock(ACCEPTS_PER_ROUND + 10)
    sizes = []
    while len(door.came) < ACCEPTS_PER_ROUND + 10:
        before = len(door.came)
        turning.loop.run_once(1)
        sizes.append(len(door.came) - before)
    # The first comes alone; that more follow at once makes a burst of it, in bounded turns.
    assert sizes[0] == 1
    assert 1 < max(sizes) <= ACCEPTS_PER_ROUND
    assert door.came[0][1] == door.clients[0].getsockname()


def test_a_burst_is_one_also_where_rounds_are_long() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.002  # a round of two milliseconds: a bulk transfer has its turns in each
        return now[0]

    turning = Turning(Loop(clock))
    door = Door(turning)
    door.knock(10)
    rounds = 0
    while len(door.came) < 10:
        turning.loop.run_once(1)
        rounds += 1
    assert rounds == 2
    door.close()
    turning.loop.close()


def test_with_descriptors_short_it_rests_and_goes_on(turning: Turning, door: Door) -> None:
    door.knock(3)
    with no_descriptors_left():
        turning.loop.run_once(1)
        assert door.shortages == 1
        # Neither the same events again nor new ones make it try before its rest is over, let alone more often than once each rest.
        for _ in range(50):
            door.acceptor.on_event(READABLE)
        assert door.shortages == 1
        turning.until(lambda: door.shortages == 3)
    assert door.came == []
    turning.until(lambda: len(door.came) == 3)
    door.knock()
    turning.until(lambda: len(door.came) == 4)


def test_a_rest_ends_with_the_acceptor(turning: Turning, door: Door) -> None:
    door.knock()
    with no_descriptors_left():
        turning.loop.run_once(1)
        door.acceptor.close()
        door.acceptor.close()
    turning.loop.run_once(0.2)
    assert door.shortages == 1
    assert door.came == []
    door.acceptor.on_event(READABLE)


def test_who_died_in_the_queue_does_not_hold_up_the_next(turning: Turning) -> None:
    class Aborting(socket.socket):
        """accept(2) may report the error of the connection that it would have returned."""

        errors: ClassVar[list[int]] = [errno.ECONNABORTED, errno.ENETDOWN]

        def _accept(self) -> tuple[int, object]:
            if self.errors:
                code = self.errors.pop()
                raise OSError(code, os.strerror(code))
            accepted: tuple[int, object] = super()._accept()  # type: ignore[misc]  # typeshed leaves it out
            return accepted

    came: list[socket.socket] = []
    listener = Aborting()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    acceptor = Acceptor(turning.loop, listener, lambda sock, _peer: came.append(sock), lambda: pytest.fail("not a shortage"))
    with socket.create_connection(listener.getsockname()):
        turning.until(lambda: came)
    assert not listener.errors
    came[0].close()
    acceptor.close()


def test_a_connection_that_could_not_be_set_up_costs_itself_only(caplog: pytest.LogCaptureFixture) -> None:
    turning = Turning()
    listener = socket.create_server(("127.0.0.1", 0))
    came: list[socket.socket] = []

    def accept(sock: socket.socket, _peer: Address) -> None:
        came.append(sock)
        if len(came) == 1:
            raise RuntimeError("a bug")

    acceptor = Acceptor(turning.loop, listener, accept, lambda: None)
    clients = [socket.create_connection(listener.getsockname()) for _ in range(2)]
    turning.until(lambda: len(came) == 2)
    assert turning.loop.bugs == 1
    acceptor.close()
    turning.loop.close()
    for sock in clients + came:
        sock.close()


def test_an_acceptor_that_is_closed_by_what_it_accepted_stops(turning: Turning, door: Door) -> None:
    door.knock(3)

    def last_one(sock: socket.socket, peer: Address) -> None:
        door.came.append((sock, peer))
        door.acceptor.close()

    door.acceptor._on_accept = last_one
    turning.loop.run_once(1)
    assert len(door.came) == 1


# Dialling


class Call:
    """One dial and what came of it."""

    def __init__(self, turning: Turning, to: Address, *, seconds: float = 5.0, source: str | None = None) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.results: list[OSError | None] = []
        self.dial = Dial(turning.loop, self.sock, seconds, self._done)
        self.dial.start(to, source)

    def _done(self, sock: socket.socket, error: OSError | None) -> None:
        assert sock is self.sock
        self.results.append(error)

    @property
    def failure(self) -> int:
        """The errno of the only result."""
        (error,) = self.results
        assert error is not None
        assert self.sock.fileno() == -1
        return error.errno or 0


@contextmanager
def silent_listener() -> Iterator[Address]:
    """An address where a connect is neither accepted nor refused: its backlog is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            waiting.append(sock)
        try:
            yield listener.getsockname()
        finally:
            for sock in waiting:
                sock.close()


def test_a_dial_that_is_answered(turning: Turning, door: Door) -> None:
    call = Call(turning, door.address, source="127.0.0.2")
    turning.until(lambda: call.results)
    assert call.results == [None]
    turning.until(lambda: door.came)
    assert door.came[0][1][0] == "127.0.0.2"
    call.dial.on_event(READABLE)
    call.dial.on_bug()
    assert call.sock.fileno() != -1, "once done, the socket is the caller's"
    turning.loop.forget(call.sock.fileno())
    call.sock.close()


def test_a_dial_that_is_refused(turning: Turning, door: Door) -> None:
    door.acceptor.close()
    call = Call(turning, door.address)
    turning.until(lambda: call.results)
    assert call.failure == errno.ECONNREFUSED


def test_within_one_namespace_a_dial_is_over_at_once(turning: Turning, door: Door) -> None:
    answered = Call(turning, door.address)
    assert answered.results == [None]
    answered.sock.close()
    turning.until(lambda: door.came)
    door.acceptor.close()
    assert Call(turning, door.address).failure == errno.ECONNREFUSED


def test_a_dial_that_is_not_answered_yet_goes_on(turning: Turning) -> None:
    with silent_listener() as address:
        call = Call(turning, address)
        turning.loop.run_once(0)
        assert call.results == []
        call.dial.cancel()


def test_a_dial_that_fails_at_once(turning: Turning) -> None:
    # TCP to a broadcast address is refused by the kernel before anything is sent.
    assert Call(turning, ("255.255.255.255", 80)).failure in (errno.ENETUNREACH, errno.EACCES)
    assert Call(turning, ("127.0.0.1", 80), source="192.0.2.1").failure == errno.EADDRNOTAVAIL


def test_a_dial_has_a_deadline(turning: Turning) -> None:
    with silent_listener() as address:
        call = Call(turning, address, seconds=0.05)
        turning.until(lambda: call.results)
    assert isinstance(call.results[0], TimeoutError)
    assert call.failure == errno.ETIMEDOUT


def test_a_cancelled_dial_says_nothing(turning: Turning) -> None:
    with silent_listener() as address:
        call = Call(turning, address, seconds=0.02)
        call.dial.cancel()
        call.dial.cancel()
        ended: list[int] = []
        turning.loop.call_later(0.05, lambda: ended.append(1))
        turning.until(lambda: ended)
    assert call.results == []
    assert call.sock.fileno() == -1
