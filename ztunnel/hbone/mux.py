"""The tunnel's HTTP/2: CONNECT streams of one connection, for both sides, as bytes in and events out.

Owns what a frame of each type does, and our own sending within the peer's windows. The rest has files of its own: `receiver`
(frames out of bytes, DATA, receive windows), `streams` (states as tables), `headers` (HPACK), `messages`, `budget`, `limits`.
Refuses to know what a CONNECT asks for (`connect`), TLS records, sockets and clocks.
Invariant: a connection error leaves a GOAWAY in the output and a machine that takes nothing more.
Source: RFC 9113; Istio ztunnel `proxy/h2` for the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ztunnel.hbone import frames
from ztunnel.hbone.budget import FRAME_EARNS, Budget, Cost
from ztunnel.hbone.events import (
    Event,
    Headers,
    InterimReceived,
    PeerGoingAway,
    PongReceived,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamReset,
    TrailersReceived,
    WindowOpened,
)
from ztunnel.hbone.exchange import Exchange
from ztunnel.hbone.frames import MAX_WINDOW, STREAM_MASK, Code, Kind, MuxError, Setting
from ztunnel.hbone.headers import HeaderBlock, HeaderCodec, encode
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.messages import MalformedError, MessageCheck, check_trailers
from ztunnel.hbone.muxstate import MuxState, SenderState
from ztunnel.hbone.receiver import FrameTaker, Receiver
from ztunnel.hbone.streams import ENDED_BY_PEER, ENDED_BY_US, SENT, Input, State, Stream, StreamTable

_pack: Final = frames.HEADER.pack_into
_GRACEFUL: Final = frozenset({Code.NO_ERROR, Code.CANCEL})
_DEBUG_BYTES: Final = 256


class Mux(FrameTaker):
    """One HTTP/2 connection.

    Methods that name a stream which is gone (reset while the caller was about to use it) do nothing and `sendable` is 0.
    Nothing is sent here: after any call, what `take` gives goes out before DATA whose header is written later.
    """

    __slots__ = (
        "limits", "peer_max_frame", "peer_takes_connect_protocol", "peer_takes_early_data", "taken",
        "_block", "_budget", "_check", "_client", "_codec", "_exchange", "_failed", "_output_bytes", "_peer_leaving", "_peer_streams",
        "_peer_window", "_receiver", "_refusing", "_starved", "_streams", "_table", "_window",
    )  # fmt: skip

    def __init__(self, *, client: bool, limits: MuxLimits) -> None:
        self._client = client
        self.limits = limits
        self.peer_max_frame = frames.DEFAULT_MAX_FRAME
        self.peer_takes_early_data = False
        """The peer has said that DATA may follow a CONNECT before its answer (decision 0006)."""
        self.peer_takes_connect_protocol = False
        """A server has said that it takes extended CONNECT."""
        self.taken = 0
        """Where the last `receive` stopped: at its `end`, or earlier when that was enough for one turn."""
        self._exchange = Exchange(client, limits)
        self._block = HeaderBlock((limits.block_frames, limits.header_bytes(client)))
        self._codec = HeaderCodec(limits.header_bytes(client))
        self._check = MessageCheck(limits.messages)
        self._output_bytes = limits.output_bytes
        self._peer_window = frames.DEFAULT_WINDOW
        self._peer_streams = limits.assumed_streams
        self._refusing = False
        self._peer_leaving = False
        self._failed: tuple[str, int] | None = None
        self._window = frames.DEFAULT_WINDOW
        """The connection's send window."""
        self._starved = False
        """`sendable` answered 0 because of it."""
        self._receiver = Receiver(self._exchange, self._block)
        self._exchange.out += limits.greeting(client)
        self._share()

    def _share(self) -> None:
        """Short ways to what every call needs."""
        self._table = self._exchange.table
        self._streams = self._exchange.table.live
        self._budget = self._exchange.budget

    # Receiving

    def receive(self, data: memoryview, start: int, end: int, now: float) -> list[Event]:
        """What `data[start:end]` means.

        Args:
            data: the range is used up to `taken`; `DataReceived` events borrow it until the caller writes there again.
            now: seconds of a monotonic clock, for the flood budgets.
        Raises:
            MuxError: the connection is over; what it held before the error in this call is lost, and the output ends with GOAWAY.
        """
        exchange = self._exchange
        if now >= self._budget.until:
            self._budget.renew(now)
        events: list[Event] = []
        exchange.events = events
        try:
            if self._failed is not None:
                raise MuxError(*self._failed)
            self.taken = self._receiver.read(data, start, end, self)
            if len(exchange.out) > self._output_bytes:
                raise MuxError("the peer does not read what it makes us send", Code.ENHANCE_YOUR_CALM)
        except MuxError as error:
            self._fail(error)
            raise
        return events

    def _fail(self, error: MuxError) -> None:
        if self._failed is None:
            self._failed = (str(error), error.code)
            self._receiver.discard()
            self._exchange.out += frames.goaway(self._table.last, error.code, str(error).encode("ascii", "replace")[:_DEBUG_BYTES])

    def take_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == Kind.WINDOW_UPDATE:
            self._on_window_update(number, payload)
        elif kind == Kind.HEADERS:
            self._on_headers(flags, number, payload)
        elif kind == Kind.RST_STREAM:
            self._on_reset(number, payload)
        elif kind == Kind.CONTINUATION:
            self._on_continuation(flags, number, payload)
        elif kind == Kind.SETTINGS:
            self._on_settings(flags, payload)
        elif kind == Kind.PING:
            self._on_ping(flags, payload)
        elif kind == Kind.GOAWAY:
            self._on_goaway(payload)
        else:
            self._budget.spend(Cost.PRIORITY)

    # Frames that belong to a stream

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise MuxError(f"HEADERS on stream {number}, which only a server could open", Code.PROTOCOL_ERROR)
        block = self._block.begin(flags, number, payload)
        if block is not None:
            self._on_message(number, self._block.ends, block)

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        self._budget.spend(Cost.CONTINUATION)
        block = self._block.extend(flags, payload)
        if block is not None:
            self._on_message(number, self._block.ends, block)

    def _on_message(self, number: int, ends: bool, block: bytes) -> None:
        """A whole header block. Decoded even when nobody wants it: the peer's compression state depends on it."""
        headers = self._codec.decode(block)
        if not self._client and number > self._table.last:
            self._table.last = number
            self._on_request(number, ends, headers)
            return
        stream = self._exchange.judge(number, Input.HEADERS)
        if stream is None:
            return
        try:
            if self._client and not stream.answered:
                self._on_response(stream, ends, headers)
            else:
                check_trailers(headers)
                if not ends:
                    self._exchange.refuse(number, Code.PROTOCOL_ERROR)
                    return
                if self.limits.messages:
                    self._exchange.events.append(TrailersReceived(number, headers))
                self._exchange.end(stream)
        except MalformedError:
            self._exchange.refuse(number, Code.PROTOCOL_ERROR)

    def _on_request(self, number: int, ends: bool, headers: Headers) -> None:
        if self._refusing or len(self._streams) >= self.limits.streams:
            self._exchange.refuse(number, Code.REFUSED_STREAM)
            return
        try:
            self._check.request(headers)
        except MalformedError:
            self._exchange.refuse(number, Code.PROTOCOL_ERROR)
            return
        stream = self._table.add(number, self._receiver.initial_window(), self._peer_window)
        if ends:
            self._table.move(stream, ENDED_BY_PEER[stream.state])
        self._exchange.events.append(RequestReceived(number, headers, ends))

    def _on_response(self, stream: Stream, ends: bool, headers: Headers) -> None:
        status = self._check.response(headers)
        if status < 200:
            self._budget.spend(Cost.RESET)
            if ends:
                self._exchange.refuse(stream.number, Code.PROTOCOL_ERROR)
            elif self.limits.messages:
                self._exchange.events.append(InterimReceived(stream.number, status, headers))
            return
        stream.answered = True
        self._table.move(stream, ENDED_BY_PEER[stream.state] if ends else stream.state)
        self._exchange.events.append(ResponseReceived(stream.number, status, headers, ends))

    def _on_reset(self, number: int, payload: bytes) -> None:
        stream = self._exchange.judge(number, Input.RST)
        if stream is None:
            return
        # Rapid reset is the cancelling of requests that are still being worked on; a stream that was answered has been of use.
        self._budget.spend(Cost.LATE if self._client or stream.answered else Cost.RESET)
        code = int.from_bytes(payload, "big")
        self._table.move(stream, State.CLOSED)
        self._exchange.events.append(StreamReset(number, code, code in _GRACEFUL))

    def _on_window_update(self, number: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & STREAM_MASK
        self._budget.pay_update()
        if number == 0:
            self._window += increment
            if increment == 0 or self._window > MAX_WINDOW:
                raise MuxError(f"window update by {increment}", Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
            if self._starved and self._window > 0:
                self._starved = False
                self._exchange.events.append(WindowOpened(0))
            return
        stream = self._exchange.judge(number, Input.WINDOW_UPDATE)
        if stream is None:
            return
        stream.send_window += increment
        if increment == 0 or stream.send_window > MAX_WINDOW:
            self._exchange.refuse(number, Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
        else:
            self._feed(stream)

    def _feed(self, stream: Stream) -> None:
        if stream.starved and stream.send_window > 0:
            stream.starved = False
            self._exchange.events.append(WindowOpened(stream.number))

    # Frames that belong to the connection

    def _on_settings(self, flags: int, payload: bytes) -> None:
        self._budget.spend(Cost.SETTINGS)
        if flags & frames.ACK:
            if not self._receiver.acknowledged:
                self._receiver.on_acknowledged()
                self._codec.acknowledged()
            return
        values = frames.parse_settings(payload, from_server=self._client)
        if not self._receiver.greeted:
            # Not said means unlimited; what we assumed until now was a guess.
            self._peer_streams = MAX_WINDOW
            self._receiver.greeted = True
        self._peer_streams = values.get(Setting.MAX_CONCURRENT_STREAMS, self._peer_streams)
        self.peer_max_frame = values.get(Setting.MAX_FRAME_SIZE, self.peer_max_frame)
        if Setting.ENABLE_CONNECT_PROTOCOL in values:
            self.peer_takes_connect_protocol = values[Setting.ENABLE_CONNECT_PROTOCOL] == 1
        self.peer_takes_early_data = values.get(Setting.EARLY_DATA, int(self.peer_takes_early_data)) == 1
        self._exchange.out += frames.frame(Kind.SETTINGS, frames.ACK, 0)
        self._exchange.events.append(SettingsReceived())
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

    def _on_ping(self, flags: int, payload: bytes) -> None:
        self._budget.spend(Cost.PING)
        if flags & frames.ACK:
            self._exchange.events.append(PongReceived(payload))
        else:
            self._exchange.out += frames.frame(Kind.PING, frames.ACK, 0, payload)

    def _on_goaway(self, payload: bytes) -> None:
        self._budget.spend(Cost.OTHER)
        last = int.from_bytes(payload[:4], "big") & STREAM_MASK
        self._peer_leaving = True
        self._exchange.events.append(PeerGoingAway(last, int.from_bytes(payload[4:8], "big"), payload[8 : 8 + _DEBUG_BYTES]))
        if not self._client:
            return
        for stream in [stream for stream in self._streams.values() if stream.number > last]:
            self._table.move(stream, State.RESET)
            self._exchange.events.append(StreamReset(stream.number, int(Code.REFUSED_STREAM), graceful=False))

    # Sending

    @property
    def has_output(self) -> bool:
        """Whether `take` would give anything."""
        return bool(self._exchange.out)

    @property
    def output_size(self) -> int:
        """Bytes that `take` would give."""
        return len(self._exchange.out)

    def take(self) -> bytearray:
        """The control bytes that wait to be sent, in order; they are the caller's from now on."""
        out = self._exchange.out
        self._exchange.out = bytearray()
        return out

    @property
    def is_refusing(self) -> bool:
        """We have sent GOAWAY."""
        return self._refusing

    @property
    def open_count(self) -> int:
        """Streams that are not closed."""
        return len(self._streams)

    @property
    def can_open(self) -> bool:
        """Whether a client may open another stream: within the peer's limit, nobody going away, numbers left."""
        leaving = self._peer_leaving or self._refusing or self._failed is not None
        return self._client and not leaving and len(self._streams) < self._peer_streams and self._table.next <= MAX_WINDOW

    def open_stream(self, headers: Sequence[tuple[bytes, bytes]], *, end: bool = False) -> int:
        """Sends a request; the number of its stream. DATA may follow at once, before the response.

        Args:
            end: the request is all.
        Raises:
            ValueError: `can_open` is false.
        """
        return self.open_block(encode(headers), end=end)

    def open_block(self, block: bytes, *, end: bool = False) -> int:
        """`open_stream` with a request that `headers.encode` has encoded."""
        if not self.can_open:
            raise ValueError("no stream can be opened here")
        number = self._table.next
        self._table.next += 2
        stream = self._table.add(number, self._receiver.initial_window(), self._peer_window)
        self._exchange.out += frames.header_block(number, self._codec.outgoing(block), end_stream=end, largest=self.peer_max_frame)
        if end:
            self._table.move(stream, ENDED_BY_US[stream.state])
        return number

    def interim(self, stream: int, status: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """A 1xx in front of the answer."""
        live = self._streams.get(stream)
        if live is None or live.answered or self._client:
            return
        block = self._codec.encode([(b":status", b"%d" % status), *headers])
        self._exchange.out += frames.header_block(stream, block, end_stream=False, largest=self.peer_max_frame)

    def end_with(self, stream: int, trailers: Sequence[tuple[bytes, bytes]]) -> None:
        """Ends our direction with a trailer section, after all DATA that was handed to the transport."""
        live = self._streams.get(stream)
        if live is None or not live.writing:
            return
        self._exchange.out += frames.header_block(stream, self._codec.encode(trailers), end_stream=True, largest=self.peer_max_frame)
        self._table.move(live, ENDED_BY_US[live.state])

    def respond(self, stream: int, status: int, headers: Sequence[tuple[bytes, bytes]] = (), *, end: bool = False) -> None:
        """Answers a request, once.

        Args:
            end: the response is all; if the peer has not ended the request, RST_STREAM(NO_ERROR) follows and the stream is gone.
        """
        self.respond_block(stream, encode([(b":status", b"%d" % status), *headers]), end=end)

    def respond_block(self, stream: int, block: bytes, *, end: bool = False) -> None:
        """`respond` with a final response that `headers.encode` has encoded."""
        live = self._streams.get(stream)
        if live is None or live.answered or self._client:
            return
        live.answered = True
        self._exchange.out += frames.header_block(stream, self._codec.outgoing(block), end_stream=end, largest=self.peer_max_frame)
        self._table.move(live, ENDED_BY_US[live.state] if end else live.state)
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
        if self._window <= 0:
            self._starved = True
            return 0
        return window if window < self._window else self._window

    def data_header(self, buffer: bytearray, at: int, stream: int, length: int) -> None:
        """Writes the header of a DATA frame to `buffer[at:at + 9]`; `length` payload bytes follow it in the caller's buffer.

        Args:
            length: at most `peer_max_frame` and at most what `sendable` has just said.
        Raises:
            ValueError: more than that, or a stream that cannot send.
        """
        live = self._streams.get(stream)
        if live is None or not live.writing or length > live.send_window or length > self._window or length > self.peer_max_frame:
            raise ValueError(f"DATA of {length} bytes may not be sent on stream {stream}")
        live.send_window -= length
        self._window -= length
        self._budget.earned += length + FRAME_EARNS
        _pack(buffer, at, length << 8, 0, stream)

    def end_stream(self, stream: int) -> None:
        """Ends our direction, after all DATA that was handed to the transport."""
        live = self._streams.get(stream)
        if live is None or not live.writing:
            return
        self._exchange.out += frames.frame(Kind.DATA, frames.END_STREAM, stream)
        self._table.move(live, ENDED_BY_US[live.state])

    def reset(self, stream: int, code: int) -> None:
        """Ends both directions at once. Bytes that the caller still holds are to be given to `consumed` all the same."""
        live = self._streams.get(stream)
        if live is None:
            return
        self._exchange.out += frames.rst_stream(stream, code)
        self._table.move(live, SENT[live.state, Input.RST][0])

    def consumed(self, stream: int, n: int) -> None:
        """`n` bytes of DataReceived have reached the application, or were thrown away: the peer may send as many again."""
        self._receiver.consumed(stream, n)

    def ping(self, payload: bytes) -> None:
        """Asks for a PongReceived with the same eight bytes.

        Raises:
            ValueError: they are not eight.
        """
        if len(payload) != 8:
            raise ValueError("a ping carries eight bytes")
        self._exchange.out += frames.frame(Kind.PING, 0, 0, payload)

    def announce_goaway(self) -> None:
        """Asks the peer to open no more streams; those that it has opened before it reads this are served (RFC 9113 §6.8)."""
        self._exchange.out += frames.goaway(STREAM_MASK, int(Code.NO_ERROR), b"")

    def goaway(self, code: int, debug: bytes = b"") -> None:
        """Takes no new streams from now on; those that live go on. With an error code the caller closes the connection."""
        self._refusing = True
        self._exchange.out += frames.goaway(self._table.last, code, debug[:_DEBUG_BYTES])

    # Hand-over

    def export(self) -> MuxState:
        """Everything that what follows depends on. Bytes that wait to be sent are part of it: take them before, or there."""
        return MuxState(
            client=self._client,
            limits=self.limits,
            table=self._table.export(),
            receiver=self._receiver.export(),
            block=self._block.export(),
            sender=SenderState(
                self._peer_window, self.peer_max_frame, self._peer_streams, self._window, self._starved, self.peer_takes_early_data
            ),
            codec=self._codec.export(),
            budget=self._budget.export(),
            refusing=self._refusing,
            peer_leaving=self._peer_leaving,
            failed=self._failed,
            out=bytes(self._exchange.out),
        )

    @classmethod
    def restore(cls, state: MuxState) -> Mux:
        """The multiplexer that `export` described, in another process or later."""
        limits, client, sender = state.limits, state.client, state.sender
        mux = cls(client=client, limits=limits)
        exchange = mux._exchange
        exchange.table = StreamTable.restore(client, limits.remembered_resets, state.table)
        exchange.budget = Budget(limits.budgets(), *state.budget)
        exchange.out = bytearray(state.out)
        mux._share()
        mux._block = HeaderBlock((limits.block_frames, limits.header_bytes(client)), state.block)
        mux._receiver = Receiver.restore(exchange, mux._block, state.receiver)
        mux._codec = HeaderCodec(limits.header_bytes(client), state.codec)
        mux._peer_window, mux.peer_max_frame, mux._peer_streams = sender.initial_window, sender.max_frame, sender.streams
        mux._window, mux._starved, mux.peer_takes_early_data = sender.window, sender.starved, sender.early_data
        mux._refusing, mux._peer_leaving, mux._failed = state.refusing, state.peer_leaving, state.failed
        return mux
