"""What the receiving and the sending half of a multiplexer share: streams, budget, what waits to be sent, what is to be told.

Nothing here reads frames. It exists so that neither half has to know the other.
"""

from __future__ import annotations

from ztunnel.hbone import frames
from ztunnel.hbone.budget import Budget, Cost
from ztunnel.hbone.events import Event, StreamEnded, StreamReset
from ztunnel.hbone.frames import Code, MuxError
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.streams import ENDED_BY_PEER, RECEIVED, Input, State, Stream, StreamTable, Verdict


class Exchange:
    """The common state of one connection, and the three things that both halves do with a stream."""

    __slots__ = ("budget", "client", "events", "limits", "out", "table")

    def __init__(self, client: bool, limits: MuxLimits) -> None:
        self.client = client
        self.limits = limits
        self.table = StreamTable(client, limits.remembered_resets)
        self.budget = Budget(limits.budgets())
        self.out = bytearray()
        """Control bytes that wait to be sent."""
        self.events: list[Event] = []
        """What the current call of `receive` will answer."""

    def judge(self, number: int, received: Input) -> Stream | None:
        """The stream that a frame is for, or None when the frame is to be passed over.

        Raises:
            MuxError: the frame may not be sent in the state of its stream.
        """
        stream = self.table.live.get(number)
        if stream is not None and (stream.state is State.OPEN or stream.state is State.LOCAL_ENDED):
            # As the table has it for every frame, since the peer has not ended the stream.
            return stream
        state = self.table.state_of(number) if stream is None else stream.state
        verdict = RECEIVED[state, received][1]
        if verdict is Verdict.TAKE and stream is not None:
            return stream
        if verdict is Verdict.IGNORE:
            self.budget.spend(Cost.LATE)
        elif verdict is Verdict.STREAM_CLOSED:
            self.refuse(number, Code.STREAM_CLOSED)
        elif verdict is Verdict.CONNECTION_CLOSED:
            raise MuxError(f"{received.name} on closed stream {number}", Code.STREAM_CLOSED)
        else:
            raise MuxError(f"{received.name} on stream {number}, which is {state.name.lower()}", Code.PROTOCOL_ERROR)
        return None

    def refuse(self, number: int, code: int) -> None:
        """A stream error: RST_STREAM, and the caller is told if it knew the stream."""
        self.budget.spend(Cost.RESET)
        self.out += frames.rst_stream(number, code)
        stream = self.table.live.get(number)
        if stream is None:
            self.table.remember(number)
        else:
            self.table.move(stream, State.RESET)
            self.events.append(StreamReset(number, int(code), graceful=False))

    def end(self, stream: Stream) -> None:
        """The peer's END_STREAM."""
        self.table.move(stream, ENDED_BY_PEER[stream.state])
        self.events.append(StreamEnded(stream.number))
