"""HTTP/2 frames as bytes: the numbers of RFC 9113, building the frames that we send, and how long an incoming one may be.

Knows nothing about streams or windows. The invariant it keeps: no frame is held in memory before `needed` has accepted its
header, so what a peer can make us hold is bounded by the sizes below. Source: RFC 9113 §4, §6, §7.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import ClassVar, Final

from ztunnel.mesh.errors import Flag, PeerError

HEADER: Final = Struct(">IBI")
"""A frame's first nine bytes as (length << 8 | type, flags, stream)."""
HEADER_BYTES: Final = 9
STREAM_MASK: Final = 0x7FFFFFFF
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
DEFAULT_MAX_FRAME: Final = 16_384
LARGEST_MAX_FRAME: Final = 2**24 - 1
CONTROL_BYTES: Final = 16_384
"""Longest payload of SETTINGS or GOAWAY that is accepted. Other frames have a fixed size, the header block bound, or are not kept."""


class Kind:
    """Frame types. Plain numbers, unlike the other tables here: every frame is compared with several of them."""

    DATA: Final = 0
    HEADERS: Final = 1
    PRIORITY: Final = 2
    RST_STREAM: Final = 3
    SETTINGS: Final = 4
    PUSH_PROMISE: Final = 5
    PING: Final = 6
    GOAWAY: Final = 7
    WINDOW_UPDATE: Final = 8
    CONTINUATION: Final = 9


END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20


class Code(IntEnum):
    """Error codes of RST_STREAM and GOAWAY."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class Setting(IntEnum):
    """Settings that we send or obey; others are ignored."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    ENABLE_CONNECT_PROTOCOL = 8
    EARLY_DATA = 0xF5A1
    """1: DATA may follow a CONNECT before its answer. Ours, from the range for experiments (RFC 9113 §11.3); others ignore it."""


class MuxError(PeerError):
    """The peer broke HTTP/2: the connection ends. `code` is what the GOAWAY says."""

    flag: ClassVar[Flag] = Flag.H2_HANDSHAKE_FAILURE

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = int(code)


_NAMES: Final = (
    "DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE", "CONTINUATION"
)  # fmt: skip
_ANY: Final = -1
_SIZES: Final[tuple[int, ...]] = (_ANY, _ANY, 5, 4, _ANY, _ANY, 8, _ANY, 4, _ANY)
"""Of the payload of each type, where it is fixed."""


def kind_name(kind: int) -> str:
    """The RFC's name of a frame type that it defines."""
    return _NAMES[kind]


def needed(kind: int, flags: int, length: int, stream: int, limits: tuple[int, int]) -> int:
    """How many bytes of a frame, its header included, must be there before it can be handled.

    DATA and frames of unknown types are handled as their payload arrives, so they need no more than their header.

    Args:
        limits: the largest frame that we advertise, and the longest header block that we accept, in bytes.
    Raises:
        MuxError: the frame is of a wrong size or on a wrong stream whatever the state of the connection is.
    """
    largest, block = limits
    if length > largest:
        raise MuxError(f"frame of {length} bytes, more than the {largest} that we allow", Code.FRAME_SIZE_ERROR)
    if stream == 0 and kind in (Kind.DATA, Kind.HEADERS, Kind.PRIORITY, Kind.RST_STREAM, Kind.CONTINUATION):
        raise MuxError(f"{kind_name(kind)} on stream 0", Code.PROTOCOL_ERROR)
    if stream != 0 and kind in (Kind.SETTINGS, Kind.PING, Kind.GOAWAY):
        raise MuxError(f"{kind_name(kind)} on stream {stream}", Code.PROTOCOL_ERROR)
    if kind == Kind.DATA:
        if flags & PADDED and length == 0:
            raise MuxError("padded DATA without its padding length", Code.FRAME_SIZE_ERROR)
        return HEADER_BYTES + (1 if flags & PADDED else 0)
    if kind == Kind.PUSH_PROMISE:
        raise MuxError("PUSH_PROMISE, which nobody may send us", Code.PROTOCOL_ERROR)
    if kind > Kind.CONTINUATION:
        return HEADER_BYTES
    _check_size(kind, flags, length, block)
    return HEADER_BYTES + length


