"""How a cluster runs a Gateway: the pod spec of its Deployment.

Non-root, without capabilities (an ingress gateway may bind ports below 1024), read-only, with its own projected token for the authority
and the ConfigMap of the authority's roots, which the authority keeps in every namespace (`publish.namespaces: ["*"]`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.controller.belongings import container_basics, proxy_environment
from ztunnel.mesh.manifests.tree import Tree, branch

USER = 65532
"""Nobody in particular, as in the image."""
_TOKENS = "/var/run/secrets/tokens"
_ROOTS = "/var/run/secrets/ztunnel/roots"
_GRACE_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettingsOfPods:
    """What every gateway's pod is given."""

    image: str
    pull_policy: str
    environment: tuple[tuple[str, str], ...]
    """Further variables: settings of `waypoint`, by their names."""
    roots_config_map: str
    requests: tuple[tuple[str, str], ...]
    limits: tuple[tuple[str, str], ...]

    def pod_spec(self, gateway: Tree) -> Tree:
        """Of one Gateway's pods (`controller.belongings.PodSpec`)."""
        basics = container_basics(gateway)
        container: Tree = {
            **basics,
            "image": self.image,
            "imagePullPolicy": self.pull_policy,
            "args": ["waypoint", "run"],
            "env": [
                *({"name": name, "value": value} for name, value in proxy_environment(gateway).items()),
                {"name": "WAYPOINT_NODE", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}},
                *({"name": name, "value": value} for name, value in self.environment),
            ],
            "startupProbe": {
                "httpGet": branch(basics, "readinessProbe", "httpGet"),
                "initialDelaySeconds": 1,
                "periodSeconds": 1,
                "failureThreshold": 30,
            },
            "resources": {"requests": dict(self.requests), "limits": dict(self.limits)},
            "securityContext": {
                **branch(basics, "securityContext"),
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "privileged": False,
            },
            "volumeMounts": [
                {"name": "token", "mountPath": _TOKENS, "readOnly": True},
                {"name": "roots", "mountPath": _ROOTS, "readOnly": True},
                {"name": "run", "mountPath": "/run/waypoint"},
            ],
        }
        token = {"serviceAccountToken": {"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"}}
        return {
            "containers": [container],
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            "volumes": [
                {"name": "token", "projected": {"sources": [token]}},
                {"name": "roots", "configMap": {"name": self.roots_config_map}},
                {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
            ],
        }
