"""ServiceEntry and WorkloadEntry as they are read."""

from __future__ import annotations

import re

import pytest

from tests.kit.builders import Json
from tests.kit.mesh_l7 import istio
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.service_entry import EntryEndpoint, EntryPort, ServiceEntryObject, WorkloadEntryObject
from ztunnel.mesh.rules import Cidr

STATIC = {"address": "1.1.1.1"}
HTTP = {"number": 80, "name": "http", "protocol": "HTTP"}


def entry(**spec: object) -> ServiceEntryObject:
    found = parse({**istio("ServiceEntry"), "spec": {"hosts": ["a.example"], "ports": [HTTP]} | spec}, "test")
    assert isinstance(found, ServiceEntryObject)
    return found


def workload(meta: Json | None = None, **spec: object) -> WorkloadEntryObject:
    body = {**istio("WorkloadEntry"), "spec": {"address": "10.0.0.1"} | spec}
    body["metadata"] = {"name": "x", **(meta or {})}
    found = parse(body, "test")
    assert isinstance(found, WorkloadEntryObject)
    return found


def test_an_entry_in_full() -> None:
    ports = [{"number": 443, "name": "tls", "protocol": "tls", "targetPort": 8443}, {"number": 53, "name": "dns", "protocol": "UDP"}]
    endpoint = {"address": "2.2.2.2", "ports": {"tls": 9443}, "labels": {"a": "b"}, "locality": "r/z", "weight": 3, "serviceAccount": "sa"}
    found = entry(
        hosts=["A.example", "b.example"],
        addresses=["1.1.1.1", "10.0.0.0/8", "1.1.1.1/32"],
        ports=ports,
        location="MESH_INTERNAL",
        resolution="STATIC",
        endpoints=[endpoint],
        exportTo=["."],
    )
    assert (found.hosts, found.addresses, found.blocks) == (("a.example", "b.example"), ("1.1.1.1",), (Cidr(32, "10.0.0.0", 8),))
    assert found.ports == (EntryPort(443, "tls", "TLS", 8443),)
    assert found.endpoints == (EntryEndpoint("2.2.2.2", True, {"tls": 9443}, {"a": "b"}, "r/z", 3, "sa"),)
    assert found.private
    assert found.notes == ("spec.addresses: blocks of more than one address are passed through, not routed to a waypoint",)
    plain = entry()
    assert (plain.resolution, plain.private, plain.notes, plain.selector) == ("NONE", False, (), None)


def test_addresses_that_a_controller_has_written() -> None:
    body = {**istio("ServiceEntry"), "spec": {"hosts": ["a"], "resolution": "DNS"}}
    body["status"] = {"addresses": [{"value": "240.240.0.1", "host": "a"}, {"value": "240.240.0.2"}]}
    found = parse(body, "test")
    assert isinstance(found, ServiceEntryObject)
    assert found.assigned == (("a", "240.240.0.1"), ("", "240.240.0.2"))


@pytest.mark.parametrize(
    ("spec", "note"),
    [({"subjectAltNames": ["x"]}, "spec.subjectAltNames"), ({"connectStrategy": "FIRST_HEALTHY_RACE"}, "spec.connectStrategy")],
)
def test_what_is_not_done_is_noted(spec: Json, note: str) -> None:
    (found,) = entry(**spec).notes
    assert note in found


@pytest.mark.parametrize(
    ("meta", "spec", "hbone"),
    [
        ({}, {}, False),
        ({"labels": {"networking.istio.io/tunnel": "http"}}, {}, True),
        ({}, {"labels": {"networking.istio.io/tunnel": "http"}}, True),
        ({"annotations": {"ambient.istio.io/redirection": "enabled"}}, {}, True),
    ],
)
def test_workload_entries(meta: Json, spec: Json, hbone: bool) -> None:
    found = workload(meta, serviceAccount="sa", **spec)
    assert (found.uid, found.hbone, found.endpoint.service_account) == ("default.x.workloadentry", hbone, "sa")
    assert found.labels == (spec.get("labels") or meta.get("labels") or {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"hosts": []}, "spec.hosts: at least one, and not *"),
        ({"hosts": ["*"]}, "spec.hosts: at least one, and not *"),
        ({"resolution": "STATIC", "endpoints": [{"address": "a.b"}]}, "with resolution STATIC they have IP addresses"),
        ({"endpoints": [{"address": "1.1.1.1"}]}, "not with resolution NONE"),
        (
            {"resolution": "STATIC", "endpoints": [STATIC], "workloadSelector": {"labels": {}}},
            "endpoints or workloadSelector",
        ),
        ({"resolution": "DNS", "workloadSelector": {"labels": {}}}, "not with resolution DNS"),
        ({"resolution": "DNS", "hosts": ["*.a"]}, "cannot be resolved"),
        ({"resolution": "DNS_ROUND_ROBIN", "endpoints": [{"address": "a"}, {"address": "b"}]}, "at most one"),
        ({"resolution": "DYNAMIC_DNS"}, "for hosts with a wildcard"),
        ({"resolution": "DYNAMIC_DNS", "hosts": ["*.a"], "ports": [{"number": 1, "name": "t", "protocol": "TCP"}]}, "protocols that name"),
        ({"resolution": "SOMETIMES"}, "not one of NONE, STATIC"),
        ({"resolution": "STATIC", "endpoints": [{"address": "unix:///x"}]}, "Unix sockets"),
        ({"addresses": ["x"]}, "not an address, nor a block of them"),
        ({"ports": [HTTP, HTTP]}, "port 80 is listed twice"),
        ({"ports": [{**HTTP, "protocol": "SPDY"}]}, "protocol: not one of HTTP"),
        ({"connectStrategy": "X"}, "connectStrategy: not one of"),
        ({"locatoin": "x"}, "unknown field"),
    ],
)
def test_refusals(spec: Json, message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        entry(**spec)
