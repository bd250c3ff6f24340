"""Which kinds an API server has, in which versions and under which names: CRDs come and go while we run.

Asked group by group (`/apis/GROUP`, `/apis/GROUP/VERSION`), which every authenticated user may. Answers are shared for a few
seconds, so that all kinds of a group that are waited for cost what one costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from ztunnel.kube.client import KubeClient
from ztunnel.kube.errors import BadAnswer, NotFound
from ztunnel.kube.resources import Resource

SHARED_SECONDS = 2.0
_WHAT = "find out what is served"


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """A kind that somebody reads.

    Attributes:
        versions: that can be read, best first.
    """

    group: str
    kind: str
    versions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}.{self.group}" if self.group else self.kind


@dataclass(slots=True)
class Discovery:
    """What one API server has."""

    client: KubeClient
    _known: dict[str, tuple[float, dict[str, list[Resource]]]] = field(default_factory=dict)
    """By group: when it was asked, and what it has by version."""
    _asking: trio.Lock = field(default_factory=trio.Lock)

    async def find(self, kind: Kind) -> Resource | None:
        """The kind as it is served now, in the best version that can be read; None: it is not installed.

        Raises:
            KubeError: the server cannot be asked.
        """
        async with self._asking:
            served = await self._group(kind.group, kind.versions)
        for version in kind.versions:
            for resource in served.get(version, ()):
                if resource.kind == kind.kind:
                    return resource
        return None

    async def _group(self, group: str, wanted: Sequence[str]) -> dict[str, list[Resource]]:
        now = trio.current_time()
        asked, served = self._known.get(group, (float("-inf"), {}))
        if now - asked >= SHARED_SECONDS:
            served = {}
            for version in await self._versions(group) if group else wanted:
                served[version] = await self._resources(group, version)
            self._known[group] = now, served
        return served

    async def _versions(self, group: str) -> list[str]:
        try:
            answer = await self.client.raw(f"/apis/{group}", _WHAT)
        except NotFound:
            return []
        listed = answer.get("versions")
        if not isinstance(listed, list):
            raise BadAnswer(f"cannot {_WHAT}: /apis/{group} lists no versions")
        return [str(each["version"]) for each in listed if isinstance(each, dict) and isinstance(each.get("version"), str)]

    async def _resources(self, group: str, version: str) -> list[Resource]:
        path = f"/apis/{group}/{version}" if group else f"/api/{version}"
        try:
            answer = await self.client.raw(path, _WHAT)
        except NotFound:
            return []
        listed = answer.get("resources")
        if not isinstance(listed, list):
            raise BadAnswer(f"cannot {_WHAT}: {path} lists no resources")
        return [found for each in listed if (found := _resource(group, version, each)) is not None]


def _resource(group: str, version: str, entry: object) -> Resource | None:
    """None for subresources, and for what does not look like a resource."""
    if not isinstance(entry, dict):
        return None
    name, kind, namespaced = entry.get("name"), entry.get("kind"), entry.get("namespaced")
    if not isinstance(name, str) or not isinstance(kind, str) or not isinstance(namespaced, bool) or "/" in name or not name:
        return None
    return Resource(group, version, name, kind, namespaced)
