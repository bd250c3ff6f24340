"""Which fields Kubernetes' own objects have, for the parts that the lab reads. Data, and the one question about it.

A misspelt field would silently mean nothing: one pod where three were asked for, the default service account, a namespace outside
of the mesh. The API server refuses it, so the lab does. Fields that it knows and the lab does not use (probes' details, volumes)
are accepted, and what is inside of them is not looked at.

Source: Kubernetes API v1 and apps/v1, release 1.34.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ztunnel.mesh.manifests.tree import Tree


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


OBJECT = _fields("apiVersion kind metadata spec status")
TOP = {
    "ServiceAccount": _fields("apiVersion kind metadata automountServiceAccountToken imagePullSecrets secrets"),
    "ConfigMap": _fields("apiVersion kind metadata binaryData data immutable"),
    "Secret": _fields("apiVersion kind metadata data immutable stringData type"),
}
"""Of kinds that have other members than a spec and a status."""
METADATA = _fields("""
    annotations creationTimestamp deletionGracePeriodSeconds deletionTimestamp finalizers generateName generation labels managedFields
    name namespace ownerReferences resourceVersion selfLink uid
""")
POD_SPEC = _fields("""
    activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks ephemeralContainers
    hostAliases hostIPC hostNetwork hostPID hostUsers hostname hostnameOverride imagePullSecrets initContainers nodeName nodeSelector os
    overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims resources restartPolicy runtimeClassName
    schedulerName schedulingGates securityContext serviceAccount serviceAccountName setHostnameAsFQDN shareProcessNamespace subdomain
    terminationGracePeriodSeconds tolerations topologySpreadConstraints volumes
""")
CONTAINER = _fields("""
    args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe resizePolicy resources restartPolicy
    restartPolicyRules securityContext startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy tty volumeDevices
    volumeMounts workingDir
""")
CONTAINER_PORT = _fields("containerPort hostIP hostPort name protocol")
ENVIRONMENT = _fields("name value valueFrom")
DEPLOYMENT_SPEC = _fields("minReadySeconds paused progressDeadlineSeconds replicas revisionHistoryLimit selector strategy template")
POD_TEMPLATE = _fields("metadata spec")
SERVICE_SPEC = _fields("""
    allocateLoadBalancerNodePorts clusterIP clusterIPs externalIPs externalName externalTrafficPolicy healthCheckNodePort
    internalTrafficPolicy ipFamilies ipFamilyPolicy loadBalancerClass loadBalancerIP loadBalancerSourceRanges ports
    publishNotReadyAddresses selector sessionAffinity sessionAffinityConfig trafficDistribution type
""")
SERVICE_PORT = _fields("appProtocol name nodePort port protocol targetPort")


def unknown_field(node: Tree, known: Iterable[str]) -> tuple[str, str] | None:
    """The first field of `node` that is none of `known`, and what is wrong with it; None if all are."""
    fields = sorted(known)
    for name in node:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            return str(name), "unknown field" + (f"; did you mean {close[0]}?" if close else "")
    return None