def _check_size(kind: int, flags: int, length: int, block: int) -> None:
    fixed = _SIZES[kind]
    if length != fixed and fixed != _ANY:
        raise MuxError(f"{kind_name(kind)} of {length} bytes instead of {fixed}", Code.FRAME_SIZE_ERROR)
    if kind in (Kind.HEADERS, Kind.CONTINUATION) and length > block:
        raise MuxError(f"header block of more than {block} bytes", Code.ENHANCE_YOUR_CALM)
    if kind == Kind.SETTINGS and (length > CONTROL_BYTES or length % 6 or (flags & ACK and length)):
        raise MuxError(f"SETTINGS of {length} bytes", Code.FRAME_SIZE_ERROR)
    if kind == Kind.GOAWAY and not 8 <= length <= CONTROL_BYTES:
        raise MuxError(f"GOAWAY of {length} bytes", Code.FRAME_SIZE_ERROR)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    # As `HEADER` would pack it, by which a function of the interpreter's would have to be called.
    return (len(payload) << 48 | kind << 40 | flags << 32 | stream).to_bytes(HEADER_BYTES, "big") + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame, in the order of `values`."""
    return frame(Kind.SETTINGS, 0, 0, b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in values.items()))


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(Kind.WINDOW_UPDATE, 0, stream, increment.to_bytes(4, "big"))


def rst_stream(stream: int, code: int) -> bytes:
    """A RST_STREAM frame."""
    return frame(Kind.RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last_stream: int, code: int, debug: bytes) -> bytes:
    """A GOAWAY frame."""
    return frame(Kind.GOAWAY, 0, 0, last_stream.to_bytes(4, "big") + code.to_bytes(4, "big") + debug)


def header_block(stream: int, block: bytes, end_stream: bool, largest: int) -> bytes:
    """HEADERS and as many CONTINUATION frames as `block` needs when no frame may be longer than `largest` bytes."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= largest:
        return frame(Kind.HEADERS, flags | END_HEADERS, stream, block)
    parts = [frame(Kind.HEADERS, flags, stream, block[:largest])]
    for at in range(largest, len(block), largest):
        last = at + largest >= len(block)
        parts.append(frame(Kind.CONTINUATION, END_HEADERS if last else 0, stream, block[at : at + largest]))
    return b"".join(parts)


def parse_settings(payload: bytes, from_server: bool) -> dict[int, int]:
    """The settings of one frame; of a repeated one the last value, as if they had been applied in order.

    Raises:
        MuxError: a value outside its range.
    Source: RFC 9113 §6.5.2.
    """
    values: dict[int, int] = {}
    for at in range(0, len(payload), 6):
        key = int.from_bytes(payload[at : at + 2], "big")
        value = int.from_bytes(payload[at + 2 : at + 6], "big")
        if key == Setting.ENABLE_PUSH and (value > 1 or (from_server and value)):
            raise MuxError(f"SETTINGS_ENABLE_PUSH {value}", Code.PROTOCOL_ERROR)
        if key == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise MuxError(f"SETTINGS_INITIAL_WINDOW_SIZE {value}", Code.FLOW_CONTROL_ERROR)
        if key == Setting.MAX_FRAME_SIZE and not DEFAULT_MAX_FRAME <= value <= LARGEST_MAX_FRAME:
            raise MuxError(f"SETTINGS_MAX_FRAME_SIZE {value}", Code.PROTOCOL_ERROR)
        if key in _KNOWN_SETTINGS:
            values[key] = value
    return values


_KNOWN_SETTINGS: Final = frozenset(int(setting) for setting in Setting)
