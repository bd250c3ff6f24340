"""The peer's byte stream: cut into frames, DATA given out as it arrives, and the windows that bound how much of it may come.

DATA is the only frame that is fast: it becomes views of the caller's own buffer. Every other frame is gathered (bounded by
`frames.needed`) and handed on whole. Invariant, per stream and for the connection: receive window + credit that the peer has not
been told of + bytes that the application has not consumed = the advertised window; so buffering is bounded without a counter.
Source: RFC 9113 §4.1, §5.2, §6.1, §6.9.
"""

from __future__ import annotations

from typing import Final

from ztunnel.hbone import frames
from ztunnel.hbone.budget import Cost
from ztunnel.hbone.events import DataReceived
from ztunnel.hbone.exchange import Exchange
from ztunnel.hbone.frames import ACK, DEFAULT_WINDOW, END_STREAM, HEADER_BYTES, PADDED, PREFACE, STREAM_MASK, Code, Kind, MuxError
from ztunnel.hbone.headers import HeaderBlock
from ztunnel.hbone.muxstate import ReceiverState
from ztunnel.hbone.streams import Input, Stream

MOST_EVENTS: Final = 1024
"""After so many of them `read` stops: of DATA frames of one byte, a buffer that is full would take fifty milliseconds."""

_unpack: Final = frames.HEADER.unpack_from


class FrameTaker:
    """Who takes the frames that are not DATA. A class and not a Protocol: compiled, it is called once or twice for every connection."""

    __slots__ = ()

    def take_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """A whole frame of a type that RFC 9113 defines and that `frames.needed` lets through."""
        raise NotImplementedError


