"""The worker's event loop: edge-triggered epoll, callbacks, timers. One thread, no coroutine per event.

A round is: events from the kernel, then the callbacks that asked to go on (`again`: they had more to read than one buffer), then timers
that are due, then everything marked dirty is flushed once (`flush_later`), so that all frames of a round leave in one record and one
`send`, then comes what need not come before that (`settle_later`): what is over is closed and counted. In a long round output leaves
in between too: whoever waits for the first of hundreds of messages works beside us then.
Whoever has asked to go on is called in its turn only, however much news of it the kernel has, and turns are taken for so long
only that fresh events of others never wait for more than one of them: a bulk transfer costs its neighbour one buffer's time.
Source: measured in `scripts/bench`'s ancestors, a callback loop against a task per socket: 1.6 to 1.8 times the requests per second.

Invariant: a handler that raises ends its own connection and nothing else; that boundary is in `run_once`.
"""

from __future__ import annotations

import heapq
import logging
import math
import select
import time
from collections.abc import Callable
from typing import Final, Protocol

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
HANGUP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
READS: Final = READABLE | select.EPOLLRDHUP | select.EPOLLET
"""To be watched for this only: who has nothing to write need not be told that there is room."""
_BOTH: Final = READS | WRITABLE
_ACCEPT: Final = READABLE | select.EPOLLEXCLUSIVE
"""Several workers share a listener: one of them is woken for a connection, not all. Not edge-triggered: whoever takes one connection
only need not find out at the price of a system call that there is no other."""

MAX_EVENTS: Final = 256
"""Events taken from the kernel per round: enough to batch, few enough that timers stay punctual."""

_TURNS_SECONDS: Final = 0.0001
"""After this the kernel is asked again before the next turn: longer than many small turns together, shorter than one of a bulk transfer."""
_TURNS_SHARE: Final = 0.25
"""Turns may last for this share of what the round's events took: hundreds of busy small connections leave transfers more than one turn."""
_SHARED_SECONDS: Final = 0.02
"""So long after a small message a worker counts as shared: bulk transfers take shorter turns meanwhile."""

_COLLECTED_SECONDS: Final = 0.0001
"""So much of a round's work is collected before it leaves: a record and a `send` cost a tenth of it or two, and the other side begins."""

_CROWDED: Final = 1024
"""Most timers are deadlines that are met, and cancelled long before they are due: they must not pile up until then."""

log = logging.getLogger(__name__)


class Handler(Protocol):
    """What the loop calls when a socket has news."""

    def on_event(self, events: int) -> None:
        """Something happened on the socket; `events` is an epoll mask. Edge-triggered: take all there is or ask for `again`."""

    def on_bug(self) -> None:
        """A callback of this handler raised what it should not have: give up everything it owns."""


class Flushable(Protocol):
    """Something with output that is worth collecting until the end of the round."""

    def flush(self) -> None:
        """Send what was collected."""

    def on_bug(self) -> None:
        """`flush` raised what it should not have."""


class Settler(Protocol):
    """Something with a last step that is to stand behind the round's output: a connection or a dial that is over."""

    def settle(self) -> None:
        """Do what is left: close, count, look whether anything was sent."""

    def on_bug(self) -> None:
        """`settle` raised what it should not have."""


