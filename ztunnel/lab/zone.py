"""The cluster's DNS zone: from objects to names, and from a query's bytes to an answer's. Pure: no sockets, no clock.

    <service>.<ns>.svc.cluster.local            cluster addresses; for a headless service those of its ready pods
    <pod or hostname>.<service>.<ns>.svc.…      each pod of a headless service
    _<port>._<protocol>.<service>.<ns>.svc.…    SRV
    <1-2-3-4>.<ns>.pod.cluster.local            pods by address (`-` for `.` and `:`)
    the hosts of ServiceEntries                 their virtual addresses, as a mesh's DNS proxy answers them; a wildcard's names, too

Source: Kubernetes DNS-based service discovery 1.1.0; RFC 1035, 2308 (negative answers carry the SOA), 6891 (EDNS), 8020 (a name with
names below it exists).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dnslib import AAAA, CLASS, EDNS0, OPCODE, QTYPE, RCODE, RR, SOA, SRV, A, DNSError, DNSRecord

from ztunnel.lab.objects import container_port, is_deleting, is_ready, pod_addresses
from ztunnel.lab.placement import cluster_addresses, service_pods
from ztunnel.mesh.entries import allocate
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject
from ztunnel.mesh.manifests.tree import Tree, at, branches, flag, integer, text

DOMAIN = "cluster.local"
TTL_SECONDS = 5
"""As CoreDNS: endpoints move."""
UDP_LIMIT = 512
EDNS_LIMIT = 1232
"""Fits every path without fragments. Source: DNS flag day 2020."""
MAX_QUERY = 4096
MAX_TCP_ANSWER = 65535

Message = Any  # dnslib publishes no types
Record = tuple[str, object]
"""Query type and data: an address, or (priority, weight, port, target)."""


@dataclass(slots=True)
class Zone:
    """Every name that exists, with its records; the names on the way to it exist without any."""

    records: dict[str, list[Record]] = field(default_factory=dict)

    def add(self, name: str, kind: str, value: object) -> None:
        """Add one record, and the names above it."""
        found = self.exists(name)
        if (kind, value) not in found:
            found.append((kind, value))

    def exists(self, name: str) -> list[Record]:
        """Make a name and those above it exist; its records."""
        found = self.records.setdefault(name, [])
        while (name := name.partition(".")[2]).endswith(DOMAIN):
            self.records.setdefault(name, [])
        return found

    def outside(self, name: str) -> list[Record] | None:
        """The records of a name of another domain, or of a wildcard that it falls under; the narrowest."""
        if name in self.records:
            return self.records[name]
        while name:
            name = name.partition(".")[2]
            if f"*.{name}" in self.records:
                return self.records[f"*.{name}"]
        return None


def build(objects: Iterable[Tree]) -> Zone:
    """The zone of a set of objects."""
    bodies = list(objects)
    pods = [body for body in bodies if text(body, "kind") == "Pod" and pod_addresses(body) and not is_deleting(body)]
    zone = Zone()
    zone.add(DOMAIN, "SOA", "")
    zone.exists(f"svc.{DOMAIN}")
    zone.exists(f"pod.{DOMAIN}")
    for pod in pods:
        for address in pod_addresses(pod):
            dashed = address.replace(".", "-").replace(":", "-")
            zone.add(f"{dashed}.{text(pod, 'metadata', 'namespace')}.pod.{DOMAIN}", _kind(address), address)
    for body in bodies:
        if text(body, "kind") == "Service":
            _service(zone, body, service_pods(body, pods))
    _entries(zone, bodies, {_kind(address) for pod in pods for address in pod_addresses(pod)})
    return zone


def _entries(zone: Zone, bodies: Iterable[Tree], families: set[str]) -> None:
    """ServiceEntries' hosts; only addresses of families that pods have, for nobody could reach the others."""
    read = (parse(body, "the lab") for body in bodies if text(body, "kind") == "ServiceEntry")
    entries = [each for each in read if isinstance(each, ServiceEntryObject)]
    for (_, _, host), vips in sorted(allocate(entries).items()):
        for address in vips if not host.endswith(f".{DOMAIN}") else ():
            if _kind(address) in families:
                zone.add(host, _kind(address), address)


def _service(zone: Zone, service: Tree, pods: list[Tree]) -> None:
    base = f"{text(service, 'metadata', 'name')}.{text(service, 'metadata', 'namespace')}.svc.{DOMAIN}"
    zone.exists(base)
    for address in cluster_addresses(service):
        zone.add(base, _kind(address), address)
    is_headless = text(service, "spec", "clusterIP") == "None"
    if not is_headless:
        for port in branches(service, "spec", "ports"):
            _srv(zone, base, port, integer(port, "port"), base)
        return
    for pod in pods:
        if is_ready(pod) or flag(service, "spec", "publishNotReadyAddresses"):
            _endpoint(zone, base, service, pod)


