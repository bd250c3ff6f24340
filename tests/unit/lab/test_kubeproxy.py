"""The rules of a node as a transaction; what they do is tested in tests/netns."""

from __future__ import annotations

from ztunnel.lab.kubeproxy import transaction
from ztunnel.lab.placement import Forward


def test_each_endpoint_has_a_rule_and_the_transaction_can_be_sent_to_every_node() -> None:
    empty = transaction([])
    two = transaction([Forward("10.96.0.1", 80, "TCP", (("10.0.0.1", 8080), ("10.0.0.2", 8080)))])
    assert len(two) == len(empty) + 2 + 2  # a rule for each endpoint, and its hairpin
    assert (two[0].what, two[-1].what) == ("service rules", "service rules")
    assert all(isinstance(request.data, bytes) for request in two)


def test_a_service_without_endpoints_adds_no_rule() -> None:
    assert len(transaction([Forward("10.96.0.1", 80, "TCP", ())])) == len(transaction([]))
