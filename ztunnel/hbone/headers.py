"""Header blocks: HPACK without a dynamic table of our own, and without the peer's as soon as it has acknowledged our SETTINGS.

Our encoder never indexes, so its output depends on nothing and its state is one bit. The decoder starts with the 4,096 bytes that
HTTP/2 grants every peer until it has seen SETTINGS_HEADER_TABLE_SIZE 0; from then on equal blocks decode equally and are remembered.
Source: RFC 7541; RFC 9113 §4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpack import Decoder, HPACKDecodingError, OversizedHeaderListError
from hpack.hpack import encode_integer
from hpack.table import HeaderTable

from ztunnel.hbone.events import Headers
from ztunnel.hbone.frames import Code, MuxError

_REMEMBERED_BLOCKS = 64
_REMEMBERED_BYTES = 512
"""Longest block worth remembering: a response's. Requests never repeat, each has its own trace id."""
_TABLE_SIZE_ZERO = b"\x20"
"""Dynamic table size update to 0: allowed before any block, required after a peer has shrunk its table. RFC 7541 §4.2."""

CodecState = tuple[bool, bool, int, tuple[tuple[bytes, bytes], ...]]
"""Our table update sent; our SETTINGS acknowledged; the peer's table size; its entries, oldest first."""


class HeaderCodec:
    """Both directions of one connection."""

    __slots__ = ("_acknowledged", "_announced", "_decoder", "_remembered")

    def __init__(self, list_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=list_bytes)
        self._acknowledged = False
        self._announced = False
        self._remembered: dict[bytes, Headers] = {}

    def acknowledged(self) -> None:
        """The peer knows that it has no dynamic table: what it still refers to there is an error, what it adds is not kept."""
        self._acknowledged = True
        self._decoder.max_allowed_table_size = 0
        self._decoder.header_table_size = 0

    def decode(self, block: bytes) -> Headers:
        """The fields of a block, in order.

        Raises:
            MuxError: COMPRESSION_ERROR for bytes that are not HPACK, ENHANCE_YOUR_CALM for a list over the bound.
        """
        known = self._remembered.get(block)
        if known is not None:
            return known
        try:
            headers = tuple((name, value) for name, value in self._decoder.decode(block, raw=True))
        except OversizedHeaderListError as error:
            raise MuxError("header list over the bound", Code.ENHANCE_YOUR_CALM) from error
        except HPACKDecodingError as error:
            raise MuxError(f"header block: {str(error)[:100]}", Code.COMPRESSION_ERROR) from error
        if self._acknowledged and len(block) <= _REMEMBERED_BYTES:
            if len(self._remembered) >= _REMEMBERED_BLOCKS:
                self._remembered.clear()
            self._remembered[block] = headers
        return headers

    def encode(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """The block of `headers`, which must be lower-case and checked: literals without indexing, without Huffman coding."""
        parts = [_field(name, value) for name, value in headers]
        if not self._announced:
            self._announced = True
            parts.insert(0, _TABLE_SIZE_ZERO)
        return b"".join(parts)

    def export(self) -> CodecState:
        """Everything that what follows depends on."""
        table = self._decoder.header_table
        entries = tuple((bytes(name), bytes(value)) for name, value in reversed(table.dynamic_entries))
        return self._announced, self._acknowledged, table.maxsize, entries

    @classmethod
    def restore(cls, list_bytes: int, state: CodecState) -> HeaderCodec:
        """The codec that `export` described."""
        codec = cls(list_bytes)
        announced, acknowledged, size, entries = state
        codec._announced = announced
        if acknowledged:
            codec.acknowledged()
        codec._decoder.header_table_size = size
        for name, value in entries:
            codec._decoder.header_table.add(name, value)
        return codec


def _field(name: bytes, value: bytes) -> bytes:
    index, values = HeaderTable.STATIC_TABLE_MAPPING.get(name, (0, {}))
    exact = values.get(value)
    if exact is not None:
        return bytes((0x80 | exact,))
    prefix = bytes(encode_integer(index, 4)) if index else b"\x00" + _length(name) + name
    return prefix + _length(value) + value


def _length(text: bytes) -> bytes:
    size = len(text)
    return bytes((size,)) if size < 127 else bytes(encode_integer(size, 7))
