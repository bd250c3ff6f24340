"""The demo's witness: what it takes for a TCP segment, and how it reads TLS from the outside."""

from __future__ import annotations

import json
import socket
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.wire import Direction, Record, RecordType, directions, dump, records, segments
from scripts.wiretap import Segment, segment_of

MAC = b"\x02" * 12


def tcp(payload: bytes, options: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", 1000, 15008, 7, 0, (20 + len(options)) << 2, 0x18, 0, 0, 0) + options + payload


def ipv4(body: bytes, protocol: int = socket.IPPROTO_TCP, length: int | None = None) -> bytes:
    total = 20 + len(body) if length is None else length
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, total, 0, 0, 64, protocol, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    return MAC + b"\x08\x00" + header + body


def ipv6(body: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, "fd00::1") + socket.inet_pton(socket.AF_INET6, "fd00::2")
    return MAC + b"\x86\xdd" + struct.pack("!IHBB", 0x60000000, len(body), socket.IPPROTO_TCP, 64) + addresses + body


def test_a_segment_of_each_family() -> None:
    assert segment_of(ipv4(tcp(b"hi"))) == Segment("10.0.0.1", 1000, "10.0.0.2", 15008, 7, b"hi")
    assert segment_of(ipv6(tcp(b"hi", b"\x01" * 12))) == Segment("fd00::1", 1000, "fd00::2", 15008, 7, b"hi")


def test_ethernet_padding_is_no_payload() -> None:
    assert segment_of(ipv4(tcp(b"")) + bytes(6)) is None
    assert segment_of(ipv4(tcp(b"hi")) + bytes(4)) == segment_of(ipv4(tcp(b"hi")))


def test_a_frame_beyond_64_kib_has_no_length() -> None:
    payload = bytes(70_000)
    segment = segment_of(ipv4(tcp(payload), length=0))
    assert segment is not None
    assert segment.payload == payload


@pytest.mark.parametrize("frame", [b"", MAC, MAC + b"\x08\x06" + bytes(28), ipv4(bytes(8), socket.IPPROTO_UDP), ipv4(bytes(10))])
def test_anything_else_is_passed_over(frame: bytes) -> None:
    assert segment_of(frame) is None


@given(st.binary(max_size=120))
def test_any_bytes_are_a_segment_or_nothing(noise: bytes) -> None:
    for kind in (b"\x08\x00", b"\x86\xdd"):
        assert isinstance(segment_of(MAC + kind + noise), Segment | None)


@given(st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1), st.data())
def test_a_stream_is_put_together_whatever_the_order(data: bytes, start: int, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(data)))) | {0, len(data)})
    parts = [Segment("a", 1, "b", 2, (start + begin) % 2**32, data[begin:end]) for begin, end in pairwise(cuts)]
    rest = draw.draw(st.permutations(parts[1:] + parts[:1]))
    assert directions([parts[0], *rest]) == [Direction("a", 1, "b", 2, data)]


def test_the_directions_of_a_connection_stay_apart() -> None:
    there, back = Segment("::1", 1, "::2", 2, 0, b"x"), Segment("::2", 2, "::1", 1, 0, b"y")
    assert [each.data for each in directions([there, back])] == [b"x", b"y"]
    assert directions([there])[0].title == "[::1]:1 → [::2]:2"


def test_segments_survive_their_journey_as_json() -> None:
    segment = Segment("10.0.0.1", 1, "10.0.0.2", 2, 3, b"\x00\xff")
    lines = [json.dumps({"listening": "eth0"}), json.dumps({**segment._asdict(), "payload": segment.payload.hex()})]
    assert segments(lines) == [segment]


def record(kind: int, body: bytes) -> bytes:
    return bytes([kind, 3, 3]) + len(body).to_bytes(2, "big") + body


def test_records_are_named_as_an_eavesdropper_can() -> None:
    wire = [record(22, b"\x01hello"), record(22, b"\x02"), record(20, b"\x01"), record(23, b"secret"), record(21, b"..")]
    titles = ["ClientHello", "Handshake", "ChangeCipherSpec", "ApplicationData", "Alert"]
    found = list(records(b"".join(wire)))
    assert [each.title for each in found] == titles
    assert [each.raw for each in found] == wire


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"", record(23, b"abc")[:-1], b"\x16\x02\x00\x00\x00"])
def test_what_is_no_whole_record_gives_none(data: bytes) -> None:
    assert list(records(data)) == []


def test_records_end_where_tls_ends() -> None:
    assert list(records(record(23, b"abc") + b"plain text")) == [Record(RecordType.APPLICATION_DATA, record(23, b"abc"))]


def test_a_dump_has_offset_hexadecimal_and_text() -> None:
    assert dump(b"GET /\x00\xff" + bytes(20), limit=18) == [
        "0000  47 45 54 20 2f 00 ff 00 00 00 00 00 00 00 00 00  GET /...........",
        "0010  00 00                                            ..",
    ]
