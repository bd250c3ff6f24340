"""Header blocks: ours read by `hpack`, `hpack`'s read by us, before and after the peer knows that it has no table."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder

from ztunnel.hbone import frames
from ztunnel.hbone.frames import Code, MuxError
from ztunnel.hbone.headers import HeaderBlock, HeaderCodec, encode

FIELDS = (
    (b":method", b"CONNECT"),
    (b":status", b"200"),
    (b":authority", b"10.0.0.1:80"),
    (b"accept-charset", b"x"),
    (b"baggage", b""),
    (b"x" * 200, b"y" * 300),
)


def test_the_library_reads_what_we_write() -> None:
    codec, decoder = HeaderCodec(65_536), Decoder()
    decoder.max_allowed_table_size = 0
    for _ in range(2):
        assert tuple(decoder.decode(codec.encode(FIELDS), raw=True)) == FIELDS
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize("huffman", [True, False])
def test_we_read_what_the_library_writes(huffman: bool) -> None:
    codec, encoder = HeaderCodec(65_536), Encoder()
    for _ in range(2):
        assert codec.decode(encoder.encode(FIELDS, huffman=huffman)) == FIELDS
    codec.acknowledged()
    encoder.header_table_size = 0
    for _ in range(3):
        assert codec.decode(encoder.encode(FIELDS, huffman=huffman)) == FIELDS


def test_a_table_that_was_taken_away_cannot_be_used() -> None:
    codec, encoder = HeaderCodec(65_536), Encoder()
    encoder.encode(FIELDS)
    codec.decode(Encoder().encode(FIELDS))
    codec.acknowledged()
    with pytest.raises(MuxError) as caught:
        codec.decode(encoder.encode(FIELDS))
    assert caught.value.code == Code.COMPRESSION_ERROR


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",
        b"\xff\x00",
        b"\xbe",
        b"\x7e\x00",
        b"\x00",
        b"\x00\x01",
        b"\x00\x01a",
        b"\x00\x01a\x05b",
        b"\x00\x01a\xff",
        b"\x00\x01a\x7f\xff\xff\xff\xff\xff\x01",
        b"\x00\x01a\x81\x00",
        b"\x3f\xe1\x1f",
        b"\x21",
        b"\x82\x20",
    ],
)
def test_not_hpack(block: bytes) -> None:
    codec = HeaderCodec(65_536)
    codec.acknowledged()
    with pytest.raises(MuxError) as caught:
        codec.decode(block)
    assert caught.value.code == Code.COMPRESSION_ERROR


@pytest.mark.parametrize("acknowledged", [True, False])
def test_list_over_the_bound(acknowledged: bool) -> None:
    codec = HeaderCodec(100)
    if acknowledged:
        codec.acknowledged()
    assert len(codec.decode(b"\x88" * 2)) == 2
    with pytest.raises(MuxError) as caught:
        codec.decode(b"\x88" * 3)
    assert caught.value.code == Code.ENHANCE_YOUR_CALM


def test_memory_of_blocks_is_bounded() -> None:
    codec = HeaderCodec(65_536)
    codec.acknowledged()
    for number in range(1000):
        block = HeaderCodec(0, (True, True, 0, ())).encode([(b"a", b"%d" % number)])
        assert codec.decode(block) is codec.decode(block)
    assert len(codec._remembered) <= 64


def test_the_last_block_again() -> None:
    codec = HeaderCodec(65_536)
    codec.acknowledged()
    assert codec.decode(b"") == ()
    for block in (b"\x88", b"\x89", b"\x88", b"\x88", b"", b"\x89"):
        assert codec.decode(block) == HeaderCodec(65_536).decode(block)
    with pytest.raises(MuxError):
        codec.decode(b"\x88\xff")
    assert codec.decode(b"\x88") is codec.decode(b"\x88")


def test_a_block_behind_one_that_begins_the_same() -> None:
    codec = HeaderCodec(200)
    codec.acknowledged()
    first = [(b"a", b"1"), (b"b", b"2"), (b"c", b"3"), (b"d", b"4")]
    for fields in (first, first[:2], [*first[:2], (b"e", b"5")], first[:3], [(b"x", b"6"), *first[1:]], [*first, (b"e", b"5")], first):
        assert codec.decode(encode(fields)) == tuple(fields)
    for known in (0, 1):
        with pytest.raises(MuxError) as caught:
            codec.decode(encode([*first[known:], (b"c", b"3"), (b"d", b"4"), (b"e", b"5")]))
        assert caught.value.code == Code.ENHANCE_YOUR_CALM


def test_a_long_beginning_is_not_remembered() -> None:
    codec = HeaderCodec(65_536)
    codec.acknowledged()
    short, long = [(b"a", b"1"), *FIELDS[-2:]], [(b"a", bytes(5000)), *FIELDS[-2:]]
    assert codec.decode(encode(long)) == tuple(long)
    assert codec._prefix[0] == b""
    for fields in (short, long, short):
        assert codec.decode(encode(fields)) == tuple(fields)
    assert codec._prefix[0] == encode(short[:1])


def test_the_first_block_takes_our_table_away() -> None:
    codec = HeaderCodec(65_536)
    assert [codec.outgoing(b"\x88") for _ in range(3)] == [b"\x20\x88", b"\x88", b"\x88"]


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 300, 70_000])
def test_strings_of_every_length(size: int) -> None:
    fields = ((b"n" + b"x" * size, b"y" * size), (b":authority", b"z" * size))
    assert tuple(Decoder(1 << 20).decode(encode(fields), raw=True)) == fields


def test_export_and_restore_with_a_table_in_use() -> None:
    codec, encoder = HeaderCodec(65_536), Encoder()
    codec.decode(encoder.encode(FIELDS))
    codec.encode(FIELDS)
    again = HeaderCodec(65_536, codec.export())
    assert again.export() == codec.export()
    assert again.decode(encoder.encode(FIELDS)) == FIELDS
    assert again.encode(FIELDS) == codec.encode(FIELDS)


def test_block_of_one_frame() -> None:
    block = HeaderBlock((3, 10))
    assert block.begin(frames.END_HEADERS | frames.END_STREAM, 1, b"abc") == b"abc"
    assert (block.ends, block.number) == (True, 0)
    flags = frames.END_HEADERS | frames.PADDED | frames.PRIORITY_FLAG
    assert block.begin(flags, 1, b"\x02" + b"prior" + b"abc" + b"\0\0") == b"abc"
    assert block.begin(frames.END_HEADERS | frames.PADDED, 1, b"\x00") == b""


@pytest.mark.parametrize(
    ("flags", "payload"), [(frames.PADDED, b""), (frames.PADDED, b"\x01"), (frames.PRIORITY_FLAG, b"1234"), (0x28, b"\x01prior")]
)
def test_padding_or_priority_that_does_not_fit(flags: int, payload: bytes) -> None:
    with pytest.raises(MuxError) as caught:
        HeaderBlock((3, 10)).begin(flags | frames.END_HEADERS, 1, payload)
    assert caught.value.code == Code.PROTOCOL_ERROR


def test_block_of_many_frames() -> None:
    block = HeaderBlock((3, 10))
    assert block.begin(frames.END_STREAM, 7, b"ab") is None
    again = HeaderBlock((3, 10), block.export())
    for one in (block, again):
        assert one.extend(0, b"cd") is None
        assert one.number == 7
        assert one.extend(frames.END_HEADERS, b"ef") == b"abcdef"
        assert (one.number, one.ends) == (0, True)


@pytest.mark.parametrize("parts", [[b"a", b"a", b"a"], [b"a" * 10]])
def test_block_in_too_many_frames_or_bytes(parts: list[bytes]) -> None:
    block = HeaderBlock((3, 10))
    block.begin(0, 1, b"a")
    with pytest.raises(MuxError) as caught:  # noqa: PT012 - which of them is over the bound is not the point
        for part in parts:
            block.extend(0, part)
    assert caught.value.code == Code.ENHANCE_YOUR_CALM


def test_nothing_to_continue() -> None:
    with pytest.raises(MuxError) as caught:
        HeaderBlock((3, 10)).extend(0, b"a")
    assert caught.value.code == Code.PROTOCOL_ERROR


def test_an_error_does_not_tell_the_peer_where_our_memory_is() -> None:
    """`hpack` writes views as `<memory at 0x7f…>` into what it raises."""
    for block in (b"\xff" * 9, b"\x3f" + b"\xff" * 9, b"\xff\xff"):
        with pytest.raises(MuxError) as caught:
            HeaderCodec(1000).decode(block)
        assert "0x" not in str(caught.value)
