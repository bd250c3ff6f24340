"""A store that keeps what a reflector tells it, and a client of the real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from tests.kit.kube_api import ApiServer, User
from ztunnel.kube.client import Bounds, KubeClient
from ztunnel.kube.config import Access
from ztunnel.kube.credentials import Files, Login
from ztunnel.kube.discovery import Discovery, Kind
from ztunnel.kube.reflector import Body, Name, Pace, Reflector

PODS = Kind("", "Pod", ("v1",))
QUICK = Pace(page=3, absent_seconds=0.05, backoff_first=0.02, backoff_most=0.2, healthy_seconds=5.0, short_seconds=0.0)
"""For a test's patience."""

BOUNDS = Bounds()


@dataclass
class Kept:
    """What there is, and how it came to be known."""

    items: dict[Name, Body] = field(default_factory=dict)
    wholes: int = 0
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    """Name and version of each change."""

    def read(self, body: Body) -> Body:
        return body

    def replaced(self, items: dict[Name, Body]) -> None:
        self.items = dict(items)
        self.wholes += 1

    def changed(self, name: Name, item: Body | None) -> None:
        if item is None:
            self.items.pop(name, None)
        else:
            self.items[name] = item
        metadata = (item or {}).get("metadata")
        self.seen.append((name.name, str(metadata["resourceVersion"]) if isinstance(metadata, dict) else None))

    def names(self, namespace: str = "") -> list[str]:
        return sorted(name.name for name in self.items if not namespace or name.namespace == namespace)


def access(api: ApiServer, user: User | None = None) -> Access:
    """As a user of the test's API server."""
    user = user or api.admin
    login = Login(f"Bearer {user.token}" if user.token else "", user.certificate_pem, user.key_pem)
    return Access(api.url, Files(login), authority_pem=api.ca_pem)


@asynccontextmanager
async def following(
    access: Access, kind: Kind = PODS, *, pace: Pace = QUICK, bounds: Bounds = BOUNDS, streams: bool = True
) -> AsyncIterator[tuple[Reflector[Body], Kept]]:
    """A reflector that runs, and what it tells.

    Args:
        streams: False: as against a server that has no WatchList.
    """
    kept = Kept()
    async with KubeClient(access, bounds) as client, trio.open_nursery() as nursery:
        made: Reflector[Body] = Reflector(client, Discovery(client), kind, kept, pace)
        made._streams = streams
        nursery.start_soon(made.run)
        yield made, kept
        nursery.cancel_scope.cancel()
