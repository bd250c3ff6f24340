"""Which node a pod goes to, which pods a deployment wants, which endpoints a service has: the cluster's decisions. Pure."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

from ztunnel.lab.objects import Key, container_port, is_deleting, is_ready, is_terminal, key_of, labels_of, pod_addresses, selects, uid_of
from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, flag, integer, put, strings, text

_SAFE = "bcdfghjklmnpqrstvwxz2456789"
"""The alphabet of generated names: no vowels, so no words. Source: Kubernetes `rand.SafeEncodeString`."""


def safe_digest(seed: str, length: int) -> str:
    """`length` letters that depend on `seed` alone."""
    digest = hashlib.sha256(seed.encode()).digest()
    return "".join(_SAFE[byte % len(_SAFE)] for byte in digest[:length])


def choose_node(nodes: Sequence[str], pods: Iterable[Tree]) -> str:
    """The node with the fewest pods that have not ended; the first of equals."""
    load = Counter(text(pod, "spec", "nodeName") for pod in pods if not is_terminal(pod) and not is_deleting(pod))
    return min(nodes, key=lambda node: (load[node], nodes.index(node)))


def template_hash(deployment: Tree) -> str:
    """The label that tells generations of a deployment's pods apart."""
    template = json.dumps(branch(deployment, "spec", "template"), sort_keys=True)
    return safe_digest(template, 9)


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a deployment needs now, and how far it is."""

    create: int
    remove: tuple[Key, ...]
    replicas: int
    updated: int
    ready: int


def rollout(deployment: Tree, pods: Iterable[Tree]) -> Rollout:
    """The next step of a deployment: all pods of the new generation at once, an old one goes for each new one that is ready."""
    wanted, current = integer(deployment, "spec", "replicas", default=1), template_hash(deployment)
    mine = [
        pod
        for pod in pods
        if text(deployment, "metadata", "name") == owner_name(pod) and not is_deleting(pod) and _same_namespace(deployment, pod)
    ]
    new = [pod for pod in mine if labels_of(pod).get("pod-template-hash") == current]
    old = [pod for pod in mine if labels_of(pod).get("pod-template-hash") != current]
    ready_new = sum(is_ready(pod) for pod in new)
    surplus = sorted(new, key=lambda pod: (is_ready(pod), text(pod, "metadata", "name")))[: max(0, len(new) - wanted)]
    retired = sorted(old, key=lambda pod: (is_ready(pod), text(pod, "metadata", "name")))[: max(0, len(old) - max(0, wanted - ready_new))]
    return Rollout(
        create=max(0, wanted - len(new)),
        remove=tuple(key_of(pod) for pod in (*surplus, *retired)),
        replicas=len(mine),
        updated=len(new),
        ready=sum(is_ready(pod) for pod in mine),
    )


def owner_name(pod: Tree) -> str:
    """The deployment that a pod belongs to, by way of its ReplicaSet's name; empty for a pod of its own."""
    for owner in branches(pod, "metadata", "ownerReferences"):
        if text(owner, "kind") == "ReplicaSet":
            return text(owner, "name").rpartition("-")[0]
    return ""


def _same_namespace(one: Tree, other: Tree) -> bool:
    return text(one, "metadata", "namespace") == text(other, "metadata", "namespace")


def deployment_pod(deployment: Tree, seed: str) -> Tree:
    """A new pod of a deployment's current generation, named `<deployment>-<hash>-<letters of seed>`, owned by its ReplicaSet."""
    current = template_hash(deployment)
    replica_set = f"{text(deployment, 'metadata', 'name')}-{current}"
    template = deepcopy(branch(deployment, "spec", "template"))
    metadata: Tree = {
        "name": f"{replica_set}-{safe_digest(seed, 5)}",
        "namespace": text(deployment, "metadata", "namespace"),
        "labels": {**strings(template, "metadata", "labels"), "pod-template-hash": current},
        "ownerReferences": [
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "name": replica_set,
                "uid": _digest_uid(uid_of(deployment) + current),
                "controller": True,
            }
        ],
    }
    if annotations := strings(template, "metadata", "annotations"):
        metadata["annotations"] = annotations
    pod: Tree = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": branch(template, "spec")}
    put(pod, {"phase": "Pending"}, "status")
    return pod


def _digest_uid(seed: str) -> str:
    digits = hashlib.sha256(seed.encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:32]}"


@dataclass(frozen=True, slots=True)
class Forward:
    """What a node does with packets to one service address and port."""

    address: str
    port: int
    protocol: str
    backends: tuple[tuple[str, int], ...]


def forwards(services: Iterable[Tree], pods: Iterable[Tree]) -> tuple[Forward, ...]:
    """What kube-proxy programs: for each cluster address and port, the ready endpoints of that address' family, in stable order."""
    ready = [pod for pod in pods if is_ready(pod) and not is_deleting(pod) and pod_addresses(pod)]
    found = []
    for service in services:
        chosen = service_pods(service, ready)
        for vip in cluster_addresses(service):
            for port in branches(service, "spec", "ports"):
                protocol = text(port, "protocol", default="TCP")
                backends = [
                    (address, number)
                    for pod in chosen
                    if (number := container_port(pod, at(port, "targetPort"), protocol)) is not None
                    for address in pod_addresses(pod)
                    if (":" in address) == (":" in vip)
                ]
                found.append(Forward(vip, integer(port, "port"), protocol, tuple(sorted(backends))))
    return tuple(sorted(found, key=lambda forward: (forward.address, forward.port, forward.protocol)))


def service_pods(service: Tree, pods: Iterable[Tree]) -> list[Tree]:
    """The pods that a service selects."""
    selector = strings(service, "spec", "selector")
    return [pod for pod in pods if _same_namespace(service, pod) and selects(selector, labels_of(pod)) and not is_terminal(pod)]


def cluster_addresses(service: Tree) -> tuple[str, ...]:
    """The service's virtual addresses; empty for a headless one."""
    found = at(service, "spec", "clusterIPs")
    return tuple(address for address in found if isinstance(address, str) and address != "None") if isinstance(found, list) else ()


def is_host_network(pod: Tree) -> bool:
    """Whether the pod lives in its node's own network."""
    return flag(pod, "spec", "hostNetwork")


def is_rolled_out(deployment: Tree) -> bool:
    """Whether a deployment has as many pods as it wants, all of the current generation and ready."""
    wanted, status = integer(deployment, "spec", "replicas", default=1), branch(deployment, "status")
    is_current = integer(status, "observedGeneration") == integer(deployment, "metadata", "generation")
    return is_current and all(integer(status, field, default=-1) == wanted for field in ("replicas", "updatedReplicas", "readyReplicas"))
