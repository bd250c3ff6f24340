"""One HBONE tunnel over a socket: handshake, then records and HTTP/2 streams, each stream joined to a relay.

Theory of operation. Control frames and small payloads are collected in `_plain` and sealed together (`Loop.flush_later`); a large
payload is read by a relay into the worker's scratch buffer behind room for its frame header, sealed where it lies, and sent at once,
after what was collected before it. When the kernel takes no more, the sealed rest waits in the outlet, and relays that want to send
are parked until it is gone: nothing else is buffered per connection. What arrives is opened into one scratch buffer and goes to the
relays as views; credit for it is given only when it reached the application (the relay says so to the mux).

With the `switch` on, the kernel takes the records over at the first moment after the handshake at which none is half-way in either
direction; until then, and if it refuses, our own do the work (`_on_event_for_kernel` and what stands behind it).

The tunnel knows nothing of policies, pods or pools: its owner decides what a request means (`TunnelOwner`).
Invariant: after `_die` no callback of this tunnel reaches a relay or the owner again.

Length: one state machine over one socket. Sending, receiving and ending read and write the same fields on every round, and each call
between them costs on every message.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Final, Protocol

from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.buffers import CHUNK, CHUNK_FRAMED, FRAME_HEADER, SHORT_FRAMED, SMALL, SMALLEST_MAX_FRAME, Scratch
from ztunnel.dataplane.endings import SettingsTimeout, TlsFailed, TlsTimeout, TunnelLost, TunnelTimes
from ztunnel.dataplane.kernel_tls import ALWAYS_OFF, KernelHalfway, KernelRefused, KernelSwitch, KernelTls, take_over
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop, Timer
from ztunnel.dataplane.outlet import Outlet
from ztunnel.dataplane.sockets import Farewell, reset_on_close
from ztunnel.dataplane.streams import Carrier, StreamEnd
from ztunnel.hbone.events import (
    DataReceived,
    Event,
    PeerGoingAway,
    PongReceived,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from ztunnel.hbone.handshake import Handshake
from ztunnel.hbone.headers import encode
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.hbone.records import RecordError, Records, missing
from ztunnel.hbone.records_own import OwnRecords
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.identity import SpiffeId

log = logging.getLogger(__name__)

_NO_ERROR: Final = 0
_PARTING: Final = b"parting\0"
"""What the PING says that follows the first GOAWAY."""
_PARTING_SECONDS: Final = 1.0
"""How long its answer may take."""
_OK: Final = encode(((b":status", b"200"),))
_ANSWER_SECONDS: Final = 0.005
"""How long an answer that nobody waits for may wait for company."""
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_SHORT: Final = SHORT_FRAMED - FRAME_HEADER


class TunnelOwner(Protocol):
    """Who decides about a tunnel's requests and its end."""

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        """The handshake is done: `tunnel.peer` is known."""

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        """A peer asks for a stream (server side): answer through `tunnel.mux.respond` or `adopt` a relay."""

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        """The last stream ended."""

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        """The tunnel is gone, `error` says why unless it ended well. Called exactly once."""


