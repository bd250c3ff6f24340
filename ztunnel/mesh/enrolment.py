"""Which pods are in the mesh: Istio's opt-in by labels, with the reason in words.

Source: Istio `cni/pkg/util/enablement_selector.go` and its chart's defaults.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ztunnel.mesh.manifests.core import Pod

MODE_LABEL = "istio.io/dataplane-mode"
SIDECAR = "sidecar.istio.io/status"
NO_ADDRESS = ", but it has no address yet"
"""End of the reason why a pod is not in the mesh yet."""


def enrolment(pod: Pod, namespace_labels: Mapping[str, str], excluded_namespaces: Collection[str]) -> tuple[bool, str]:
    """Whether a pod's traffic is to be captured, and why or why not."""
    wanted, reason = _labelled(pod, namespace_labels)
    if not wanted:
        return False, reason
    if pod.host_network:
        return False, f"{reason}, but it uses the node's network, which is not captured"
    if SIDECAR in pod.metadata.annotations:
        return False, f"{reason}, but it has a sidecar"
    if pod.metadata.namespace in excluded_namespaces:
        return False, f"{reason}, but namespace {pod.metadata.namespace} is excluded"
    if pod.terminal:
        return False, f"{reason}, but it has ended ({pod.phase})"
    if not pod.addresses:
        return False, f"{reason}{NO_ADDRESS}"
    return True, reason


def _labelled(pod: Pod, namespace_labels: Mapping[str, str]) -> tuple[bool, str]:
    own = pod.metadata.labels.get(MODE_LABEL)
    if own == "ambient":
        return True, f"the pod is labelled {MODE_LABEL}=ambient"
    if own == "none":
        return False, f"the pod is labelled {MODE_LABEL}=none"
    if namespace_labels.get(MODE_LABEL) == "ambient":
        return True, f"namespace {pod.metadata.namespace} is labelled {MODE_LABEL}=ambient"
    return False, f"neither the pod nor namespace {pod.metadata.namespace} is labelled {MODE_LABEL}=ambient"
