"""Do the node agents and the gateways know what the lab knows? Asked over their sockets, beside what follows from the objects.

An agent reads the manifests a moment after they change; `settle` waits until each has, so that what comes next meets the mesh that was
asked for. Which policies there are and whom they select is compared, not their text: a policy that was changed in place may be in force
a moment later.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from ztunnel.controller.belongings import told_labels
from ztunnel.controller.statuses import Reader
from ztunnel.lab.objects import kind_of
from ztunnel.mesh.derive import OF_USE, MeshOptions, MeshState, derive
from ztunnel.mesh.l7.bound import bound_to
from ztunnel.mesh.l7.config import fingerprint
from ztunnel.mesh.l7.derive import derive_proxy
from ztunnel.mesh.l7.ingress import GatewayPods, derive_gateway
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject, key, kinds, parse
from ztunnel.mesh.manifests.tree import Tree, branches, flag, integer, strings, text, texts
from ztunnel.mesh.waypoints import GATEWAY_NAME, MANAGED, MANAGED_WAYPOINT
from ztunnel.mesh.workloads import waypoint_text
from ztunnel.settings import WaypointFallback, variable
from ztunnel.sources.mesh_config import mesh_config_of

ASK_SECONDS = 2.0
MAX_ANSWER = 32 << 20
MESH_KINDS = frozenset(kind for _, kind, _ in kinds(OF_USE))


@dataclass(frozen=True, slots=True)
class View:
    """What routing and authorization depend on."""

    workloads: frozenset[tuple[str, str, bool, tuple[str, ...], str]]
    """UID, protocol, readiness, policies, waypoint."""
    services: frozenset[tuple[str, str, tuple[str, ...], int, str]]
    """Namespace, name, addresses, ready endpoints, waypoint."""
    policies: frozenset[tuple[str, str]]
    """Namespace, name."""


def state_of(bodies: Iterable[Tree]) -> MeshState:
    """The mesh that follows from the lab's objects."""
    objects: list[KubeObject] = [parse(body, "the lab") for body in bodies if kind_of(body) in MESH_KINDS]
    return derive({key(item): item for item in objects}, options())


def options() -> MeshOptions:
    """As the lab's agents have them."""
    fails_open = os.environ.get(variable("waypoint.fallback")) == WaypointFallback.L4.value
    return MeshOptions(hbone_needs_annotation=True, waypoint_fails_open=fails_open)


def expected(state: MeshState) -> View:
    """What an agent must see."""
    workloads = state.workloads.values()
    return View(
        frozenset(
            (each.uid, each.protocol.value, each.ready, tuple(sorted(each.policies)), waypoint_text(each.waypoint)) for each in workloads
        ),
        frozenset(
            (
                each.namespace,
                each.name,
                tuple(sorted(each.vips)),
                sum(endpoint.ready for endpoint in each.endpoints),
                waypoint_text(each.waypoint),
            )
            for each in state.services.values()
        ),
        frozenset((each.namespace, each.name) for each in state.policies.values()),
    )


async def seen_by(agent: Path) -> View | None:
    """What the agent with that control socket sees; None when it does not answer in time."""
    answers: list[Tree] = []
    for what in ("workloads", "services", "policies"):
        answer = await _ask(agent, f"/v1/{what}")
        if answer is None:
            return None
        answers.append(answer)
    workloads, services, policies = (branches(answer, "items") for answer in answers)
    return View(
        frozenset(
            (text(row, "uid"), text(row, "protocol"), flag(row, "ready"), tuple(sorted(texts(row, "policies"))), text(row, "waypoint"))
            for row in workloads
        ),
        frozenset(
            (
                text(row, "namespace"),
                text(row, "name"),
                tuple(sorted(texts(row, "vips"))),
                integer(row, "ready_endpoints"),
                text(row, "waypoint"),
            )
            for row in services
        ),
        frozenset((text(row, "namespace"), text(row, "name")) for row in policies),
    )


class Gateways:
    """What each gateway's pod must be configured with."""

    def __init__(self, bodies: Iterable[Tree]) -> None:
        self._options = replace(options(), waypoint_fails_open=False)
        self._objects = Reader().read(bodies)
        self._state = derive(self._objects, self._options)
        self._mesh_config = mesh_config_of(self._objects, self._options.root_namespace)

    def expected(self, pod: Tree) -> str:
        """The fingerprint of the configuration of one of a gateway's pods."""
        namespace, node = text(pod, "metadata", "namespace"), text(pod, "spec", "nodeName")
        labels = strings(pod, "metadata", "labels")
        who = ObjectKey("Gateway", namespace, labels[GATEWAY_NAME])
        if labels.get(MANAGED) == MANAGED_WAYPOINT:
            bound = bound_to(self._objects, self._options, who)
            config = derive_proxy(self._objects, self._state, self._options, who, bound, node, self._mesh_config)
        else:
            pods = GatewayPods(namespace, text(pod, "spec", "serviceAccountName"), told_labels(labels))
            config = derive_gateway(self._objects, self._state, self._options, who, pods, node, self._mesh_config)
        return fingerprint(config)


async def configured(gateway: Path) -> str:
    """The fingerprint of what the gateway with that control socket is configured with; empty when it does not answer in time."""
    return text(await _ask(gateway, "/v1/status"), "config")


async def _ask(path: Path, target: str) -> Tree | None:
    """The JSON answer to a GET over a Unix socket."""
    received = bytearray()
    try:
        with trio.move_on_after(ASK_SECONDS), trio.socket.socket(socket.AF_UNIX) as sock:
            await sock.connect(str(path))
            await sock.send(f"GET {target} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n".encode())
            while (data := await sock.recv(1 << 16)) and len(received) < MAX_ANSWER:
                received += data
        status, _, body = bytes(received).partition(b"\r\n\r\n")
        found = json.loads(body) if status.startswith(b"HTTP/1.1 200") else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
