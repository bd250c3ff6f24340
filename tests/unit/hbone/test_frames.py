"""Frames as bytes: against `hyperframe`, and every size that is wrong."""

from __future__ import annotations

import pytest
from hyperframe.frame import ContinuationFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from tests.kit.h2peer import frame_texts
from ztunnel.hbone import frames
from ztunnel.hbone.frames import Code, Kind, MuxError

SIZES = (1 << 20, 1 << 16)


def parsed(wire: bytes) -> list[Frame]:
    found = []
    while wire:
        one, length = Frame.parse_frame_header(memoryview(wire[:9]))
        one.parse_body(memoryview(wire[9 : 9 + length]))
        found.append(one)
        wire = wire[9 + length :]
    return found


def test_what_we_build_is_what_others_read() -> None:
    one, two, three, four = parsed(
        frames.settings({4: 100, 1: 0}) + frames.window_update(3, 7) + frames.rst_stream(5, 8) + frames.goaway(9, 11, b"why")
    )
    assert isinstance(one, SettingsFrame)
    assert one.settings == {4: 100, 1: 0}
    assert isinstance(two, WindowUpdateFrame)
    assert (two.stream_id, two.window_increment) == (3, 7)
    assert isinstance(three, RstStreamFrame)
    assert (three.stream_id, three.error_code) == (5, 8)
    assert isinstance(four, GoAwayFrame)
    assert (four.last_stream_id, four.error_code, four.additional_data) == (9, 11, b"why")


@pytest.mark.parametrize(("size", "count"), [(0, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_a_block_is_cut_into_frames(size: int, count: int) -> None:
    block = bytes(range(size))
    first, *rest = parsed(frames.header_block(1, block, end_stream=True, largest=10))
    assert isinstance(first, HeadersFrame)
    assert "END_STREAM" in first.flags
    assert all(isinstance(one, ContinuationFrame) for one in rest)
    assert ["END_HEADERS" in one.flags for one in (first, *rest)] == [False] * (count - 1) + [True]
    assert b"".join(one.data for one in (first, *rest) if isinstance(one, HeadersFrame | ContinuationFrame)) == block


@pytest.mark.parametrize(
    ("kind", "flags", "length", "stream", "needed"),
    [
        (Kind.DATA, 0, 1 << 20, 1, 9),
        (Kind.DATA, frames.PADDED, 1, 1, 10),
        (Kind.HEADERS, 0, 1 << 16, 1, 9 + (1 << 16)),
        (Kind.PRIORITY, 0, 5, 1, 14),
        (Kind.RST_STREAM, 0, 4, 1, 13),
        (Kind.SETTINGS, 0, 12, 0, 21),
        (Kind.SETTINGS, frames.ACK, 0, 0, 9),
        (Kind.PING, 0, 8, 0, 17),
        (Kind.GOAWAY, 0, 16_384, 0, 9 + 16_384),
        (Kind.WINDOW_UPDATE, 0, 4, 0, 13),
        (Kind.WINDOW_UPDATE, 0, 4, 1, 13),
        (Kind.CONTINUATION, 0, 0, 1, 9),
        (10, 0, 1 << 20, 0, 9),
        (255, 255, 1 << 20, 7, 9),
    ],
)
def test_needed(kind: int, flags: int, length: int, stream: int, needed: int) -> None:
    assert frames.needed(kind, flags, length, stream, SIZES) == needed


@pytest.mark.parametrize(
    ("kind", "flags", "length", "stream", "code"),
    [
        (Kind.DATA, 0, (1 << 20) + 1, 1, Code.FRAME_SIZE_ERROR),
        (Kind.DATA, 0, 1, 0, Code.PROTOCOL_ERROR),
        (Kind.DATA, frames.PADDED, 0, 1, Code.FRAME_SIZE_ERROR),
        (Kind.HEADERS, 0, 1, 0, Code.PROTOCOL_ERROR),
        (Kind.HEADERS, 0, (1 << 16) + 1, 1, Code.ENHANCE_YOUR_CALM),
        (Kind.PRIORITY, 0, 4, 1, Code.FRAME_SIZE_ERROR),
        (Kind.PRIORITY, 0, 5, 0, Code.PROTOCOL_ERROR),
        (Kind.RST_STREAM, 0, 5, 1, Code.FRAME_SIZE_ERROR),
        (Kind.RST_STREAM, 0, 4, 0, Code.PROTOCOL_ERROR),
        (Kind.SETTINGS, 0, 6, 1, Code.PROTOCOL_ERROR),
        (Kind.SETTINGS, 0, 7, 0, Code.FRAME_SIZE_ERROR),
        (Kind.SETTINGS, 0, 16_386, 0, Code.FRAME_SIZE_ERROR),
        (Kind.SETTINGS, frames.ACK, 6, 0, Code.FRAME_SIZE_ERROR),
        (Kind.PUSH_PROMISE, 0, 4, 1, Code.PROTOCOL_ERROR),
        (Kind.PING, 0, 7, 0, Code.FRAME_SIZE_ERROR),
        (Kind.PING, 0, 8, 1, Code.PROTOCOL_ERROR),
        (Kind.GOAWAY, 0, 7, 0, Code.FRAME_SIZE_ERROR),
        (Kind.GOAWAY, 0, 16_385, 0, Code.FRAME_SIZE_ERROR),
        (Kind.GOAWAY, 0, 8, 1, Code.PROTOCOL_ERROR),
        (Kind.WINDOW_UPDATE, 0, 3, 0, Code.FRAME_SIZE_ERROR),
        (Kind.CONTINUATION, 0, (1 << 16) + 1, 1, Code.ENHANCE_YOUR_CALM),
        (Kind.CONTINUATION, 0, 1, 0, Code.PROTOCOL_ERROR),
    ],
)
def test_refused_by_its_header(kind: int, flags: int, length: int, stream: int, code: Code) -> None:
    with pytest.raises(MuxError) as caught:
        frames.needed(kind, flags, length, stream, SIZES)
    assert caught.value.code == code


def setting(key: int, value: int) -> bytes:
    return key.to_bytes(2, "big") + value.to_bytes(4, "big")


def test_settings_of_one_frame() -> None:
    payload = setting(4, 1) + setting(0x99, 5) + setting(4, 2) + setting(2, 0)
    assert frames.parse_settings(payload, from_server=True) == {4: 2, 2: 0}
    assert frames.parse_settings(setting(2, 1), from_server=False) == {2: 1}


@pytest.mark.parametrize(
    ("key", "value", "from_server", "code"),
    [
        (2, 2, False, Code.PROTOCOL_ERROR),
        (2, 1, True, Code.PROTOCOL_ERROR),
        (4, 1 << 31, True, Code.FLOW_CONTROL_ERROR),
        (5, 16_383, True, Code.PROTOCOL_ERROR),
        (5, 1 << 24, True, Code.PROTOCOL_ERROR),
    ],
)
def test_settings_out_of_range(key: int, value: int, from_server: bool, code: Code) -> None:
    with pytest.raises(MuxError) as caught:
        frames.parse_settings(setting(key, value) + setting(key, 20_000 if key == 5 else 0), from_server)
    assert caught.value.code == code


def test_frames_are_readable_in_a_diff() -> None:
    wire = frames.PREFACE + frames.settings({3: 5}) + frames.rst_stream(1, 8) + frames.frame(Kind.PING, frames.ACK, 0, bytes(8))
    assert frame_texts(wire) == ["PREFACE", "SETTINGS MAX_CONCURRENT_STREAMS=5", "RST_STREAM 1 CANCEL", "PING ack 0000000000000000"]
