"""One application and one stream: every ending in every order, and what waits meanwhile."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.kit.wire import TIMES, Ends, Wire, received, tcp_pair
from ztunnel.dataplane import sockets
from ztunnel.dataplane.loop import READABLE
from ztunnel.dataplane.relay import CONNECT_ERROR, AppReset, StreamRelay, TooMuchWaiting
from ztunnel.dataplane.sockets import reset
from ztunnel.hbone import frames
from ztunnel.hbone.frames import Code
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.mesh.errors import LocalError, MeshError, UpstreamError, UpstreamRefused


@pytest.fixture(name="wire")
def fixture_wire() -> Iterator[Wire]:
    wire = Wire(times=TIMES)
    yield wire
    wire.close()
    assert wire.loop.bugs == 0
    assert wire.scratch.waiting.bytes == 0, "what waited was counted off again"


class Pair:
    """One stream with both applications."""

    def __init__(self, wire: Wire, *, optimistic: bool = True) -> None:
        self.wire = wire
        self.near, self.ends = wire.open(optimistic=optimistic)
        self.relay = wire.client.relays[-1]

    def meet(self) -> None:
        """Both sides are there, and the answer has come."""
        self.wire.run_until(lambda: self.wire.server.apps and self.ends.answered)

    @property
    def far(self) -> socket.socket:
        return self.wire.server.apps[-1]

    @property
    def server(self) -> StreamRelay:
        return self.wire.server.relays[-1]

    @property
    def server_ends(self) -> Ends:
        return self.wire.server.ends[-1]


@pytest.fixture(name="pair")
def fixture_pair(wire: Wire) -> Pair:
    pair = Pair(wire)
    pair.meet()
    return pair


def is_reset(wire: Wire, sock: socket.socket) -> bool:
    with pytest.raises(ConnectionResetError):
        wire.run_until(lambda: received(sock) == b"never")
    return True


def attach_late(wire: Wire) -> socket.socket:
    """What happens once the application of a held request is reached: its end of the connection."""
    near, far = tcp_pair()
    wire.server.apps.append(far)
    relay = wire.server.relays[-1]
    wire.server.tunnel.mux.respond(relay._stream, 200)
    wire.server.tunnel.mark_dirty()
    relay.attach(near)
    return far


# States


def test_states_for_the_listing(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays)
    assert pair.relay.state == pair.server.state == "connecting"
    far = attach_late(wire)
    wire.run_until(lambda: pair.ends.answered)
    assert pair.relay.state == pair.server.state == "open"
    far.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: pair.relay.state == "half-closed")
    assert pair.server.state == "half-closed"


# Before there is an application


def test_what_comes_before_the_application_is_there_waits_for_it(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    pair.near.send(b"early")
    wire.run_until(lambda: wire.server.relays and wire.server.relays[0].from_stream == 5)
    far = attach_late(wire)
    wire.run_until(lambda: received(far) == b"early")


@pytest.mark.parametrize("early", [b"", b"early"], ids=["nothing", "something"])
def test_an_end_that_comes_before_the_application_is_there_is_passed_on(wire: Wire, early: bytes) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    pair.near.send(early)
    pair.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: wire.server.relays and wire.server.relays[0]._remote_ended)
    far = attach_late(wire)
    if early:
        wire.run_until(lambda: received(far) == early)
    wire.run_until(lambda: received(far) == b"")
    far.send(b"answer")
    far.close()
    wire.run_until(lambda: received(pair.near) == b"answer")
    wire.run_until(lambda: pair.server_ends.is_over and pair.ends.is_over)
    assert pair.ends.results == pair.server_ends.results == [None]


def test_a_reset_before_the_application_is_there_ends_it(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    pair.near.send(b"early")
    wire.run_until(lambda: wire.server.relays and wire.server.relays[0].from_stream)
    reset(pair.near)
    wire.run_until(lambda: pair.server_ends.is_over)
    assert isinstance(pair.server_ends.results[0], UpstreamError)
    assert not wire.server.tunnel.relays


def test_an_application_that_cannot_be_reached_is_a_refusal(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays)

    def refuse(_error: MeshError) -> None:
        wire.server.tunnel.mux.respond(pair.server._stream, 503, end=True)
        wire.server.tunnel.mark_dirty()

    pair.server.on_refused = refuse
    pair.server.abort(UpstreamRefused("nobody listens"))
    wire.run_until(lambda: pair.ends.is_over)
    error = pair.ends.results[0]
    assert isinstance(error, UpstreamRefused)
    assert error.status == 503
    assert is_reset(wire, pair.near)


def test_without_a_word_for_refusals_the_stream_is_reset(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays)
    pair.server.abort(UpstreamRefused("nobody listens"))
    wire.run_until(lambda: pair.ends.is_over)
    assert f"{CONNECT_ERROR:#x}" in str(pair.ends.results[0])


# Waiting for the answer


def test_without_optimism_nothing_is_read_before_the_answer(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire, optimistic=False)
    pair.near.send(b"patience")
    wire.run_until(lambda: wire.server.relays)
    for _ in range(10):
        wire.loop.run_once(0)
    assert pair.relay.to_stream == 0
    far = attach_late(wire)
    wire.run_until(lambda: received(far) == b"patience")


def test_a_relay_that_waited_for_the_answer_is_forgotten_with_its_end(wire: Wire, pair: Pair) -> None:
    later = Pair(wire, optimistic=False)
    later.near.send(b"all")
    later.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: later.ends.answered and received(later.far) == b"all")
    later.far.close()
    wire.run_until(lambda: later.ends.is_over)
    assert not wire.client.tunnel._parked


def test_a_client_that_leaves_before_the_answer_is_noticed_without_reading(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire, optimistic=False)
    wire.run_until(lambda: wire.server.relays)
    reset(pair.near)
    wire.run_until(lambda: pair.ends.is_over)
    assert isinstance(pair.ends.results[0], AppReset)
    wire.run_until(lambda: pair.server_ends.is_over)


def test_a_client_that_half_closes_before_the_answer_is_still_answered(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire, optimistic=False)
    pair.near.send(b"all")
    pair.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: wire.server.relays)
    far = attach_late(wire)
    wire.run_until(lambda: received(far) == b"all")
    wire.run_until(lambda: received(far) == b"")


@pytest.mark.parametrize("ended", [True, False], ids=["and ended", "and left open"])
def test_a_refusal_ends_the_stream_whether_the_peer_ended_it_or_not(wire: Wire, ended: bool) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays)
    wire.server.tunnel.mux.respond(pair.server._stream, 502, end=ended)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: pair.ends.is_over)
    assert not wire.client.tunnel.relays


def test_a_refusal_that_no_reset_follows_leaves_no_stream_behind(wire: Wire) -> None:
    # RFC 9113 §8.1: a server may ask the client to stop by RST_STREAM(NO_ERROR). One that does not would count the stream for ever.
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays)
    answer = Mux(client=False, limits=MuxLimits())._codec.encode([(b":status", b"401")])
    wire.server.tunnel.mux._exchange.out += frames.header_block(pair.server._stream, answer, end_stream=True, largest=16384)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: pair.ends.is_over and pair.server_ends.is_over)
    assert wire.client.tunnel.mux.open_count == wire.server.tunnel.mux.open_count == 0


def test_an_answer_that_is_the_end_at_once(wire: Wire) -> None:
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays)
    wire.server.tunnel.mux.respond(pair.server._stream, 200, end=True)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: received(pair.near) == b"")
    assert pair.ends.answered == 1
    pair.relay.answered(200, ended=False)
    assert pair.ends.answered == 1, "there is one answer"


# Ending


@pytest.mark.parametrize("code", [Code.NO_ERROR, Code.CANCEL, Code.CONNECT_ERROR])
def test_a_reset_behind_the_end_leaves_it_a_good_end(wire: Wire, pair: Pair, code: Code) -> None:
    assert wire.exchange(pair.far, pair.near, b"answer") == b"answer"
    wire.server.tunnel.mux.end_stream(pair.server._stream)
    wire.server.tunnel.mux.reset(pair.server._stream, code)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: pair.ends.is_over)
    assert pair.ends.results == [None]
    wire.run_until(lambda: received(pair.near) == b"")


@pytest.mark.parametrize("code", [Code.NO_ERROR, Code.CANCEL])
def test_a_reset_before_the_end_is_a_cut(wire: Wire, pair: Pair, code: Code) -> None:
    assert wire.exchange(pair.far, pair.near, b"half of an ans") == b"half of an ans"
    wire.server.tunnel.mux.reset(pair.server._stream, code)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: pair.ends.is_over)
    assert isinstance(pair.ends.results[0], UpstreamError)
    assert is_reset(wire, pair.near)


def test_a_good_end_reaches_an_application_that_is_still_sending(wire: Wire, pair: Pair) -> None:
    stuff(wire, pair, bytes(1 << 20))
    answer = os.urandom(1 << 20)
    assert wire.exchange(pair.far, pair.near, answer[: 1 << 16]) == answer[: 1 << 16]
    sent = (1 << 16) + pair.far.send(answer[1 << 16 :])
    wire.run_until(lambda: pair.relay.from_stream == sent)
    wire.server.tunnel.mux.end_stream(pair.server._stream)
    wire.server.tunnel.mux.reset(pair.server._stream, Code.NO_ERROR)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: pair.ends.results == [None])
    assert drain(wire, pair.near, sent - (1 << 16)) == answer[1 << 16 : sent]
    wire.run_until(lambda: received(pair.near) == b"")


def test_another_reset_is_a_reset(wire: Wire, pair: Pair) -> None:
    wire.server.tunnel.mux.reset(pair.server._stream, Code.INTERNAL_ERROR)
    wire.server.tunnel.mark_dirty()
    wire.run_until(lambda: pair.ends.is_over)
    assert is_reset(wire, pair.near)
    pair.relay.remote_reset(0)
    pair.relay.abort(LocalError("too late"))
    pair.relay.tunnel_lost(LocalError("too late"))
    assert len(pair.ends.results) == 1


def test_a_tunnel_that_dies_resets_both_applications(wire: Wire, pair: Pair) -> None:
    wire.client.tunnel.close(LocalError("enough"))
    assert str(pair.ends.results[0]) == "enough"
    wire.run_until(lambda: pair.server_ends.is_over)
    assert is_reset(wire, pair.near)
    assert is_reset(wire, pair.far)


def test_an_abort_resets_both_applications(wire: Wire, pair: Pair) -> None:
    pair.relay.abort(LocalError("policy"))
    wire.run_until(lambda: pair.server_ends.is_over)
    assert is_reset(wire, pair.near)
    assert is_reset(wire, pair.far)


def test_a_reset_behind_a_half_close_is_noticed(wire: Wire, pair: Pair) -> None:
    pair.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: received(pair.far) == b"")
    reset(pair.near)
    wire.run_until(lambda: pair.ends.is_over)
    assert isinstance(pair.ends.results[0], AppReset)
    # What came before the end of file was whole; whoever still answers learns that nobody listens.
    wire.run_until(lambda: pair.server_ends.results == [None])
    with pytest.raises(BrokenPipeError):
        wire.run_until(lambda: not pair.far.send(b"anybody?"))


def test_an_application_that_is_gone_behind_its_half_close_does_not_spoil_a_good_end(wire: Wire, pair: Pair) -> None:
    pair.meet()
    pair.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: received(pair.far) == b"")
    reset(pair.near)
    # Before the loop has heard of the reset.
    pair.relay.remote_ended()
    wire.run_until(lambda: pair.ends.is_over)
    assert pair.ends.results == [None]


def test_a_tunnel_that_ends_right_behind_its_last_stream_has_ended_well(wire: Wire, pair: Pair) -> None:
    """Its last bytes and its end come in one read: the relay is over, if not settled yet, and no live stream is lost."""
    pair.far.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: received(pair.near) == b"")
    wire.client.tunnel.go_away()
    wire.loop.run_once(0)
    pair.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: wire.server.closed)
    assert wire.server.closed == [None]
    wire.run_until(lambda: pair.server_ends.is_over)
    assert pair.server_ends.results == [None]


def test_an_abort_behind_a_good_end_changes_nothing_of_it(wire: Wire, pair: Pair) -> None:
    pair.meet()
    pair.near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: received(pair.far) == b"")
    pair.relay.remote_ended()
    # Before the round is over: a policy may be the next thing that the loop hears of.
    pair.relay.abort(LocalError("policy"))
    assert pair.ends.results == [None]
    assert not wire.client.tunnel.relays
    wire.loop.run_once(0)
    assert pair.ends.results == [None]


def test_a_connection_that_cannot_be_settled_is_counted_all_the_same() -> None:
    class Broken(sockets.Home):
        def give_back(self, sock: socket.socket) -> None:
            sock.close()
            raise ZeroDivisionError("this is a bug")

    wire = Wire(times=TIMES)
    pair = Pair(wire)
    pair.meet()
    pair.relay._home = Broken()
    for each in (pair.near, pair.far):
        each.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: pair.ends.is_over and pair.server_ends.is_over)
    assert pair.ends.results == [None]
    assert wire.loop.bugs == 1
    wire.close()


@pytest.mark.parametrize("first", ["near", "far"])
def test_a_good_end_needs_no_care_once_it_is_acknowledged(wire: Wire, pair: Pair, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.meet()
    careful: list[socket.socket] = []
    monkeypatch.setattr(sockets, "deliver_on_close", careful.append)
    one, other = (pair.near, pair.far) if first == "near" else (pair.far, pair.near)
    one.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: received(other) == b"")
    other.close()
    wire.run_until(lambda: pair.ends.results and pair.server_ends.results)
    assert (pair.ends.results, pair.server_ends.results, careful) == ([None], [None], [])


def test_bytes_for_an_application_that_is_gone_reset_the_stream(wire: Wire, pair: Pair) -> None:
    # The kernel tells of it at the next write only: with nothing read there is no event left to come.
    wire.loop.forget(pair.server._sock.fileno() if pair.server._sock else -1)
    reset(pair.far)
    pair.near.send(b"x")
    wire.run_until(lambda: pair.server_ends.is_over)
    assert isinstance(pair.server_ends.results[0], AppReset)
    wire.run_until(lambda: pair.ends.is_over)


def test_a_bug_ends_one_relay(wire: Wire, pair: Pair) -> None:
    pair.relay.on_bug()
    assert str(pair.ends.results[0]) == "internal error"
    pair.relay.on_event(READABLE)


# What waits


def stuff(wire: Wire, pair: Pair, piece: bytes) -> int:
    """Sends until nothing moves any more; the number of bytes that were taken."""
    taken = 0
    still = 0
    while still < 50:
        try:
            taken += pair.near.send(piece)
            still = 0
        except BlockingIOError:
            still += 1
        wire.loop.run_once(0)
    return taken


def drain(wire: Wire, sock: socket.socket, size: int) -> bytes:
    got = bytearray()

    def more() -> bool:
        got.extend(received(sock) or b"")
        return len(got) >= size

    wire.run_until(more, 20)
    return bytes(got)


def test_an_application_that_dies_with_bytes_waiting(wire: Wire, pair: Pair) -> None:
    stuff(wire, pair, bytes(1 << 20))
    assert pair.server._backlog
    reset(pair.far)
    wire.run_until(lambda: pair.server_ends.is_over)
    assert not pair.server._backlog
    wire.run_until(lambda: pair.ends.is_over)
    # The connection's window was given back: another stream is not starved by this one's bytes.
    other = Pair(wire)
    other.meet()
    data = os.urandom(20 << 20)
    assert wire.exchange(other.near, other.far, data) == data


def test_a_graceful_reset_comes_behind_what_waits(wire: Wire, pair: Pair) -> None:
    size = stuff(wire, pair, bytes(1 << 20))
    pair.near.shutdown(socket.SHUT_WR)
    assert len(drain(wire, pair.far, size)) == size
    wire.run_until(lambda: received(pair.far) == b"")
    pair.far.close()
    wire.run_until(lambda: pair.ends.results == [None])


def held_bytes(relay: StreamRelay) -> int:
    return sum(map(sys.getsizeof, relay._backlog))


def test_crumbs_cost_no_more_than_loaves(wire: Wire) -> None:
    """A peer that sends its bytes one by one may not make us hold hundreds for each."""
    wire.server.hold = True
    pair = Pair(wire)
    wire.run_until(lambda: wire.server.relays and wire.client.tunnel._settled)
    tunnel, relay = wire.client.tunnel, wire.server.relays[0]
    crumbs = 0
    while crumbs < 50_000:
        for _ in range(500):
            frame = bytearray(10)
            tunnel.mux.data_header(frame, 0, pair.relay._stream, 1)
            frame[9] = crumbs & 0xFF
            tunnel._plain.append(frame)
            crumbs += 1
        tunnel.mark_dirty()
        wire.run_until(lambda sent=crumbs: relay.from_stream == sent)  # type: ignore[misc]  # mypy does not infer defaults
    assert held_bytes(relay) < 4 * crumbs
    assert len(relay._backlog) < 100
    far = attach_late(wire)
    assert drain(wire, far, crumbs) == bytes(number & 0xFF for number in range(crumbs))


def test_more_pieces_than_one_system_call_takes(wire: Wire, pair: Pair) -> None:
    pieces = [os.urandom(30) for _ in range(500)]
    tunnel = wire.client.tunnel
    for piece in pieces:
        frame = bytearray(9) + piece
        tunnel.mux.data_header(frame, 0, pair.relay._stream, len(piece))
        tunnel._plain.append(frame)
    tunnel.mark_dirty()
    assert drain(wire, pair.far, 15_000) == b"".join(pieces)


def test_a_relay_that_is_over_gives_back_what_still_comes(wire: Wire, pair: Pair) -> None:
    mux = wire.client.tunnel.mux
    pair.relay.abort(LocalError("enough"))
    before = mux.export().receiver.credit
    pair.relay.deliver(memoryview(b"late"))
    assert mux.export().receiver.credit == before + 4


def test_what_waits_for_all_applications_together_has_a_bound(wire: Wire, pair: Pair) -> None:
    """The greedy connection ends and gives its room back; one with little waiting goes on."""
    wire.scratch.waiting.limit = 1 << 20
    ends = pair.server_ends
    modest = Pair(wire)
    modest.meet()
    far = modest.far

    def push() -> bool:
        with suppress(OSError):
            pair.near.send(bytes(65536))
        return ends.is_over

    wire.run_until(push)
    assert [type(result) for result in ends.results] == [TooMuchWaiting]
    assert wire.scratch.waiting.bytes == 0
    assert wire.scratch.waiting.take_refused() == 1
    data = os.urandom(4 << 20)
    assert wire.exchange(modest.near, far, data) == data
