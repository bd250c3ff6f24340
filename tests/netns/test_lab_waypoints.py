"""Waypoints in a lab, from manifests: who goes through one, and what happens while there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kit import labs
from tests.kit.labs import Lab
from tests.kit.polling import eventually
from ztunnel.mesh.manifests.tree import Tree, branches, text
from ztunnel.mesh.waypoints import GATEWAY_NAME
from ztunnel.settings import variable

pytestmark = pytest.mark.slow

APPLICATIONS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: front}}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080, name: http}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: echo, image: echo, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {containers: [{name: curl, image: curlimages/curl}]}
"""
RESET = (7, 56)
"""What curl says of a connection that is reset: before it knows that it is connected, or after."""
PROXY_READER = """
import socket
server = socket.create_server(("127.0.0.1", 15088))
while True:
    sock, _ = server.accept()
    head = sock.recv(16)
    if len(head) < 16:
        sock.close()  # somebody who only asks whether we listen
        continue
    body = sock.recv(int.from_bytes(head[14:16], "big"))
    wanted = socket.inet_ntop(socket.AF_INET, body[4:8]), int.from_bytes(body[10:12], "big")
    sock.recv(65536)
    told = f"{wanted[0]}:{wanted[1]} {body[15:].decode()}"
    sock.sendall(f"HTTP/1.1 200 OK\\r\\ncontent-length: {len(told)}\\r\\nconnection: close\\r\\n\\r\\n{told}".encode())
    sock.close()
"""


def foreign(binding: str, container: dict[str, object]) -> list[dict[str, object]]:
    """A proxy of somebody else's that is a waypoint: a captured pod, and a Gateway that says where it is."""
    labels = {GATEWAY_NAME: "front"}
    spec = {"gatewayClassName": "foreign", "listeners": [{"name": "in", "port": 15088, "protocol": "istio.io/PROXY"}]}
    addresses = [{"type": "Hostname", "value": "front.shop.svc.cluster.local"}]
    return [
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "front", "namespace": "shop", "annotations": {"ambient.istio.io/waypoint-inbound-binding": binding}},
            "spec": {**spec, "addresses": addresses},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "front", "namespace": "shop"},
            "spec": {"selector": labels, "ports": [{"port": 80}]},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "front", "namespace": "shop", "labels": labels},
            "spec": {"containers": [{"name": "proxy", **container}]},
        },
    ]


@pytest.fixture(name="lab", scope="module")
def fixture_lab() -> Iterator[Lab]:
    """Applications of which one wants a waypoint that is not there."""
    with labs.up(APPLICATIONS) as found:
        yield found


def test_while_the_waypoint_is_missing_nothing_goes_through(lab: Lab) -> None:
    refused = lab.curl("client", "http://web/", namespace="shop")
    assert refused.code in RESET, refused
    assert lab.curl("client", f"http://{lab.address('web', 'shop')}:8080/", namespace="shop").code == 0, "by its own address it has none"
    condition = next(iter(branches(lab.get("service", "web", "shop"), "status", "conditions")))
    assert (text(condition, "type"), text(condition, "reason")) == ("istio.io/WaypointBound", "WaypointIsNotReady")
    node = text(lab.get("pod", "client", "shop"), "spec", "nodeName")
    eventually(lambda: "is not ready: there is no such Gateway" in lab.logs(f"node/{node}"))


def test_a_foreign_proxy_is_a_waypoint_and_reads_what_was_dialled(lab: Lab) -> None:
    vip = text(lab.get("service", "web", "shop"), "spec", "clusterIP")
    objects = foreign("PROXY/15088", {"command": [sys.executable, "-c", PROXY_READER], "ports": [{"containerPort": 15088}]})
    lab.apply(objects)
    lab.settle()
    told = lab.curl("client", "http://web/", namespace="shop")
    assert told.stdout == f"{vip}:80 spiffe://cluster.local/ns/shop/sa/default", told
    node = text(lab.get("pod", "client", "shop"), "spec", "nodeName")
    eventually(lambda: "waypoint=shop/front" in lab.logs(f"node/{node}"))
    lab.delete("pod", "front", "shop")
    lab.settle()
    assert lab.curl("client", "http://web/", namespace="shop").code in RESET, "a waypoint without a pod is none to do without"
    lab.delete("gateway", "front", "shop")
    lab.settle()


@pytest.mark.parametrize("ip_family", ["ipv6", "dual"])
def test_a_waypoint_of_the_labs_own_in_other_address_families(ip_family: str) -> None:
    listeners = [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]
    gateway: Tree = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "front", "namespace": "shop"},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": listeners},
    }
    with labs.up([APPLICATIONS, gateway], nodes=1, ip_family=ip_family) as lab:
        told = lab.curl("client", "http://web/", "-6", "-i", namespace="shop")
        assert told.code == 0, told
        assert "server: istio-envoy" in told.stdout.lower()


@contextmanager
def fallback(value: str) -> Iterator[None]:
    """Agents of labs that are brought up meanwhile have this setting."""
    name = variable("waypoint.fallback")
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def test_an_operator_can_have_them_done_without() -> None:
    with fallback("l4"), labs.up(APPLICATIONS, nodes=1) as lab:
        answer = lab.curl("client", "http://web/", namespace="shop")
        assert answer.code == 0, answer
