"""What a Gateway of ours makes: the deployment controller's part. A service account, a deployment and a service, and where it then is.

Everything that a Gateway owns is recognised by its owner reference and goes when it goes. Pure: the lab's controller and the cluster's
write what is said here. Source: Istio `pilot/pkg/config/kube/gateway/deploymentcontroller.go` and its templates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from ztunnel.mesh.manifests.tree import Tree, at, branches, integer, strings, text
from ztunnel.mesh.ports import INBOUND_HBONE, METRICS, READINESS
from ztunnel.mesh.waypoints import GATEWAY_CLASS_NAME, GATEWAY_NAME, MANAGED, MANAGED_WAYPOINT, WAYPOINT_CLASS

RBAC = "rbac.authorization.k8s.io"
ROLE = "ztunnel-gateway"
"""ClusterRole that is given in the whole cluster."""
ROLE_IN_NAMESPACE = "ztunnel-gateway-private"
"""ClusterRole that is given in the gateway's namespace."""
NAMESPACE_LABEL = "ztunnel.io/gateway-namespace"
INGRESS_CLASS = "istio"
REVISION = "istio.io/rev"
CLASSES: dict[str, str] = {
    WAYPOINT_CLASS: "istio.io/mesh-controller",
    INGRESS_CLASS: "istio.io/gateway-controller",
}
"""The classes that we run gateways of, and the controllers that are named in them."""
GRACE_SECONDS = 30
"""More than a gateway needs to linger and drain."""
_MANAGED_GATEWAY = "istio.io-gateway-controller"


PodSpec = Callable[[Tree], Tree]
"""Members of the pod spec of a Gateway's pods: its container, `container_basics` and more, and volumes. The rest is the same everywhere."""


def is_ours(gateway: Tree) -> bool:
    """Whether we run it: its class is ours, it is not for another revision, and its spec does not say that it is somewhere already."""
    ours = text(gateway, "spec", "gatewayClassName") in CLASSES and _is_of_our_revision(gateway)
    return ours and not branches(gateway, "spec", "addresses")


def _is_of_our_revision(gateway: Tree) -> bool:
    return _labels(gateway).get(REVISION, "default") == "default"


def name_of(gateway: Tree) -> str:
    """The name of what is made for a gateway: a waypoint's is its own, an ingress gateway's has its class behind it."""
    name, gateway_class = text(gateway, "metadata", "name"), text(gateway, "spec", "gatewayClassName")
    return name if gateway_class == WAYPOINT_CLASS else f"{name}-{gateway_class}"


def belongings(gateway: Tree, pod_spec: PodSpec) -> list[Tree]:
    """The objects that a gateway needs: ServiceAccount, Service, Deployment. Its number of pods is left to whoever scales it."""
    name, gateway_name = name_of(gateway), text(gateway, "metadata", "name")
    labels, pod_labels = _own_labels(gateway), _pod_labels(gateway)
    selector = {GATEWAY_NAME: gateway_name}
    scrape = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS), "prometheus.io/path": "/stats/prometheus"}
    template = {
        "metadata": {"labels": pod_labels, "annotations": {**strings(gateway, "spec", "infrastructure", "annotations"), **scrape}},
        "spec": {"serviceAccountName": name, "terminationGracePeriodSeconds": GRACE_SECONDS, **pod_spec(gateway)},
    }
    return [
        _object(gateway, "v1", "ServiceAccount", name, labels, {}),
        _object(gateway, "v1", "Service", name, labels, {"spec": {"selector": selector, "ports": _service_ports(gateway)}}),
        _object(gateway, "apps/v1", "Deployment", name, labels, {"spec": {"selector": {"matchLabels": selector}, "template": template}}),
    ]


def bindings(gateway: Tree) -> list[Tree]:
    """The rights of a gateway's pods in a cluster: to read the mesh, and the secrets and texts of its own namespace."""
    name, namespace = name_of(gateway), text(gateway, "metadata", "namespace")
    account: Tree = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    labels = {GATEWAY_NAME: text(gateway, "metadata", "name"), MANAGED: MANAGED_WAYPOINT}
    own = _object(gateway, f"{RBAC}/v1", "RoleBinding", name, labels, _grant(ROLE_IN_NAMESPACE, account))
    # Nothing of a namespace can own what is of the cluster: it is known by its name and labels.
    everywhere: Tree = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": f"{ROLE}:{namespace}:{name}", "labels": {**labels, NAMESPACE_LABEL: namespace}},
        **_grant(ROLE, account),
    }
    return [own, everywhere]


