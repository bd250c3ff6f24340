"""Whether this agent can take traffic, as kubelet asks it on port 15021.

Source: Istio ztunnel `readiness`: 200 `ready`, or 500 `not ready, pending: a, b`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ztunnel.runtime.http import Request, Response


class Readiness:
    """The parts that must have started, and may be lost again.

    Args:
        parts: names as an operator should read them.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        self._pending = set(parts)
        self._watched: dict[str, Callable[[], bool]] = {}

    def done(self, part: str) -> None:
        """A part works."""
        self._pending.discard(part)

    def lost(self, part: str) -> None:
        """A part does not work any more."""
        self._pending.add(part)

    def watch(self, part: str, works: Callable[[], bool]) -> None:
        """Asks whether a part works whenever somebody wants to know."""
        self._watched[part] = works

    @property
    def ready(self) -> bool:
        """Whether every part works."""
        return not self.pending

    @property
    def pending(self) -> tuple[str, ...]:
        """What does not work, sorted."""
        return tuple(sorted(self._pending.union(part for part, works in self._watched.items() if not works())))

    async def handle(self, request: Request) -> Response:
        """The answers of port 15021."""
        if request.path != "/healthz/ready":
            return Response(404, b"/healthz/ready is here\n")
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"GET it\n", headers=(("allow", "GET, HEAD"),))
        if self.ready:
            return Response(200, b"ready\n")
        return Response(500, f"not ready, pending: {', '.join(self.pending)}\n".encode())
