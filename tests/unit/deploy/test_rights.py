"""The rights that deploy/ grants are those that the code asks for: no more, and none forgotten when a kind is read anew.

What fails here is mended in deploy/helm/ztunnel/templates/*-rights.yaml; then scripts/render-deploy.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ztunnel.controller.belongings import RBAC, ROLE, ROLE_IN_NAMESPACE
from ztunnel.controller.bodies import KINDS
from ztunnel.kube.resources import CONFIG_MAPS, EVENTS, LEASES, NAMESPACES, PODS, SECRETS, TOKEN_REVIEWS
from ztunnel.sources.kubernetes import MESH_KINDS, proxy

BASE = Path(__file__).parents[3] / "deploy" / "kustomize" / "base"
Right = tuple[str, str, str, str]
"""API group, resource, verb, and the object's name or empty."""


def rights(file: str, kind: str, name: str = "") -> set[Right]:
    documents: list[Any] = list(yaml.safe_load_all((BASE / file).read_text()))
    (role,) = [each for each in documents if each["kind"] == kind and name in ("", each["metadata"]["name"])]
    return {
        right
        for rule in role["rules"]
        for right in product(rule["apiGroups"], rule["resources"], rule["verbs"], rule.get("resourceNames") or [""])
    }


def plural(kind: str) -> str:
    lower = kind.lower()
    if lower.endswith(("cy", "ry")):
        return lower[:-1] + "ies"
    return lower + ("es" if lower.endswith("s") else "s")


def test_the_agents_rights() -> None:
    asked: set[Right] = {(kind.group, plural(kind.kind), verb, "") for kind in MESH_KINDS for verb in ("list", "watch")}
    asked |= {(PODS.group, PODS.plural, "patch", ""), (EVENTS.group, EVENTS.plural, "create", "")}
    assert rights("agent-rights.yaml", "ClusterRole") == asked


def test_the_authoritys_rights() -> None:
    review = (TOKEN_REVIEWS.group, TOKEN_REVIEWS.plural, "create", "")
    everywhere: set[Right] = {("", CONFIG_MAPS.plural, "create", "")}
    everywhere |= {("", CONFIG_MAPS.plural, verb, "ztunnel-ca-root-cert") for verb in ("get", "update")}
    everywhere |= {("", plural, verb, "") for plural in (PODS.plural, NAMESPACES.plural) for verb in ("list", "watch")}
    assert rights("ca-rights.yaml", "ClusterRole") == {review, *everywhere}
    own: set[Right] = set()
    for resource, name in ((SECRETS.plural, "ztunnel-ca"), (CONFIG_MAPS.plural, "ztunnel-ca-root-cert")):
        own |= {("", resource, "create", ""), ("", resource, "get", name), ("", resource, "update", name)}
    assert rights("ca-rights.yaml", "Role") == own


OWNED = {"ServiceAccount", "Service", "Deployment", "RoleBinding", "ClusterRoleBinding"}
UNTOLD = {"Namespace", "ServiceAccount", "Deployment", "RoleBinding", "ClusterRoleBinding", "ReferenceGrant", "WorkloadEntry"}
"""Kinds in whose status nothing is written."""


def test_the_controllers_rights() -> None:
    asked: set[Right] = set()
    for kind in KINDS:
        verbs = ["list", "watch"]
        verbs += ["create", "patch", "delete"] if kind.kind in OWNED else ["create"] if kind.kind == "GatewayClass" else []
        asked |= {(kind.group, plural(kind.kind), verb, "") for verb in verbs}
        if kind.kind not in UNTOLD:
            asked.add((kind.group, f"{plural(kind.kind)}/status", "patch", ""))
    asked |= {(RBAC, "clusterroles", "bind", name) for name in (ROLE, ROLE_IN_NAMESPACE)}
    assert rights("controller-rights.yaml", "ClusterRole") == asked
    lease = (LEASES.group, LEASES.plural)
    assert rights("controller-rights.yaml", "Role") == {
        (*lease, "create", ""),
        (*lease, "get", "ztunnel-controller"),
        (*lease, "update", "ztunnel-controller"),
    }


def test_the_rights_of_gateways_pods() -> None:
    everywhere: set[Right] = set()
    private: set[Right] = set()
    for wanted in proxy("shop", "istio-system"):
        into = everywhere if not wanted.namespace or wanted.name else private
        into |= {(wanted.kind.group, plural(wanted.kind.kind), verb, wanted.name) for verb in ("list", "watch")}
    assert rights("gateway-rights.yaml", "ClusterRole", ROLE) == everywhere
    assert rights("gateway-rights.yaml", "ClusterRole", ROLE_IN_NAMESPACE) == private
