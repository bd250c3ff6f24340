"""Pods, services, namespaces and service accounts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.kit.builders import namespace, pod, service_manifest
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.core import (
    Pod,
    ServiceObject,
    ServicePortObject,
    read_namespace,
    read_pod,
    read_service,
    read_service_account,
)
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata


def read(**parts: Mapping[str, object]) -> Pod:
    return read_pod(Field("Pod default/x", "", pod("x", "10.0.0.1", **parts)))  # type: ignore[arg-type]  # parts by name


def service(*vips: str, **spec: object) -> ServiceObject:
    return read_service(Field("Service default/web", "", service_manifest("web", *vips, **spec)))  # type: ignore[arg-type]  # spec by name


def test_namespaces_and_service_accounts_are_their_metadata() -> None:
    assert read_namespace(Field("Namespace shop", "", namespace("shop"))).metadata.labels == {"istio.io/dataplane-mode": "ambient"}
    body = {"metadata": {"name": "cart", "namespace": "shop"}}
    assert read_service_account(Field("ServiceAccount shop/cart", "", body)).metadata == Metadata("cart", "shop", "shop.cart")


def test_a_pod_as_it_runs() -> None:
    assert read() == Pod(Metadata("x", "default", "uid-x"), node="node", phase="Running", addresses=("10.0.0.1",), ready=True)
    assert read(spec={"serviceAccountName": "cart", "hostNetwork": True}).service_account == "cart"
    assert read(spec={"hostNetwork": True}).host_network


def test_a_pod_that_has_not_started() -> None:
    bare = read_pod(Field("Pod default/x", "", {"metadata": {"name": "x"}}))
    assert bare == Pod(Metadata("x", "default", "default.x"))
    assert not bare.terminal


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_ended_pods_are_terminal(phase: str) -> None:
    assert read(status={"phase": phase}).terminal


def test_addresses_are_canonical_and_single() -> None:
    assert read(status={"podIPs": [{"ip": "::ffff:10.0.0.1"}, {"ip": "FD00::1"}, {"ip": "10.0.0.1"}]}).addresses == ("10.0.0.1", "fd00::1")
    assert read(status={"podIPs": None, "podIP": "10.0.0.2"}).addresses == ("10.0.0.2",)
    assert read(status={"podIPs": None, "podIP": ""}).addresses == ()
    assert read(status={"podIPs": None}).addresses == ()


@pytest.mark.parametrize("conditions", [[], None, [{"type": "Ready", "status": "False"}], [{"type": "Other", "status": "True"}]])
def test_ready_is_its_condition(conditions: object) -> None:
    assert not read(status={"conditions": conditions}).ready


def test_named_tcp_ports_of_containers_and_sidecars() -> None:
    def container(name: str, number: int, **more: object) -> dict[str, object]:
        return {"ports": [{"name": name, "containerPort": number, **more}]}

    ports = read(
        spec={
            "containers": [container("http", 8080), container("dns", 53, protocol="UDP"), {"ports": [{"containerPort": 9}]}],
            "initContainers": [{**container("side", 15), "restartPolicy": "Always"}, container("init", 16)],
        }
    ).ports
    assert ports == {"http": 8080, "side": 15}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"spec": {"containers": [{"ports": [{"name": "8080", "containerPort": 1}]}]}},
            r"containers\[0\]\.ports\[0\]\.name: not a port name",
        ),
        ({"spec": {"containers": [{"ports": [{"name": "x" * 16, "containerPort": 1}]}]}}, "not a port name"),
        ({"spec": {"containers": [{"ports": [{"containerPort": "80"}]}]}}, "containerPort: not a port number"),
        ({"spec": {"containers": [{"ports": [{"containerPort": 80, "protocol": "tcp"}]}]}}, "protocol: not one of TCP, UDP, SCTP"),
        ({"spec": {"containers": "x"}}, "spec.containers: not a list"),
        ({"spec": {"hostNetwork": "yes"}}, "spec.hostNetwork: not a boolean"),
        ({"spec": {"serviceAccountName": "a/b"}}, "spec.serviceAccountName: not a name"),
        ({"status": {"podIPs": [{"ip": "10.0.0.300"}]}}, r"status.podIPs\[0\].ip: not an IP address"),
        ({"status": {"podIPs": ["10.0.0.1"]}}, r"status.podIPs\[0\]: not a mapping"),
    ],
)
def test_hostile_pods_are_refused(parts: Mapping[str, Mapping[str, object]], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read(**parts)


def test_a_service() -> None:
    found = service(
        "10.1.0.1",
        "fd01::1",
        selector={"app": "web"},
        ports=[
            {"name": "http", "port": 80, "targetPort": 8080},
            {"name": "grpc", "port": 90, "targetPort": "grpc", "protocol": "TCP"},
            {"port": 53, "protocol": "UDP"},
            {"port": 7},
        ],
        publishNotReadyAddresses=True,
    )
    assert found == ServiceObject(
        metadata=Metadata("web", "default", "default.web"),
        vips=("10.1.0.1", "fd01::1"),
        ports=(ServicePortObject(80, 8080, "http"), ServicePortObject(90, "grpc", "grpc"), ServicePortObject(7, 7)),
        selector={"app": "web"},
        publish_not_ready=True,
    )


def test_addresses_of_services() -> None:
    assert service().vips == ()
    assert service(clusterIPs=None, clusterIP="None").vips == ()
    assert service(clusterIPs=None, clusterIP=None).vips == ()
    assert service(clusterIPs=None, clusterIP="").vips == ()
    assert service(clusterIPs=None, clusterIP="10.1.0.1").vips == ("10.1.0.1",)


def test_an_external_name_is_ignored_with_a_reason() -> None:
    assert service(type="ExternalName", externalName="example.com").ignored.startswith("ExternalName is a DNS name")
    assert service(type="NodePort").ignored == ""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "Magic"}, "spec.type: not one of ClusterIP, NodePort, LoadBalancer, ExternalName"),
        ({"ports": [{"port": 80}, {"port": 80}]}, r"spec.ports\[1\].port: port 80 is listed twice"),
        ({"ports": [{"port": 80, "targetPort": "8080"}]}, r"targetPort: not a port name"),
        ({"ports": [{"port": 80, "targetPort": 0}]}, r"targetPort: not a port number"),
        ({"ports": [{"port": 80, "name": "a b"}]}, r"name: not a label value"),
        ({"clusterIPs": ["10.0.0.0/8"]}, r"spec.clusterIPs\[0\]: not an IP address"),
        ({"selector": ["app"]}, "spec.selector: not a mapping"),
    ],
)
def test_hostile_services_are_refused(spec: Mapping[str, object], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        service(**spec)
