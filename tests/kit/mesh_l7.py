"""Short words for tests of what an L7 proxy is told: manifests of its kinds, and the configuration that some of them come to."""

from __future__ import annotations

from collections.abc import Iterable

from tests.kit.builders import Json, mesh, metadata
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.clusters import Cluster
from ztunnel.mesh.l7.config import ProxyConfig
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject, key, parse

WAYPOINT = ObjectKey("Gateway", "default", "waypoint")


def istio(kind: str, name: str = "x", *, namespace: str = "default", created: str = "", **spec: object) -> Json:
    """An object of networking.istio.io."""
    meta = metadata(name, namespace, **({"creationTimestamp": created} if created else {}))
    return {"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": meta, "spec": spec}


def gateway_api(kind: str, name: str = "x", *, namespace: str = "default", created: str = "", **spec: object) -> Json:
    """An object of gateway.networking.k8s.io."""
    meta = metadata(name, namespace, **({"creationTimestamp": created} if created else {}))
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": meta, "spec": spec}


def secret(name: str, namespace: str = "default", **entries: str) -> Json:
    """A Secret; `tls_crt` is its entry `tls.crt`."""
    data = {name.replace("_", "."): value for name, value in entries.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata(name, namespace), "stringData": data}


def read_all(bodies: Iterable[object]) -> dict[ObjectKey, KubeObject]:
    """The objects of some manifests."""
    return {key(each): each for each in (parse(body, "test") for body in bodies)}


def hostname(name: str, namespace: str = "default") -> str:
    """A Service's full name."""
    return f"{name}.{namespace}.svc.cluster.local"


def waypoint(*bodies: Json, serves: Iterable[str] = ("web",), namespace: str = "default", more: Iterable[KubeObject] = ()) -> ProxyConfig:
    """What `WAYPOINT` is told when it serves these Services of a namespace (or hosts, where they have a dot).

    Args:
        more: objects beside those of the manifests.
    """
    services = frozenset(f"{namespace}/{each if '.' in each else hostname(each, namespace)}" for each in serves)
    objects = read_all(bodies) | {key(each): each for each in more}
    return derive_proxy(objects, mesh(*bodies), MeshOptions(), WAYPOINT, Bound(services))


def only_cluster(config: ProxyConfig) -> Cluster:
    """The cluster of a configuration that has one."""
    (found,) = config.clusters.values()
    return found
