"""The cluster's names, and queries of every kind, the hostile ones too."""

from __future__ import annotations

import struct
from typing import Any

import hypothesis.strategies as st
import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import example, given

from ztunnel.lab.zone import EDNS_LIMIT, MAX_QUERY, UDP_LIMIT, Zone, answer, build
from ztunnel.mesh.manifests.tree import Tree

Message = Any  # dnslib publishes no types


def _pod(name: str, *addresses: str, ready: bool = True, **spec: object) -> Tree:
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": "db"}},
        "spec": {"containers": [{"ports": [{"name": "sql", "containerPort": 5432}]}], **spec},
        "status": {
            "podIPs": [{"ip": address} for address in addresses],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def _service(name: str, *vips: str, **spec: object) -> Tree:
    ports = [{"name": "sql", "port": 80, "targetPort": "sql", "protocol": "TCP"}]
    body = {"selector": {"app": "db"}, "clusterIP": vips[0], "clusterIPs": list(vips), "ports": ports, **spec}
    return {"kind": "Service", "metadata": {"name": name, "namespace": "shop"}, "spec": body}


ZONE = build(
    [
        _service("web", "10.96.0.7", "fd96::7"),
        _service("db", "None"),
        _service("early", "None", publishNotReadyAddresses=True),
        _pod("db-0", "10.244.1.1", "fd99:1::1", hostname="zero"),
        _pod("db-1", "10.244.2.1"),
        _pod("db-2", "10.244.2.2", ready=False),
    ]
)


def _ask(name: str, kind: str = "A", zone: Zone = ZONE, *, udp: bool = True, edns: int = 0, query_id: int = 0) -> Message:
    query = DNSRecord(DNSHeader(id=query_id, rd=1), q=DNSQuestion(name, getattr(QTYPE, kind)))
    if edns:
        query.add_ar(EDNS0(udp_len=edns))
    packed = answer(zone, bytes(query.pack()), udp)
    assert packed is not None
    if udp:
        assert len(packed) <= max(UDP_LIMIT, min(edns, EDNS_LIMIT))
    return DNSRecord.parse(packed)


def _data(reply: Message) -> list[str]:
    return sorted(str(record.rdata) for record in reply.rr)


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("web.shop.svc.cluster.local", "A", ["10.96.0.7"]),
        ("WEB.Shop.svc.Cluster.LOCAL", "AAAA", ["fd96::7"]),
        ("web.shop.svc.cluster.local", "ANY", ["10.96.0.7", "fd96::7"]),
        ("db.shop.svc.cluster.local", "A", ["10.244.1.1", "10.244.2.1"]),
        ("early.shop.svc.cluster.local", "A", ["10.244.1.1", "10.244.2.1", "10.244.2.2"]),
        ("zero.db.shop.svc.cluster.local", "AAAA", ["fd99:1::1"]),
        ("db-1.db.shop.svc.cluster.local", "A", ["10.244.2.1"]),
        ("10-244-2-2.shop.pod.cluster.local", "A", ["10.244.2.2"]),
        ("fd99-1--1.shop.pod.cluster.local", "AAAA", ["fd99:1::1"]),
        ("_sql._tcp.web.shop.svc.cluster.local", "SRV", ["0 100 80 web.shop.svc.cluster.local."]),
        (
            "_sql._tcp.db.shop.svc.cluster.local",
            "SRV",
            ["0 100 5432 db-1.db.shop.svc.cluster.local.", "0 100 5432 zero.db.shop.svc.cluster.local."],
        ),
    ],
)
def test_names_have_their_records(name: str, kind: str, found: list[str]) -> None:
    reply = _ask(name, kind)
    assert (_data(reply), reply.header.rcode, reply.header.aa, reply.auth) == (found, RCODE.NOERROR, 1, [])


def test_srv_answers_bring_the_addresses_along() -> None:
    assert sorted(str(record.rdata) for record in _ask("_sql._tcp.web.shop.svc.cluster.local", "SRV").ar) == ["10.96.0.7", "fd96::7"]


@pytest.mark.parametrize(
    ("name", "kind", "rcode"),
    [
        ("nothing.shop.svc.cluster.local", "A", RCODE.NXDOMAIN),
        ("db-2.db.shop.svc.cluster.local", "A", RCODE.NXDOMAIN),
        ("web.shop.svc.cluster.local", "TXT", RCODE.NOERROR),
        ("db-1.db.shop.svc.cluster.local", "AAAA", RCODE.NOERROR),
        ("shop.svc.cluster.local", "A", RCODE.NOERROR),
        ("svc.cluster.local", "A", RCODE.NOERROR),
        ("_tcp.web.shop.svc.cluster.local", "A", RCODE.NOERROR),
    ],
)
def test_what_is_not_there_is_denied_with_the_zones_soa(name: str, kind: str, rcode: int) -> None:
    reply = _ask(name, kind)
    assert (reply.rr, reply.header.rcode) == ([], rcode)
    assert [record.rtype for record in reply.auth] == [QTYPE.SOA]


def test_names_outside_are_refused() -> None:
    for name in ("example.com", "notcluster.local", "local", "."):
        reply = _ask(name)
        assert (reply.header.rcode, reply.header.aa, reply.rr) == (RCODE.REFUSED, 0, [])