class Tunnel(Carrier):
    """See the module. `start`, `go_away`, `close`, `abort`, `adopt` and `peer` are for the owner; the rest is for relays."""

    def __init__(
        self, loop: Loop, scratch: Scratch, owner: TunnelOwner, times: TunnelTimes, *, client: bool, switch: KernelSwitch = ALWAYS_OFF
    ) -> None:
        self.id = f"t{loop.serial()}"
        self.loop = loop
        self.scratch = scratch
        self.owner = owner
        self.client = client
        self.mux = Mux(client=client, limits=MuxLimits())
        self.peer: SpiffeId | None = None
        self.peer_address: Address = ("", 0)
        self.relays: dict[int, StreamEnd] = {}
        self.is_ready = False
        self.is_dead = False
        self.is_draining = False
        self.bytes_received = 0
        self.opened_at = loop.now
        self.expires_at = float("inf")
        """Time of the loop's clock at which the first of both certificates expires: no new streams then, live ones go on."""
        self._times = times
        self._sock: socket.socket | None = None
        self._handshake: Handshake | None = None
        self._outlet = Outlet(scratch, self._lost)
        self._switch = switch
        self._for_kernel = switch.is_on
        self._kernel: KernelTls | None = None
        self._plain: list[bytearray] = []
        self._partial = b""
        self._unheard = b""
        """Plaintext that was left for the next turn: of many tiny frames, one buffer is the work of many turns."""
        self._parked: dict[StreamEnd, None] = {}
        self._dirty = False
        self._settled = False
        self._heard_at = loop.now
        self._asked_at: float | None = None
        self._timer: Timer | None = None
        self._parting: Timer | None = None
        self._parted = False
        self._taking = False
        self._answers: list[int] = []
        self._may_wait = 0
        """Bytes of the mux's output that are answers which nobody may be waiting for."""
        self._answer_due: Timer | None = None

    # Life

    def start(self, sock: socket.socket, handshake: Handshake, peer: Address) -> None:
        """Takes over a connected socket, already watched or not, and begins (client) or awaits (server) the handshake."""
        self._sock = sock
        self._handshake = handshake
        self.peer_address = peer
        self._outlet.open(sock)
        self._timer = self.loop.call_later(self._times.handshake, self._handshake_expired)
        self.loop.take(sock.fileno(), self)
        self._outlet.send_raw(handshake.outgoing())

    @property
    def blocked(self) -> bool:
        """Whether the socket takes nothing now: whoever can wait must."""
        return self._outlet.is_blocked

    @property
    def bytes_sent(self) -> int:
        """On the wire, TLS included; without it from when the kernel does TLS."""
        return self._outlet.bytes_sent

    @property
    def is_in_kernel(self) -> bool:
        """Whether the kernel seals and opens its records."""
        return self._kernel is not None

    @property
    def stage(self) -> str:
        """For the listing: connecting, handshake, open or draining."""
        if self._sock is None:
            return "connecting"
        if not self.is_ready:
            return "handshake"
        return "draining" if self.is_draining or self.is_parting else "open"

    @property
    def is_parting(self) -> bool:
        """Whether it still takes the streams that were on their way when it was told to go."""
        return self._parting is not None

    def go_away(self) -> None:
        """Graceful end: no new streams, live ones go on, closed after the last.

        The server's side says so first and serves what was on its way meanwhile, for as long as a PING takes: a client whose stream
        crossed a single GOAWAY would see it refused (RFC 9113 §6.8). A handshake that is under way gets the same time to end.
        """
        if self.is_dead or self._parted or self._parting is not None:
            return
        if self.client:
            self._part()
            return
        self._parting = self.loop.call_later(_PARTING_SECONDS, self._part)
        if self._settled:
            self._announce()

    def _announce(self) -> None:
        self.mux.announce_goaway()
        self.mux.ping(_PARTING)
        self.mark_dirty()

    def _part(self) -> None:
        if self.is_dead or self._parted:
            return
        if self._parting is not None:
            self._parting.cancel()
            self._parting = None
        # Whoever has said GOAWAY itself is refused streams all the same.
        self._parted = self.is_draining = True
        self.mux.goaway(_NO_ERROR)
        self.mark_dirty()
        self._end_if_idle()

    def close(self, error: MeshError | None = None) -> None:
        """Ends it now, streams included. Without an error the peer hears close_notify first, if the socket takes it."""
        self._die(error)

    def abort(self, error: MeshError) -> None:
        """Ends it now with RST: a FIN that nobody acknowledges would keep the namespace of a deleted pod for minutes."""
        if self._sock is not None and not self.is_dead:
            reset_on_close(self._sock)
        self._die(error)

    def on_bug(self) -> None:
        self._die(TunnelLost("internal error"))

    def adopt(self, stream: int, relay: StreamEnd) -> None:
        """Joins a relay to a stream that the mux knows."""
        self.relays[stream] = relay

    def release(self, stream: int) -> None:
        """A relay has done with its stream (both directions ended, or reset)."""
        relay = self.relays.pop(stream, None)
        if relay is None:
            return
        self._parked.pop(relay, None)
        if not self.relays and not self.is_dead:
            self.owner.tunnel_idle(self)
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self.is_draining and not self.relays and not self.is_dead:
            self.flush()
            if self._outlet.is_settled:
                self._die(None)

    # Sending, for relays

    def mark_dirty(self) -> None:
        """Something is to be sent at the end of this round."""
        if not self._dirty:
            self._dirty = True
            self.loop.flush_later(self)

    def answer(self, stream: int, block: bytes = _OK) -> None:
        """Answers a request with 200. Whoever has sent data behind it does not wait for that: it may travel with what comes next.

        Called while what came is dealt with (the data may be behind the request still), or later. `block`: of `connect.response_block`.
        """
        before = self.mux.output_size
        self.mux.respond_block(stream, block)
        self._may_wait += self.mux.output_size - before
        self._answers.append(stream)
        if not self._taking:
            self._send_controls()

    def _send_controls(self) -> None:
        """What the mux has to say leaves with this round, unless it is answers only that nobody waits for."""
        answers, self._answers = self._answers, []
        if self.mux.output_size > self._may_wait or not all(self._has_sent(stream) for stream in answers):
            self.mark_dirty()
        elif answers and self._answer_due is None:
            self._answer_due = self.loop.call_later(_ANSWER_SECONDS, self._answers_waited)

    def _has_sent(self, stream: int) -> bool:
        relay = self.relays.get(stream)
        return relay is not None and relay.from_stream > 0

    def _answers_waited(self) -> None:
        self._answer_due = None
        if not self.is_dead and self.mux.has_output:
            self.mark_dirty()

    def park(self, relay: StreamEnd) -> None:
        """The relay cannot send now (window or socket full): call it again when that has changed."""
        self._parked[relay] = None

    def read_from(self, sock: socket.socket, stream: int, room: int) -> tuple[int, int]:
        """Reads once from an application's socket and sends what came as DATA of `stream`.

        Args:
            room: bytes that flow control allows, > 0; the tunnel is ready and not blocked.
        Returns: (bytes read, bytes asked for); 0 read means the application has ended its direction.
        Raises: OSError from the application's socket, BlockingIOError included.
        """
        scratch = self.scratch
        turn = _SHORT if self.loop.is_shared else CHUNK
        if room > turn:
            room = turn
        in_one = self.mux.peer_max_frame >= CHUNK
        count: int
        if in_one or room < SMALLEST_MAX_FRAME:
            asked, count = room, sock.recv_into(scratch.payload, room, _FLAGS)
        else:
            views = scratch.slots[: room // SMALLEST_MAX_FRAME]
            asked = len(views) * SMALLEST_MAX_FRAME
            count = sock.recvmsg_into(views, 0, _FLAGS)[0]
        if count >= SMALL:
            self.loop.flush_collected()
        if in_one and count:
            self.mux.data_header(scratch.frame, 0, stream, count)
            self.send_frames(count + FRAME_HEADER)
        elif count:
            self.send_frames(self._frame_slots(stream, count))
        return count, asked

    def _frame_slots(self, stream: int, count: int) -> int:
        at = 0
        for left in range(count, 0, -SMALLEST_MAX_FRAME):
            size = min(left, SMALLEST_MAX_FRAME)
            self.mux.data_header(self.scratch.frame, at, stream, size)
            at += FRAME_HEADER + size
        return at

    def send_frames(self, length: int) -> None:
        """Sends the DATA frames that were written to the first `length` bytes of `scratch.frame`."""
        if length < SMALL:
            self._collect()
            self._plain.append(self.scratch.frame[:length])
            self.mark_dirty()
        else:
            self._send_plain()
            self._outlet.seal(self.scratch.frame, 0, length)

    # Sending, below the frames

    def flush(self) -> None:
        """Seals and sends what was collected in this round."""
        self._dirty = False
        if self.is_ready and not self._outlet.is_blocked and not self.is_dead:
            self._send_plain()

    def _collect(self) -> None:
        if self.mux.has_output:
            self._plain.append(self.mux.take())
            self._may_wait = 0

    def _send_plain(self) -> None:
        self._collect()
        if self._plain:
            parts, self._plain = self._plain, []
            self._outlet.send_plain(parts[0] if len(parts) == 1 else bytearray().join(parts))

    def _lost(self, error: OSError) -> None:
        self._die(TunnelLost(f"tunnel to {self.peer_address[0]}: {error.strerror}"))

    def _unblock(self) -> None:
        """The kernel has room again: send what waited, then let those go on who were parked."""
        self._outlet.drain()
        if self._outlet.is_blocked or self.is_dead:
            return
        if self._for_kernel:
            self._move()
            if self.is_dead:
                return
        if self.is_ready:
            self._send_plain()
            self._unpark()
        if self.is_draining:
            self._end_if_idle()

    def _unpark(self) -> None:
        parked, self._parked = self._parked, {}
        for relay in parked:
            self.loop.again(relay, READABLE)

    # Receiving

    def on_event(self, events: int) -> None:
        if self.is_dead:
            return
        if self._for_kernel:
            self._on_event_for_kernel(events)
            return
        if events & WRITABLE and self._outlet.has_backlog:
            self._unblock()
        if events & (READABLE | HANGUP) and not self.is_dead:
            self._read(events)

    def _read(self, events: int, asked: int = 0) -> None:
        """Reads once: `asked` bytes, or a turn's worth of them."""
        assert self._sock is not None
        if self._unheard:
            self._hear_more(events)
            return
        if not asked:
            asked = SHORT_FRAMED if self.loop.is_shared else CHUNK_FRAMED
        scratch = self.scratch
        kept = len(self._partial)
        try:
            count: int = self._sock.recv_into(scratch.raw[kept:] if kept else scratch.raw, asked, _FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        if not count:
            self._peer_ended()
            return
        self._heard_at = self.loop.now
        self._asked_at = None
        self.bytes_received += count
        if kept:
            scratch.raw[:kept] = self._partial
            self._partial = b""
        try:
            self._take(kept + count)
        except MeshError as error:
            self._refuse(error)
            return
        if not self.is_dead and (count == asked or self._unheard or events & HANGUP):
            self.loop.again(self, READABLE | (events & HANGUP))

    def _take(self, end: int) -> None:
        start = 0
        raw = self.scratch.raw
        records = self._outlet.records
        if records is None:
            done = self._shake(bytes(raw[:end]))
            if done is None:
                return
            records, rest = done
            end = len(rest)
            raw[:end] = rest
        plain = self.scratch.plain
        while start < end and not self.is_dead:
            consumed, produced = records.open(raw, start, end, plain, 0)
            if produced:
                self._hear(produced)
            if consumed == start:
                break
            start = consumed
            if self._unheard:
                break
        if self.is_dead:
            return
        self._partial = bytes(raw[start:end]) if start < end else b""
        if records.peer_closed and not self._unheard:
            self._peer_ended()

    def _hear(self, end: int) -> None:
        """What the plaintext up to `end` means, or one turn's worth of it."""
        plain = self.scratch.plain
        self._taking = True
        self._dispatch(self.mux.receive(plain, 0, end, self.loop.now))
        self._taking = False
        if self.is_dead:
            return
        if self.mux.taken < end:
            self._unheard = bytes(plain[self.mux.taken : end])
        if self.mux.has_output:
            self._send_controls()

    def _hear_more(self, events: int) -> None:
        """Goes on with what was left; behind it, the socket is read again or the peer has ended."""
        unheard, self._unheard = self._unheard, b""
        self.scratch.plain[: len(unheard)] = unheard
        try:
            self._hear(len(unheard))
        except MeshError as error:
            self._refuse(error)
            return
        if self.is_dead:
            return
        records, kernel = self._outlet.records, self._kernel
        ended = kernel.ended if kernel is not None else records is not None and records.peer_closed
        if ended and not self._unheard:
            self._peer_ended()
        else:
            self.loop.again(self, READABLE | (events & HANGUP))

    # Receiving, where the kernel opens the records

    def _on_event_for_kernel(self, events: int) -> None:
        if events & WRITABLE and self._outlet.has_backlog:
            self._unblock()
        elif events & WRITABLE:
            # Nothing waits here, but the kernel may have kept the last record until now.
            self._end_if_idle()
        if not events & (READABLE | HANGUP):
            return
        if self._kernel is None and not self.is_dead:
            self._move()
        if self.is_dead:
            return
        if self._kernel is None:
            self._read(events)
        else:
            self._read_plain(self._kernel, events)

    def _read_plain(self, kernel: KernelTls, events: int) -> None:
        if self._unheard:
            self._hear_more(events)
            return
        scratch = self.scratch
        try:
            count = kernel.receive(scratch.plain_chunk)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        except MeshError as error:
            self._refuse(error)
            return
        self._heard_at = self.loop.now
        self._asked_at = None
        self.bytes_received += count
        if count:
            try:
                self._hear(count)
            except MeshError as error:
                self._refuse(error)
                return
        if kernel.ended and not self._unheard and not self.is_dead:
            self._peer_ended()
        # Behind a record that is no data there may be more. For one that hides behind data the kernel raises an event of its own.
        if not self.is_dead and (not count or count == CHUNK_FRAMED or self._unheard or events & HANGUP):
            self.loop.again(self, READABLE | (events & HANGUP))

    def _move(self) -> None:
        """Gives the records to the kernel, unless one is half-way: waiting to be sent, or come in part."""
        if self._kernel is not None or self._outlet.records is None or self._unheard:
            return
        while self._partial and not self.is_dead:
            kept = len(self._partial)
            self._read(0, missing(self._partial))
            if len(self._partial) == kept:
                return
        records, sock = self._outlet.records, self._sock
        if self.is_dead or self._outlet.has_backlog or not isinstance(records, OwnRecords) or sock is None:
            return
        state = records.export()
        try:
            self._kernel = take_over(sock, state)
        except KernelRefused as error:
            self._switch.turn_off(error)
            self._for_kernel = False
            self._outlet.records = OwnRecords(state)
        except KernelHalfway as error:
            self._switch.turn_off(error)
            self._die(error)
        else:
            self._outlet.use_kernel(self._kernel)
            self.loop.again(self, READABLE)

    def _shake(self, data: bytes) -> tuple[Records, bytes] | None:
        """The record layer and what came behind the handshake, once that is done."""
        handshake = self._handshake
        assert handshake is not None
        handshake.receive(data)
        self._outlet.send_raw(handshake.outgoing())
        if not handshake.done or self.is_dead:
            return None
        self._handshake = None
        self.peer = handshake.peer
        self.expires_at = self.loop.now + (handshake.not_after.timestamp() - time.time())
        records, rest = handshake.finish()
        self._outlet.records = records
        self.is_ready = True
        self.owner.tunnel_ready(self)
        if self.is_dead:
            return None
        self._unpark()
        self.mark_dirty()
        return records, rest

    def _dispatch(self, events: list[Event]) -> None:
        relays = self.relays
        index = 0
        count = len(events)
        while index < count and not self.is_dead:
            event = events[index]
            index += 1
            if type(event) is not DataReceived:
                self._dispatch_rare(event)
                continue
            stream = event.stream
            relay = relays.get(stream)
            if relay is None:
                self.mux.consumed(stream, len(event.data))
                continue
            following = events[index] if index < count else None
            if type(following) is not DataReceived or following.stream != stream:
                relay.deliver(event.data)
                continue
            views = [event.data]
            while type(following) is DataReceived and following.stream == stream:
                views.append(following.data)
                index += 1
                following = events[index] if index < count else None
            relay.deliver_run(views)

    def _dispatch_rare(self, event: Event) -> None:
        """What is not DATA: by type, the most frequent first."""
        if type(event) is StreamEnded:
            if relay := self.relays.get(event.stream):
                relay.remote_ended()
        elif type(event) is RequestReceived:
            self.owner.tunnel_request(self, event)
        elif type(event) is ResponseReceived:
            if relay := self.relays.get(event.stream):
                relay.answered(event.status, event.ended)
        elif type(event) is StreamReset:
            if relay := self.relays.get(event.stream):
                relay.remote_reset(event.code)
        elif type(event) is WindowOpened:
            relay = self.relays.get(event.stream)
            if not event.stream:
                self._unpark()
            elif relay is not None and relay in self._parked:
                del self._parked[relay]
                self.loop.again(relay, READABLE)
        elif type(event) is SettingsReceived:
            self._settings_received()
        elif type(event) is PeerGoingAway:
            self._peer_going_away(event)
        elif type(event) is PongReceived and self.is_parting and event.payload == _PARTING:
            self._part()

    def _settings_received(self) -> None:
        if not self._settled:
            self._settled = True
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(self._times.ping, self._keep_alive)
            if self.is_parting:
                self._announce()
        self._unpark()

    def _peer_going_away(self, event: PeerGoingAway) -> None:
        # The streams that it disowns follow as resets.
        self.is_draining = True
        if event.code:
            log.info("peer ended its tunnel with an error", extra={"fields": {"peer": self.peer_address[0], "code": event.code}})
        self._end_if_idle()

    # Ending

    def _peer_ended(self) -> None:
        if not self.is_ready:
            self._die(TlsFailed(f"{self.peer_address[0]} closed the connection during the TLS handshake"))
        elif self.relays:
            self._die(TunnelLost(f"{self.peer_address[0]} closed the tunnel with {len(self.relays)} live streams"))
        else:
            self._die(None)

    def _refuse(self, error: MeshError) -> None:
        """The peer broke the rules: tell it in its own terms, then end."""
        if self._handshake is not None:
            self._outlet.send_raw(self._handshake.outgoing())
        elif isinstance(error, RecordError):
            self._outlet.end(error)
        elif self.is_ready:
            self._send_plain()
        self._die(error)

    def _handshake_expired(self) -> None:
        kind, what = (SettingsTimeout, "HTTP/2 SETTINGS") if self.is_ready else (TlsTimeout, "the end of the TLS handshake")
        self._die(kind(f"{self.peer_address[0]}: {what} did not come within {self._times.handshake:g} s"))

    def _keep_alive(self) -> None:
        now = self.loop.now
        if self._asked_at is not None and now - self._asked_at >= self._times.ping_timeout:
            self._die(TunnelLost(f"{self.peer_address[0]} has not answered a PING for {self._times.ping_timeout:g} s"))
            return
        if self._asked_at is None and now - self._heard_at >= self._times.ping:
            self._asked_at = now
            self.mux.ping(b"ztunnel\0")
            self.mark_dirty()
        self._timer = self.loop.call_later(self._times.ping, self._keep_alive)

    def _die(self, error: MeshError | None) -> None:
        if self.is_dead:
            return
        if error is None:
            self._outlet.end(None)
            if self.is_dead:
                return
        self.is_dead = True
        for timer in (self._timer, self._parting, self._answer_due):
            if timer is not None:
                timer.cancel()
        self._parting = None
        if self._sock is not None and error is None and not self._outlet.has_backlog:
            Farewell(self.loop, self._sock)
        elif self._sock is not None:
            self.loop.forget(self._sock.fileno())
            self._sock.close()
        self._outlet.close()
        self._parked.clear()
        relays, self.relays = self.relays, {}
        for relay in relays.values():
            relay.tunnel_lost(error or TunnelLost("the tunnel was closed"))
        self.owner.tunnel_closed(self, error)
