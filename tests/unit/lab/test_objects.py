"""Kinds, names and label selectors."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ztunnel.lab.objects import KINDS, Key, LabError, container_port, display, key_of, kind_named, not_found, parse_selector, selects
from ztunnel.mesh.manifests.tree import Tree

LABELS = {"app": "web", "tier": "front"}


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("po", "Pod"),
        ("pods", "Pod"),
        ("SVC", "Service"),
        ("deploy", "Deployment"),
        ("deployments.apps", "Deployment"),
        ("ns", "Namespace"),
        ("sa", "ServiceAccount"),
    ],
)
def test_kinds_have_kubectls_spellings(word: str, kind: str) -> None:
    assert kind_named(word).kind == kind


def test_two_groups_have_gateways() -> None:
    istio: Tree = {"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "g", "namespace": "shop"}}
    assert key_of(istio) == Key("Gateway.networking.istio.io", "shop", "g")
    assert key_of({**istio, "apiVersion": "gateway.networking.k8s.io/v1"}) == Key("Gateway", "shop", "g")
    assert display(key_of(istio)) == "gateway.networking.istio.io/g"
    assert kind_named("gateways").kind == "Gateway"
    assert kind_named("gw").kind == kind_named("gateways.networking.istio.io").kind == "Gateway.networking.istio.io"


def test_an_unknown_kind_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(LabError, match="'sofa'; it has nodes, namespaces"):
        kind_named("sofa")


def test_no_spelling_means_two_kinds() -> None:
    words = [word for kind in KINDS.values() for word in kind.words]
    assert len(words) == len(set(words))


def test_objects_are_named_as_kubectl_names_them() -> None:
    assert display(Key("Deployment", "shop", "web")) == "deployment.apps/web"
    assert str(not_found(Key("Pod", "", "x"))) == 'Error from server (NotFound): pods "x" not found'


@pytest.mark.parametrize(
    ("selector", "holds"),
    [
        ("", True),
        ("app=web", True),
        ("app==web,tier=front", True),
        ("app=db", False),
        ("app!=db", True),
        ("absent!=x", True),
        ("app", True),
        ("absent", False),
        ("!absent", True),
        ("!app", False),
        ("app in (web, db)", True),
        ("app in (db)", False),
        ("app notin (db),tier in (front)", True),
        ("absent notin (x)", True),
        ("absent=", False),
    ],
)
def test_selectors(selector: str, holds: bool) -> None:
    assert all(term.holds(LABELS) for term in parse_selector(selector)) is holds


@pytest.mark.parametrize("selector", ["app in web", "a b", ",,", "=x", "a=b=c", "a in (b", "x" * 5000])
def test_selectors_that_are_none(selector: str) -> None:
    with pytest.raises(LabError):
        parse_selector(selector)


@given(st.text(max_size=60))
def test_any_text_is_a_selector_or_is_refused(selector: str) -> None:
    try:
        terms = parse_selector(selector)
    except LabError:
        return
    for term in terms:
        term.holds(LABELS)


def test_a_service_without_selector_selects_nothing() -> None:
    assert selects({"app": "web"}, LABELS)
    assert not selects({}, LABELS)


def test_target_ports_by_name_and_number() -> None:
    pod: Tree = {
        "spec": {
            "containers": [{"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"name": "http", "containerPort": 8080}]}]
        }
    }
    assert container_port(pod, 80, "TCP") == 80
    assert container_port(pod, "http", "TCP") == 8080
    assert container_port(pod, "dns", "UDP") == 53
    assert container_port(pod, "dns", "TCP") is None
    assert container_port(pod, True, "TCP") is None
