"""What is known of one connection, as the decisions about it find it out."""

from __future__ import annotations

from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.flow import Direction
from ztunnel.mesh.identity import SpiffeId


class Facts:
    """What is known of a connection; filled in as it is found out, before the first record leaves."""

    __slots__ = (
        "destination", "destination_identity", "destination_uid", "direction", "endpoint", "mutual_tls", "pod_uid", "policy", "protocol",
        "service", "service_name", "service_namespace", "source", "source_identity", "source_uid", "target", "trace", "waypoint",
    )  # fmt: skip

    def __init__(
        self, direction: Direction, pod_uid: str, source: Address, destination: Address, *, source_uid: str = "", destination_uid: str = ""
    ) -> None:
        self.direction = direction
        self.pod_uid = pod_uid
        self.source = source
        self.destination = destination
        """What was dialled: with a tunnel its far end, port 15008, whichever side tells."""
        self.target = ""
        self.endpoint: Address = ("", 0)
        """Inbound: the application's own address, which the verdict is about and which is dialled here."""
        self.protocol = "TCP"
        self.mutual_tls = False
        self.source_uid = source_uid
        self.destination_uid = destination_uid
        self.source_identity: SpiffeId | None = None
        self.destination_identity: SpiffeId | None = None
        self.service = ""
        self.service_name = ""
        self.service_namespace = ""
        self.policy = ""
        self.trace = ""
        self.waypoint = ""
        """Outbound: the waypoint that it goes to, `namespace/name`."""

    def inbound(self, pod_uid: str, endpoint: Address) -> Facts:
        """The same connection as the pod has it in which it ends."""
        inner = Facts(
            Direction.INBOUND,
            pod_uid,
            self.source,
            self.destination,
            source_uid=self.source_uid,
            destination_uid=self.destination_uid,
        )
        inner.target, inner.endpoint, inner.protocol, inner.mutual_tls = self.target, endpoint, self.protocol, self.mutual_tls
        inner.source_identity, inner.destination_identity = self.source_identity, self.destination_identity
        inner.service, inner.service_name, inner.service_namespace = self.service, self.service_name, self.service_namespace
        inner.trace = self.trace
        return inner
