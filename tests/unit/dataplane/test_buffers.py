"""The scratch buffers: their places fit together, and records made of the largest read fit into them."""

from __future__ import annotations

from ztunnel.dataplane import buffers
from ztunnel.dataplane.buffers import CHUNK, CHUNK_FRAMED, FRAME_HEADER, SMALLEST_MAX_FRAME, Scratch
from ztunnel.hbone.records import MAX_RECORD, sealed_size


def test_a_framed_read_is_a_whole_number_of_full_records() -> None:
    assert CHUNK_FRAMED % buffers.RECORD_PLAIN == 0
    assert CHUNK + FRAME_HEADER == CHUNK_FRAMED
    assert len(Scratch().payload) == CHUNK


def test_slots_lie_behind_room_for_their_headers() -> None:
    scratch = Scratch()
    framed = FRAME_HEADER + SMALLEST_MAX_FRAME
    for index, slot in enumerate(scratch.slots):
        assert len(slot) == SMALLEST_MAX_FRAME
        slot[0] = index + 1
        assert scratch.frame[index * framed + FRAME_HEADER] == index + 1
    assert len(scratch.slots) * framed <= CHUNK_FRAMED


def test_everything_that_is_made_of_a_read_has_room() -> None:
    scratch = Scratch()
    assert len(scratch.frame) > CHUNK_FRAMED, "seal needs a spare byte"
    assert len(scratch.sealed) >= sealed_size(CHUNK_FRAMED)
    # A read behind the longest incomplete record, and its plaintext.
    assert len(scratch.raw) >= MAX_RECORD + CHUNK_FRAMED
    assert len(scratch.plain) >= len(scratch.raw) - MAX_RECORD
