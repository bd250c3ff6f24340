"""The protobuf wire format: fields in, fields out. No schemas; who knows a message knows its field numbers. Pure.

Reading is bounded by its input: nothing is copied more than once, nothing recurses. Groups, which proto3 does not have, are refused.
Source: protobuf's encoding guide.
"""

from __future__ import annotations

from collections.abc import Iterator

from ztunnel.mesh.errors import PeerError

Value = int | bytes
"""Of a field: a varint as an unsigned 64-bit number, everything else as its bytes."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_LARGEST_NUMBER = (1 << 29) - 1
_LONGEST_VARINT = 10
_MASK = (1 << 64) - 1


class WireError(PeerError):
    """Bytes that are no protobuf message."""


def read_fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field, in the order of the message; repeated fields come repeatedly.

    Raises:
        WireError: truncated, overlong, a group, or a field number that cannot be.
    """
    position, end = 0, len(data)
    while position < end:
        tag, position = _read_varint(data, position)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _LARGEST_NUMBER:
            raise WireError(f"field number {number} is out of range")
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if kind == _LENGTH:
            size, position = _read_varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise WireError(f"field {number} has wire type {kind}")
        if size > end - position:
            raise WireError(f"field {number} is cut off")
        yield number, data[position : position + size]
        position += size


def read_text(number: int, value: Value) -> str:
    """A string field.

    Raises:
        WireError: not a string, or not UTF-8.
    """
    try:
        return read_bytes(number, value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"field {number} is not UTF-8") from error


def read_bytes(number: int, value: Value) -> bytes:
    """A bytes field or an embedded message.

    Raises:
        WireError: a number.
    """
    if isinstance(value, int):
        raise WireError(f"field {number} is a number where bytes are expected")
    return value


def read_int64(number: int, value: Value) -> int:
    """An int64 field: negative numbers are written as their two's complement.

    Raises:
        WireError: not a varint.
    """
    if not isinstance(value, int):
        raise WireError(f"field {number} is bytes where a number is expected")
    return value - (1 << 64) if value >> 63 else value


def bytes_field(number: int, content: bytes | str) -> bytes:
    """A string, bytes or embedded message, also an empty one."""
    raw = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | _LENGTH) + _varint(len(raw)) + raw


def int_field(number: int, value: int) -> bytes:
    """An int64; nothing for 0, which is what absence means in proto3."""
    return _varint(number << 3 | _VARINT) + _varint(value & _MASK) if value else b""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            return value & _MASK, position + index + 1
    raise WireError("a varint is cut off" if len(data) - position < _LONGEST_VARINT else "a varint is longer than ten bytes")
