"""The way in: dispatch, keys, lists."""

from __future__ import annotations

import pytest

from tests.kit.builders import authentication, authorization, namespace, pod, service_manifest
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.authentication import PeerAuthenticationObject
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.core import Namespace, Node, Pod, ServiceAccountObject, ServiceObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import Ignored, RefusedPolicy, key, key_of, parse, unpack
from ztunnel.mesh.manifests.request_authentication import RequestAuthenticationObject

ACCOUNT = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "x"}}
DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x", "namespace": "shop"}, "spec": 5}


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (namespace("x"), Namespace, ObjectKey("Namespace", "", "x")),
        (pod("x"), Pod, ObjectKey("Pod", "default", "x")),
        (service_manifest("x"), ServiceObject, ObjectKey("Service", "default", "x")),
        ({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "ip-10.ec2"}}, Node, ObjectKey("Node", "", "ip-10.ec2")),
        (ACCOUNT, ServiceAccountObject, ObjectKey("ServiceAccount", "default", "x")),
        (authorization("x"), AuthorizationPolicyObject, ObjectKey("AuthorizationPolicy", "default", "x")),
        (
            {**authorization("x"), "apiVersion": "security.istio.io/v1beta1"},
            AuthorizationPolicyObject,
            ObjectKey("AuthorizationPolicy", "default", "x"),
        ),
        (authentication("x"), PeerAuthenticationObject, ObjectKey("PeerAuthentication", "default", "x")),
        (DEPLOYMENT, Ignored, ObjectKey("Deployment.apps", "shop", "x")),
        ({"apiVersion": "v1", "kind": "Endpoints"}, Ignored, ObjectKey("Endpoints", "default", "")),
        (
            {"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "x"}},
            RequestAuthenticationObject,
            ObjectKey("RequestAuthentication", "default", "x"),
        ),
        (
            {"apiVersion": "policy.linkerd.io/v1", "kind": "AuthorizationPolicy"},
            Ignored,
            ObjectKey("AuthorizationPolicy.policy.linkerd.io", "default", ""),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, ObjectKey) else "",
)
def test_each_kind_and_its_key(body: object, kind: type, expected: ObjectKey) -> None:
    found = parse(body, "f.yaml")
    assert isinstance(found, kind)
    assert key(found) == key_of(body) == expected


def test_a_stand_in_has_the_key_of_what_it_stands_for() -> None:
    stands_for = ObjectKey("AuthorizationPolicy", "default", "x")
    assert key(RefusedPolicy(stands_for, None, everywhere=False, reason="")) == stands_for


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "f.yaml#3: kind: required"),
        ("text", 'f.yaml#3: document: not a mapping: "text"'),
        (
            {"apiVersion": "security.istio.io/v1", "kind": "AuthPolicy", "metadata": {"name": "x"}},
            'AuthPolicy.security.istio.io default/x: kind: not a kind of security.istio.io (a list is kind List of v1): "AuthPolicy"',
        ),
        ([], "f.yaml#3: document: not a mapping: a list"),
        ({}, "f.yaml#3: kind: required"),
        ({"kind": 5}, "f.yaml#3: kind: not text (quote it): 5"),
        ({"kind": "a\nb", "apiVersion": "v1"}, 'f.yaml#3: kind: not a kind: "a\\nb"'),
        ({"kind": "Pod", "metadata": {"name": "x"}}, "Pod default/x: apiVersion: required"),
        ({"kind": "Pod", "apiVersion": "v1"}, "f.yaml#3: metadata.name: required"),
        ({"kind": "Pod", "apiVersion": "v1", "metadata": []}, "f.yaml#3: metadata: not a mapping: a list"),
        (
            {"kind": "Pod", "apiVersion": "v2", "metadata": {"name": "x"}},
            'Pod default/x: apiVersion: not a version of Pod that is known (v1): "v2"',
        ),
        (
            {"kind": "AuthorizationPolicy", "apiVersion": "security.istio.io/v1alpha1", "metadata": {"name": "x"}},
            (
                "AuthorizationPolicy default/x: apiVersion: not a version of AuthorizationPolicy that is known (v1, v1beta1): "
                '"security.istio.io/v1alpha1"'
            ),
        ),
        (
            {"kind": "AuthorizationPolicy", "apiVersion": "v1", "metadata": {"name": "x"}},
            'AuthorizationPolicy default/x: apiVersion: not a version of security.istio.io: "v1"',
        ),
    ],
)
def test_refusals_name_the_object_or_where_it_came_from(body: object, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse(body, "f.yaml#3")
    assert str(caught.value) == message


@pytest.mark.parametrize("body", [None, 5, [], {}, {"kind": None}, {"kind": ""}, {"kind": "a\tb"}, {"kind": "x" * 254}])
def test_what_says_no_kind_has_no_key(body: object) -> None:
    assert key_of(body) is None


def test_a_key_is_as_much_as_can_be_read() -> None:
    assert key_of({"kind": "Pod", "apiVersion": 5, "metadata": 5}) == ObjectKey("Pod", "default", "")
    hostile = {"kind": "Pod", "metadata": {"name": ["x"], "namespace": "a\nb"}}
    assert key_of(hostile) == ObjectKey("Pod", "", "")


def test_lists_are_unpacked() -> None:
    inner = {"apiVersion": "v1", "kind": "List", "items": [pod("b")]}
    body = {"apiVersion": "v1", "kind": "List", "items": [pod("a"), inner, None]}
    assert unpack(body) == [pod("a"), pod("b"), None]
    assert unpack(None) == []
    assert unpack(pod("a")) == [pod("a")]
    assert unpack({"apiVersion": "v1", "kind": "List"}) == []
    assert unpack("text") == ["text"]


def test_hostile_lists_are_refused() -> None:
    itself: dict[str, object] = {"apiVersion": "v1", "kind": "List"}
    itself["items"] = [itself]
    with pytest.raises(ManifestError, match="lists nested more than 4 deep"):
        unpack(itself)
    with pytest.raises(ManifestError, match="items: not a list"):
        unpack({"apiVersion": "v1", "kind": "List", "items": {}})
