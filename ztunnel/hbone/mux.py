"""The tunnel's HTTP/2: CONNECT streams of one connection, for both sides, as bytes in and events out.

Owns the streams, both directions' flow control and the order of what waits to be sent. Refuses to know what a CONNECT asks for
(`connect`), TLS records, sockets and clocks. DATA is the only frame that is fast: it is given to the caller as views of the caller's
own buffer, as it arrives; every other frame is gathered (bounded), looked up in a table, and paid for from a budget.
Invariants: per stream and per connection, receive window + credit not yet told + bytes not yet consumed = the advertised window,
so that buffering is bounded without a counter; a connection error leaves a GOAWAY in the output and a machine that takes nothing more.

Longer than most modules because receiving shares its hot state (windows, current frame) with what the frames do to it; what could
be told apart is: `frames`, `streams` (the tables), `headers` (HPACK), `messages`, `budget`, `limits`, `muxstate`.
Source: RFC 9113; Istio ztunnel `proxy/h2` for the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ztunnel.hbone import frames
from ztunnel.hbone.budget import Budget, Cost
from ztunnel.hbone.events import (
    DataReceived,
    Event,
    Headers,
    PeerGoingAway,
    PongReceived,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from ztunnel.hbone.frames import HEADER_BYTES, MAX_WINDOW, PREFACE, STREAM_MASK, Code, Kind, MuxError, Setting
from ztunnel.hbone.headers import HeaderCodec
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.messages import MalformedError, check_request, check_response, check_trailers
from ztunnel.hbone.muxstate import MuxState, PeerSettings, Position, StreamState
from ztunnel.hbone.streams import RECEIVED, SENT, Input, State, Stream, Verdict

_unpack = frames.HEADER.unpack_from
_pack = frames.HEADER.pack_into
_GRACEFUL = frozenset({Code.NO_ERROR, Code.CANCEL})
_UPDATE_PRICE = 4096
"""What a WINDOW_UPDATE takes from what our DATA has earned, so that a peer may send two per frame and one per 4 KiB for nothing."""
_MOST_EARNED = 64 << 20
_DEBUG_BYTES = 256


class Mux:
    """One HTTP/2 connection.

    Methods that name a stream which is gone (reset while the caller was about to use it) do nothing and `sendable` is 0.
    Nothing is sent here: after any call, what `take` gives goes out before DATA whose header is written later.
    """

    __slots__ = (
        "limits", "peer_max_frame",
        "_client", "_streams", "_resets", "_next", "_last", "_codec", "_budget", "_out", "_events", "_handlers",
        "_greeted", "_acknowledged", "_peer_window", "_peer_streams", "_refusing", "_peer_leaving", "_failed",
        "_send_window", "_receive_window", "_credit", "_starved", "_earned", "_stream_quarter", "_quarter", "_sizes",
        "_preface", "_kept", "_left", "_skip", "_ends", "_current", "_block",
    )  # fmt: skip

    def __init__(self, *, client: bool, limits: MuxLimits) -> None:
        self._client = client
        self.limits = limits
        self.peer_max_frame = frames.DEFAULT_MAX_FRAME
        self._streams: dict[int, Stream] = {}
        self._resets: dict[int, None] = {}
        self._next = 1
        self._last = 0
        self._codec = HeaderCodec(limits.header_bytes(client))
        self._budget = Budget(limits.budgets())
        self._events: list[Event] = []
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            Kind.HEADERS: self._on_headers,
            Kind.PRIORITY: self._on_priority,
            Kind.RST_STREAM: self._on_reset,
            Kind.SETTINGS: self._on_settings,
            Kind.PING: self._on_ping,
            Kind.GOAWAY: self._on_goaway,
            Kind.WINDOW_UPDATE: self._on_window_update,
            Kind.CONTINUATION: self._on_continuation,
        }
        self._greeted = False
        self._acknowledged = False
        self._peer_window = frames.DEFAULT_WINDOW
        self._peer_streams = limits.assumed_streams
        self._refusing = False
        self._peer_leaving = False
        self._failed: tuple[str, int] | None = None
        self._send_window = frames.DEFAULT_WINDOW
        self._receive_window = limits.connection_window
        self._credit = 0
        self._starved = False
        self._earned = 0
        self._quarter = limits.connection_window >> 2
        self._stream_quarter = max(1, limits.stream_window >> 2)
        self._sizes = (limits.max_frame, limits.header_bytes(client))
        self._preface = 0 if client else len(PREFACE)
        self._kept = bytearray()
        self._left = 0
        self._skip = 0
        self._ends = False
        self._current: Stream | None = None
        self._block: tuple[int, bool, bytearray, int] | None = None
        self._out = self._greeting()

    def _greeting(self) -> bytearray:
        limits = self.limits
        values: dict[int, int] = {Setting.HEADER_TABLE_SIZE: 0}
        if self._client:
            values[Setting.ENABLE_PUSH] = 0
        else:
            values[Setting.MAX_CONCURRENT_STREAMS] = limits.streams
        values[Setting.INITIAL_WINDOW_SIZE] = limits.stream_window
        values[Setting.MAX_FRAME_SIZE] = limits.max_frame
        values[Setting.MAX_HEADER_LIST_SIZE] = limits.header_bytes(self._client)
        out = bytearray(PREFACE if self._client else b"") + frames.settings(values)
        grown = limits.connection_window - frames.DEFAULT_WINDOW
        return out + frames.window_update(0, grown) if grown else out

    # Receiving

    def receive(self, data: bytearray, start: int, end: int, now: float) -> list[Event]:
        """What `data[start:end]` means.

        Args:
            data: all of the range is used up; `DataReceived` events borrow it until the caller writes there again.
            now: seconds of a monotonic clock, for the flood budgets.
        Raises:
            MuxError: the connection is over; what it held before the error in this call is lost, and the output ends with GOAWAY.
        """
        if self._failed is not None:
            raise MuxError(*self._failed)
        self._budget.renew(now)
        events: list[Event] = []
        self._events = events
        try:
            self._read(data, start, end, events)
            if len(self._out) > self.limits.output_bytes:
                raise MuxError("the peer does not read what it makes us send", Code.ENHANCE_YOUR_CALM)  # noqa: TRY301 - one exit for all
        except MuxError as error:
            self._fail(error)
            raise
        return events

    def _fail(self, error: MuxError) -> None:
        self._failed = (str(error), error.code)
        self._kept = bytearray()
        self._block = None
        self._out += frames.goaway(self._last, error.code, str(error).encode("ascii", "replace")[:_DEBUG_BYTES])

    def _read(self, data: bytearray, start: int, end: int, events: list[Event]) -> None:
        """The loop that runs once per DATA frame. Whatever is not a whole plain DATA frame within both windows goes to `_frame`."""
        pos = self._resume(data, start, end) if self._kept or self._preface else start
        view = memoryview(data)
        streams = self._streams
        largest = self.limits.max_frame
        while True:
            if self._left or self._skip:
                pos = self._payload(view, pos, end)
            plain = self._greeted and self._block is None
            while plain and end - pos >= HEADER_BYTES:
                word, flags, number = _unpack(data, pos)
                if word & 0xFF or flags > 1:
                    break
                length = word >> 8
                body = pos + HEADER_BYTES
                stop = body + length
                stream = streams.get(number)
                if stream is None or stop > end or not 0 < length <= stream.receive_window or not stream.reading:
                    break
                if length > self._receive_window or length > largest:
                    break
                stream.receive_window -= length
                self._receive_window -= length
                events.append(DataReceived(number, view[body:stop]))
                pos = stop
                if flags:
                    self._end(stream)
            if end - pos < HEADER_BYTES:
                break
            used = self._frame(data, pos, end)
            if not used:
                break
            pos += used
        if pos < end:
            self._kept += view[pos:end]

    def _resume(self, data: bytearray, pos: int, end: int) -> int:
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
            if len(kept) >= HEADER_BYTES and self._frame(kept, 0, len(kept)):
                self._kept = bytearray()
                return pos

    def _wanted(self, kept: bytearray) -> int:
        if len(kept) < HEADER_BYTES:
            return HEADER_BYTES
        word, flags, number = _unpack(kept, 0)
        return frames.needed(word & 0xFF, flags, word >> 8, number & STREAM_MASK, self._sizes)

    def _payload(self, view: memoryview, pos: int, end: int) -> int:
        """Gives out the bytes of a DATA frame that is longer than what has arrived, and passes over what nobody wants."""
        if self._left:
            size = min(self._left, end - pos)
            stream = self._current
            if stream is not None and stream.reading:
                if size:
                    self._events.append(DataReceived(stream.number, view[pos : pos + size]))
            else:
                self._credit_connection(size)
            self._left -= size
            pos += size
            if not self._left:
                self._current = None
                if self._ends and stream is not None and stream.reading:
                    self._end(stream)
        if not self._left:
            size = min(self._skip, end - pos)
            self._skip -= size
            pos += size
        return pos

    def _frame(self, data: bytearray, pos: int, end: int) -> int:
        """Handles the frame at `pos`; how many bytes of it are done with, 0 when it is not all there yet."""
        word, flags, number = _unpack(data, pos)
        number &= STREAM_MASK
        kind = word & 0xFF
        if self._block is not None and (kind != Kind.CONTINUATION or number != self._block[0]):
            raise MuxError("header block interrupted by another frame", Code.PROTOCOL_ERROR)
        if not self._greeted and (kind != Kind.SETTINGS or flags & frames.ACK):
            raise MuxError("the first frame is not SETTINGS", Code.PROTOCOL_ERROR)
        needed = frames.needed(kind, flags, word >> 8, number, self._sizes)
        if end - pos < needed:
            return 0
        if kind == Kind.DATA:
            self._on_data(flags, number, word >> 8, data[pos + HEADER_BYTES] + 1 if flags & frames.PADDED else 0)
            return needed
        handler = self._handlers.get(kind)
        if handler is None:
            self._budget.spend(Cost.OTHER)
            self._skip = word >> 8
        else:
            handler(flags, number, bytes(data[pos + HEADER_BYTES : pos + needed]))
        return needed

    # Frames that belong to a stream

    def _judge(self, number: int, received: Input) -> Stream | None:
        """The stream that a frame is for, or None when the frame is to be passed over.

        Raises:
            MuxError: the frame may not be sent in the state of its stream.
        """
        stream = self._streams.get(number)
        state = self._state_of(number) if stream is None else stream.state
        verdict = RECEIVED[state, received][1]
        if verdict is Verdict.TAKE and stream is not None:
            return stream
        if verdict is Verdict.IGNORE:
            self._budget.spend(Cost.LATE)
        elif verdict is Verdict.STREAM_CLOSED and stream is not None:
            self._refuse(number, Code.STREAM_CLOSED)
        elif verdict is Verdict.CONNECTION_CLOSED:
            raise MuxError(f"{received.name} on closed stream {number}", Code.STREAM_CLOSED)
        else:
            raise MuxError(f"{received.name} on stream {number}, which is {state.name.lower()}", Code.PROTOCOL_ERROR)
        return None

    def _state_of(self, number: int) -> State:
        """The state of a stream that is not live."""
        if number in self._resets:
            return State.RESET
        opened = self._next > number if self._client else self._last >= number
        return State.CLOSED if opened and number & 1 else State.IDLE

    def _on_data(self, flags: int, number: int, length: int, overhead: int) -> None:
        """`overhead`: the padding length's byte and the padding. It counts for flow control, and is given back at once."""
        if overhead > length:
            raise MuxError("padding longer than its frame", Code.PROTOCOL_ERROR)
        if length > self._receive_window:
            raise MuxError("DATA beyond the connection's window", Code.FLOW_CONTROL_ERROR)
        self._receive_window -= length
        stream = self._judge(number, Input.DATA)
        if stream is not None and not stream.reading:
            self._refuse(number, Code.PROTOCOL_ERROR)
            stream = None
        if stream is None:
            self._credit_connection(length)
            self._skip = length - (1 if overhead else 0)
            return
        if length > stream.receive_window:
            raise MuxError(f"DATA beyond the window of stream {number}", Code.FLOW_CONTROL_ERROR)
        stream.receive_window -= length
        self._left = length - overhead
        self._skip = overhead - 1 if overhead else 0
        self._ends = bool(flags & frames.END_STREAM)
        self._current = stream
        if overhead:
            self.consumed(number, overhead)
        if not self._left:
            self._current = None
            if self._ends:
                self._end(stream)
            else:
                self._budget.spend(Cost.EMPTY_DATA)

    def _end(self, stream: Stream) -> None:
        self._move(stream, RECEIVED[stream.state, Input.END][0])
        self._events.append(StreamEnded(stream.number))

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise MuxError(f"HEADERS on stream {number}, which only a server could open", Code.PROTOCOL_ERROR)
        first, last = 0, len(payload)
        if flags & frames.PADDED:
            first, last = 1, last - (payload[0] if payload else 0)
        if flags & frames.PRIORITY_FLAG:
            first += 5
        if first > last:
            raise MuxError("padding or priority longer than its frame", Code.PROTOCOL_ERROR)
        fragment = payload[first:last]
        ends = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS:
            self._on_message(number, ends, fragment)
        else:
            self._block = (number, ends, bytearray(fragment), 1)

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None:
            raise MuxError("CONTINUATION of nothing", Code.PROTOCOL_ERROR)
        self._budget.spend(Cost.CONTINUATION)
        _, ends, fragments, count = self._block
        fragments += payload
        if count >= self.limits.block_frames or len(fragments) > self._sizes[1]:
            raise MuxError("header block in too many frames or bytes", Code.ENHANCE_YOUR_CALM)
        if flags & frames.END_HEADERS:
            self._block = None
            self._on_message(number, ends, bytes(fragments))
        else:
            self._block = (number, ends, fragments, count + 1)

    def _on_message(self, number: int, ends: bool, block: bytes) -> None:
        """A whole header block. Decoded even when nobody wants it: the peer's compression state depends on it."""
        headers = self._codec.decode(block)
        if not self._client and number > self._last:
            self._last = number
            self._on_request(number, ends, headers)
            return
        stream = self._judge(number, Input.HEADERS)
        if stream is None:
            return
        try:
            if self._client and not stream.answered:
                self._on_response(stream, ends, headers)
            else:
                check_trailers(headers)
                if not ends:
                    self._refuse(number, Code.PROTOCOL_ERROR)
                else:
                    self._end(stream)
        except MalformedError:
            self._refuse(number, Code.PROTOCOL_ERROR)

    def _on_request(self, number: int, ends: bool, headers: Headers) -> None:
        if self._refusing or len(self._streams) >= self.limits.streams:
            self._refuse(number, Code.REFUSED_STREAM)
            return
        try:
            check_request(headers)
        except MalformedError:
            self._refuse(number, Code.PROTOCOL_ERROR)
            return
        stream = self._add(number)
        if ends:
            self._move(stream, RECEIVED[stream.state, Input.END][0])
        self._events.append(RequestReceived(number, headers, ends))

    def _on_response(self, stream: Stream, ends: bool, headers: Headers) -> None:
        status = check_response(headers)
        if status < 200:
            self._budget.spend(Cost.RESET)
            if ends:
                self._refuse(stream.number, Code.PROTOCOL_ERROR)
            return
        stream.answered = True
        self._move(stream, RECEIVED[stream.state, Input.END][0] if ends else stream.state)
        self._events.append(ResponseReceived(stream.number, status, headers, ends))

    def _on_reset(self, _flags: int, number: int, payload: bytes) -> None:
        stream = self._judge(number, Input.RST)
        if stream is None:
            return
        # Rapid reset is the cancelling of requests that are still being worked on; a stream that was answered has been of use.
        self._budget.spend(Cost.LATE if self._client or stream.answered else Cost.RESET)
        code = int.from_bytes(payload, "big")
        self._move(stream, State.CLOSED)
        self._events.append(StreamReset(number, code, code in _GRACEFUL))

    def _on_priority(self, _flags: int, _number: int, _payload: bytes) -> None:
        self._budget.spend(Cost.PRIORITY)

    def _on_window_update(self, _flags: int, number: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & STREAM_MASK
        self._pay_update()
        if number == 0:
            self._send_window += increment
            if increment == 0 or self._send_window > MAX_WINDOW:
                raise MuxError(f"window update by {increment}", Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
            if self._starved and self._send_window > 0:
                self._starved = False
                self._events.append(WindowOpened(0))
            return
        stream = self._judge(number, Input.WINDOW_UPDATE)
        if stream is None:
            return
        stream.send_window += increment
        if increment == 0 or stream.send_window > MAX_WINDOW:
            self._refuse(number, Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
        else:
            self._feed(stream)

    def _pay_update(self) -> None:
        if self._earned < _UPDATE_PRICE:
            self._budget.spend(Cost.WINDOW_UPDATE)
        else:
            self._earned = min(self._earned, _MOST_EARNED) - _UPDATE_PRICE

    def _feed(self, stream: Stream) -> None:
        if stream.starved and stream.send_window > 0:
            stream.starved = False
            self._events.append(WindowOpened(stream.number))

    # Frames that belong to the connection

    def _on_settings(self, flags: int, _number: int, payload: bytes) -> None:
        self._budget.spend(Cost.SETTINGS)
        if flags & frames.ACK:
            if not self._acknowledged:
                self._acknowledged = True
                self._codec.acknowledged()
                self._rebase_receiving()
            return
        values = frames.parse_settings(payload, from_server=self._client)
        if not self._greeted:
            # Not said means unlimited; what we assumed until now was a guess.
            self._peer_streams = MAX_WINDOW
            self._greeted = True
        self._peer_streams = values.get(Setting.MAX_CONCURRENT_STREAMS, self._peer_streams)
        self.peer_max_frame = values.get(Setting.MAX_FRAME_SIZE, self.peer_max_frame)
        self._out += frames.frame(Kind.SETTINGS, frames.ACK, 0)
        self._events.append(SettingsReceived())
        self._rebase_sending(values.get(Setting.INITIAL_WINDOW_SIZE, self._peer_window))

    def _rebase_sending(self, window: int) -> None:
        change = window - self._peer_window
        self._peer_window = window
        if change == 0:
            return
        for stream in self._streams.values():
            stream.send_window += change
            if stream.send_window > MAX_WINDOW:
                raise MuxError("SETTINGS_INITIAL_WINDOW_SIZE overflows a stream's window", Code.FLOW_CONTROL_ERROR)
            self._feed(stream)

    def _rebase_receiving(self) -> None:
        change = min(0, self.limits.stream_window - frames.DEFAULT_WINDOW)
        for stream in self._streams.values():
            stream.receive_window += change

    def _initial_receive_window(self) -> int:
        """Until the peer has acknowledged our SETTINGS it may believe in HTTP/2's default."""
        window = self.limits.stream_window
        return window if self._acknowledged else max(window, frames.DEFAULT_WINDOW)

    def _on_ping(self, flags: int, _number: int, payload: bytes) -> None:
        self._budget.spend(Cost.PING)
        if flags & frames.ACK:
            self._events.append(PongReceived(payload))
        else:
            self._out += frames.frame(Kind.PING, frames.ACK, 0, payload)

    def _on_goaway(self, _flags: int, _number: int, payload: bytes) -> None:
        self._budget.spend(Cost.OTHER)
        last = int.from_bytes(payload[:4], "big") & STREAM_MASK
        self._peer_leaving = True
        self._events.append(PeerGoingAway(last, int.from_bytes(payload[4:8], "big"), payload[8 : 8 + _DEBUG_BYTES]))
        if not self._client:
            return
        for stream in [stream for stream in self._streams.values() if stream.number > last]:
            self._move(stream, State.RESET)
            self._events.append(StreamReset(stream.number, int(Code.REFUSED_STREAM), graceful=False))

    # Streams

    def _add(self, number: int) -> Stream:
        stream = Stream(number, self._initial_receive_window(), self._peer_window)
        self._streams[number] = stream
        stream.enter(State.OPEN, self._client)
        return stream

    def _move(self, stream: Stream, state: State) -> None:
        stream.enter(state, self._client)
        if state is State.CLOSED or state is State.RESET:
            del self._streams[stream.number]
            if state is State.RESET:
                self._remember(stream.number)

    def _remember(self, number: int) -> None:
        self._resets[number] = None
        if len(self._resets) > self.limits.remembered_resets:
            del self._resets[next(iter(self._resets))]

    def _refuse(self, number: int, code: int) -> None:
        """A stream error: RST_STREAM, and the caller is told if it knew the stream."""
        self._budget.spend(Cost.RESET)
        self._out += frames.rst_stream(number, code)
        stream = self._streams.get(number)
        if stream is None:
            self._remember(number)
        else:
            self._move(stream, State.RESET)
            self._events.append(StreamReset(number, int(code), graceful=False))

    # Sending

    @property
    def has_output(self) -> bool:
        """Whether `take` would give anything."""
        return bool(self._out)

    def take(self) -> bytearray:
        """The control bytes that wait to be sent, in order; they are the caller's from now on."""
        out = self._out
        self._out = bytearray()
        return out

    @property
    def open_count(self) -> int:
        """Streams that are not closed."""
        return len(self._streams)

    @property
    def can_open(self) -> bool:
        """Whether a client may open another stream: within the peer's limit, nobody going away, numbers left."""
        leaving = self._peer_leaving or self._refusing or self._failed is not None
        return self._client and not leaving and len(self._streams) < self._peer_streams and self._next <= MAX_WINDOW

    def open_stream(self, headers: Sequence[tuple[bytes, bytes]]) -> int:
        """Sends a request; the number of its stream. DATA may follow at once, before the response.

        Raises:
            ValueError: `can_open` is false.
        """
        if not self.can_open:
            raise ValueError("no stream can be opened here")
        number = self._next
        self._next += 2
        self._add(number)
        self._out += frames.header_block(number, self._codec.encode(headers), end_stream=False, largest=self.peer_max_frame)
        return number

    def respond(self, stream: int, status: int, headers: Sequence[tuple[bytes, bytes]] = (), *, end: bool = False) -> None:
        """Answers a request, once.

        Args:
            end: the response is all; if the peer has not ended the request, RST_STREAM(NO_ERROR) follows and the stream is gone.
        """
        live = self._streams.get(stream)
        if live is None or live.answered or self._client:
            return
        live.answered = True
        block = self._codec.encode([(b":status", b"%d" % status), *headers])
        self._out += frames.header_block(stream, block, end_stream=end, largest=self.peer_max_frame)
        self._move(live, SENT[live.state, Input.END][0] if end else live.state)
        if end and live.state is not State.CLOSED:
            self.reset(stream, Code.NO_ERROR)

    def sendable(self, stream: int) -> int:
        """Bytes of DATA that may be sent on a stream now. After a 0 for want of window, WindowOpened will follow."""
        live = self._streams.get(stream)
        if live is None or not live.writing:
            return 0
        window = live.send_window
        if window <= 0:
            live.starved = True
            return 0
        if self._send_window <= 0:
            self._starved = True
            return 0
        return window if window < self._send_window else self._send_window  # noqa: FURB136 - min() costs as much as the rest

    def data_header(self, buffer: bytearray, at: int, stream: int, length: int) -> None:
        """Writes the header of a DATA frame to `buffer[at:at + 9]`; `length` payload bytes follow it in the caller's buffer.

        Args:
            length: at most `peer_max_frame` and at most what `sendable` has just said.
        Raises:
            ValueError: more than that, or a stream that cannot send.
        """
        live = self._streams.get(stream)
        if live is None or not live.writing or length > live.send_window or length > self._send_window or length > self.peer_max_frame:
            raise ValueError(f"DATA of {length} bytes may not be sent on stream {stream}")
        live.send_window -= length
        self._send_window -= length
        self._earned += length + 2 * _UPDATE_PRICE
        _pack(buffer, at, length << 8, 0, stream)

    def end_stream(self, stream: int) -> None:
        """Ends our direction, after all DATA that was handed to the transport."""
        live = self._streams.get(stream)
        if live is None or not live.writing:
            return
        self._out += frames.frame(Kind.DATA, frames.END_STREAM, stream)
        self._move(live, SENT[live.state, Input.END][0])

    def reset(self, stream: int, code: int) -> None:
        """Ends both directions at once. Bytes that the caller still holds are to be given to `consumed` all the same."""
        live = self._streams.get(stream)
        if live is None:
            return
        self._out += frames.rst_stream(stream, code)
        self._move(live, SENT[live.state, Input.RST][0])

    def consumed(self, stream: int, n: int) -> None:
        """`n` bytes of DataReceived have reached the application, or were thrown away: the peer may send as many again."""
        self._credit_connection(n)
        live = self._streams.get(stream)
        if live is None or not live.reading:
            return
        live.credit += n
        if live.credit >= self._stream_quarter:
            self._out += frames.window_update(stream, live.credit)
            live.receive_window += live.credit
            live.credit = 0

    def _credit_connection(self, n: int) -> None:
        self._credit += n
        if self._credit >= self._quarter:
            self._out += frames.window_update(0, self._credit)
            self._receive_window += self._credit
            self._credit = 0

    def ping(self, payload: bytes) -> None:
        """Asks for a PongReceived with the same eight bytes."""
        if len(payload) != 8:
            raise ValueError("a ping carries eight bytes")
        self._out += frames.frame(Kind.PING, 0, 0, payload)

    def goaway(self, code: int, debug: bytes = b"") -> None:
        """Takes no new streams from now on; those that live go on. With an error code the caller closes the connection."""
        self._refusing = True
        self._out += frames.goaway(self._last, code, debug[:_DEBUG_BYTES])

    # Hand-over

    def export(self) -> MuxState:
        """Everything that what follows depends on. Bytes that wait to be sent are part of it: take them before, or there."""
        spent, until = self._budget.export()
        block = self._block
        current = self._current
        return MuxState(
            client=self._client,
            limits=self.limits,
            streams=tuple(
                StreamState(s.number, s.state.value, s.answered, s.receive_window, s.send_window, s.credit, s.starved)
                for s in self._streams.values()
            ),
            resets=tuple(self._resets),
            next_stream=self._next,
            last_stream=self._last,
            peer=PeerSettings(self._greeted, self._peer_window, self.peer_max_frame, self._peer_streams),
            acknowledged=self._acknowledged,
            send_window=self._send_window,
            receive_window=self._receive_window,
            credit=self._credit,
            starved=self._starved,
            earned=self._earned,
            refusing=self._refusing,
            peer_leaving=self._peer_leaving,
            failed=self._failed,
            position=Position(
                preface=self._preface,
                kept=bytes(self._kept),
                left=self._left,
                skip=self._skip,
                ends=self._ends,
                current=current.number if current is not None and current.reading else 0,
                block=None if block is None else (block[0], block[1], bytes(block[2]), block[3]),
            ),
            codec=self._codec.export(),
            spent=spent,
            budget_until=until,
            out=bytes(self._out),
        )

    @classmethod
    def restore(cls, state: MuxState) -> Mux:
        """The multiplexer that `export` described, in another process or later."""
        mux = cls(client=state.client, limits=state.limits)
        mux._acknowledged = state.acknowledged
        for s in state.streams:
            stream = Stream(s.number, s.receive_window, s.send_window)
            stream.answered, stream.credit, stream.starved = s.answered, s.credit, s.starved
            stream.enter(State(s.state), state.client)
            mux._streams[s.number] = stream
        mux._resets = dict.fromkeys(state.resets)
        mux._next, mux._last = state.next_stream, state.last_stream
        peer, at = state.peer, state.position
        mux._greeted, mux._peer_window, mux.peer_max_frame, mux._peer_streams = (
            peer.greeted, peer.initial_window, peer.max_frame, peer.streams,
        )  # fmt: skip
        mux._send_window, mux._receive_window, mux._credit = state.send_window, state.receive_window, state.credit
        mux._starved, mux._earned = state.starved, state.earned
        mux._refusing, mux._peer_leaving, mux._failed = state.refusing, state.peer_leaving, state.failed
        mux._preface, mux._kept, mux._left, mux._skip, mux._ends = at.preface, bytearray(at.kept), at.left, at.skip, at.ends
        mux._current = mux._streams.get(at.current)
        mux._block = None if at.block is None else (at.block[0], at.block[1], bytearray(at.block[2]), at.block[3])
        mux._codec = HeaderCodec.restore(state.limits.header_bytes(state.client), state.codec)
        mux._budget = Budget(state.limits.budgets(), state.spent, state.budget_until)
        mux._out = bytearray(state.out)
        return mux
