"""The wire format against protobuf's own encoder, and against bytes that are none."""

from __future__ import annotations

import pytest
from google.protobuf import struct_pb2, wrappers_pb2
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.rpc.protobuf import WireError, bytes_field, int_field, read_bytes, read_fields, read_int64, read_text


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_numbers_as_protobuf_writes_and_reads_them(number: int) -> None:
    written = wrappers_pb2.Int64Value(value=number).SerializeToString()
    assert int_field(1, number) == written
    assert [read_int64(*field) for field in read_fields(written)] == ([number] if number else [])


@given(st.text())
def test_text_as_protobuf_writes_and_reads_it(text: str) -> None:
    written = wrappers_pb2.StringValue(value=text).SerializeToString()
    assert [read_text(*field) for field in read_fields(written)] == ([text] if text else [])
    assert wrappers_pb2.StringValue.FromString(bytes_field(1, text)).value == text


def test_a_message_within_messages() -> None:
    struct = struct_pb2.Struct()
    struct.update({"name": "value", "number": 1.5})
    entries = {}
    for number, value in read_fields(struct.SerializeToString()):
        assert number == 1
        entry = dict(read_fields(read_bytes(number, value)))
        entries[read_text(1, entry[1])] = dict(read_fields(read_bytes(2, entry[2])))
    assert entries == {"name": {3: b"value"}, "number": {2: b"\0\0\0\0\0\0\xf8\x3f"}}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x0a", "cut off"),
        (b"\x0a\x05abc", "field 1 is cut off"),
        (b"\x0d\x01\x02", "field 1 is cut off"),
        (b"\x08" + b"\xff" * 11, "longer than ten bytes"),
        (b"\x08\xff", "a varint is cut off"),
        (b"\x02\x00", "field number 0"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\xf8\xff\xff\xff\xff\x01\x00", "out of range"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        list(read_fields(data))


def test_fields_of_another_type_are_refused() -> None:
    with pytest.raises(WireError, match="field 1 is a number"):
        read_text(1, 5)
    with pytest.raises(WireError, match="field 2 is bytes"):
        read_int64(2, b"")
    with pytest.raises(WireError, match="not UTF-8"):
        read_text(3, b"\xff")


@given(st.binary(max_size=200))
def test_any_bytes_give_fields_or_an_error(data: bytes) -> None:
    try:
        assert sum(1 for _ in read_fields(data)) <= len(data)
    except WireError:
        pass
