"""The multiplexer under any input: defined errors only, no matter how the bytes are cut, and exportable at every point."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hpack import Decoder, Encoder, HPACKDecodingError
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.h2peer import CONNECT, CONNECT_BLOCK, FIRST_WORDS, OK_BLOCK, SETTINGS, SETTINGS_ACK, data, event_text, headers, literal
from ztunnel.hbone import frames
from ztunnel.hbone.events import DataReceived, RequestReceived
from ztunnel.hbone.frames import Kind, MuxError
from ztunnel.hbone.headers import HeaderCodec
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.hbone.muxstate import MuxState

LIMITS = MuxLimits(
    stream_window=200, connection_window=65_535, streams=3, remembered_resets=2, pings=20, settings=20, resets=20, late_frames=20
)
STREAMS = st.sampled_from([0, 1, 3, 5, 2, 7])
PAYLOADS = st.binary(max_size=60)
PLAUSIBLE = st.one_of(
    st.builds(data, STREAMS, PAYLOADS, st.booleans(), st.one_of(st.none(), st.integers(0, 20))),
    st.builds(
        headers, STREAMS, st.sampled_from([CONNECT_BLOCK, OK_BLOCK, literal([(b"a", b"b")]), b"\x40\x01a\x01b", b"\xbe"]), st.booleans()
    ),
    st.builds(frames.window_update, STREAMS, st.sampled_from([0, 1, 100, 2**31 - 1])),
    st.builds(frames.rst_stream, STREAMS, st.integers(0, 13)),
    st.builds(frames.goaway, STREAMS, st.integers(0, 13), PAYLOADS),
    st.builds(frames.settings, st.dictionaries(st.integers(1, 6), st.sampled_from([0, 1, 100, 16_384, 2**31 - 1]), max_size=3)),
    st.just(SETTINGS_ACK),
    st.builds(frames.frame, st.just(Kind.PING), st.integers(0, 1), st.just(0), st.just(b"12345678")),
    st.builds(frames.frame, st.just(Kind.HEADERS), st.integers(0, 1), STREAMS, st.just(CONNECT_BLOCK[:7])),
    st.builds(frames.frame, st.just(Kind.CONTINUATION), st.sampled_from([0, 4]), STREAMS, st.just(CONNECT_BLOCK[7:])),
)
ANY_FRAME = st.builds(frames.frame, st.integers(0, 12), st.integers(0, 255), STREAMS, PAYLOADS)
CONVERSATIONS = st.lists(st.one_of(PLAUSIBLE, PLAUSIBLE, PLAUSIBLE, ANY_FRAME), max_size=25).map(b"".join)


class Talk:
    """One multiplexer whose caller does as callers do, the same whatever the pieces: what came of it, as text."""

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.events: list[str] = []
        self.data: dict[int, bytes] = {}
        self.failed = -1

    def hear(self, wire: bytes) -> None:
        if self.failed >= 0:
            return
        buffer = bytearray(wire)
        try:
            events = self.mux.receive(memoryview(buffer), 0, len(buffer), 5.0)
        except MuxError as error:
            self.failed = error.code
            return
        for event in events:
            if isinstance(event, DataReceived):
                self.data[event.stream] = self.data.get(event.stream, b"") + bytes(event.data)
            else:
                self.events.append(event_text(event))

    def act(self) -> None:
        """Answers, sends and gives credit."""
        if self.failed >= 0:
            return
        for number in (1, 3, 5):
            self.mux.respond(number, 200)
            room = min(self.mux.sendable(number), 50)
            if room:
                self.mux.data_header(bytearray(9), 0, number, room)
            self.mux.consumed(number, 7 if number in self.data else 0)
        self.mux.end_stream(5)
        self.mux.reset(3, 8)


def started(client: bool) -> Mux:
    mux = Mux(client=client, limits=LIMITS)
    wire = bytearray((b"" if client else FIRST_WORDS) + SETTINGS)
    mux.receive(memoryview(wire), 0, len(wire), 5.0)
    if client:
        for _ in range(3):
            mux.open_stream(CONNECT)
    return mux


def cut(wire: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(wire) + 1) for place in places}), len(wire)]
    return [wire[start:end] for start, end in itertools.pairwise(edges)]


@given(st.booleans(), st.binary(max_size=200))
def test_any_bytes(client: bool, wire: bytes) -> None:
    mux = Mux(client=client, limits=LIMITS)
    talk = Talk(mux)
    talk.hear(wire)
    if not client and not FIRST_WORDS.startswith(wire[:24]):
        assert talk.failed >= 0


@given(st.booleans(), st.binary(max_size=200))
def test_any_bytes_after_the_beginning(client: bool, wire: bytes) -> None:
    Talk(started(client)).hear(wire)


@given(st.booleans(), CONVERSATIONS)
def test_any_frames_leave_a_bounded_machine(client: bool, wire: bytes) -> None:
    talk = Talk(started(client))
    for piece in cut(wire, range(0, len(wire), 37)):
        talk.hear(piece)
        talk.act()
        state = talk.mux.export()
        assert len(state.receiver.kept) <= frames.HEADER_BYTES + 65_536
        assert len(state.table.resets) <= LIMITS.remembered_resets
        assert len(state.table.live) <= 3
        for stream in state.table.live:
            assert stream.send_window <= frames.MAX_WINDOW
            assert stream.receive_window + stream.credit <= frames.DEFAULT_WINDOW


@given(st.booleans(), CONVERSATIONS, st.lists(st.integers(0, 2000), max_size=30))
def test_any_cutting_is_the_same(client: bool, wire: bytes, places: list[int]) -> None:
    whole, pieces, bytewise = Talk(started(client)), Talk(started(client)), Talk(started(client))
    whole.hear(wire)
    for piece in cut(wire, places):
        pieces.hear(piece)
    for at in range(len(wire)):
        bytewise.hear(wire[at : at + 1])
    assert whole.failed == pieces.failed == bytewise.failed
    assert whole.mux.take() == pieces.mux.take() == bytewise.mux.take()
    if whole.failed < 0:
        # What one call told before it failed is lost with the connection, so only whole conversations can be compared.
        assert whole.events == pieces.events == bytewise.events
        assert whole.data == pieces.data == bytewise.data
        assert whole.mux.export() == pieces.mux.export() == bytewise.mux.export()


@given(st.booleans(), CONVERSATIONS, st.lists(st.integers(0, 2000), max_size=6), st.integers(0, 6))
def test_handing_over_changes_nothing(client: bool, wire: bytes, places: list[int], handover: int) -> None:
    kept, moved = Talk(started(client)), Talk(started(client))
    for number, piece in enumerate(cut(wire, places)):
        if number == handover:
            moved.mux = Mux.restore(msgspec.json.decode(msgspec.json.encode(moved.mux.export()), type=MuxState))
        for talk in (kept, moved):
            talk.hear(piece)
            talk.act()
        assert kept.mux.take() == moved.mux.take()
    assert (kept.events, kept.data, kept.failed) == (moved.events, moved.data, moved.failed)
    assert kept.mux.export() == moved.mux.export()


@given(st.binary(max_size=64))
def test_blocks_without_a_table_decode_as_the_library_does(block: bytes) -> None:
    ours, library = HeaderCodec(1000), Decoder(max_header_list_size=1000)
    ours.acknowledged()
    library.max_allowed_table_size = 0
    library.header_table_size = 0
    try:
        expected = tuple((name, value) for name, value in library.decode(block, raw=True))
    except HPACKDecodingError:
        with pytest.raises(MuxError):
            ours.decode(block)
    else:
        assert ours.decode(block) == expected


FIELDS = st.lists(
    st.tuples(st.one_of(st.sampled_from([b":method", b":status", b"accept", b"via"]), st.binary(max_size=200)), st.binary(max_size=200))
)


@given(FIELDS, st.booleans())
def test_blocks_round_trip(fields: list[tuple[bytes, bytes]], huffman: bool) -> None:
    writer, reader, encoder = HeaderCodec(1 << 20), HeaderCodec(1 << 20), Encoder()
    assert reader.decode(writer.encode(fields)) == tuple(fields)
    reader.acknowledged()
    encoder.header_table_size = 0
    assert reader.decode(writer.encode(fields)) == tuple(fields)
    assert reader.decode(encoder.encode(fields, huffman=huffman)) == tuple(fields)
    assert tuple(Decoder(1 << 20).decode(writer.encode(fields), raw=True)) == tuple(fields)


@given(st.lists(st.integers(1, 120), max_size=30))
def test_outstanding_data_never_exceeds_the_window(sizes: list[int]) -> None:
    mux = started(client=False)
    outstanding = 0
    for wire in (SETTINGS_ACK + headers(1), *(data(1, bytes(size)) for size in sizes)):
        buffer = bytearray(wire)
        try:
            events = mux.receive(memoryview(buffer), 0, len(buffer), 5.0)
        except MuxError:
            return
        for event in events:
            if isinstance(event, DataReceived):
                outstanding += len(event.data)
                assert outstanding <= LIMITS.stream_window
            else:
                assert isinstance(event, RequestReceived)
        taken = outstanding // 2
        mux.consumed(1, taken)
        outstanding -= taken
        [stream] = mux.export().table.live
        assert stream.receive_window + stream.credit + outstanding == LIMITS.stream_window
