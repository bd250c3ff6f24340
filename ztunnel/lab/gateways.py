"""How a lab starts a gateway: the container of its pod, and what all of them are told."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ztunnel.controller.belongings import container_basics, proxy_environment
from ztunnel.mesh.manifests.tree import Tree

SOCKETS = "w"
"""Directory of the control sockets, by the pod's first address; short, because the kernel allows 107 bytes of path."""
SETTINGS_FILE = "waypoint.yaml"
LINGER_SECONDS = 1.0
"""A lab's agents hear of a pod that leaves within a fraction of this."""
_PASSED_ON = ("WAYPOINT_WORKERS", "WAYPOINT_LOG_LEVEL")
"""Settings of gateways that the environment of `lab up` decides."""


def control_socket(state: Path, address: str) -> Path:
    """Where a gateway's pod answers questions about itself."""
    return state / SOCKETS / address


@dataclass(frozen=True, slots=True)
class Installation:
    """Where a gateway's program finds what it needs."""

    state: Path
    python_path: str

    def prepare(self) -> None:
        """Write what all gateways are told."""
        (self.state / SOCKETS).mkdir(mode=0o700, exist_ok=True)
        files = {"files": str(self.state / "manifests"), "redirection_status": "annotation", "poll_seconds": 0.05}
        settings = {"linger_seconds": LINGER_SECONDS, "sources": files, "ca": {"directory": str(self.state / "ca")}}
        (self.state / SETTINGS_FILE).write_text(json.dumps(settings, indent=2))

    def pod_spec(self, gateway: Tree) -> Tree:
        """Of one Gateway's pods (`controller.belongings.PodSpec`)."""
        given = {
            "PYTHONPATH": self.python_path,
            **proxy_environment(gateway),
            "WAYPOINT_ADMIN_SOCKET": str(control_socket(self.state, "$(POD_IP)")),
            **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        }
        environment: list[Tree] = [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "WAYPOINT_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ]
        environment += [{"name": name, "value": value} for name, value in given.items()]
        command = [sys.executable, "-m", "waypoint", "run", "--config", str(self.state / SETTINGS_FILE)]
        return {"containers": [{**container_basics(gateway), "command": command, "env": environment}]}