def test_the_addresses_of_a_headless_service_take_turns() -> None:
    first = {str(_ask("db.shop.svc.cluster.local", query_id=number).rr[0].rdata) for number in range(4)}
    assert first == {"10.244.1.1", "10.244.2.1"}


def test_answers_that_are_too_long_for_udp_are_cut_and_whole_over_tcp() -> None:
    zone = build([_service("db", "None"), *(_pod(f"db-{number}", f"10.244.1.{number}") for number in range(1, 200))])
    name = "db.shop.svc.cluster.local"
    for edns in (0, 512, 1232, 65000):
        cut = _ask(name, zone=zone, edns=edns)
        assert (cut.header.tc, cut.rr) == (1, [])
    assert len(_ask(name, zone=zone, udp=False).rr) == 199
    few = build([_service("db", "None"), *(_pod(f"db-{number}", f"10.244.1.{number}") for number in range(1, 40))])
    assert _ask(name, zone=few).header.tc == 1
    assert len(_ask(name, zone=few, edns=1232).rr) == 39


def test_edns_is_answered_with_edns() -> None:
    assert [record.rtype for record in _ask("web.shop.svc.cluster.local", edns=4096).ar] == [QTYPE.OPT]
    assert _ask("web.shop.svc.cluster.local").ar == []


def test_what_is_no_query_gets_an_error_or_nothing() -> None:
    query = bytes(DNSRecord.question("web.shop.svc.cluster.local").pack())
    assert answer(ZONE, b"", True) is None
    assert answer(ZONE, query[:11], True) is None
    assert answer(ZONE, query[:2] + b"\x80" + query[3:], True) is None
    for packet, rcode in (
        (query[:20], RCODE.FORMERR),
        (query[:4] + b"\0\2" + query[6:], RCODE.FORMERR),
        (query[:4] + b"\0\0" + query[6:12], RCODE.FORMERR),
        (query + bytes(MAX_QUERY), RCODE.FORMERR),
        (query[:2] + struct.pack(">H", 4 << 11) + query[4:], RCODE.NOTIMP),
    ):
        reply = answer(ZONE, packet, True)
        assert reply is not None
        assert (reply[:2], reply[3] & 0xF, reply[2] & 0x80) == (query[:2], rcode, 0x80)


@given(st.binary(max_size=200), st.booleans())
@example(b"\0\1\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", True)
@example(b"\0\1\1\0\0\1\0\0\0\0\0\0\x3f" + b"a" * 63 + b"\0\0\1\0\1", True)
@example(b"\0\1\1\0\0\1\0\0\0\0\0\0\x03\xff\xfe.\0\0\1\0\1", False)
def test_any_bytes_are_answered_or_ignored(packet: bytes, udp: bool) -> None:
    reply = answer(ZONE, packet, udp)
    assert reply is None or reply[:2] == packet[:2]


@given(st.binary(max_size=80), st.integers(0, 40), st.booleans())
def test_any_bytes_in_a_real_query_are_answered_or_ignored(junk: bytes, where: int, udp: bool) -> None:
    query = DNSRecord.question("db.shop.svc.cluster.local")
    query.add_ar(EDNS0(udp_len=1232))
    packed = bytes(query.pack())
    packet = packed[: 12 + where] + junk + packed[12 + where + len(junk) // 2 :]
    reply = answer(ZONE, packet, udp)
    assert reply is None or reply[:2] == packet[:2]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["kind", "metadata", "spec", "status"]), st.sampled_from(["Pod", "Service", {}, [], 1, None])),
        max_size=4,
    )
)
def test_any_objects_make_a_zone(objects: list[Tree]) -> None:
    assert build(objects).records


def _entry(name: str, *hosts: str, **spec: object) -> Tree:
    port = {"number": 80, "name": "http", "protocol": "HTTP"}
    body = {"hosts": list(hosts), "ports": [port], "resolution": "DNS", **spec}
    return {"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": name, "namespace": "shop"}, "spec": body}


def test_hosts_of_service_entries() -> None:
    zone = build(
        [
            _pod("db-0", "10.0.0.1"),
            _entry("given", "a.example", addresses=["192.0.2.7"]),
            _entry("made", "b.example"),
            _entry("wild", "*.w.example", resolution="DYNAMIC_DNS"),
        ]
    )
    assert zone.records["a.example"] == [("A", "192.0.2.7")]
    ((kind, made),) = zone.records["b.example"]
    assert (kind, str(made).startswith("240.240.")) == ("A", True)

    def asked(name: str) -> tuple[int, list[str]]:
        packet = answer(zone, DNSRecord.question(name).pack(), is_udp=True)
        assert packet is not None
        reply: Message = DNSRecord.parse(packet)
        return reply.header.rcode, [str(record.rdata) for record in reply.rr]

    assert asked("A.Example") == (RCODE.NOERROR, ["192.0.2.7"])
    assert len(asked("x.y.w.example")[1]) == 1
    assert asked("w.example") == (RCODE.REFUSED, [])
    assert asked("c.example") == (RCODE.REFUSED, [])
