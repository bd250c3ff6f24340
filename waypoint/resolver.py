"""Addresses of the DNS names that clusters use: looked up in the supervisor, handed to the workers, again and again while they are used.

What was found stays in force while a name cannot be resolved. Trio shell around the host's resolver.
Source: Istio `dnsRefreshRate`; Envoy's `strict_dns`, which keeps what it had.
"""

from __future__ import annotations

import logging
import math
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from ztunnel.mesh.addresses import canonical
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

REFRESH: Final = 60.0
RETRY: Final = 5.0
LOOKUP_SECONDS: Final = 10.0
AT_ONCE: Final = 16
MAX_NAMES: Final = 4096
MAX_ADDRESSES: Final = 256
JITTER: Final = 0.1
"""Share of a pause, so that names do not come all at once."""

Name = tuple[str, int]
Lookup = Callable[[str], Awaitable[tuple[str, ...]]]
"""The addresses of a name; raises OSError."""
Deliver = Callable[[str, int, tuple[str, ...]], None]
"""(name, port, addresses), whenever they differ from the last."""


class Resolver:
    """Keeps the addresses of all wanted names fresh. `run` once, `want` whenever the configuration changes."""

    def __init__(self, deliver: Deliver, lookup: Lookup | None = None) -> None:
        self._deliver = deliver
        self._lookup = lookup or look_up
        self._due: dict[Name, float] = {}
        self._known: dict[Name, tuple[str, ...]] = {}
        self._failing: set[Name] = set()
        self._asked: set[str] = set()
        """Names that are wanted once."""
        self._changed = trio.Event()

    def want(self, names: Iterable[Name]) -> None:
        """From now on exactly these."""
        wanted = set(names)
        if len(wanted) > MAX_NAMES:
            log.error("more DNS names than are resolved", extra=fields(names=len(wanted), limit=MAX_NAMES))
            wanted = set(sorted(wanted)[:MAX_NAMES])
        self._due = {name: self._due.get(name, 0.0) for name in wanted}
        self._known = {name: addresses for name, addresses in self._known.items() if name in wanted}
        self._failing &= wanted
        self._changed.set()

    def ask(self, name: str) -> None:
        """Looks a name up once; what is found is delivered with port 0, also when that is nothing."""
        if len(self._asked) < MAX_NAMES:
            self._asked.add(name)
            self._changed.set()

    async def run(self) -> None:
        """Looks names up for ever."""
        limit = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                now = trio.current_time()
                asked, self._asked = self._asked, set()
                for once in asked:
                    nursery.start_soon(self._once, once, limit)
                for name in [name for name, due in self._due.items() if due <= now]:
                    # Due again when it has been looked up; one that is slow keeps nobody else waiting.
                    self._due[name] = math.inf
                    nursery.start_soon(self._refresh, name, limit)
                pause = min(self._due.values(), default=math.inf) - trio.current_time()
                with trio.move_on_after(min(max(pause, 0.0), REFRESH)):
                    await self._changed.wait()

    async def _once(self, name: str, limit: trio.CapacityLimiter) -> None:
        addresses: tuple[str, ...] = ()
        async with limit:
            try:
                with trio.fail_after(LOOKUP_SECONDS):
                    addresses = await self._lookup(name)
            except (OSError, UnicodeError, trio.TooSlowError) as error:
                log.info("a host that a request names cannot be resolved", extra=fields(name=name, error=error))
        self._deliver(name, 0, addresses)

    async def _refresh(self, name: Name, limit: trio.CapacityLimiter) -> None:
        async with limit:
            try:
                with trio.fail_after(LOOKUP_SECONDS):
                    addresses = await self._lookup(name[0])
            except (OSError, UnicodeError, trio.TooSlowError) as error:
                self._again(name, RETRY)
                if name not in self._failing:
                    self._failing.add(name)
                    log.warning("a DNS name cannot be resolved; what was known stays", extra=fields(name=name[0], error=error))
                return
        self._failing.discard(name)
        self._again(name, REFRESH)
        if name in self._due and addresses != self._known.get(name):
            self._known[name] = addresses
            self._deliver(name[0], name[1], addresses)

    def _again(self, name: Name, seconds: float) -> None:
        if name in self._due:
            self._due[name] = trio.current_time() + seconds * (1 + JITTER * random.random())
            self._changed.set()


async def look_up(name: str) -> tuple[str, ...]:
    """What the host's resolver says, in one order."""
    found = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    said = (canonical(str(entry[4][0]).partition("%")[0]) for entry in found)
    return tuple(sorted({address for address in said if address is not None}))[:MAX_ADDRESSES]
