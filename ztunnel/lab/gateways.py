"""How a lab starts a gateway: the container of its pod."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ztunnel.controller.belongings import container_basics
from ztunnel.mesh.manifests.tree import Tree, text
from ztunnel.mesh.waypoints import WAYPOINT_CLASS


@dataclass(frozen=True, slots=True)
class Installation:
    """Where a gateway's program finds what it needs."""

    manifests: str
    ca: str
    python_path: str

    def container(self, gateway: Tree) -> Tree:
        """Of one Gateway's pods (`controller.belongings.Container`)."""
        is_waypoint = text(gateway, "spec", "gatewayClassName") == WAYPOINT_CLASS
        command = [
            *(sys.executable, "-m", "waypoint", "run" if is_waypoint else "gateway"),
            *("--name", text(gateway, "metadata", "name"), "--namespace", text(gateway, "metadata", "namespace")),
            *("--manifests", self.manifests, "--ca-directory", self.ca),
        ]
        return {**container_basics(gateway), "command": command, "env": [{"name": "PYTHONPATH", "value": self.python_path}]}
