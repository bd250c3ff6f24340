"""Header blocks: their assembly from frames, and HPACK without a dynamic table.

Our encoder never indexes, so its output depends on nothing and its state is one bit. A peer may use the 4,096 bytes of table that
HTTP/2 grants everybody until it has acknowledged our SETTINGS_HEADER_TABLE_SIZE 0: so long `hpack` decodes. From then on a block means
the same wherever it stands, is decoded here in a fifth of the time (each connection costs one request block), and is remembered.
Source: RFC 7541; RFC 9113 §4.3, §6.10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hpack import Decoder, HPACKDecodingError, OversizedHeaderListError
from hpack.hpack import encode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from ztunnel.hbone import frames
from ztunnel.hbone.events import Headers
from ztunnel.hbone.frames import Code, MuxError

_REMEMBERED_BLOCKS: Final = 64
_REMEMBERED_BYTES: Final = 512
"""Longest block worth remembering: a response's. Requests never repeat, each has its own trace id."""
_LONGEST_PREFIX: Final = 4096
"""Longest beginning of requests that is remembered, several times a CONNECT's: an idle tunnel must not keep 64 KiB of a hostile one."""
_VARYING: Final = 2
"""Fields at the end of a CONNECT that differ from one to the next: `forwarded` and `traceparent`."""
_TABLE_SIZE_ZERO: Final = b"\x20"
"""Dynamic table size update to 0: allowed before any block, required after a peer has shrunk its table. RFC 7541 §4.2."""
_FIELD_OVERHEAD: Final = 32
"""What a field counts for beyond its bytes. RFC 9113 §6.5.2."""
_STATIC: Final = HeaderTable.STATIC_TABLE
_PREFIX: Final = {name: bytes(encode_integer(index, 4)) for name, (index, _) in HeaderTable.STATIC_TABLE_MAPPING.items()}
_LENGTHS: Final = tuple(bytes((size,)) for size in range(0x7F))
"""Lengths of strings without Huffman coding, as far as one byte says them."""
_EXACT: Final = {(name, value): bytes((0x80 | index,)) for index, (name, value) in enumerate(_STATIC, 1)}

CodecState = tuple[bool, bool, int, tuple[tuple[bytes, bytes], ...]]
"""Our table update sent; our SETTINGS acknowledged; the peer's table size; its entries, oldest first."""
BlockState = tuple[int, bool, bytes, int]
"""The fields of a HeaderBlock."""


class HeaderBlock:
    """The header block that is being received. While it is open, `number` is its stream and no other frame may come."""

    __slots__ = ("_count", "_fragments", "_limits", "ends", "number")

    def __init__(self, limits: tuple[int, int], state: BlockState = (0, False, b"", 0)) -> None:
        """`limits`: the most frames and the most bytes of one block."""
        self._limits = limits
        self.number, self.ends, fragments, self._count = state
        self._fragments = bytearray(fragments)

    def begin(self, flags: int, number: int, payload: bytes) -> bytes | None:
        """A HEADERS frame; the block if that is all of it. `ends` tells its END_STREAM.

        Raises:
            MuxError: padding or priority longer than the frame.
        """
        first, last = 0, len(payload)
        if flags & frames.PADDED:
            first, last = 1, last - (payload[0] if payload else 0)
        if flags & frames.PRIORITY_FLAG:
            first += 5
        if first > last:
            raise MuxError("padding or priority longer than its frame", Code.PROTOCOL_ERROR)
        self.ends = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS:
            return payload[first:last]
        self.number, self._fragments, self._count = number, bytearray(payload[first:last]), 1
        return None

    def extend(self, flags: int, payload: bytes) -> bytes | None:
        """A CONTINUATION frame; the block if it is complete now.

        Raises:
            MuxError: nothing to continue; too many frames or bytes.
        """
        if not self.number:
            raise MuxError("CONTINUATION of nothing", Code.PROTOCOL_ERROR)
        self._fragments += payload
        self._count += 1
        if self._count > self._limits[0] or len(self._fragments) > self._limits[1]:
            raise MuxError("header block in too many frames or bytes", Code.ENHANCE_YOUR_CALM)
        if not flags & frames.END_HEADERS:
            return None
        block = bytes(self._fragments)
        self.number, self._fragments, self._count = 0, bytearray(), 0
        return block

    def export(self) -> BlockState:
        """For `HeaderBlock(limits, export())`."""
        return self.number, self.ends, bytes(self._fragments), self._count