class Receiver:
    """The receiving half of one connection."""

    __slots__ = (
        "acknowledged",
        "greeted",
        "_block", "_credit", "_current", "_ends", "_exchange", "_kept", "_left", "_preface",
        "_quarter", "_sizes", "_skip", "_stream_quarter", "_stream_window", "_window",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, block: HeaderBlock) -> None:
        limits = exchange.limits
        self._exchange = exchange
        self._block = block
        self.greeted = False
        """The peer's first SETTINGS have come."""
        self.acknowledged = False
        """The peer has acknowledged our SETTINGS."""
        self._window = limits.connection_window
        self._credit = 0
        self._stream_window = limits.stream_window
        self._quarter = limits.connection_window >> 2
        self._stream_quarter = max(1, limits.stream_window >> 2)
        self._sizes = (limits.max_frame, limits.header_bytes(exchange.client))
        self._preface = 0 if exchange.client else len(PREFACE)
        """Bytes of the client's preface still to come."""
        self._kept = bytearray()
        """The beginning of a frame that cannot be handled yet."""
        self._left = 0
        """Bytes of tunnel data still to come in the current DATA frame, for `_current`; then END_STREAM if `_ends`."""
        self._skip = 0
        """Bytes to be passed over after those: padding, or a frame that nobody wants."""
        self._ends = False
        self._current: Stream | None = None

    def read(self, data: memoryview, start: int, end: int, taker: FrameTaker) -> int:
        """Takes `data[start:end]`, or as much of it as makes MOST_EVENTS; where it stopped.

        The loop runs once per frame; whatever is not a whole plain DATA frame goes to `_frame`.
        """
        pos = self._resume(data, start, end, taker) if self._kept or self._preface else start
        streams = self._exchange.table.live
        events = self._exchange.events
        largest = self._sizes[0]
        while True:
            if self._left or self._skip:
                pos = self._payload(data, pos, end)
            if end - pos < HEADER_BYTES:
                break
            if len(events) >= MOST_EVENTS:
                return pos
            head: tuple[int, int, int] = _unpack(data, pos)
            word, flags, number = head
            body = pos + HEADER_BYTES
            length = word >> 8
            stop = body + length
            stream = streams.get(number) if word & 0xFF == Kind.DATA and flags <= END_STREAM else None
            if (
                stream is not None
                and stream.reading
                and stop <= end
                and (length or flags)
                and length <= stream.receive_window
                and length <= self._window
                and length <= largest
                and self.greeted
                and not self._block.number
            ):
                if length:
                    stream.receive_window -= length
                    self._window -= length
                    events.append(DataReceived(number, data[body:stop]))
                if flags:
                    self._exchange.end(stream)
                pos = stop
                continue
            used = self._frame(data, pos, end, head, taker)
            if not used:
                break
            pos += used
        if pos < end:
            self._kept += data[pos:end]
        return end

    def discard(self) -> None:
        """After a connection error nothing kept is of use."""
        self._kept = bytearray()

    def _resume(self, data: memoryview, pos: int, end: int, taker: FrameTaker) -> int:
        """Completes the preface or the frame that the last call could not; the new position in `data`."""
        if self._preface:
            size = min(self._preface, end - pos)
            at = len(PREFACE) - self._preface
            if data[pos : pos + size] != PREFACE[at : at + size]:
                raise MuxError("not an HTTP/2 client", Code.PROTOCOL_ERROR)
            self._preface -= size
            return pos + size
        kept = self._kept
        while True:
            wanted = self._wanted(kept)
            size = min(wanted - len(kept), end - pos)
            kept += data[pos : pos + size]
            pos += size
            if len(kept) < wanted:
                return pos
            if self._frame(memoryview(kept), 0, len(kept), _unpack(kept, 0), taker):
                self._kept = bytearray()
                return pos

    def _wanted(self, kept: bytearray) -> int:
        if len(kept) < HEADER_BYTES:
            return HEADER_BYTES
        word, flags, number = _unpack(kept, 0)
        return frames.needed(word & 0xFF, flags, word >> 8, number & STREAM_MASK, self._sizes)

    def _payload(self, data: memoryview, pos: int, end: int) -> int:
        """Gives out the bytes of a DATA frame that is longer than what has arrived, and passes over what nobody wants."""
        if self._left:
            size = min(self._left, end - pos)
            stream = self._current
            wanted = stream is not None and stream.reading
            if not wanted:
                self.credit_connection(size)
            elif size and stream is not None:
                self._exchange.events.append(DataReceived(stream.number, data[pos : pos + size]))
            self._left -= size
            pos += size
            if self._left:
                return pos
            self._current = None
            if self._ends and wanted and stream is not None:
                self._exchange.end(stream)
        size = min(self._skip, end - pos)
        self._skip -= size
        return pos + size

    def _frame(self, data: memoryview, pos: int, end: int, head: tuple[int, int, int], taker: FrameTaker) -> int:
        """Handles the frame at `pos`; how many bytes of it are done with, 0 when it is not all there yet."""
        word, flags, number = head
        number &= STREAM_MASK
        kind = word & 0xFF
        length = word >> 8
        block = self._block.number
        if block and (kind != Kind.CONTINUATION or number != block):
            raise MuxError("header block interrupted by another frame", Code.PROTOCOL_ERROR)
        if not self.greeted and (kind != Kind.SETTINGS or flags & ACK):
            raise MuxError("the first frame is not SETTINGS", Code.PROTOCOL_ERROR)
        needed = frames.needed(kind, flags, length, number, self._sizes)
        if end - pos < needed:
            return 0
        if kind == Kind.DATA:
            self._on_data(flags, number, length, data[pos + HEADER_BYTES] + 1 if flags & PADDED else 0)
        elif kind > Kind.CONTINUATION:
            self._exchange.budget.spend(Cost.OTHER)
            self._skip = length
        else:
            taker.take_frame(kind, flags, number, data[pos + HEADER_BYTES : pos + needed].tobytes())
        return needed

    def _on_data(self, flags: int, number: int, length: int, overhead: int) -> None:
        """`overhead`: the padding length's byte and the padding. It counts for flow control, and is given back at once."""
        if overhead > length:
            raise MuxError("padding longer than its frame", Code.PROTOCOL_ERROR)
        if length > self._window:
            raise MuxError("DATA beyond the connection's window", Code.FLOW_CONTROL_ERROR)
        self._window -= length
        exchange = self._exchange
        stream = exchange.judge(number, Input.DATA)
        if stream is not None and not stream.reading:
            # DATA before the response.
            exchange.refuse(number, Code.PROTOCOL_ERROR)
            stream = None
        if stream is None:
            self.credit_connection(length)
            self._skip = length - (1 if overhead else 0)
            return
        if length and length > stream.receive_window:
            raise MuxError(f"DATA beyond the window of stream {number}", Code.FLOW_CONTROL_ERROR)
        stream.receive_window -= length
        self._left = length - overhead
        self._skip = max(0, overhead - 1)
        self._ends = bool(flags & END_STREAM)
        if overhead:
            self.consumed(number, overhead)
        if self._left:
            self._current = stream
        elif self._ends:
            exchange.end(stream)
        else:
            exchange.budget.spend(Cost.EMPTY_DATA)

    # Windows

    def initial_window(self) -> int:
        """A new stream's window. Until the peer has acknowledged our SETTINGS it may believe in HTTP/2's default."""
        window = self._stream_window
        return window if self.acknowledged or window > DEFAULT_WINDOW else DEFAULT_WINDOW

    def on_acknowledged(self) -> None:
        """From now on the peer keeps to our windows. Those of live streams may become negative."""
        change = self._stream_window - self.initial_window()
        self.acknowledged = True
        for stream in self._exchange.table.live.values():
            stream.receive_window += change

    def consumed(self, number: int, n: int) -> None:
        """`n` bytes of a stream, live or gone, need no room any more."""
        self.credit_connection(n)
        stream = self._exchange.table.live.get(number)
        if stream is None or not stream.reading:
            return
        stream.credit += n
        if stream.credit >= self._stream_quarter:
            self._exchange.out += frames.window_update(number, stream.credit)
            stream.receive_window += stream.credit
            stream.credit = 0

    def credit_connection(self, n: int) -> None:
        """`n` bytes need no room any more, whatever stream they were for."""
        self._credit += n
        if self._credit >= self._quarter:
            self._exchange.out += frames.window_update(0, self._credit)
            self._window += self._credit
            self._credit = 0

    # Hand-over

    def export(self) -> ReceiverState:
        """Everything that what follows depends on."""
        current = self._current
        return ReceiverState(
            self.greeted,
            self.acknowledged,
            self._window,
            self._credit,
            self._preface,
            bytes(self._kept),
            self._left,
            self._skip,
            self._ends,
            current.number if current is not None and current.reading else 0,
        )

    @classmethod
    def restore(cls, exchange: Exchange, block: HeaderBlock, state: ReceiverState) -> Receiver:
        """The receiver that `export` described; the streams of `exchange` are already restored."""
        receiver = cls(exchange, block)
        receiver.greeted, receiver.acknowledged = state.greeted, state.acknowledged
        receiver._window, receiver._credit = state.window, state.credit
        receiver._preface, receiver._kept = state.preface, bytearray(state.kept)
        receiver._left, receiver._skip, receiver._ends = state.left, state.skip, state.ends
        receiver._current = exchange.table.live.get(state.current)
        return receiver
