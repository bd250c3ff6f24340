"""Two sockets joined: half-closes and resets of each side, a reader that is slow, a far side that comes late."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.kit.wire import Ends, received, tcp_pair
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop
from ztunnel.dataplane.relay import AppReset, TooMuchWaiting
from ztunnel.dataplane.sockets import Dial, reset
from ztunnel.dataplane.splice import Splice
from ztunnel.mesh.errors import LocalError


class Joint:
    """A splice, and the applications at both ends."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.ends = Ends()
        client, self.near = tcp_pair()
        self._upper, self.far = tcp_pair()
        self.scratch = Scratch()
        self.splice = Splice(self.loop, self.scratch, client, self.ends)

    def attach(self) -> None:
        self.splice.attach(self._upper)

    def run_until(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            self.loop.run_once(0.01)

    def ended_with_reset(self, sock: socket.socket) -> bool:
        with pytest.raises(ConnectionResetError):
            self.run_until(lambda: received(sock) == b"never")
        return True

    def stuff(self, sender: socket.socket) -> int:
        """Sends until nothing moves any more; how much."""
        taken = still = 0
        while still < 30:
            try:
                taken += sender.send(bytes(1 << 20))
                still = 0
            except BlockingIOError:
                still += 1
            self.loop.run_once(0)
        return taken

    def drain(self, sock: socket.socket, size: int) -> None:
        got = 0

        def more() -> bool:
            nonlocal got
            got += len(received(sock) or b"")
            return got >= size

        self.run_until(more, 20)
        assert got == size

    def close(self) -> None:
        self.splice.abort(LocalError("the test is over"))
        for sock in (self.near, self.far, self._upper):
            sock.close()
        assert not self.loop._handlers
        self.loop.close()
        assert self.loop.bugs == 0
        assert len(self.ends.results) == 1


@pytest.fixture(name="joint")
def fixture_joint() -> Iterator[Joint]:
    joint = Joint()
    yield joint
    joint.close()


@pytest.fixture(name="open_joint")
def fixture_open_joint(joint: Joint) -> Joint:
    joint.attach()
    return joint


def test_bytes_both_ways_and_states(joint: Joint) -> None:
    joint.near.send(b"early")
    assert joint.splice.state == "connecting"
    joint.splice.client.on_event(READABLE)
    joint.attach()
    assert joint.splice.state == "open"
    joint.run_until(lambda: received(joint.far) == b"early")
    joint.far.send(b"answer")
    joint.run_until(lambda: received(joint.near) == b"answer")
    assert (joint.splice.up, joint.splice.down) == (5, 6)
    joint.near.shutdown(socket.SHUT_WR)
    joint.run_until(lambda: received(joint.far) == b"")
    assert joint.splice.state == "half-closed"


@pytest.mark.parametrize("first", ["client", "server"])
def test_half_closes_pass_one_by_one(open_joint: Joint, first: str) -> None:
    joint = open_joint
    one, other = (joint.near, joint.far) if first == "client" else (joint.far, joint.near)
    one.send(b"all")
    one.shutdown(socket.SHUT_WR)
    joint.run_until(lambda: received(other) == b"all")
    joint.run_until(lambda: received(other) == b"")
    other.send(b"still here")
    joint.run_until(lambda: received(one) == b"still here")
    other.close()
    joint.run_until(lambda: received(one) == b"")
    joint.run_until(lambda: joint.ends.is_over)
    assert joint.ends.results == [None]


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_reset_is_a_reset_on_the_other_side(open_joint: Joint, first: str) -> None:
    joint = open_joint
    one, other = (joint.near, joint.far) if first == "client" else (joint.far, joint.near)
    one.send(b"x")
    joint.run_until(lambda: received(other) == b"x")
    reset(one)
    joint.run_until(lambda: joint.ends.is_over)
    error = joint.ends.results[0]
    assert isinstance(error, AppReset)
    assert first in str(error)
    assert joint.ended_with_reset(other)


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_reset_behind_a_half_close_is_noticed(open_joint: Joint, first: str) -> None:
    joint = open_joint
    one, other = (joint.near, joint.far) if first == "client" else (joint.far, joint.near)
    one.shutdown(socket.SHUT_WR)
    joint.run_until(lambda: received(other) == b"")
    reset(one)
    joint.run_until(lambda: joint.ends.is_over)
    assert str(joint.ends.results[0]) == f"{first} side was reset"


def test_small_messages_make_a_worker_a_shared_one(open_joint: Joint) -> None:
    open_joint.near.send(b"a question")
    open_joint.run_until(lambda: received(open_joint.far) == b"a question")
    assert open_joint.loop.is_shared


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_slow_reader_stops_its_sender(open_joint: Joint, first: str) -> None:
    joint = open_joint
    sender, reader = (joint.near, joint.far) if first == "client" else (joint.far, joint.near)
    size = joint.stuff(sender)
    waiting = [len(end.pending) for end in (joint.splice.client, joint.splice._upper) if end is not None]
    assert 0 < max(waiting) <= 256 * 1024
    # The other direction does not wait.
    reader.send(b"meanwhile")
    joint.run_until(lambda: received(sender) == b"meanwhile")
    sender.shutdown(socket.SHUT_WR)
    joint.drain(reader, size)
    joint.run_until(lambda: received(reader) == b"")


def test_a_reader_that_dies_with_bytes_waiting(open_joint: Joint) -> None:
    joint = open_joint
    joint.stuff(joint.near)
    reset(joint.far)
    joint.run_until(lambda: joint.ends.is_over)
    assert isinstance(joint.ends.results[0], AppReset)
    assert joint.ended_with_reset(joint.near)


def test_whole_transfers(open_joint: Joint) -> None:
    joint = open_joint
    data = os.urandom(3_000_000)
    sent = 0
    got = bytearray()

    def move() -> bool:
        nonlocal sent
        if sent < len(data):
            try:
                sent += joint.near.send(data[sent:])
            except BlockingIOError:
                pass
        got.extend(received(joint.far) or b"")
        return len(got) == len(data)

    joint.run_until(move, 20)
    assert bytes(got) == data


def test_an_abort_resets_both_sides_even_before_there_are_two(joint: Joint) -> None:
    joint.splice.abort(LocalError("enough"))
    assert joint.ended_with_reset(joint.near)
    joint.splice.abort(LocalError("again"))
    joint.splice.client.on_event(READABLE | WRITABLE | HANGUP)


def test_a_bug_is_the_end_of_one_splice(open_joint: Joint) -> None:
    open_joint.splice.client.on_bug()
    assert str(open_joint.ends.results[0]) == "internal error"


def test_a_side_that_is_gone_when_the_end_is_passed_on(open_joint: Joint) -> None:
    joint = open_joint
    # Both at once: the client's end of file is read before the server's reset has been told.
    joint.near.shutdown(socket.SHUT_WR)
    reset(joint.far)
    joint.run_until(lambda: joint.ends.is_over)
    assert isinstance(joint.ends.results[0], AppReset)


def test_bytes_for_a_side_that_is_gone(open_joint: Joint) -> None:
    joint = open_joint
    joint.near.send(b"x")
    joint.run_until(lambda: received(joint.far) == b"x")
    upper = joint.splice._upper
    assert upper is not None
    joint.loop.forget(upper.sock.fileno())
    reset(joint.far)
    joint.near.send(b"y")
    joint.run_until(lambda: joint.ends.is_over)
    assert isinstance(joint.ends.results[0], AppReset)


def test_a_server_that_says_its_last_word_before_we_look(joint: Joint) -> None:
    calling = socket.socket()
    calling.setblocking(False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Dial(joint.loop, calling, 5.0, lambda sock, _error: joint.splice.attach(sock)).start(listener.getsockname(), None)
        far, _ = listener.accept()
    far.send(b"banner")
    far.close()
    joint.run_until(lambda: received(joint.near) == b"banner")
    joint.run_until(lambda: received(joint.near) == b"")


def test_what_waits_for_all_applications_together_has_a_bound(joint: Joint) -> None:
    joint.attach()
    joint.scratch.waiting.limit = 100 << 10
    for _ in range(200):
        if joint.ends.is_over:
            break
        with suppress(OSError):
            joint.near.send(bytes(1 << 20))
        joint.loop.run_once(0)
    assert [type(result) for result in joint.ends.results] == [TooMuchWaiting]
    assert joint.scratch.waiting.bytes == 0
