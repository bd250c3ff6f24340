"""What leaves on a tunnel's socket: in order, whatever the kernel takes at once."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from tests.kit.polling import eventually
from tests.kit.tls import End, joined
from tests.kit.wire import received, tcp_pair
from ztunnel.dataplane.buffers import CHUNK_FRAMED, Scratch
from ztunnel.dataplane.outlet import Outlet
from ztunnel.dataplane.sockets import reset
from ztunnel.hbone.records_own import OwnRecords

_HANDSHAKE = 22
_UPDATE_REQUESTED = bytes((24, 0, 0, 1, 1))


class Pipe:
    """An outlet, and what its peer reads."""

    def __init__(self) -> None:
        self.near, self.far = tcp_pair()
        self.lost: list[OSError] = []
        self.outlet = Outlet(Scratch(), self.lost.append)
        self.outlet.open(self.near)
        sender, self.reader = joined((True, True))
        self.sender: End = sender

    @property
    def blocked(self) -> bool:
        return self.outlet.is_blocked

    def encrypt(self) -> None:
        self.outlet.records = self.sender.records

    def read(self) -> bytes:
        """The plaintext of what has come."""
        while data := received(self.far):
            self.reader.receive(data)
        plain = bytes(self.reader.plain)
        self.reader.plain.clear()
        return plain

    def fill(self) -> bytes:
        """Sends until the kernel takes no more; what was sent."""
        sent = bytearray()
        while not self.blocked:
            plain = os.urandom(100_000)
            sent += plain
            self.outlet.send_plain(bytearray(plain))
        return bytes(sent)


@pytest.fixture(name="pipe")
def fixture_pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.near.close()
    pipe.far.close()


def test_what_needs_no_seal_leaves_as_it_is(pipe: Pipe) -> None:
    pipe.outlet.send_raw(b"flight")
    pipe.outlet.send_raw(b"")
    assert received(pipe.far) == b"flight"
    assert pipe.outlet.bytes_sent == 6


def test_frames_before_the_handshake_and_after_the_end_go_nowhere(pipe: Pipe) -> None:
    pipe.outlet.send_plain(bytearray(b"early"))
    pipe.encrypt()
    pipe.outlet.close()
    pipe.outlet.send_plain(bytearray(b"late"))
    pipe.outlet.send_raw(b"late")
    assert received(pipe.far) is None
    assert pipe.outlet.bytes_sent == 0


def test_more_than_a_scratch_buffer_is_sealed_in_parts(pipe: Pipe) -> None:
    pipe.encrypt()
    plain = os.urandom(2 * CHUNK_FRAMED + 5)
    pipe.outlet.send_plain(bytearray(plain))
    got = bytearray()

    def arrives() -> bool:
        got.extend(pipe.read())
        pipe.outlet.drain()
        return len(got) >= len(plain)

    eventually(arrives)
    assert bytes(got) == plain


def test_what_the_kernel_does_not_take_waits_in_order(pipe: Pipe) -> None:
    pipe.encrypt()
    plain = pipe.fill()
    assert pipe.outlet.has_backlog
    # What cannot be refused any more queues up behind; many pieces, so that a gathered write takes some of them in part.
    for number in range(200):
        control = b"control %d " % number * 50
        pipe.outlet.send_plain(bytearray(control))
        plain += control
    got = bytearray()

    def arrives() -> bool:
        got.extend(pipe.read())
        pipe.outlet.drain()
        return len(got) >= len(plain)

    eventually(arrives)
    assert not pipe.blocked
    assert bytes(got) == plain
    assert pipe.lost == []


def test_the_answer_to_a_key_update_goes_before_what_is_sealed_later(pipe: Pipe) -> None:
    pipe.encrypt()
    asking = pipe.reader.records
    assert isinstance(asking, OwnRecords)
    pipe.sender.receive(asking._control(_HANDSHAKE, _UPDATE_REQUESTED))
    asking._tx.update()
    pipe.outlet.send_plain(bytearray(b"under new keys"))
    assert pipe.read() == b"under new keys"


def test_a_lost_socket_is_told_once(pipe: Pipe) -> None:
    pipe.encrypt()
    pipe.fill()
    reset(pipe.far)
    pipe.outlet.drain()
    assert [error.errno for error in pipe.lost] == [errno.ECONNRESET]
    pipe.outlet.close()
    pipe.outlet.drain()
    assert len(pipe.lost) == 1


def test_a_socket_that_is_lost_at_the_first_write(pipe: Pipe) -> None:
    pipe.near.shutdown(socket.SHUT_WR)
    pipe.outlet.send_raw(b"x")
    assert len(pipe.lost) == 1
    assert not pipe.outlet.has_backlog
