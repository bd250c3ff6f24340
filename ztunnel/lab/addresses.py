"""Which address belongs to whom in a lab: nodes, pods, services. Pure.

    nodes      10.99.0.<n>             fd99::<n>
    pods       10.244.<n>.<i>          fd99:<n>::<i>
    services   10.96.0.0/16            fd96::/108       (kube-dns: .10 and ::a)

A freed address is given out again only after the others of its range (round robin), so that a stale user of it shows itself late in
tests that want it early: those ask for `first_free`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from ztunnel.lab.objects import LabError

MAX_NODES = 64
MAX_PODS_PER_NODE = 250
FAMILIES = {"ipv4": (4,), "ipv6": (6,), "dual": (4, 6)}
"""`--ip-family` to IP versions, primary first."""

SERVICE_NETWORKS: dict[int, IPv4Network | IPv6Network] = {4: ip_network("10.96.0.0/16"), 6: ip_network("fd96::/108")}
DNS_VIPS = {4: "10.96.0.10", 6: "fd96::a"}


def node_address(number: int, version: int) -> str:
    """The address of the node with that number (from 1) on the fabric."""
    return f"10.99.0.{number}" if version == 4 else f"fd99::{number:x}"


def pod_network(number: int, version: int) -> str:
    """The addresses of that node's pods."""
    return f"10.244.{number}.0/24" if version == 4 else f"fd99:{number:x}::/64"


def pod_address(number: int, index: int, version: int) -> str:
    """The address of a node's pod with that index (from 1)."""
    return f"10.244.{number}.{index}" if version == 4 else f"fd99:{number:x}::{index:x}"


@dataclass(slots=True)
class PodIndexes:
    """The indexes in use on one node; dual-stack pods have the same index in both families."""

    used: set[int] = field(default_factory=set)

    def take(self) -> int:
        """The lowest free index: a lab re-uses addresses as early as it can, because that is when bugs show.

        Raises:
            LabError: the node is full.
        """
        for index in range(1, MAX_PODS_PER_NODE + 1):
            if index not in self.used:
                self.used.add(index)
                return index
        raise LabError("", f"the node has no address for more than {MAX_PODS_PER_NODE} pods")

    def free(self, index: int) -> None:
        """Give an index back."""
        self.used.discard(index)


def service_addresses(wanted: list[str], versions: tuple[int, ...], used: Iterable[str]) -> list[str]:
    """The cluster addresses of a service: those that it asks for, checked, or one new one of each version.

    Raises:
        LabError: outside the service network, of a version that the lab has not, or in use.
    """
    taken = set(used)
    for address in wanted:
        try:
            parsed = ip_address(address)
        except ValueError as error:
            raise LabError("Invalid", f"spec.clusterIPs: {address!r} is not an IP address") from error
        if parsed.version not in versions or parsed not in SERVICE_NETWORKS[parsed.version]:
            networks = " or ".join(str(SERVICE_NETWORKS[version]) for version in versions)
            raise LabError("Invalid", f"spec.clusterIPs: {address} is not in {networks}")
        if str(parsed) in taken:
            raise LabError("Invalid", f"spec.clusterIPs: {address} is already allocated")
    if wanted:
        return [str(ip_address(address)) for address in wanted]
    return [_next_free(version, taken) for version in versions]


def _next_free(version: int, taken: set[str]) -> str:
    """The first address from .100 on: the low ones are for services that name theirs."""
    network = SERVICE_NETWORKS[version]
    for offset in range(100, network.num_addresses - 1):
        candidate = str(network[offset])
        if candidate not in taken:
            return candidate
    raise LabError("", f"no service address left in {network}")
