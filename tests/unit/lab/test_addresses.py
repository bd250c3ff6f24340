"""Who gets which address."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from ztunnel.lab.addresses import MAX_PODS_PER_NODE, SERVICE_NETWORKS, PodIndexes, pod_address, pod_network, service_addresses
from ztunnel.lab.objects import LabError


def test_pods_addresses_are_in_their_nodes_network() -> None:
    for version in (4, 6):
        for node in (1, 17, 64):
            assert ip_address(pod_address(node, MAX_PODS_PER_NODE, version)) in ip_network(pod_network(node, version))


def test_a_freed_index_is_taken_again_first_and_a_full_node_is_an_error() -> None:
    indexes = PodIndexes()
    assert [indexes.take() for _ in range(3)] == [1, 2, 3]
    indexes.free(2)
    assert indexes.take() == 2
    for _ in range(MAX_PODS_PER_NODE - 3):
        indexes.take()
    with pytest.raises(LabError, match="no address"):
        indexes.take()


def test_services_get_one_address_of_each_family() -> None:
    found = service_addresses([], (4, 6), ["10.96.0.100"])
    assert found == ["10.96.0.101", "fd96::64"]
    assert all(ip_address(address) in SERVICE_NETWORKS[ip_address(address).version] for address in found)


@pytest.mark.parametrize(
    ("wanted", "why"), [("10.96.0.5", "already allocated"), ("10.1.1.1", "is not in"), ("fd96::1", "is not in"), ("x", "not an IP address")]
)
def test_addresses_that_a_service_cannot_have(wanted: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        service_addresses([wanted], (4,), ["10.96.0.5"])
    assert service_addresses(["10.96.0.6"], (4,), ["10.96.0.5"]) == ["10.96.0.6"]
