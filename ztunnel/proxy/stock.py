"""Ready-made sockets of pods' network namespaces: marked, transparent, waiting to be connected.

The supervisor makes them in batches, because entering a namespace and setting a mark need privileges that a worker does not have.
The stock asks for more before it is empty, doubling the batch while demand outruns it or one lasts for a moment only: the supervisor
wakes up for each, and takes its time on the processor from the connections that are served. One that finds nothing waits for the next
batch, within its own deadline.

A socket whose connection has ended well comes back and dials again, so that a steady load needs hardly any new ones. It is still bound to
the address that it came from, mostly that of the very client which connects next, and need not be bound to it again.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from ztunnel.dataplane.sockets import Home, finish, renew, unbind

Taker = Callable[[socket.socket | None], None]
"""Gets a socket, or None when there is none to be had: the pod is gone, or the node is short of descriptors."""

_FIRST_BATCH: Final = 16
_MAX_BATCH: Final = 128
_MOMENT_SECONDS: Final = 0.05
"""As long as news wait to travel together (`ztunnel.worker`): the supervisor is woken this often as it is."""
_REMEMBERED: Final = 1024
"""Addresses that sockets come back from."""
_KERNELS_CHOICE: Final = "any"
"""What a socket is bound to that came from no address of its caller's: to none, or, if it was ever bound in a former life, to what the
kernel chose for its last (Linux keeps SOCK_BINDADDR_LOCK through `unbind`). No address is written like this."""


class SocketStock:
    """The sockets of one pod and one address family. `need(count)` asks the supervisor; `receive` brings what it made."""

    def __init__(self, need: Callable[[int], None], max_waiting: int, clock: Callable[[], float]) -> None:
        self._need = need
        self._max_waiting = max_waiting
        self._clock = clock
        self._asked_at = -math.inf
        self._sockets: deque[tuple[socket.socket, str]] = deque()
        """Each with the address that it is bound to, empty if to none, `_KERNELS_CHOICE` if nobody knows."""
        self._homes: dict[str, _Home] = {}
        self._waiting: deque[Taker] = deque()
        self._batch = _FIRST_BATCH
        self._asked = False
        self._closed = False
        self._fewest = 0
        """Least number in stock since `trim`."""

    def take(self, taker: Taker) -> bool:
        """Gives `taker` a socket now or when one comes. False: too many wait already, or the pod is gone."""
        sock, _ = self.take_now("")
        if sock is not None:
            taker(sock)
            return True
        if self._closed or len(self._waiting) >= self._max_waiting:
            return False
        self._waiting.append(taker)
        if self._asked:
            self._batch = min(self._batch * 2, _MAX_BATCH)
        self._fewest = 0
        self._ask()
        return True

    def take_now(self, source: str) -> tuple[socket.socket | None, bool]:
        """One of those that are there, and whether it comes from the address `source`: if not, the caller has to bind it.

        None: `take` waits for the next. With an empty `source` it comes from no address, whatever it had in a former life.
        """
        if not self._sockets:
            return None, False
        sock, bound = self._sockets.popleft()
        if not source and bound:
            unbind(sock)
        left = len(self._sockets)
        if left < self._fewest:
            self._fewest = left
        if left < self._batch // 2:
            self._ask()
        return sock, not source or source == bound

    def home(self, source: str) -> Home:
        """Where a socket goes that comes from this address, empty for none, once it has ended well."""
        home = self._homes.get(source)
        if home is None:
            if len(self._homes) >= _REMEMBERED:
                self._homes.clear()
            home = self._homes[source] = _Home(self, source)
        return home

    def trim(self) -> None:
        """Called at intervals: closes what a burst left behind and nobody has needed since the last call."""
        idle = min(self._fewest, len(self._sockets)) - _FIRST_BATCH
        if idle > 0:
            self._batch = max(_FIRST_BATCH, self._batch // 2)
            for _ in range(idle):
                self._sockets.pop()[0].close()
        self._fewest = len(self._sockets)

    def receive(self, sockets: list[socket.socket]) -> None:
        """A batch came, empty if none could be made; those who waited are served in order."""
        self._asked = False
        if self._closed:
            for sock in sockets:
                sock.close()
            return
        self._sockets.extend([(sock, "") for sock in sockets])
        while self._waiting and self._sockets:
            sock, bound = self._sockets.popleft()
            if bound:
                unbind(sock)
            self._waiting.popleft()(sock)
        if not sockets:
            # The supervisor could not make any. Whoever waits for more than came back fails now; the next connection asks again.
            self._dismiss()
        elif self._waiting or not self._sockets:
            self._ask()

    def take_back(self, sock: socket.socket, source: str) -> None:
        """One that ended well comes back, if there is room and the kernel is done with it. `source`: see `home`."""
        if self._closed or len(self._sockets) >= self._batch or not renew(sock):
            finish(sock)
        else:
            self._sockets.append((sock, source or _KERNELS_CHOICE))

    def close(self) -> None:
        """The pod is gone: an unused socket would keep its namespace alive."""
        self._closed = True
        for sock, _ in self._sockets:
            sock.close()
        self._sockets.clear()
        # They know us: nobody but the garbage collector, which hardly ever looks at old objects, would free us.
        self._homes.clear()
        self._dismiss()

    def _dismiss(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for taker in waiting:
            taker(None)

    def _ask(self) -> None:
        if not self._asked:
            now = self._clock()
            if now - self._asked_at < _MOMENT_SECONDS:
                self._batch = min(self._batch * 2, _MAX_BATCH)
            self._asked, self._asked_at = True, now
            self._need(self._batch)


class _Home(Home):
    """See `SocketStock.home`."""

    __slots__ = ("_source", "_stock")

    def __init__(self, stock: SocketStock, source: str) -> None:
        self._stock = stock
        self._source = source

    def give_back(self, sock: socket.socket) -> None:
        self._stock.take_back(sock, self._source)