class Timer:
    """A callback at a time; cancel it by calling `cancel` (idempotent)."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Owns the epoll descriptor and the order of events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._forgotten: set[int] = set()
        """Descriptors forgotten in this round: what the kernel had to say of them is not news of whoever has their numbers now."""
        self._again: dict[Handler, int] = {}
        """Once each, in the order in which they asked: a transfer whose events come in while it waits would get more than its turn."""
        self._dirty: list[Flushable] = []
        self._settlers: list[Settler] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._crowded = _CROWDED
        """So many timers are looked through for cancelled ones."""
        self._held = False
        self._may_hold = True
        self._running = False
        self._serial = 0
        self._small_at = -math.inf
        self._flush_at = -math.inf
        """When what is collected should leave, at the latest."""
        self.now = clock()
        """Seconds, monotonic, as of the start of this round: the clock of everything in the worker."""
        self.before = self.now
        """The same of the round before."""
        self.bugs = 0
        """Callbacks that raised what they should not have; a metric, and zero in a healthy worker."""

    def watch(self, fd: int, handler: Handler) -> None:
        """Calls `handler` for reading and writing on `fd` until `forget`."""
        self._handlers[fd] = handler
        self._epoll.register(fd, _BOTH)

    def watch_listener(self, fd: int, handler: Handler) -> None:
        """Calls `handler` when `fd` has connections to accept."""
        self._handlers[fd] = handler
        self._epoll.register(fd, _ACCEPT)

    def take(self, fd: int, handler: Handler, events: int = _BOTH) -> None:
        """Watches `fd` for `handler`, in the place of its former one if there is one; what is pending is reported in the next round."""
        known = fd in self._handlers
        self._handlers[fd] = handler
        if known:
            # The kernel is asked anew: what it said to the former handler (an end of file behind the last bytes) it would not repeat.
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)

    def forget(self, fd: int) -> None:
        """Stops watching; call before the descriptor is closed, so that its number cannot be mistaken for a later one."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            self._forgotten.add(fd)

    def drop(self, fd: int) -> None:
        """As `forget`, for a descriptor that is closed next and that no other process has: then the kernel forgets it too, unasked.

        One that others hold (a listener, a socket that dials, while our supervisor still has it) would go on reporting under its number.
        """
        if self._handlers.pop(fd, None) is not None:
            self._forgotten.add(fd)

    def has(self, kind: type) -> bool:
        """Whether a handler of this type watches anything."""
        return any(type(handler) is kind for handler in self._handlers.values())

    def again(self, handler: Handler, events: int) -> None:
        """Calls the handler once more in the next round, after the others had their turn."""
        self._again[handler] = self._again.get(handler, 0) | events

    def hold(self) -> None:
        """Looks for more events once before this round's output leaves: what was just begun has something to add in an instant."""
        self._held = self._may_hold

    def small(self) -> None:
        """A small message came by: somebody waits for answers here."""
        self._small_at = self.now

    @property
    def is_shared(self) -> bool:
        """Whether somebody who waits for answers shares the worker with bulk transfers."""
        return self.now - self._small_at < _SHARED_SECONDS

    def flush_later(self, flushable: Flushable) -> None:
        """Calls `flush` once at the end of this round, or within it if it is long; the caller keeps its own flag against asking twice."""
        self._dirty.append(flushable)

    def settle_later(self, settler: Settler) -> None:
        """Calls `settle` once, behind this round's output: what others wait for comes first."""
        self._settlers.append(settler)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Calls back after `seconds`, or never if the timer is cancelled."""
        if len(self._timers) >= self._crowded:
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._crowded = max(_CROWDED, 2 * len(self._timers))
        timer = Timer(self.now + seconds, callback)
        heapq.heappush(self._timers, (timer.due, self.serial(), timer))
        return timer

    def serial(self) -> int:
        """A number that nothing else in this loop has: names for listings."""
        self._serial += 1
        return self._serial

    def stop(self) -> None:
        """Ends `run` after this round."""
        self._running = False

    def run(self) -> None:
        """Runs until `stop`. Raises only what the kernel says of epoll itself."""
        self._running = True
        while self._running:
            self.run_once(None)
        self.close()

    def run_once(self, limit: float | None) -> None:
        """One round, waiting at most `limit` seconds for an event (None: until something happens)."""
        events = self._epoll.poll(self._patience(limit), MAX_EVENTS)
        self.before = self.now
        self.now = self._clock()
        handlers, forgotten, again = self._handlers, self._forgotten, self._again
        forgotten.clear()
        waiting = len(again)
        self._flush_at = self.now + _COLLECTED_SECONDS
        # The connection boundary of the worker: the places that catch everything, so that a bug costs one connection. They stand
        # here and not in a function of their own because each event would pay for its call.
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is None or fd in forgotten:
                continue
            if waiting and handler in again:
                again[handler] |= mask
                continue
            try:
                handler.on_event(mask)
            except Exception:  # noqa: BLE001 - it is logged there
                self._met_bug(handler)
            self.flush_if_late()
        if waiting:
            self._take_turns(waiting)
        timers = self._timers
        if timers and timers[0][0] <= self.now:
            self._run_timers()
        if self._held:
            self._held = self._may_hold = False
            return
        self._may_hold = True
        if self._dirty:
            self._flush()
        if self._settlers:
            self._settle()

    def flush_if_late(self) -> None:
        """For whoever does much within one event: what is collected leaves now if it has been for long enough."""
        if self._dirty and self._clock() >= self._flush_at:
            self._flush()

    def flush_collected(self) -> None:
        """For whoever is about to be long: nobody's small messages wait for a buffer of somebody's bulk transfer.

        Not for whoever has frames in the worker's scratch buffer that a `flush` may write to: in a waypoint every flush does.
        """
        if self._dirty:
            self._flush()

    def _flush(self) -> None:
        self._held = False
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for flushable in dirty:
                try:
                    flushable.flush()
                except Exception:  # noqa: BLE001 - it is logged there
                    self._met_bug(flushable)
        self._flush_at = self._clock() + _COLLECTED_SECONDS

    def _settle(self) -> None:
        settlers, self._settlers = self._settlers, []
        for settler in settlers:
            try:
                settler.settle()
            except Exception:  # noqa: BLE001 - it is logged there
                self._met_bug(settler)

    def _take_turns(self, waiting: int) -> None:
        """The first `waiting` of those who have asked to go on: one of them in any case, the others while there is time."""
        again = self._again
        began = self._clock()
        until = max(self.now + _TURNS_SECONDS, began + _TURNS_SHARE * (began - self.now))
        for _ in range(waiting):
            handler = next(iter(again))
            mask = again.pop(handler)
            try:
                handler.on_event(mask)
            except Exception:  # noqa: BLE001 - it is logged there
                self._met_bug(handler)
            if self._clock() >= until:
                return

    def close(self) -> None:
        """Releases the epoll descriptor; the loop cannot run again."""
        self._epoll.close()

    def _patience(self, limit: float | None) -> float:
        if self._again or self._dirty or self._settlers:
            return 0
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not timers:
            return -1 if limit is None else limit
        # As of the round's start: a timer may be late by what the round took, which it would be anyway, and the clock is not asked twice.
        wait = timers[0][0] - self.now
        if limit is not None and limit < wait:
            wait = limit
        return wait if wait > 0 else 0

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._guarded_call(callback)

    def _met_bug(self, handler: Handler | Flushable | Settler) -> None:
        self.bugs += 1
        log.exception("bug: a connection handler raised")  # noqa: LOG004 - called from an exception handler only
        self._guarded_call(handler.on_bug)

    def _guarded_call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            self.bugs += 1
            log.exception("bug: a callback raised")
