"""The mesh's kinds in a test's API server. Their schemas take anything, so that what is refused is refused by us."""

from __future__ import annotations

from tests.kit.kube_api import ApiError, ApiServer
from tests.kit.polling import eventually

KINDS = (
    ("security.istio.io", "AuthorizationPolicy", "authorizationpolicies", "Namespaced"),
    ("security.istio.io", "PeerAuthentication", "peerauthentications", "Namespaced"),
    ("gateway.networking.k8s.io", "Gateway", "gateways", "Namespaced"),
    ("gateway.networking.k8s.io", "GatewayClass", "gatewayclasses", "Cluster"),
)
"""API group, kind, its plural and its scope."""


def define(api: ApiServer) -> None:
    """Install them in version v1, and wait until they are served."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"openAPIV3Schema": {**anything, "properties": {"status": anything}}}
    for group, kind, plural, scope in KINDS:
        names = {"plural": plural, "kind": kind, "singular": kind.lower(), "listKind": f"{kind}List"}
        version = {"name": "v1", "served": True, "storage": True, "schema": schema, "subresources": {"status": {}}}
        annotations = {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api/pull/2466"}
        api.apply(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"{plural}.{group}", "annotations": annotations},
                "spec": {"group": group, "scope": scope, "names": names, "versions": [version]},
            }
        )
    named = [f"crd/{plural}.{group}" for group, _, plural, _ in KINDS]
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", *named)
    # Established is not served yet: for a second or two the storage is being set up (429).
    eventually(lambda: all(_is_served(api, group, plural) for group, _, plural, _ in KINDS), within=60, saying="kinds are served")


def _is_served(api: ApiServer, group: str, plural: str) -> bool:
    try:
        api.request("GET", f"/apis/{group}/v1/{plural}")
    except ApiError:
        return False
    return True
