"""Conversations with one multiplexer: raw frames in, events and frames out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from tests.kit.h2peer import (
    CONNECT,
    CONNECT_BLOCK,
    OK_BLOCK,
    SETTINGS,
    SETTINGS_ACK,
    Script,
    client,
    data,
    fails,
    frame_texts,
    headers,
    literal,
    server,
)
from ztunnel.hbone import frames
from ztunnel.hbone.events import (
    PeerGoingAway,
    PongReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from ztunnel.hbone.frames import Code, Kind, MuxError
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.hbone.muxstate import MuxState

TINY = MuxLimits(stream_window=100, connection_window=65_535)


# Beginnings


def test_a_client_says_first() -> None:
    assert frame_texts(bytes(Mux(client=True, limits=MuxLimits()).take())) == [
        "PREFACE",
        "SETTINGS HEADER_TABLE_SIZE=0 ENABLE_PUSH=0 INITIAL_WINDOW_SIZE=4194304 MAX_FRAME_SIZE=1048576 MAX_HEADER_LIST_SIZE=16384",
        "WINDOW_UPDATE 0 +16711681",
    ]


def test_a_server_says_first() -> None:
    mux = Mux(client=False, limits=MuxLimits(connection_window=65_535))
    assert frame_texts(bytes(mux.take())) == [
        (
            "SETTINGS HEADER_TABLE_SIZE=0 MAX_CONCURRENT_STREAMS=200 INITIAL_WINDOW_SIZE=4194304 MAX_FRAME_SIZE=1048576"
            " MAX_HEADER_LIST_SIZE=65536 EARLY_DATA=1"
        )
    ]
    assert not mux.has_output
    assert not mux.can_open


@pytest.mark.parametrize("wire", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/1", frames.PREFACE[:-1] + b"x", b"\x16\x03\x01"])
def test_not_a_client(wire: bytes) -> None:
    mux = Mux(client=False, limits=MuxLimits())
    with pytest.raises(MuxError):
        mux.receive(memoryview(bytearray(wire)), 0, len(wire), 0.0)


@pytest.mark.parametrize("wire", [SETTINGS_ACK, frames.frame(Kind.PING, 0, 0, bytes(8)), headers(1)])
def test_settings_come_first(wire: bytes) -> None:
    mux = Mux(client=True, limits=MuxLimits())
    with pytest.raises(MuxError) as caught:
        mux.receive(memoryview(bytearray(wire)), 0, len(wire), 0.0)
    assert caught.value.code == Code.PROTOCOL_ERROR


def test_streams_before_and_after_settings() -> None:
    mux = Mux(client=True, limits=MuxLimits(assumed_streams=2))
    mux.open_stream(CONNECT)
    mux.open_stream(CONNECT)
    with pytest.raises(ValueError, match="no stream"):
        mux.open_stream(CONNECT)
    for values, can_open in (({}, True), ({3: 2}, False), ({3: 3}, True)):
        wire = bytearray(frames.settings(values))
        mux.receive(memoryview(wire), 0, len(wire), 0.0)
        assert mux.can_open is can_open


@pytest.mark.parametrize("limits", [{"connection_window": 65_534}, {"stream_window": 0}, {"stream_window": 1 << 31}, {"max_frame": 16_383}])
def test_limits_that_http2_cannot_say(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is not in"):
        replace(MuxLimits(), **limits)  # type: ignore[arg-type]  # a test's keywords


# Requests and responses


def test_request_data_and_both_ends() -> None:
    script = server()
    script.receives(headers(1), data(1, b"early"), events=[RequestReceived(1, CONNECT, False), "Data 1 b'early'"])
    assert script.mux.sendable(1) == 0
    script.mux.respond(1, 200, [(b"baggage", b"a=b")])
    script.mux.respond(1, 200)
    script.sends("HEADERS 1 15B")
    assert script.mux.sendable(1) == 65_535
    script.receives(data(1, b"x", end=True), events=["Data 1 b'x'", StreamEnded(1)])
    script.mux.end_stream(1)
    script.mux.end_stream(1)
    script.sends("DATA 1 0B end")
    assert script.mux.open_count == 0
    for number in (1, 99):
        script.mux.respond(number, 200)
        script.mux.reset(number, Code.CANCEL)
        script.mux.end_stream(number)
        assert script.mux.sendable(number) == 0
    script.sends()


def test_request_that_ends_at_once() -> None:
    script = server()
    script.receives(headers(1, end=True), events=[RequestReceived(1, CONNECT, True)])
    script.mux.respond(1, 400, end=True)
    script.sends("HEADERS 1 2B end")
    assert script.mux.open_count == 0


LABELS = ((b"baggage", b"a=b"), (b"forwarded", b"for=a"), (b"traceparent", b"00"))
HEADED = CONNECT_BLOCK + literal(LABELS)


@pytest.mark.parametrize(
    "block",
    [
        CONNECT_BLOCK + literal([*LABELS[:1], (b"forwarded", b"for=b\n"), LABELS[2]]),
        CONNECT_BLOCK + literal([*LABELS[:2], (b"traceparent", b" 00")]),
        CONNECT_BLOCK + literal([*LABELS[:2], (b"connection", b"00")]),
        CONNECT_BLOCK + literal([*LABELS[:2], (b":authority", b"00")]),
        CONNECT_BLOCK + literal([(b"baggage", b"a\0"), *LABELS[1:]]),
        literal([*LABELS, LABELS[0], LABELS[0]]),
        b"",
    ],
)
def test_a_malformed_request_behind_good_ones_that_are_like_it(block: bytes) -> None:
    script = server()
    script.receives(headers(1, HEADED), events=[RequestReceived(1, (*CONNECT, *LABELS), False)])
    script.receives(headers(3, HEADED), events=[RequestReceived(3, (*CONNECT, *LABELS), False)])
    script.receives(headers(5, block), sends=["RST_STREAM 5 PROTOCOL_ERROR"])
    script.receives(headers(7, HEADED), events=[RequestReceived(7, (*CONNECT, *LABELS), False)])


def test_a_first_request_without_anything() -> None:
    server().receives(headers(1, b""), sends=["RST_STREAM 1 PROTOCOL_ERROR"])


def test_responses_that_are_the_same_and_others() -> None:
    script = client()
    for number, block, status in (
        (1, OK_BLOCK, 200),
        (3, OK_BLOCK, 200),
        (5, b"\x8d", 404),
        (7, b"\x8d", 404),
        (9, OK_BLOCK, 200),
    ):
        script.mux.open_stream(CONNECT)
        script.mux.take()
        fields = ((b":status", b"%d" % status),)
        script.receives(headers(number, block), events=[ResponseReceived(number, status, fields, False)])


@pytest.mark.parametrize("block", [b"", literal([(b":status", b"2x0")]), b"\x88\x88"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_malformed_response_first_and_behind_a_good_one(block: bytes, before: int) -> None:
    script = client()
    for number in (1, 3)[:before]:
        script.mux.open_stream(CONNECT)
        script.mux.take()
        script.receives(headers(number, OK_BLOCK), events=[ResponseReceived(number, 200, ((b":status", b"200"),), False)])
    for number in (1, 3, 5)[before : before + 2]:
        script.mux.open_stream(CONNECT)
        script.mux.take()
        gone = StreamReset(number, int(Code.PROTOCOL_ERROR), False)
        script.receives(headers(number, block), events=[gone], sends=[f"RST_STREAM {number} PROTOCOL_ERROR"])


def test_response_that_ends_at_once() -> None:
    script = client()
    script.mux.open_stream(CONNECT)
    script.mux.take()
    script.receives(headers(1, OK_BLOCK, end=True), events=[ResponseReceived(1, 200, ((b":status", b"200"),), True)])
    script.mux.end_stream(1)
    assert script.mux.open_count == 0


def test_refusal_is_followed_by_a_clean_reset_and_late_data_is_forgiven() -> None:
    script = server()
    script.receives(headers(1), events=[RequestReceived(1, CONNECT, False)])
    script.mux.respond(1, 401, end=True)
    script.sends("HEADERS 1 6B end", "RST_STREAM 1 NO_ERROR")
    late = [data(1, b"late", padding=3), headers(1, end=True), frames.window_update(1, 5), frames.rst_stream(1, 8)]
    script.receives(*late)


def test_a_client_may_send_before_the_response() -> None:
    script = client()
    stream = script.mux.open_stream(CONNECT)
    assert frame_texts(bytes(script.mux.take())) == ["HEADERS 1 23B"]
    assert script.mux.sendable(stream) == 65_535


def test_headers_longer_than_a_frame_are_continued() -> None:
    script = client()
    script.mux.open_stream([*CONNECT, (b"baggage", b"x" * 20_000)])
    script.sends("HEADERS 1 16384B", "CONTINUATION 1 3652B")


def test_interim_responses_are_passed_over() -> None:
    script = client()
    script.mux.open_stream(CONNECT)
    script.mux.take()
    script.receives(headers(1, literal([(b":status", b"103")])))
    script.receives(headers(1, OK_BLOCK), events=[ResponseReceived(1, 200, ((b":status", b"200"),), False)])


@pytest.mark.parametrize("fields", [[(b":status", b"103")], [(b":status", b"abc")], [(b"a", b"b")]])
def test_malformed_responses(fields: list[tuple[bytes, bytes]]) -> None:
    script = client()
    script.mux.open_stream(CONNECT)
    script.mux.take()
    script.receives(headers(1, literal(fields), end=True), events=[StreamReset(1, 1, False)], sends=["RST_STREAM 1 PROTOCOL_ERROR"])


def test_data_before_the_response() -> None:
    script = client()
    script.mux.open_stream(CONNECT)
    script.mux.take()
    script.receives(data(1, b"x"), events=[StreamReset(1, 1, False)], sends=["RST_STREAM 1 PROTOCOL_ERROR"])


def test_malformed_requests_reset_their_stream_only() -> None:
    script = server(streams=1)
    script.receives(headers(3, literal([(b":method", b"CONNECT"), (b":path", b"/")])), sends=["RST_STREAM 3 PROTOCOL_ERROR"])
    script.receives(data(3, b"late"), data(1, b"x"), events=["Data 1 b'x'"])


def test_other_methods_are_the_callers() -> None:
    fields = ((b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"))
    server().receives(headers(1, literal(fields)), events=[RequestReceived(1, fields, False)])


def test_trailers_end_a_stream() -> None:
    script = server(streams=2)
    script.receives(headers(1, literal([(b"a", b"b")]), end=True), events=[StreamEnded(1)])
    script.receives(headers(3, literal([(b"a", b"b")])), events=[StreamReset(3, 1, False)], sends=["RST_STREAM 3 PROTOCOL_ERROR"])
    again = client(streams=1)
    again.receives(
        headers(1, literal([(b":status", b"200")]), end=True), events=[StreamReset(1, 1, False)], sends=["RST_STREAM 1 PROTOCOL_ERROR"]
    )


def test_more_streams_than_allowed_are_refused() -> None:
    script = server(MuxLimits(streams=2), streams=2)
    script.receives(headers(5), data(5, b"x"), sends=["RST_STREAM 5 REFUSED_STREAM"])
    script.receives(frames.rst_stream(1, 8), headers(7), events=[StreamReset(1, 8, True), RequestReceived(7, CONNECT, False)])


# DATA


def test_data_streams_as_it_arrives() -> None:
    script = server(streams=1)
    frame = data(1, b"abcdef", end=True)
    script.receives(frame[:5])
    script.receives(frame[5:11], events=["Data 1 b'ab'"])
    script.receives(frame[11:14], events=["Data 1 b'cde'"])
    script.receives(
        frame[14:], frames.frame(Kind.PING, 0, 0, b"12345678"), events=["Data 1 b'f'", StreamEnded(1)], sends=["PING ack 3132333435363738"]
    )


def test_data_borrows_the_callers_buffer() -> None:
    script = server(streams=1)
    buffer = bytearray(b"??" + data(1, b"abc") + b"??")
    [event] = script.mux.receive(memoryview(buffer), 2, len(buffer) - 2, script.now)
    buffer[11:14] = b"xyz"
    assert repr(event).startswith("DataReceived(stream=1")
    assert bytes(getattr(event, "data")) == b"xyz"  # noqa: B009 - the union has events without data


def test_padding_is_passed_over_and_credited_at_once() -> None:
    script = server(TINY, streams=1)
    script.receives(data(1, b"ab", padding=30), events=["Data 1 b'ab'"], sends=["WINDOW_UPDATE 1 +31"])
    frame = data(1, b"cd", end=True, padding=5)
    for at in range(len(frame)):
        expected = {10: ["Data 1 b'c'"], 11: ["Data 1 b'd'", "StreamEnded(stream=1)"]}.get(at, [])
        script.receives(frame[at : at + 1], events=expected)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_padding_as_long_as_its_frame(length: int) -> None:
    body = bytes((length,)) + bytes(length - 1)
    assert fails(server(streams=1), frames.frame(Kind.DATA, frames.PADDED, 1, body)) is Code.PROTOCOL_ERROR


def test_stream_reset_in_the_middle_of_a_frame() -> None:
    script = server(streams=1)
    frame = data(1, b"abcdef", end=True)
    script.receives(frame[:12], events=["Data 1 b'abc'"])
    script.mux.reset(1, Code.CANCEL)
    script.mux.consumed(1, 3)
    script.sends("RST_STREAM 1 CANCEL")
    script.receives(frame[12:])


def test_the_reserved_bit_and_unknown_flags_mean_nothing() -> None:
    script = server(streams=1)
    frame = bytearray(data(1, b"x"))
    frame[5] |= 0x80
    frame[4] |= 0x40
    script.receives(bytes(frame), events=["Data 1 b'x'"])


# Streams that are not there


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (data(1, b"x"), Code.PROTOCOL_ERROR),
        (headers(1, OK_BLOCK), Code.PROTOCOL_ERROR),
        (headers(2, OK_BLOCK), Code.PROTOCOL_ERROR),
        (frames.rst_stream(1, 0), Code.PROTOCOL_ERROR),
        (frames.window_update(1, 1), Code.PROTOCOL_ERROR),
        (frames.window_update(2, 1), Code.PROTOCOL_ERROR),
    ],
)
@pytest.mark.parametrize("make", [client, server])
def test_idle_streams(make: Callable[[], Script], wire: bytes, code: Code) -> None:
    if make is server and wire == headers(1, OK_BLOCK):
        wire = headers(4)
    assert fails(make(), wire) is code


@pytest.mark.parametrize("wire", [data(1, b"x"), headers(1, end=True)])
def test_frames_on_a_stream_that_the_peer_has_ended(wire: bytes) -> None:
    script = server(streams=1)
    script.receives(data(1, b"", end=True), events=[StreamEnded(1)])
    script.receives(wire, events=[StreamReset(1, 5, False)], sends=["RST_STREAM 1 STREAM_CLOSED"])
    script = server(streams=1)
    script.receives(data(1, b"", end=True), events=[StreamEnded(1)])
    script.mux.end_stream(1)
    script.sends("DATA 1 0B end")
    script.receives(frames.window_update(1, 5), frames.rst_stream(1, 0))
    assert fails(script, wire) is Code.STREAM_CLOSED


def test_frames_on_a_stream_that_the_peer_has_reset_or_passed_by() -> None:
    script = server(streams=1)
    script.receives(frames.rst_stream(1, 2), events=[StreamReset(1, 2, False)])
    assert fails(script, data(1, b"x")) is Code.STREAM_CLOSED
    script = server()
    script.receives(headers(9), events=[RequestReceived(9, CONNECT, False)])
    assert fails(script, headers(3)) is Code.STREAM_CLOSED


def test_resets_are_remembered_for_a_while() -> None:
    script = server(MuxLimits(remembered_resets=1), streams=2)
    script.mux.reset(1, Code.CANCEL)
    script.mux.reset(3, Code.CANCEL)
    script.mux.take()
    script.receives(data(3, b"x"))
    assert fails(script, data(1, b"x")) is Code.STREAM_CLOSED


@pytest.mark.parametrize(("code", "graceful"), [(0, True), (8, True), (2, False), (0xFFFFFFFF, False)])
def test_resets_by_the_peer(code: int, graceful: bool) -> None:
    script = server(streams=1)
    script.receives(data(1, b"", end=True), frames.rst_stream(1, code), events=[StreamEnded(1), StreamReset(1, code, graceful)])
    assert (script.mux.sendable(1), script.mux.open_count) == (0, 0)


# Header blocks in pieces


def test_continuation() -> None:
    script = server()
    first = frames.frame(Kind.HEADERS, frames.END_STREAM, 1, CONNECT_BLOCK[:5])
    middle = frames.frame(Kind.CONTINUATION, 0, 1, CONNECT_BLOCK[5:9])
    last = frames.frame(Kind.CONTINUATION, frames.END_HEADERS, 1, CONNECT_BLOCK[9:])
    for at in range(0, len(first + middle), 3):
        script.receives((first + middle)[at : at + 3])
    script.receives(last, events=[RequestReceived(1, CONNECT, True)])


@pytest.mark.parametrize(
    "wire", [data(1, b"x"), headers(3), SETTINGS, frames.frame(99, 0, 0), frames.frame(Kind.CONTINUATION, frames.END_HEADERS, 3, b"")]
)
def test_nothing_may_interrupt_a_header_block(wire: bytes) -> None:
    script = server(streams=1)
    assert fails(script, frames.frame(Kind.HEADERS, 0, 5, b""), wire) is Code.PROTOCOL_ERROR


def test_continuation_of_nothing() -> None:
    assert fails(server(), frames.frame(Kind.CONTINUATION, frames.END_HEADERS, 1, b"")) is Code.PROTOCOL_ERROR


def test_bad_header_blocks_end_the_connection() -> None:
    assert fails(server(), headers(1, b"\x80")) is Code.COMPRESSION_ERROR
    assert fails(server(MuxLimits(server_header_bytes=60)), headers(1)) is Code.ENHANCE_YOUR_CALM
    # A refused or late block is decoded all the same.
    assert fails(server(MuxLimits(streams=0)), headers(1, b"\x80")) is Code.COMPRESSION_ERROR


# The connection


def test_pings() -> None:
    script = client()
    script.receives(frames.frame(Kind.PING, frames.ACK, 0, b"abcdefgh"), events=[PongReceived(b"abcdefgh")])
    script.mux.ping(b"abcdefgh")
    script.sends("PING 6162636465666768")
    with pytest.raises(ValueError, match="eight"):
        script.mux.ping(b"short")


def test_goaway_from_the_server() -> None:
    script = client(streams=2)
    wire = frames.goaway(1, 0, b"bye" * 200)
    script.receives(wire, events=[PeerGoingAway(1, 0, (b"bye" * 200)[:256]), StreamReset(3, 7, False)])
    assert not script.mux.can_open
    assert script.mux.sendable(1) > 0
    assert script.mux.sendable(3) == 0
    script.receives(data(1, b"on"), data(3, b"late"), events=["Data 1 b'on'"])


def test_goaway_from_the_client() -> None:
    script = server(streams=1)
    script.receives(frames.goaway(0, 0, b""), data(1, b"on"), events=[PeerGoingAway(0, 0, b""), "Data 1 b'on'"])


def test_a_graceful_goaway_of_ours() -> None:
    script = server(streams=1)
    script.mux.goaway(Code.NO_ERROR, b"drain")
    script.sends("GOAWAY last=1 NO_ERROR")
    script.receives(headers(3), data(1, b"on"), events=["Data 1 b'on'"], sends=["RST_STREAM 3 REFUSED_STREAM"])
    again = client()
    again.mux.goaway(Code.NO_ERROR)
    assert not again.mux.can_open


def test_an_announced_goaway_still_serves_what_was_on_its_way() -> None:
    script = server(streams=1)
    script.mux.announce_goaway()
    script.sends("GOAWAY last=2147483647 NO_ERROR")
    script.receives(headers(3), events=[RequestReceived(3, CONNECT, False)])
    script.mux.goaway(Code.NO_ERROR)
    script.sends("GOAWAY last=3 NO_ERROR")
    script.receives(headers(5), sends=["RST_STREAM 5 REFUSED_STREAM"])


def test_numbers_run_out() -> None:
    script = client()
    script.mux._table.next = 2**31 - 1
    assert script.mux.open_stream(CONNECT) == 2**31 - 1
    assert not script.mux.can_open


# Hand-over


def test_state_is_plain_data() -> None:
    script = server(streams=2)
    script.mux.reset(3, Code.CANCEL)
    script.receives(data(1, b"abcdef")[:12], events=["Data 1 b'abc'"], sends=["RST_STREAM 3 CANCEL"])
    state = script.mux.export()
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=MuxState)
    assert again == state
    assert Mux.restore(again).export() == state