def _grant(role: str, account: Tree) -> Tree:
    return {"roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role}, "subjects": [account]}


def _own_labels(gateway: Tree) -> dict[str, str]:
    gateway_class = text(gateway, "spec", "gatewayClassName")
    return {
        **strings(gateway, "spec", "infrastructure", "labels"),
        GATEWAY_NAME: text(gateway, "metadata", "name"),
        GATEWAY_CLASS_NAME: gateway_class,
        MANAGED: MANAGED_WAYPOINT if gateway_class == WAYPOINT_CLASS else _MANAGED_GATEWAY,
    }


def _pod_labels(gateway: Tree) -> dict[str, str]:
    return {
        **_own_labels(gateway),
        "sidecar.istio.io/inject": "false",
        "istio.io/dataplane-mode": "none",
        "service.istio.io/canonical-name": name_of(gateway)[:63].rstrip("-."),
        "service.istio.io/canonical-revision": "latest",
    }


def is_owned_by(body: Tree, uids: Iterable[str]) -> bool | None:
    """Whether one of these gateways owns an object; None when no gateway does."""
    owners = [text(owner, "uid") for owner in branches(body, "metadata", "ownerReferences") if text(owner, "kind") == "Gateway"]
    return any(owner in uids for owner in owners) if owners else None


def is_left_over(body: Tree, gateways: Iterable[Tree], served: Collection[str]) -> bool:
    """Whether an object was made by us for a Gateway that is there, but is no longer run by us.

    What another controller of Istio's makes has the same labels: of another class's nothing is ours; of another revision's only the
    rights, for its controller goes on with the rest.

    Args:
        served: UIDs of the gateways that we run.
    """
    labels = _labels(body)
    made_for = labels.get(GATEWAY_CLASS_NAME, WAYPOINT_CLASS)
    if GATEWAY_NAME not in labels or labels.get(MANAGED) not in (MANAGED_WAYPOINT, _MANAGED_GATEWAY) or made_for not in CLASSES:
        return False
    if is_owned_by(body, served) is not False:
        return False
    is_right = text(body, "kind") == "RoleBinding"
    known = {text(each, "metadata", "uid") for each in gateways if is_right or _is_of_our_revision(each)}
    return is_owned_by(body, known) is True


def addresses(gateway: Tree, service: Tree | None, is_ready: bool, domain: str = "cluster.local") -> list[Tree]:
    """`status.addresses`: its service's, from the moment that a pod of it was ready; they are not taken back (as in Istio)."""
    if service is None or not (is_ready or branches(gateway, "status", "addresses")):
        return []
    namespace = text(gateway, "metadata", "namespace")
    found: list[Tree] = [{"type": "IPAddress", "value": address} for address in _cluster_addresses(service)]
    return [*found, {"type": "Hostname", "value": f"{text(service, 'metadata', 'name')}.{namespace}.svc.{domain}"}]


def is_pod_of(pod: Tree, gateway: Tree) -> bool:
    """Whether a pod is one of a gateway's."""
    name, namespace = text(gateway, "metadata", "name"), text(gateway, "metadata", "namespace")
    return _labels(pod).get(GATEWAY_NAME) == name and text(pod, "metadata", "namespace") == namespace


def _object(gateway: Tree, version: str, kind: str, name: str, labels: dict[str, str], more: Tree) -> Tree:
    owner = {
        "apiVersion": text(gateway, "apiVersion"),
        "kind": "Gateway",
        "name": text(gateway, "metadata", "name"),
        "uid": text(gateway, "metadata", "uid"),
        "controller": True,
    }
    metadata: Tree = {
        "name": name,
        "namespace": text(gateway, "metadata", "namespace"),
        "labels": dict(labels),
        "ownerReferences": [owner],
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def proxy_environment(gateway: Tree) -> dict[str, str]:
    """What a gateway's program is told of itself: settings of `waypoint`, by their variables."""
    found = {"WAYPOINT_NAME": text(gateway, "metadata", "name"), "WAYPOINT_NAMESPACE": text(gateway, "metadata", "namespace")}
    if text(gateway, "spec", "gatewayClassName") == WAYPOINT_CLASS:
        return found
    labels = ",".join(f"{name}={value}" for name, value in told_labels(_pod_labels(gateway)))
    return {**found, "WAYPOINT_KIND": "gateway", "WAYPOINT_SERVICE_ACCOUNT": name_of(gateway), "WAYPOINT_LABELS": labels}


def told_labels(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Of a pod's labels, those that its gateway is told: what Gateways of Istio's own may select it by. Generations have the same."""
    return tuple(sorted((name, value) for name, value in labels.items() if name != "pod-template-hash"))


def container_basics(gateway: Tree) -> Tree:
    """What every gateway's container has: name, ports, readiness probe, security context."""
    is_waypoint = text(gateway, "spec", "gatewayClassName") == WAYPOINT_CLASS
    ports = [] if not is_waypoint else [{"containerPort": INBOUND_HBONE, "name": "mesh"}]
    capabilities: Tree = {"drop": ["ALL"]} if is_waypoint else {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}
    return {
        "name": "istio-proxy",
        "ports": [*ports, {"containerPort": METRICS, "name": "metrics"}, {"containerPort": READINESS, "name": "status-port"}],
        "readinessProbe": {"httpGet": {"path": "/healthz/ready", "port": READINESS}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
    }


def _service_ports(gateway: Tree) -> list[Tree]:
    found: list[Tree] = [{"name": "status-port", "port": READINESS, "targetPort": READINESS}]
    if text(gateway, "spec", "gatewayClassName") == WAYPOINT_CLASS:
        return [*found, {"name": "mesh", "port": INBOUND_HBONE, "targetPort": INBOUND_HBONE}]
    seen = {READINESS}
    for listener in branches(gateway, "spec", "listeners"):
        port = integer(listener, "port")
        if port not in seen:
            seen.add(port)
            name = f"{text(listener, 'protocol').split('/')[-1].lower()[:8]}-{port}"
            found.append({"name": name, "port": port, "targetPort": port})
    return found


def gateway_class(name: str) -> Tree:
    """One of the classes that are there without anybody having written them."""
    what = "waypoints" if name == WAYPOINT_CLASS else "gateways"
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": name},
        "spec": {"controllerName": CLASSES[name], "description": f"The default class of {what}"},
    }


def _labels(body: Tree) -> dict[str, str]:
    return strings(body, "metadata", "labels")


def _cluster_addresses(service: Tree) -> list[str]:
    found = at(service, "spec", "clusterIPs")
    return [each for each in found if isinstance(each, str) and each != "None"] if isinstance(found, list) else []
