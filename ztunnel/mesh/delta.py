"""What changed in the mesh, as one value: sources produce it, every index (supervisor's and workers') applies it."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.rules import Policy
from ztunnel.mesh.workloads import Service, Workload


@dataclass(frozen=True, slots=True)
class Delta:
    """Upserts and removals. Applying the same delta twice changes nothing more.

    `removed_workloads` holds UIDs, `removed_services` `Service.key`s, `removed_policies` `Policy.key`s.
    """

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[Policy, ...] = ()
    removed_workloads: tuple[str, ...] = ()
    removed_services: tuple[str, ...] = ()
    removed_policies: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(
            self.workloads or self.services or self.policies or self.removed_workloads or self.removed_services or self.removed_policies
        )
