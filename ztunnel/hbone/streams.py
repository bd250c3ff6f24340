"""The life of streams, as two tables: what a frame that we receive does, and what a frame that we send does; and the streams that live.

Knows no frames and no bytes, only states and inputs. Every pair of state and input has an entry; what the peer may not do
ends in an error, what we may not do is refused without a trace (the stream was reset while the caller was about to use it).
Source: RFC 9113 §5.1.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

from ztunnel.hbone.muxstate import StreamState, TableState


class State(IntEnum):
    """`RESET` is closed by our RST_STREAM and still remembered: the peer's frames may have been on their way."""

    IDLE = 0
    OPEN = 1
    LOCAL_ENDED = 2
    REMOTE_ENDED = 3
    RESET = 4
    CLOSED = 5


class Input(IntEnum):
    """Frames, and END_STREAM as an input of its own that follows the frame which carries it."""

    HEADERS = 0
    DATA = 1
    END = 2
    RST = 3
    WINDOW_UPDATE = 4


class Verdict(Enum):
    """What to do with the frame."""

    TAKE = 0
    IGNORE = 1
    STREAM_CLOSED = 2
    """A stream error."""
    CONNECTION_CLOSED = 3
    """A connection error of type STREAM_CLOSED."""
    CONNECTION_BROKEN = 4
    """A connection error of type PROTOCOL_ERROR."""


_TAKE, _IGNORE = Verdict.TAKE, Verdict.IGNORE
_I, _O, _L, _R, _X, _C = State.IDLE, State.OPEN, State.LOCAL_ENDED, State.REMOTE_ENDED, State.RESET, State.CLOSED

RECEIVED: Final[dict[tuple[State, Input], tuple[State, Verdict]]] = {
    (_I, Input.HEADERS): (_O, _TAKE),
    (_I, Input.DATA): (_C, Verdict.CONNECTION_BROKEN),
    (_I, Input.END): (_C, Verdict.CONNECTION_BROKEN),
    (_I, Input.RST): (_C, Verdict.CONNECTION_BROKEN),
    (_I, Input.WINDOW_UPDATE): (_C, Verdict.CONNECTION_BROKEN),
    (_O, Input.HEADERS): (_O, _TAKE),
    (_O, Input.DATA): (_O, _TAKE),
    (_O, Input.END): (_R, _TAKE),
    (_O, Input.RST): (_C, _TAKE),
    (_O, Input.WINDOW_UPDATE): (_O, _TAKE),
    (_L, Input.HEADERS): (_L, _TAKE),
    (_L, Input.DATA): (_L, _TAKE),
    (_L, Input.END): (_C, _TAKE),
    (_L, Input.RST): (_C, _TAKE),
    (_L, Input.WINDOW_UPDATE): (_L, _TAKE),
    (_R, Input.HEADERS): (_X, Verdict.STREAM_CLOSED),
    (_R, Input.DATA): (_X, Verdict.STREAM_CLOSED),
    (_R, Input.END): (_X, Verdict.STREAM_CLOSED),
    (_R, Input.RST): (_C, _TAKE),
    (_R, Input.WINDOW_UPDATE): (_R, _TAKE),
    (_X, Input.HEADERS): (_X, _IGNORE),
    (_X, Input.DATA): (_X, _IGNORE),
    (_X, Input.END): (_X, _IGNORE),
    (_X, Input.RST): (_X, _IGNORE),
    (_X, Input.WINDOW_UPDATE): (_X, _IGNORE),
    (_C, Input.HEADERS): (_C, Verdict.CONNECTION_CLOSED),
    (_C, Input.DATA): (_C, Verdict.CONNECTION_CLOSED),
    (_C, Input.END): (_C, Verdict.CONNECTION_CLOSED),
    (_C, Input.RST): (_C, _IGNORE),
    (_C, Input.WINDOW_UPDATE): (_C, _IGNORE),
}

