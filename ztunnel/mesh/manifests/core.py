"""Namespace, ServiceAccount, Pod and Service: read for what the mesh needs, unknown fields ignored as Kubernetes does.

Source: Kubernetes core/v1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ztunnel.mesh.l7.rate_limit import check_rate_limits
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata

TERMINAL_PHASES: Final = frozenset(("Succeeded", "Failed"))
_PORT_NAME: Final = re.compile(r"[a-z0-9-]{0,14}[a-z][a-z0-9-]{0,14}")
_PROTOCOLS: Final = ("TCP", "UDP", "SCTP")
_TYPES: Final = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Its labels decide whether its pods are in the mesh."""

    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Node:
    """Its labels say in which region and zone its pods are."""

    metadata: Metadata


@dataclass(frozen=True, slots=True)
class ServiceAccountObject:
    """Known so that it can be listed; a pod's identity comes from the name that the pod states."""

    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod, as its manifest and its status say."""

    metadata: Metadata
    node: str = ""
    service_account: str = "default"
    host_network: bool = False
    ports: dict[str, int] = field(default_factory=dict)
    """Numbers of the named TCP ports of its containers."""
    phase: str = ""
    addresses: tuple[str, ...] = ()
    ready: bool = False
    """Its Ready condition."""

    @property
    def terminal(self) -> bool:
        """Whether it has ended for good; its addresses may belong to another pod by now."""
        return self.phase in TERMINAL_PHASES


@dataclass(frozen=True, slots=True)
class ServicePortObject:
    """One TCP port; `target` is a number or the name of a container's port."""

    port: int
    target: int | str
    name: str = ""
    app_protocol: str = ""


@dataclass(frozen=True, slots=True)
class ServiceObject:
    """One service. Without `vips` it is headless, or its address is not assigned yet."""

    metadata: Metadata
    vips: tuple[str, ...] = ()
    ports: tuple[ServicePortObject, ...] = ()
    selector: dict[str, str] = field(default_factory=dict)
    publish_not_ready: bool = False
    traffic_distribution: str = ""
    ignored: str = ""
    """Why the mesh does nothing with it; empty when it does."""


def read_namespace(document: Field) -> Namespace:
    """A Namespace."""
    return Namespace(read_metadata(document, namespaced=False))


def read_node(document: Field) -> Node:
    """A Node. Its name may have dots, a namespace's may not."""
    metadata = document.get("metadata")
    name = metadata.get("name").name()
    return Node(Metadata(name, uid=name, labels=metadata.get("labels").labels()))


def read_service_account(document: Field) -> ServiceAccountObject:
    """A ServiceAccount."""
    return ServiceAccountObject(read_metadata(document))


def read_pod(document: Field) -> Pod:
    """A Pod."""
    spec, status = document.get("spec"), document.get("status")
    return Pod(
        metadata=read_metadata(document),
        node=spec.get("nodeName").name(""),
        service_account=spec.get("serviceAccountName").name("default"),
        host_network=spec.get("hostNetwork").boolean(),
        ports=dict(_container_ports(spec)),
        phase=status.get("phase").text(""),
        addresses=_addresses(status.get("podIPs"), status.get("podIP")),
        ready=any(
            condition.get("type").text() == "Ready" and condition.get("status").text() == "True"
            for condition in status.get("conditions").items()
        ),
    )


def read_service(document: Field) -> ServiceObject:
    """A Service.

    Raises:
        ManifestError: a field that we read is not what it should be.
    """
    metadata = read_metadata(document)
    check_rate_limits(document)
    spec = document.get("spec")
    kind = spec.get("type")
    if kind.text("ClusterIP") not in _TYPES:
        raise kind.wrong(f"not one of {', '.join(_TYPES)}")
    if kind.value == "ExternalName":
        return ServiceObject(metadata, ignored="ExternalName is a DNS name, not a destination: connections go to what it names")
    return ServiceObject(
        metadata=metadata,
        vips=_vips(spec.get("clusterIPs"), spec.get("clusterIP")),
        ports=_service_ports(spec.get("ports")),
        selector=spec.get("selector").labels(),
        publish_not_ready=spec.get("publishNotReadyAddresses").boolean(),
        traffic_distribution=spec.get("trafficDistribution").text(""),
    )


def _container_ports(spec: Field) -> Iterator[tuple[str, int]]:
    containers = spec.get("containers").items()
    # An init container that is restarted always is a sidecar: it serves for the pod's whole life.
    sidecars = [each for each in spec.get("initContainers").items() if each.get("restartPolicy").text("") == "Always"]
    for container in containers + sidecars:
        for port in container.get("ports").items():
            number = port.get("containerPort").port()
            if _protocol(port) == "TCP" and not port.get("name").absent:
                yield _port_name(port.get("name")), number


def _addresses(several: Field, one: Field) -> tuple[str, ...]:
    listed = [item.get("ip").address() for item in several.items()]
    if not listed and not one.absent:
        # An unassigned address is written as empty text by some clients.
        listed = [] if one.value == "" else [one.address()]
    return tuple(dict.fromkeys(listed))


def _vips(several: Field, one: Field) -> tuple[str, ...]:
    fields = several.items() or ([] if one.absent else [one])
    return tuple(dict.fromkeys(each.address() for each in fields if each.value not in ("", "None")))


def _service_ports(place: Field) -> tuple[ServicePortObject, ...]:
    ports: dict[int, ServicePortObject] = {}
    for item in place.items():
        number = item.get("port").port()
        if _protocol(item) != "TCP":
            continue
        if number in ports:
            raise item.get("port").error(f"port {number} is listed twice")
        name = item.get("name")
        ports[number] = ServicePortObject(
            port=number,
            target=_target(item.get("targetPort"), number),
            name="" if name.absent else name.label_value(),
            app_protocol=item.get("appProtocol").text(""),
        )
    return tuple(ports.values())


def _target(place: Field, default: int) -> int | str:
    if place.absent:
        return default
    return _port_name(place) if isinstance(place.value, str) else place.port()


def _protocol(port: Field) -> str:
    protocol = port.get("protocol")
    if protocol.text("TCP") not in _PROTOCOLS:
        raise protocol.wrong(f"not one of {', '.join(_PROTOCOLS)}")
    return protocol.text("TCP")


def _port_name(place: Field) -> str:
    name = place.text()
    if len(name) > 15 or not _PORT_NAME.fullmatch(name):
        raise place.wrong("not a port name (at most 15 lower-case letters, digits and -, with a letter)")
    return name