class HeaderCodec:
    """Both directions of one connection."""

    __slots__ = ("_announced", "_decoder", "_last", "_last_block", "_list_bytes", "_prefix", "_remembered")

    def __init__(self, list_bytes: int, state: CodecState = (False, False, HeaderTable.DEFAULT_SIZE, ())) -> None:
        self._announced, acknowledged, size, entries = state
        self._list_bytes = list_bytes
        self._decoder: Decoder | None = None
        """Until the peer has acknowledged our SETTINGS."""
        if not acknowledged:
            self._decoder = Decoder(max_header_list_size=list_bytes)
            self._decoder.header_table_size = size
            for name, value in entries:
                self._decoder.header_table.add(name, value)
        self._remembered: dict[bytes, Headers] = {}
        self._last_block: bytes = b""
        self._last: Headers = ()
        """The remembered block that came last: comparing is less work than looking up, and a tunnel's answers are all the same."""
        self._prefix: tuple[bytes, Headers, int] = (b"", (), 0)
        """The beginning of a block, its fields, and the room that they leave."""

    def acknowledged(self) -> None:
        """The peer knows that it has no dynamic table: what it still refers to there is an error, what it adds is not kept."""
        self._decoder = None

    def decode(self, block: bytes) -> Headers:
        """The fields of a block, in order.

        Raises:
            MuxError: COMPRESSION_ERROR for bytes that are not HPACK, ENHANCE_YOUR_CALM for a list over the bound.
        """
        if block == self._last_block:
            return self._last
        try:
            if self._decoder is not None:
                return tuple((name, value) for name, value in self._decoder.decode(block, raw=True))
            prefix, fields, room = self._prefix
            if prefix and block.startswith(prefix):
                return _decode(block, (len(prefix), fields, room))[0]
            headers = self._remembered.get(block) or self._decode_new(block)
        except OversizedHeaderListError as error:
            raise MuxError("header list over the bound", Code.ENHANCE_YOUR_CALM) from error
        except HPACKDecodingError as error:
            # `hpack` quotes objects by their place in our memory, and the peer hears this text.
            raise MuxError(f"header block: {str(error).partition('<')[0][:100]}", Code.COMPRESSION_ERROR) from error
        if len(block) <= _REMEMBERED_BYTES and len(headers) <= _VARYING:
            if len(self._remembered) >= _REMEMBERED_BLOCKS:
                self._remembered.clear()
            self._remembered[block] = headers
            self._last_block, self._last = block, headers
        return headers

    def _decode_new(self, block: bytes) -> Headers:
        """Requests of one tunnel differ in their last fields only (`forwarded`, `traceparent`): what is in front is decoded once."""
        headers, boundary = _decode(block, (0, (), self._list_bytes))
        if 0 < boundary <= _LONGEST_PREFIX:
            known = headers[:-_VARYING]
            spent = list_bytes(known)
            self._prefix = block[:boundary], known, self._list_bytes - spent
        return headers

    def encode(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """The block of `headers`, as it goes out now."""
        return self.outgoing(encode(headers))

    def outgoing(self, block: bytes) -> bytes:
        """A block of `encode` as it goes out now: in front of its first one, each connection says that its table is empty."""
        if self._announced:
            return block
        self._announced = True
        return _TABLE_SIZE_ZERO + block

    def export(self) -> CodecState:
        """For `HeaderCodec(list_bytes, export())`."""
        if self._decoder is None:
            return self._announced, True, 0, ()
        table = self._decoder.header_table
        entries = tuple((bytes(name), bytes(value)) for name, value in reversed(table.dynamic_entries))
        return self._announced, False, table.maxsize, entries


def list_bytes(headers: Headers) -> int:
    """What a list counts for against SETTINGS_MAX_HEADER_LIST_SIZE. Source: RFC 9113 §6.5.2."""
    return sum([len(name) + len(value) + _FIELD_OVERHEAD for name, value in headers])


def encode(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The block of `headers`, which must be lower-case and checked: literals without indexing, without Huffman coding.

    The same for every connection and at any time, so that it may be made once for many messages.
    """
    return b"".join([_EXACT.get(field) or name_literal(field[0]) + string_literal(field[1]) for field in headers])


def name_literal(name: bytes) -> bytes:
    """The beginning of a field without indexing; the `string_literal` of its value is the rest."""
    return _PREFIX.get(name) or b"\x00" + string_literal(name)


def string_literal(text: bytes) -> bytes:
    """A string without Huffman coding."""
    return literal_length(len(text)) + text


def literal_length(size: int) -> bytes:
    """The beginning of a string of `size` bytes without Huffman coding."""
    return _LENGTHS[size] if size < 0x7F else bytes(encode_integer(size, 7))


def _decode(block: bytes, known: tuple[int, Headers, int]) -> tuple[Headers, int]:
    """A block that may refer to the static table only, and where its last `_VARYING` fields begin (0: it has no more than those).

    Args:
        known: where to begin, the fields in front of that, and the room that they leave. Raises `hpack`'s errors.
    """
    pos, before, room = known
    headers = list(before)
    last = last_but_one = 0
    size = len(block)
    while pos < size:
        first = block[pos]
        start = pos
        if first & 0x80:
            index, pos = _integer(block, pos, 0x7F)
            field = _static(index)
        elif first & 0x60 == 0x20:
            index, pos = _integer(block, pos, 0x1F)
            if index or headers:
                raise HPACKDecodingError("table size update that is not 0 or not at the start")
            continue
        else:
            # 0x40 asks for an entry in a table that holds none, the others do not ask.
            index, pos = _integer(block, pos, 0x3F if first & 0x40 else 0x0F)
            if index:
                name = _static(index)[0]
            else:
                name, pos = _string(block, pos)
            value, pos = _string(block, pos)
            field = (name, value)
        room -= len(field[0]) + len(field[1]) + _FIELD_OVERHEAD
        if room < 0:
            raise OversizedHeaderListError("list over the bound")
        headers.append(field)
        last_but_one, last = last, start
    return tuple(headers), (last_but_one if len(headers) > _VARYING else 0)


def _static(index: int) -> tuple[bytes, bytes]:
    if not 0 < index <= len(_STATIC):
        raise HPACKDecodingError(f"index {index} is not in the static table")
    return _STATIC[index - 1]


def _integer(block: bytes, pos: int, mask: int) -> tuple[int, int]:
    """An integer whose prefix is `mask`, of at most five bytes as in `hpack`, and where it ends. RFC 7541 §5.1."""
    if pos >= len(block):
        raise HPACKDecodingError("block ends where an integer should be")
    number = block[pos] & mask
    pos += 1
    if number < mask:
        return number, pos
    for shift, byte in zip((0, 7, 14, 21), block[pos : pos + 4], strict=False):
        pos += 1
        number += (byte & 0x7F) << shift
        if byte < 0x80:
            return number, pos
    raise HPACKDecodingError("integer too long or cut off")


def _string(block: bytes, pos: int) -> tuple[bytes, int]:
    """A string and where it ends. RFC 7541 §5.2."""
    start = pos
    if pos < len(block) and block[pos] < 0x7F:
        # As nearly all are: not coded, and one byte says how long.
        length, pos = block[pos], pos + 1
    else:
        length, pos = _integer(block, pos, 0x7F)
    end = pos + length
    if end > len(block):
        raise HPACKDecodingError("string cut off")
    text = block[pos:end]
    return (decode_huffman(text) if block[start] & 0x80 else text), end
