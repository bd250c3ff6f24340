"""Whether this agent goes for good: the DaemonSet that it is of is being deleted, or has been.

An agent that is told to end cannot tell from that whether another follows. The API server can: a DaemonSet that is deleted is gone, or
marked, before its pods are. It is followed all the time, because the right to ask may be deleted along with it. Only what the API server
has said counts: while it is away, or lets us not ask, nothing is removed, and pods' traffic waits for the next agent.
Rights: list and watch DaemonSets in our namespace.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ztunnel.kube.client import Json, KubeClient
from ztunnel.kube.discovery import Discovery, Kind
from ztunnel.kube.reflector import Name, Pace, Reflector
from ztunnel.mesh.manifests.tree import at
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

DAEMON_SET_KIND = Kind("apps", "DaemonSet", ("v1",))


@dataclass(slots=True)
class Departure:
    """Follows one DaemonSet. Satisfies `kube.reflector.Store`.

    Args:
        daemon_set: `namespace/name`.
    """

    client: KubeClient
    daemon_set: str
    pace: Pace = field(default_factory=Pace)
    is_final: bool = field(default=False, init=False)
    """It was there, and is being deleted, or is no more."""
    is_known: bool = field(default=False, init=False)
    """It was there. One that never was is a name that was misspelt."""

    async def follow(self) -> None:
        """For ever."""
        namespace = self.daemon_set.partition("/")[0]
        await Reflector(self.client, Discovery(self.client), DAEMON_SET_KIND, self, self.pace, namespace=namespace).run()

    def read(self, body: Json) -> bool:
        """See `Store`: whether it is being deleted."""
        return at(body, "metadata", "deletionTimestamp") is not None

    def replaced(self, items: Mapping[Name, bool]) -> None:
        """See `Store`."""
        self._judge(items.get(self._name))

    def changed(self, name: Name, item: bool | None) -> None:
        """See `Store`."""
        if name == self._name:
            self._judge(item)

    @property
    def _name(self) -> Name:
        namespace, _, name = self.daemon_set.partition("/")
        return Name(namespace, name)

    def _judge(self, is_going: bool | None) -> None:
        self.is_known = self.is_known or is_going is not None
        was_final, self.is_final = self.is_final, self.is_known and is_going is not False
        if self.is_final and not was_final:
            log.warning("our DaemonSet is being deleted: no other agent follows", extra=fields(daemon_set=self.daemon_set))