SENT: Final[dict[tuple[State, Input], tuple[State, bool]]] = {
    (_I, Input.HEADERS): (_O, True),
    (_I, Input.DATA): (_I, False),
    (_I, Input.END): (_I, False),
    (_I, Input.RST): (_I, False),
    (_I, Input.WINDOW_UPDATE): (_I, False),
    (_O, Input.HEADERS): (_O, True),
    (_O, Input.DATA): (_O, True),
    (_O, Input.END): (_L, True),
    (_O, Input.RST): (_X, True),
    (_O, Input.WINDOW_UPDATE): (_O, True),
    (_L, Input.HEADERS): (_L, False),
    (_L, Input.DATA): (_L, False),
    (_L, Input.END): (_L, False),
    (_L, Input.RST): (_X, True),
    (_L, Input.WINDOW_UPDATE): (_L, True),
    (_R, Input.HEADERS): (_R, True),
    (_R, Input.DATA): (_R, True),
    (_R, Input.END): (_C, True),
    (_R, Input.RST): (_X, True),
    (_R, Input.WINDOW_UPDATE): (_R, False),
    (_X, Input.HEADERS): (_X, False),
    (_X, Input.DATA): (_X, False),
    (_X, Input.END): (_X, False),
    (_X, Input.RST): (_X, False),
    (_X, Input.WINDOW_UPDATE): (_X, False),
    (_C, Input.HEADERS): (_C, False),
    (_C, Input.DATA): (_C, False),
    (_C, Input.END): (_C, False),
    (_C, Input.RST): (_C, False),
    (_C, Input.WINDOW_UPDATE): (_C, False),
}
"""The second value: whether the frame may be sent at all."""

ENDED_BY_PEER: Final = {state: RECEIVED[state, Input.END][0] for state in State}
ENDED_BY_US: Final = {state: SENT[state, Input.END][0] for state in State}
"""The transitions of every stream's life, from the tables."""


class Stream:
    """One live stream. `reading` and `writing` restate `state` and `answered` for the paths that run once per DATA frame."""

    __slots__ = ("answered", "credit", "number", "reading", "receive_window", "send_window", "starved", "state", "writing")

    def __init__(self, number: int, receive_window: int, send_window: int) -> None:
        self.number = number
        self.state = State.IDLE
        self.answered = False
        """The response's HEADERS passed: received by a client, sent by a server."""
        self.receive_window = receive_window
        """How much more the peer may send. May be negative after our SETTINGS shrank it."""
        self.send_window = send_window
        self.credit = 0
        """Bytes that the application took and that the peer has not been told about."""
        self.starved = False
        """`sendable` answered 0 because of this stream's window."""
        self.reading = False
        self.writing = False

    def enter(self, state: State, client: bool) -> None:
        """Moves to `state`."""
        self.state = state
        self.reading = state in (State.OPEN, State.LOCAL_ENDED) and (self.answered or not client)
        self.writing = state in (State.OPEN, State.REMOTE_ENDED) and (self.answered or client)


class StreamTable:
    """The streams of one connection: the live ones, the recently reset ones, and which numbers were used.

    `next` is the number that a client opens next, `last` the highest that a server has seen.
    """

    __slots__ = ("_client", "_remembered", "_resets", "last", "live", "next")

    def __init__(self, client: bool, remembered: int) -> None:
        self._client = client
        self._remembered = remembered
        self._resets: dict[int, None] = {}
        self.live: dict[int, Stream] = {}
        self.next = 1
        self.last = 0

    def add(self, number: int, receive_window: int, send_window: int) -> Stream:
        """A stream that has just been opened by HEADERS."""
        stream = Stream(number, receive_window, send_window)
        stream.enter(State.OPEN, self._client)
        self.live[number] = stream
        return stream

    def move(self, stream: Stream, state: State) -> None:
        """Moves a live stream to `state`, and forgets it when that is an end."""
        stream.enter(state, self._client)
        if state is State.CLOSED or state is State.RESET:
            del self.live[stream.number]
            if state is State.RESET:
                self.remember(stream.number)

    def remember(self, number: int) -> None:
        """A stream that we have reset: the peer's frames for it may be on their way."""
        self._resets[number] = None
        if len(self._resets) > self._remembered:
            del self._resets[next(iter(self._resets))]

    def state_of(self, number: int) -> State:
        """The state of any stream. Only clients open streams here, so even numbers stay idle for ever."""
        stream = self.live.get(number)
        if stream is not None:
            return stream.state
        if number in self._resets:
            return State.RESET
        opened = self.next > number if self._client else self.last >= number
        return State.CLOSED if opened and number & 1 else State.IDLE

    def export(self) -> TableState:
        """Everything that what follows depends on."""
        live = (
            StreamState(s.number, s.state.value, s.answered, s.receive_window, s.send_window, s.credit, s.starved)
            for s in self.live.values()
        )
        return TableState(tuple(live), tuple(self._resets), self.next, self.last)

    @classmethod
    def restore(cls, client: bool, remembered: int, state: TableState) -> StreamTable:
        """The table that `export` described."""
        table = cls(client, remembered)
        table._resets = dict.fromkeys(state.resets)
        table.next, table.last = state.next, state.last
        for s in state.live:
            stream = table.add(s.number, s.receive_window, s.send_window)
            stream.answered, stream.credit, stream.starved = s.answered, s.credit, s.starved
            stream.enter(State(s.state), client)
        return table
