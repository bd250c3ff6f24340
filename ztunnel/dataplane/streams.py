"""What stands between a tunnel and whoever uses one of its streams: the tunnel's side (`Carrier`) and the user's (`StreamEnd`)."""

from __future__ import annotations

import socket

from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.loop import Loop
from ztunnel.hbone.mux import Mux
from ztunnel.mesh.errors import MeshError


class Carrier:
    """The tunnel, as far as the user of a stream needs it.

    A class and not a Protocol, like `StreamEnd`: compiled, each side of this seam calls the other for every message.
    """

    loop: Loop
    scratch: Scratch
    mux: Mux
    is_ready: bool
    is_dead: bool

    @property
    def blocked(self) -> bool:
        """Whether the socket takes nothing now."""
        raise NotImplementedError

    def read_from(self, sock: socket.socket, stream: int, room: int) -> tuple[int, int]:
        """Reads from an application once and sends it on: (bytes read, bytes asked for)."""
        raise NotImplementedError

    def send_frames(self, length: int) -> None:
        """Sends the DATA frames that were written to the first `length` bytes of `scratch.frame`."""
        raise NotImplementedError

    def park(self, end: StreamEnd) -> None:
        """Calls the stream's user again when it can send."""
        raise NotImplementedError

    def mark_dirty(self) -> None:
        """Something is to be sent."""
        raise NotImplementedError

    def release(self, stream: int) -> None:
        """The user has done with its stream."""
        raise NotImplementedError


class StreamEnd:
    """Who uses a stream of a tunnel: what the tunnel tells it. The loop calls it (READABLE) when it can send again."""

    __slots__ = ("from_stream",)

    def __init__(self) -> None:
        self.from_stream = 0
        """Bytes of payload that have come."""

    def deliver(self, view: memoryview) -> None:
        """Payload arrived; the view is valid during this call only. Credit is given by whoever takes it (`Mux.consumed`)."""
        raise NotImplementedError

    def deliver_run(self, views: list[memoryview]) -> None:
        """The same for several frames that came at once."""
        for view in views:
            self.deliver(view)

    def answered(self, status: int, ended: bool) -> None:
        """Client side: the response to our CONNECT."""
        raise NotImplementedError

    def remote_ended(self) -> None:
        """END_STREAM: the far side has no more to send."""
        raise NotImplementedError

    def remote_reset(self, code: int) -> None:
        """RST_STREAM, or a GOAWAY that disowns the stream."""
        raise NotImplementedError

    def tunnel_lost(self, error: MeshError) -> None:
        """The tunnel is gone, and the stream with it."""
        raise NotImplementedError

    def abort(self, error: MeshError) -> None:
        """Ends the stream, with a reset."""
        raise NotImplementedError

    def on_event(self, events: int) -> None:
        """It may be possible to send again."""
        raise NotImplementedError

    def on_bug(self) -> None:
        """A call of this raised what it should not have: give up everything."""
        raise NotImplementedError
