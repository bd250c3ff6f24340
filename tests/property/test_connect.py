"""CONNECT's headers: parse is the inverse of build, and hostile text gives a value or BadConnect, nothing else."""

from __future__ import annotations

import string
from ipaddress import IPv4Address, IPv6Address

from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.hbone import connect
from ztunnel.hbone.connect import Authority, Baggage
from ztunnel.hbone.events import Headers
from ztunnel.hbone.messages import check_request
from ztunnel.mesh.addresses import canonical
from ztunnel.mesh.errors import BadConnect

LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
HOSTNAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(lambda ip: canonical(str(ip)) or "")
PORTS = st.integers(1, 65535)
VALUES = st.one_of(st.just(""), st.text(string.ascii_letters + string.digits + "-._ /:", min_size=1, max_size=60).map(str.rstrip))
BAGGAGE = st.builds(
    lambda kind, name, rest: Baggage(rest[0], rest[1], kind if name else "", name, *rest[2:]),
    st.sampled_from(["deployment", "cronjob", "pod", "job"]),
    VALUES,
    st.tuples(*[VALUES] * 6),
)
HOSTILE = st.one_of(
    st.binary(max_size=300), st.text(max_size=100).map(str.encode), st.text('0123456789.:[]%abc@ =;,"-for hst', max_size=80).map(str.encode)
)


def _read(block: bytes) -> Headers:
    """A header block as a library reads it."""
    return tuple((bytes(name), bytes(value)) for name, value in Decoder().decode(block, raw=True))


@given(st.one_of(HOSTNAMES, ADDRESSES), PORTS)
def test_authority_round_trip(host: str, port: int) -> None:
    authority = Authority(host, port)
    assert connect.parse_authority(str(authority).encode()) == authority


@given(HOSTILE)
def test_any_authority(text: bytes) -> None:
    try:
        authority = connect.parse_authority(text)
    except BadConnect:
        return
    assert 1 <= authority.port <= 65535
    assert connect.parse_authority(str(authority).encode()) == authority
    assert canonical(authority.host) in (None, authority.host)


@given(BAGGAGE)
def test_baggage_round_trip(baggage: Baggage) -> None:
    assert connect.parse_baggage([connect.build_baggage(baggage)]) == baggage


@given(st.builds(Baggage, *[st.text(max_size=20)] * 8))
def test_any_baggage_makes_a_well_formed_request(baggage: Baggage) -> None:
    headers = _read(connect.RequestHead("a:1", connect.build_baggage(baggage), "").block(("::1", 1), ""))
    check_request(headers)
    again = connect.parse_request(headers).baggage
    assert connect.build_baggage(again) == connect.build_baggage(baggage)


@given(st.lists(HOSTILE, max_size=4))
def test_any_baggage(values: list[bytes]) -> None:
    connect.build_baggage(connect.parse_baggage(values))


@given(ADDRESSES, PORTS, st.one_of(st.just(""), HOSTNAMES))
def test_forwarded_round_trip(address: str, port: int, host: str) -> None:
    headers = dict(_read(connect.RequestHead("a:1", b"", host).block((address, port), "")))
    assert connect.parse_forwarded(headers[b"forwarded"]) == ((address, port), host)


@given(HOSTILE)
def test_any_forwarded_and_trace(value: bytes) -> None:
    client, _ = connect.parse_forwarded(value)
    assert client is None or isinstance(IPv6Address(client[0]) if ":" in client[0] else IPv4Address(client[0]), IPv4Address | IPv6Address)
    assert len(connect.parse_traceparent(value)) in (0, 55)


@given(st.text("0123456789abcdef", min_size=110, max_size=110))
def test_every_trace_of_ours_is_valid(digits: str) -> None:
    for trace in connect.new_traceparents(digits):
        assert connect.parse_traceparent(trace.encode()) == trace
