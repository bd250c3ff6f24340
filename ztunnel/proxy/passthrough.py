"""Port 15006: plaintext into a pod, from peers outside the mesh. The same verdict as for tunnels, with no identity to go by.

Source: Istio ztunnel `proxy/inbound_passthrough.rs`.
"""

from __future__ import annotations

import socket

from ztunnel.dataplane.addresses import Address, text
from ztunnel.dataplane.flow import Direction
from ztunnel.dataplane.sockets import reset
from ztunnel.dataplane.splice import Splice
from ztunnel.mesh.errors import LocalError, MeshError
from ztunnel.mesh.inbound import service_for
from ztunnel.mesh.ports import ILLEGAL_TARGETS
from ztunnel.proxy.connections import Connection
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.inbound import judge
from ztunnel.proxy.pods import Node, Pod, PodDial, redirected


class Passthrough:
    """What happens to plaintext connections that nftables redirected on their way into the pods of this node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def accept(self, pod: Pod, sock: socket.socket, peer: Address) -> None:
        """One connection."""
        node = self._node
        destination = redirected(node, pod, sock, peer)
        if destination is None:
            return
        facts = Facts(Direction.INBOUND, pod.uid, peer, destination, destination_uid=pod.uid)
        facts.target, facts.endpoint = text(destination), destination
        connection = node.connections.register(facts)
        refused = self._judge(pod, connection)
        if refused is not None:
            reset(sock)
            connection.end(refused)
            return
        splice = Splice(node.loop, node.scratch, sock, connection)
        connection.relay = splice
        PodDial(node, connection, destination, None if peer[0] == destination[0] else peer[0]).start(pod)

    def _judge(self, pod: Pod, connection: Connection) -> MeshError | None:
        """Why it is not carried."""
        node = self._node
        facts = connection.facts
        if facts.destination[1] in ILLEGAL_TARGETS:
            return LocalError(f"port {facts.destination[1]} is the proxy itself")
        workload = node.index.workload(pod.uid)
        if workload is None:
            return LocalError("failed to fetch information about local workload")
        source = node.index.workload_at(facts.source[0])
        facts.source_uid = source.uid if source is not None else ""
        service = service_for(node.index, workload, facts.destination[1])
        if service is not None:
            facts.service, facts.service_name, facts.service_namespace = service.hostname, service.name, service.namespace
        return judge(node, workload, connection)