def _endpoint(zone: Zone, base: str, service: Tree, pod: Tree) -> None:
    own = f"{text(pod, 'spec', 'hostname') or text(pod, 'metadata', 'name')}.{base}".lower()
    for address in pod_addresses(pod):
        zone.add(base, _kind(address), address)
        zone.add(own, _kind(address), address)
    for port in branches(service, "spec", "ports"):
        number = container_port(pod, at(port, "targetPort"), text(port, "protocol", default="TCP"))
        if number is not None:
            _srv(zone, base, port, number, own)


def _srv(zone: Zone, base: str, port: Tree, number: int, target: str) -> None:
    if name := text(port, "name"):
        zone.add(f"_{name}._{text(port, 'protocol', default='TCP').lower()}.{base}", "SRV", (0, 100, number, target))


def _kind(address: str) -> str:
    return "AAAA" if ":" in address else "A"


def answer(zone: Zone, packet: bytes, is_udp: bool) -> bytes | None:
    """The answer to one packet; None for what deserves none (an answer, or less than a header).

    Whatever the bytes are, nothing is raised: what cannot be read is a format error.
    """
    if len(packet) < 12 or packet[2] & 0x80:
        return None
    if len(packet) > MAX_QUERY:
        return _bare(packet, RCODE.FORMERR)
    try:
        query: Message = DNSRecord.parse(packet)
    except (DNSError, ValueError, IndexError, UnicodeError, RecursionError):  # dnslib lets some of Python's own through
        return _bare(packet, RCODE.FORMERR)
    if query.header.opcode != OPCODE.QUERY:
        return _bare(packet, RCODE.NOTIMP)
    if len(query.questions) != 1:
        return _bare(packet, RCODE.FORMERR)
    reply: Message = query.reply(ra=0, aa=1)
    _fill(reply, zone, query)
    options = [record for record in query.ar if record.rtype == QTYPE.OPT]
    if options:
        reply.add_ar(EDNS0(udp_len=EDNS_LIMIT))
    limit = max(UDP_LIMIT, min(EDNS_LIMIT, int(options[0].rclass))) if options else UDP_LIMIT
    return _packed(reply, query, limit if is_udp else MAX_TCP_ANSWER)


def _fill(reply: Message, zone: Zone, query: Message) -> None:
    question = query.q
    name = str(question.qname).rstrip(".").lower()
    is_ours = name == DOMAIN or name.endswith(f".{DOMAIN}")
    records = zone.records.get(name) if is_ours else zone.outside(name)
    if question.qclass != CLASS.IN or not (is_ours or records):
        reply.header.rcode, reply.header.aa = RCODE.REFUSED, 0
        return
    wanted = QTYPE.get(question.qtype, str(question.qtype))
    matching = [record for record in records or [] if wanted in (record[0], "ANY")]
    # Clients take the first of several addresses; the query's id turns them, so that no endpoint gets everything.
    turn = query.header.id % len(matching) if matching else 0
    for kind, value in matching[turn:] + matching[:turn]:
        reply.add_answer(_resource(question.qname, kind, value))
    if wanted == "SRV":
        _glue(reply, zone, matching)
    if not matching:
        reply.header.rcode = RCODE.NXDOMAIN if records is None else RCODE.NOERROR
        reply.add_auth(_soa(DOMAIN))


def _glue(reply: Message, zone: Zone, matching: list[Record]) -> None:
    for target in sorted({value[3] for _, value in matching if isinstance(value, tuple)}):
        for kind, value in zone.records.get(target, []):
            if kind in ("A", "AAAA"):
                reply.add_ar(_resource(target, kind, value))


def _resource(name: object, kind: str, value: object) -> Message:
    if kind == "SOA":
        return _soa(name)
    if kind == "SRV" and isinstance(value, tuple):
        priority, weight, port, target = value
        return RR(name, QTYPE.SRV, ttl=TTL_SECONDS, rdata=SRV(priority, weight, port, target))
    return RR(name, QTYPE.A if kind == "A" else QTYPE.AAAA, ttl=TTL_SECONDS, rdata=A(value) if kind == "A" else AAAA(value))


def _soa(name: object) -> Message:
    times = (1, 7200, 1800, 86400, TTL_SECONDS)
    return RR(name, QTYPE.SOA, ttl=TTL_SECONDS, rdata=SOA(f"ns.dns.{DOMAIN}", f"hostmaster.{DOMAIN}", times))


def _packed(reply: Message, query: Message, limit: int) -> bytes:
    try:
        packed = bytes(reply.pack())
    except (DNSError, ValueError, UnicodeError):  # a question that could be read and cannot be written back
        return _bare(bytes(query.header.id.to_bytes(2, "big")) + bytes(10), RCODE.FORMERR)
    if len(packed) <= limit:
        return packed
    short: Message = query.reply(ra=0, aa=1)
    short.header.tc = 1
    return bytes(short.pack())


def _bare(packet: bytes, rcode: int) -> bytes:
    """A header alone: the query's id and opcode, and a response code."""
    return packet[:2] + bytes([0x80 | (packet[2] & 0x79), rcode & 0x0F]) + bytes(8)
