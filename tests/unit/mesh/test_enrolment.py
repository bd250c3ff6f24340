"""Opt-in by labels, and every way out."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.kit.builders import pod
from ztunnel.mesh.enrolment import enrolment
from ztunnel.mesh.manifests.core import Pod
from ztunnel.mesh.manifests.parse import parse

AMBIENT = {"istio.io/dataplane-mode": "ambient"}
NONE = {"istio.io/dataplane-mode": "none"}


def made(*addresses: str, **parts: Mapping[str, object]) -> Pod:
    found = parse(pod("x", *(addresses or ("10.0.0.1",)), **parts), "test")  # type: ignore[arg-type]  # parts by name
    assert isinstance(found, Pod)
    return found


@pytest.mark.parametrize(
    ("labels", "namespace_labels", "wanted", "reason"),
    [
        ({}, AMBIENT, True, "namespace default is labelled istio.io/dataplane-mode=ambient"),
        (AMBIENT, {}, True, "the pod is labelled istio.io/dataplane-mode=ambient"),
        (NONE, AMBIENT, False, "the pod is labelled istio.io/dataplane-mode=none"),
        (AMBIENT, NONE, True, "the pod is labelled istio.io/dataplane-mode=ambient"),
        ({"istio.io/dataplane-mode": "other"}, AMBIENT, True, "namespace default is labelled istio.io/dataplane-mode=ambient"),
        ({}, {}, False, "neither the pod nor namespace default is labelled istio.io/dataplane-mode=ambient"),
        ({}, NONE, False, "neither the pod nor namespace default is labelled istio.io/dataplane-mode=ambient"),
    ],
)
def test_labels(labels: dict[str, str], namespace_labels: dict[str, str], wanted: bool, reason: str) -> None:
    assert enrolment(made(labels=labels), namespace_labels, ()) == (wanted, reason)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"spec": {"hostNetwork": True}}, "it uses the node's network, which is not captured"),
        ({"meta": {"annotations": {"sidecar.istio.io/status": "{}"}}}, "it has a sidecar"),
        ({"status": {"phase": "Succeeded"}}, "it has ended (Succeeded)"),
        ({"status": {"podIPs": []}}, "it has no address yet"),
    ],
)
def test_labelled_pods_that_are_not_captured(parts: dict[str, Mapping[str, object]], why: str) -> None:
    wanted, reason = enrolment(made(**parts), AMBIENT, ())
    assert not wanted
    assert reason == f"namespace default is labelled istio.io/dataplane-mode=ambient, but {why}"


def test_excluded_namespaces() -> None:
    wanted, reason = enrolment(made(), AMBIENT, ("default",))
    assert not wanted
    assert reason.endswith("but namespace default is excluded")
