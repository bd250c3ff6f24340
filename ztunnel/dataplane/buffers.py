"""The scratch buffers of one worker: shared by all its connections, because a callback loop uses one at a time.

A connection keeps bytes only when its other side does not take them; an idle one costs no buffer at all.
Source: 512 KiB against 64 KiB was worth a third of the bulk throughput (buffer ablation in the performance notes).
"""

from __future__ import annotations

from typing import Final

from ztunnel.hbone.records import MAX_RECORD, sealed_size

FRAME_HEADER: Final = 9
RECORD_PLAIN: Final = 16384
CHUNK_FRAMED: Final = 32 * RECORD_PLAIN
"""One read from the application and its frame header: a whole number of full records."""
CHUNK: Final = CHUNK_FRAMED - FRAME_HEADER
SHORT_FRAMED: Final = 4 * RECORD_PLAIN
"""The same while somebody who waits for answers shares the worker: a tenth of a millisecond instead of almost one."""
SMALL: Final = 4096
"""Reads below this are collected and leave together at the end of the loop's round; larger ones are sealed where they lie."""
SMALLEST_MAX_FRAME: Final = 16384
"""Every HTTP/2 peer takes frames of this size (RFC 9113 §4.2); most take no larger ones."""

_SLOT: Final = SMALLEST_MAX_FRAME + FRAME_HEADER
_SLOTS: Final = CHUNK_FRAMED // _SLOT

MAX_WAITING: Final = 512 << 20
"""Bytes that may wait in a worker for applications that do not take them. Each tunnel may leave 16 MiB, and tunnels may be many."""
SPARED: Final = 64 << 10
"""A connection with no more than this waiting is not ended for the sake of all."""


class Waiting:
    """How much waits in all connections together, and what that costs the greediest: a worker without memory would end them all."""

    __slots__ = ("bytes", "limit", "refused")

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self.bytes = 0
        self.limit = limit
        self.refused = 0
        """Connections that had to end since the count was last taken."""

    def add(self, more: int, own: int) -> bool:
        """So much more waits in a connection, which makes `own` there. False: it must end, and give back what waits."""
        self.bytes += more
        if more <= 0 or self.bytes <= self.limit or own <= SPARED:
            return True
        self.refused += 1
        return False

    def take_refused(self) -> int:
        """How many had to end since the last call."""
        refused, self.refused = self.refused, 0
        return refused


class Scratch:
    """Buffers and prepared views into them.

    `frame` holds a frame header and payload read from the application; `slots` are the payload places of a run of 16 KiB
    frames in the same buffer, with holes for their headers, for one scattered read. `sealed` takes the records made of it.
    `raw` takes what arrives on a tunnel, `plain` its plaintext. `waiting` counts what connections had to copy out of them.
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.waiting = Waiting(max_waiting)
        self.frame = bytearray(CHUNK_FRAMED + 1)
        whole = memoryview(self.frame)
        self.frame_view = whole
        self.payload = whole[FRAME_HEADER:CHUNK_FRAMED]
        self.slots = [whole[i * _SLOT + FRAME_HEADER : (i + 1) * _SLOT] for i in range(_SLOTS)]
        self.sealed = memoryview(bytearray(sealed_size(CHUNK_FRAMED) + MAX_RECORD))
        self.raw = memoryview(bytearray(CHUNK_FRAMED + 2 * MAX_RECORD))
        self.plain = memoryview(bytearray(CHUNK_FRAMED + 2 * MAX_RECORD))
        self.plain_chunk = self.plain[:CHUNK_FRAMED]
        self.splice = bytearray(256 * 1024)
        self.splice_view = memoryview(self.splice)
