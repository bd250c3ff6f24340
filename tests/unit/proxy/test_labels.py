"""What a workload says of itself is what it is now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.builders import workload
from ztunnel.hbone import connect
from ztunnel.proxy import labels
from ztunnel.proxy.labels import answer_of, baggage_of


def test_it_is_made_once_for_a_workload_and_anew_for_its_next_form() -> None:
    first = replace(workload("cart"), canonical_name="cart", canonical_revision="v1")
    assert (baggage_of(first), answer_of(first)) == (
        b"k8s.cluster.name=Kubernetes,k8s.namespace.name=default,service.name=cart,service.version=v1",
        connect.response_block(baggage_of(first)),
    )
    assert baggage_of(first) is baggage_of(first)
    assert answer_of(first) is answer_of(first)
    second = replace(first, canonical_revision="v2")
    assert b"service.version=v2" in baggage_of(second)
    assert b"service.version=v2" in answer_of(second)
    assert b"service.version=v1" in answer_of(first)


def test_few_workloads_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_REMEMBERED", 3)
    for number in [*range(10), *range(10)]:
        named = replace(workload(f"w{number}"), canonical_name=f"w{number}")
        assert b"service.name=w%d" % number in baggage_of(named)
    assert len(labels._known) <= 3
