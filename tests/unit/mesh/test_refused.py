"""Stand-ins: the strictest thing that a refused policy could have meant, where it could have applied."""

from __future__ import annotations

import pytest

from tests.kit.builders import authentication, authorization, pod, selecting
from ztunnel.mesh.denials import DENY_EVERYTHING, NOT_AUTHENTICATED, unknown_policy
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import RefusedPolicy
from ztunnel.mesh.refused import refused_policy, stand_in
from ztunnel.mesh.rules import Action, Policy, Rule, Scope

ERROR = ManifestError("AuthorizationPolicy default/x", "spec.rules", "broken")
TEXT = "AuthorizationPolicy default/x: spec.rules: broken"
KEY = ObjectKey("AuthorizationPolicy", "default", "x")


def test_a_broken_policy_leaves_a_stand_in() -> None:
    assert stand_in(authorization("x", rules=5), ERROR) == RefusedPolicy(KEY, None, False, TEXT)
    assert stand_in(authorization("x", rules=5, selector=selecting(app="w")), ERROR) == RefusedPolicy(KEY, {"app": "w"}, False, TEXT)


@pytest.mark.parametrize("selector", [5, {"app": "x"}, {"matchLabels": {"app": ["x"]}}, {}])
def test_a_selector_that_cannot_be_read_means_the_whole_namespace(selector: object) -> None:
    found = stand_in(authorization("x", selector=selector), ERROR)
    assert isinstance(found, RefusedPolicy)
    assert found.selector is None


def test_a_broken_spec_means_the_whole_namespace() -> None:
    assert stand_in({**authorization("x"), "spec": "text"}, ERROR) == RefusedPolicy(KEY, None, False, TEXT)


def test_a_broken_name_means_the_whole_namespace() -> None:
    body = authorization("x", meta={"name": 5}, selector=selecting(app="w"))
    assert stand_in(body, ERROR) == RefusedPolicy(ObjectKey("AuthorizationPolicy", "default", ""), None, False, TEXT)


def test_a_broken_namespace_means_everywhere() -> None:
    found = stand_in(authorization("x", meta={"namespace": 5}), ERROR)
    assert found == RefusedPolicy(ObjectKey("AuthorizationPolicy", "", "x"), None, True, TEXT)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        pod("x"),
        {"apiVersion": "policy.linkerd.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "x"}},
        authorization("x", action="AUDIT"),
        authorization("x", meta={"annotations": {"istio.io/dry-run": "true"}}),
        authorization("x", meta={"annotations": {"istio.io/dry-run": True}}),
    ],
)
def test_what_never_denied_leaves_nothing(body: object) -> None:
    assert stand_in(body, ERROR) is None


def test_a_peer_authentication_has_no_dry_run() -> None:
    body = authentication("x", "STRCIT")
    assert stand_in({**body, "metadata": {"name": "x", "annotations": {"istio.io/dry-run": "true"}}}, ERROR) is not None


@pytest.mark.parametrize("metadata", [5, {"annotations": 5}, {"annotations": {"istio.io/dry-run": "false"}}])
def test_broken_metadata_is_no_way_out(metadata: object) -> None:
    assert stand_in({**authorization("x"), "metadata": metadata}, ERROR) is not None


@pytest.mark.parametrize(
    ("refused", "scope"),
    [
        (RefusedPolicy(KEY, None, False, TEXT), Scope.NAMESPACE),
        (RefusedPolicy(KEY, {"app": "w"}, False, TEXT), Scope.SELECTOR),
        (RefusedPolicy(ObjectKey("AuthorizationPolicy", "istio-system", "x"), None, False, TEXT), Scope.GLOBAL),
        (RefusedPolicy(ObjectKey("AuthorizationPolicy", "", "x"), {"app": "w"}, True, TEXT), Scope.GLOBAL),
    ],
)
def test_a_stand_in_denies_everything_in_its_scope(refused: RefusedPolicy, scope: Scope) -> None:
    reason = f"refused, so everything that it may apply to is denied: {TEXT}"
    assert refused_policy(refused, "istio-system") == Policy(
        refused.key.name, refused.key.namespace, scope, Action.DENY, DENY_EVERYTHING, reason=reason
    )


def test_a_refused_peer_authentication_is_strict() -> None:
    found = stand_in(authentication("x", "STRCIT"), ERROR)
    assert isinstance(found, RefusedPolicy)
    policy = refused_policy(found, "istio-system")
    assert (policy.key, policy.scope, policy.rules) == ("PeerAuthentication/default/x", Scope.NAMESPACE, (Rule((NOT_AUTHENTICATED,)),))
    assert policy.reason == f"refused, so treated as STRICT: {TEXT}"


def test_an_unknown_policy_denies_everything_under_its_own_name() -> None:
    policy = unknown_policy("AuthorizationPolicy/default/x")
    assert (policy.key, policy.action, policy.rules) == ("AuthorizationPolicy/default/x", Action.DENY, DENY_EVERYTHING)
    assert "not been received" in policy.reason
