"""The multiplexer against the `h2` library in both roles, and against itself."""

from __future__ import annotations

import random

import h2.events
import h2.settings
import pytest

from tests.kit.h2peer import CONNECT, End, LibraryEnd, MuxEnd, data, frame_texts, headers, join
from ztunnel.hbone import frames
from ztunnel.hbone.events import PeerGoingAway, PongReceived, ResponseReceived, StreamReset
from ztunnel.hbone.frames import Code, Kind
from ztunnel.hbone.limits import MuxLimits

SMALL = MuxLimits(stream_window=30_000, connection_window=200_000, max_frame=20_000)
WINDOW = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE
FRAME = h2.settings.SettingCodes.MAX_FRAME_SIZE


def payloads(count: int, total: int) -> list[bytes]:
    dice = random.Random(count)
    return [dice.randbytes(total // count) for _ in range(count)]


def both_ways(client: MuxEnd | LibraryEnd, server: MuxEnd | LibraryEnd, count: int, total: int, piece: int) -> None:
    join(client, server)
    up, down = payloads(count, total), payloads(count, total)[::-1]
    server.answers = list(down)
    streams = [client.open(payload) for payload in up]
    join(client, server, piece)
    assert [bytes(server.inbox[stream]) for stream in streams] == up
    assert [bytes(client.inbox[stream]) for stream in streams] == down
    assert client.ended == server.ended == set(streams)


@pytest.mark.parametrize("piece", [9_000, 1 << 30])
def test_100_streams_with_10_MB_each_way_client(piece: int) -> None:
    end = MuxEnd(client=True, limits=SMALL)
    both_ways(end, LibraryEnd(client=False, settings={WINDOW: 25_000, FRAME: 17_000}), 100, 10_000_000, piece)
    assert end.mux.open_count == 0


@pytest.mark.parametrize("piece", [9_000, 1 << 30])
def test_100_streams_with_10_MB_each_way_server(piece: int) -> None:
    end = MuxEnd(client=False, limits=SMALL)
    both_ways(LibraryEnd(client=True, settings={WINDOW: 25_000, FRAME: 17_000}), end, 100, 10_000_000, piece)
    assert end.mux.open_count == 0


@pytest.mark.parametrize(
    "limits", [SMALL, MuxLimits(), MuxLimits(stream_window=3, connection_window=65_535)], ids=["small", "usual", "tiny"]
)
def test_against_itself(limits: MuxLimits) -> None:
    total = 4_000 if limits.stream_window == 3 else 2_000_000
    both_ways(MuxEnd(client=True, limits=limits), MuxEnd(client=False, limits=limits), 20, total, 1 << 30)


@pytest.mark.parametrize("mux_is_client", [True, False])
@pytest.mark.parametrize("first", ["client", "server"])
def test_half_close_in_both_orders(mux_is_client: bool, first: str) -> None:
    mux = MuxEnd(client=mux_is_client)
    library = LibraryEnd(client=not mux_is_client)
    client: MuxEnd | LibraryEnd = mux if mux_is_client else library
    server: MuxEnd | LibraryEnd = library if mux_is_client else mux
    join(client, server)
    stream = client.open(b"")
    client.outbox.clear()
    join(client, server)
    early, late = (client, server) if first == "client" else (server, client)
    early.outbox[stream] = bytearray(b"early")
    join(client, server)
    assert stream in late.ended
    assert stream not in early.ended
    late.outbox[stream] = bytearray(b"late")
    join(client, server)
    assert [bytes(early.inbox[stream]), bytes(late.inbox[stream])] == [b"late", b"early"]
    assert mux.mux.open_count == 0


def opened(mux_is_client: bool) -> tuple[MuxEnd, LibraryEnd, int]:
    mux, library = MuxEnd(client=mux_is_client), LibraryEnd(client=not mux_is_client)
    ends: tuple[End, End] = (mux, library)
    join(*ends)
    stream = (mux if mux_is_client else library).open(b"")
    mux.outbox.clear()
    library.outbox.clear()
    join(*ends)
    return mux, library, stream


@pytest.mark.parametrize("mux_is_client", [True, False])
def test_reset_by_us(mux_is_client: bool) -> None:
    mux, library, stream = opened(mux_is_client)
    mux.mux.reset(stream, Code.CONNECT_ERROR)
    library.outbox[stream] = bytearray(b"on its way")
    join(library, mux)
    [reset] = library.saw(h2.events.StreamReset)
    assert isinstance(reset, h2.events.StreamReset)
    assert reset.error_code == Code.CONNECT_ERROR
    assert stream not in mux.inbox


@pytest.mark.parametrize("mux_is_client", [True, False])
@pytest.mark.parametrize(("code", "graceful"), [(Code.NO_ERROR, True), (Code.CANCEL, True), (Code.INTERNAL_ERROR, False)])
def test_reset_by_the_peer(mux_is_client: bool, code: Code, graceful: bool) -> None:
    mux, library, stream = opened(mux_is_client)
    library.connection.reset_stream(stream, code)
    join(mux, library)
    assert mux.events[-1] == StreamReset(stream, code, graceful)
    assert mux.mux.sendable(stream) == 0


def test_refusal_with_a_status() -> None:
    mux, library = MuxEnd(client=False), LibraryEnd(client=True)
    join(mux, library)
    library.connection.send_headers(1, list(CONNECT))
    wire = bytearray(library.pump())
    mux.mux.receive(memoryview(wire), 0, len(wire), 0.0)
    mux.mux.respond(1, 401, end=True)
    library.connection.send_data(1, b"optimistic")
    join(library, mux)
    assert library.saw(h2.events.ResponseReceived)
    assert library.saw(h2.events.StreamEnded)
    assert mux.mux.open_count == 0


def test_client_hears_of_a_refusal() -> None:
    mux, library = MuxEnd(client=True), LibraryEnd(client=False)
    join(mux, library)
    stream = mux.mux.open_stream(CONNECT)
    library.connection.receive_data(mux.pump())
    library.connection.send_headers(stream, [(b":status", b"503")], end_stream=True)
    library.connection.reset_stream(stream, Code.NO_ERROR)
    join(mux, library)
    assert mux.events[-2:] == [ResponseReceived(stream, 503, ((b":status", b"503"),), True), StreamReset(stream, 0, True)]


def test_goaway_and_ping() -> None:
    mux, library, stream = opened(True)
    mux.mux.ping(b"12345678")
    join(mux, library)
    assert PongReceived(b"12345678") in mux.events
    library.connection.close_connection(Code.NO_ERROR, last_stream_id=stream)
    wire = library.connection.data_to_send()
    mux.feed(wire)
    assert PeerGoingAway(stream, 0, b"") in mux.events
    assert not mux.mux.can_open
    assert mux.mux.sendable(stream) > 0
    mux.mux.goaway(Code.NO_ERROR)
    assert frame_texts(mux.pump()) == ["GOAWAY last=0 NO_ERROR"]


def test_settings_change_in_mid_flight() -> None:
    mux, library, stream = opened(True)
    mux.outbox[stream] = bytearray(200_000)
    library.feed(mux.pump())
    library.connection.update_settings({WINDOW: 1_000, h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    mux.feed(library.connection.data_to_send())
    assert mux.mux.sendable(stream) == 0
    assert not mux.mux.can_open
    library.connection.update_settings({WINDOW: 100_000})
    join(mux, library)
    assert len(library.inbox[stream]) == 200_000
    assert stream in library.ended


def test_padding_and_continuation_that_the_library_does_not_send() -> None:
    mux, library, stream = opened(False)
    block = library.connection.encoder.encode([*CONNECT, (b"baggage", b"x" * 3000)])
    wire = frames.header_block(stream + 2, block, end_stream=False, largest=100)
    assert sum(text.startswith("CONTINUATION") for text in frame_texts(wire)) > 20
    mux.feed(wire + data(stream + 2, b"padded", padding=200) + data(stream + 2, b"", end=True, padding=0))
    assert bytes(mux.inbox[stream + 2]) == b"padded"
    assert stream + 2 in mux.ended


def test_priority_in_headers_is_passed_over() -> None:
    mux, _, stream = opened(False)
    wire = headers(stream + 2)
    flagged = frames.frame(
        Kind.HEADERS, wire[4] | frames.PRIORITY_FLAG | frames.PADDED, stream + 2, b"\x02" + bytes(5) + wire[9:] + b"\0\0"
    )
    mux.feed(flagged)
    assert mux.mux.open_count == 2
