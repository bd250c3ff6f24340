"""CONNECT's headers: what is said, what is understood, what is refused."""

from __future__ import annotations

import pytest
from hpack import Decoder

from ztunnel.hbone import connect
from ztunnel.hbone.connect import Authority, Baggage
from ztunnel.hbone.events import Headers
from ztunnel.mesh.errors import BadConnect

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
FULL = Baggage("Kubernetes", "shop", "deployment", "cart", "cart", "v2", "r1", "z1")
FULL_TEXT = (
    b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,service.version=v2,"
    b"cloud.region=r1,cloud.availability_zone=z1"
)


def _read(block: bytes) -> Headers:
    """A header block as a library reads it."""
    return tuple((bytes(name), bytes(value)) for name, value in Decoder().decode(block, raw=True))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        (b"10.0.0.1:80", "10.0.0.1", 80),
        (b"10.0.0.1:1", "10.0.0.1", 1),
        (b"10.0.0.1:65535", "10.0.0.1", 65535),
        (b"[fd00::1]:80", "fd00::1", 80),
        (b"[FD00:0:0::1]:80", "fd00::1", 80),
        (b"[::ffff:10.0.0.1]:80", "10.0.0.1", 80),
        (b"cart.shop.svc.cluster.local:8080", "cart.shop.svc.cluster.local", 8080),
        (b"Cart.SHOP:8080", "cart.shop", 8080),
        (b"a_b.c:1", "a_b.c", 1),
        (b"7eleven:1", "7eleven", 1),
        (b".".join([b"a" * 63] * 3) + b"." + b"b" * 55 + b":80", ".".join(["a" * 63] * 3) + "." + "b" * 55, 80),
    ],
)
def test_authorities(text: bytes, host: str, port: int) -> None:
    assert connect.parse_authority(text) == Authority(host, port)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b":",
        b":80",
        b"10.0.0.1",
        b"10.0.0.1:",
        b"10.0.0.1:0",
        b"10.0.0.1:080",
        b"10.0.0.1:65536",
        b"10.0.0.1:99999999999999999999",
        b"10.0.0.1:-1",
        b"10.0.0.1:+80",
        b"10.0.0.1:8 0",
        b"10.0.0.1:80 ",
        b" 10.0.0.1:80",
        b"10.0.0.1:http",
        b"10.0.0.256:80",
        b"10.0.0:80",
        b"010.0.0.1:80",
        b"0x7f.1:80",
        b"2130706433:80",
        b"[10.0.0.1]:80",
        b"[]:80",
        b"[:80",
        b"[fd00::1:80",
        b"fd00::1]:80",
        b"fd00::1:80",
        b"[[fd00::1]]:80",
        b"[fd00::1]80",
        b"[fe80::1%eth0]:80",
        b"[fe80::1%25eth0]:80",
        b"[v1.fe]:80",
        b"user@host:80",
        b"user:password@host:80",
        b"http://host:80",
        b"host:80/path",
        b"a b:80",
        b"a\x00b:80",
        b"a\r\nb:80",
        b"a,b:80",
        b"a..b:80",
        b"a.:80",
        b".a:80",
        b"-a:80",
        b"a-:80",
        b"a" * 64 + b":80",
        b"a." * 126 + b"ab:80",
        b"h\xc3\xb6st:80",
        b"\xff:80",
        "١0.0.0.1:80".encode(),
        "10.0.0.1:８0".encode(),
    ],
)
def test_authorities_that_are_none(text: bytes) -> None:
    with pytest.raises(BadConnect) as caught:
        connect.parse_authority(text)
    assert caught.value.status == 400


def test_memory_of_authorities_is_bounded() -> None:
    for number in range(5000):
        assert connect.parse_authority(b"a%d:1" % number) == Authority(f"a{number}", 1)
    assert len(connect._authorities) <= 4096


def test_authority_as_text() -> None:
    assert [str(Authority("10.0.0.1", 80)), str(Authority("::1", 80)), str(Authority("a.b", 80))] == ["10.0.0.1:80", "[::1]:80", "a.b:80"]


def test_baggage_in_order() -> None:
    assert connect.build_baggage(FULL) == FULL_TEXT
    assert connect.parse_baggage([FULL_TEXT]) == FULL


def test_baggage_omits_what_is_empty_or_cannot_be_carried() -> None:
    assert connect.build_baggage(Baggage()) == b""
    assert connect.build_baggage(Baggage(namespace="shop", zone="z")) == b"k8s.namespace.name=shop,cloud.availability_zone=z"
    assert connect.build_baggage(Baggage(workload_type="daemonset", workload_name="agent")) == b""
    for value in ("a,b", "a=b", "ä", "a\nb", "x" * 257, "end ", "\x7f"):
        assert connect.build_baggage(Baggage(cluster=value, revision="v1")) == b"service.version=v1"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Baggage()),
        ([b""], Baggage()),
        ([b"service.name=a", b"cloud.region=b"], Baggage(service_name="a", region="b")),
        ([b"service.name=a,service.name=b"], Baggage(service_name="b")),
        ([b"service.name=a=b=c"], Baggage(service_name="a")),
        ([b"service.name"], Baggage()),
        ([b"service.name=,cloud.region=b"], Baggage(region="b")),
        ([b" service.name=a, cloud.region=b"], Baggage()),
        ([b"service.name= a "], Baggage(service_name=" a ")),
        ([b"service.name=%41"], Baggage(service_name="%41")),
        ([b"unknown=x,k8s.daemonset.name=y"], Baggage()),
        ([b"k8s.job.name=j"], Baggage(workload_type="job", workload_name="j")),
        ([b"k8s.cronjob.name=c,k8s.pod.name=p"], Baggage(workload_type="pod", workload_name="p")),
        ([b"service.name=a", b"cloud.region=\xc3\xa9"], Baggage()),
        ([b"service.name=a\x7f"], Baggage()),
        ([b"service.name=" + b"x" * 257 + b",cloud.region=b"], Baggage(region="b")),
        ([b"service.name=a", b"x" * 8192], Baggage()),
        ([b"," * 8192], Baggage()),
    ],
)
def test_baggage_as_it_comes(values: list[bytes], expected: Baggage) -> None:
    assert connect.parse_baggage(values) == expected


@pytest.mark.parametrize(
    ("value", "client", "host"),
    [
        (b"", None, ""),
        (b'for="10.0.0.1:80"', ("10.0.0.1", 80), ""),
        (b'for="[::1]:80";host=a.b', ("::1", 80), "a.b"),
        (b'for="[::ffff:10.0.0.1]:80"', ("10.0.0.1", 80), ""),
        (b"for=10.0.0.1:80; host=a.b ", ("10.0.0.1", 80), "a.b"),
        (b'host="a.b";host=c', None, "a.b"),
        (b"host=;host=c", None, "c"),
        (b"host=", None, ""),
        (b"Host=a.b", None, ""),
        (b"by=x;proto=http", None, ""),
        (b"for=unknown;host=a.b", None, "a.b"),
        (b"for=unknown", None, ""),
        (b"for=host=a.b", None, ""),
        (b'for="10.0.0.1:80";host=a b;host=c', ("10.0.0.1", 80), "c"),
        (b" for=unknown;host=a.b", None, "a.b"),
        (b"for=\xc3;host=a.b", None, ""),
        (b"for=" + b"a" * 500 + b";host=a.b", None, "a.b"),
        (b"for=a;by=" + b"a" * 600 + b";host=a.b", None, "a.b"),
        (b'for="10.0.0.1"', None, ""),
        (b'for="a.b:80"', None, ""),
        (b'for="_hidden";for="10.0.0.1:80"', ("10.0.0.1", 80), ""),
        (b"for=10.0.0.256:80", None, ""),
        (b"for=10.0.0.1:0", None, ""),
        (b"host=a b", None, ""),
        (b"host=\xc3\xa9", None, ""),
        (b"host=" + b"a" * 8192, None, ""),
        (b"host=" + b"a." * 126 + b"ab", None, ""),
    ],
)
def test_forwarded_as_it_comes(value: bytes, client: tuple[str, int] | None, host: str) -> None:
    assert connect.parse_forwarded(value) == (client, host)


def test_new_traces() -> None:
    digits = bytes(range(1, 111)).hex().replace("0", "f")
    traces = connect.new_traceparents(digits)
    assert [trace[:3] + trace[35:36] + trace[52:] for trace in traces] == ["00---00"] * 4
    assert [trace[3:35] for trace in traces] == [digits[at + 3 : at + 35] for at in (0, 55, 110, 165)]
    assert [trace[36:52] for trace in traces] == [digits[at + 36 : at + 52] for at in (0, 55, 110, 165)]


def test_a_new_trace_is_never_invalid() -> None:
    traces = connect.new_traceparents("0" * 55 + "1" * 36 + "0" * 19 + "0" * 36 + "1" * 19)
    assert [connect.parse_traceparent(trace.encode()) for trace in traces] == traces
    assert len(traces) == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (TRACE, TRACE),
        (TRACE[:-2] + "01", TRACE[:-2] + "01"),
        (TRACE.replace("00-", "01-", 1), TRACE.replace("00-", "01-", 1)),
        (TRACE.replace("00-", "cc-", 1) + "-what-comes", TRACE.replace("00-", "cc-", 1)),
        (TRACE + "-more", ""),
        (TRACE.replace("00-", "cc-", 1) + "x", ""),
        (TRACE.replace("00-", "ff-", 1), ""),
        (TRACE.upper(), ""),
        (TRACE[:-1], ""),
        ("", ""),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-00", ""),
        ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-00", ""),
        ("00-" + "0" * 31 + "1-" + "0" * 15 + "1-00", "00-" + "0" * 31 + "1-" + "0" * 15 + "1-00"),
        (" " + TRACE, ""),
        ("é" * 55, ""),
    ],
)
def test_traces_as_they_come(value: str, text: str) -> None:
    assert connect.parse_traceparent(value.encode()) == text


def test_request_in_order_and_back() -> None:
    headers = _read(connect.RequestHead("[fd00::1]:80", FULL_TEXT, "cart.shop.svc").block(("10.0.0.9", 40_000), TRACE))
    assert headers == (
        (b":method", b"CONNECT"),
        (b":authority", b"[fd00::1]:80"),
        (b"baggage", FULL_TEXT),
        (b"forwarded", b'for="10.0.0.9:40000";host=cart.shop.svc'),
        (b"traceparent", TRACE.encode()),
    )
    request = connect.parse_request(headers)
    assert (request.authority, request.baggage) == (Authority("fd00::1", 80), FULL)
    assert (request.forwarded_for, request.forwarded_host, request.traceparent) == (("10.0.0.9", 40_000), "cart.shop.svc", TRACE)


def test_requests_of_one_route_differ_in_their_client_and_trace() -> None:
    head = connect.RequestHead("a:1", b"", "")
    other = TRACE.replace("0af", "1af")
    for source, client in ((("10.0.0.9", 1), "10.0.0.9:1"), (("fd00::9", 65_535), "[fd00::9]:65535"), (("10.0.0.9", 22), "10.0.0.9:22")):
        for trace in (TRACE, other):
            said = ((b"forwarded", f'for="{client}"'.encode()), (b"traceparent", trace.encode()))
            assert _read(head.block(source, trace)) == ((b":method", b"CONNECT"), (b":authority", b"a:1"), (b"baggage", b""), *said)


def test_a_request_with_long_names() -> None:
    host, baggage = "a" * 63 + "." + "b" * 63, b"service.name=" + b"x" * 253
    assert dict(_read(connect.RequestHead(f"{host}:1", baggage, host).block(("fd00::9", 4000), TRACE))) == {
        b":method": b"CONNECT",
        b":authority": f"{host}:1".encode(),
        b"baggage": baggage,
        b"forwarded": f'for="[fd00::9]:4000";host={host}'.encode(),
        b"traceparent": TRACE.encode(),
    }


def test_a_bare_request_is_enough() -> None:
    request = connect.parse_request(((b":method", b"CONNECT"), (b":authority", b"a:1")))
    assert (request.baggage, request.forwarded_for, request.forwarded_host, request.traceparent) == (Baggage(), None, "", "")


def test_first_instances_count_except_for_baggage() -> None:
    fields = (
        (b"forwarded", b"host=a"),
        (b"forwarded", b"host=b"),
        (b"traceparent", b""),
        (b"traceparent", TRACE.encode()),
        (b"baggage", b"service.name=a"),
        (b"baggage", b"cloud.region=b"),
    )
    request = connect.parse_request(((b":method", b"CONNECT"), (b":authority", b"a:1"), *fields))
    assert (request.forwarded_host, request.traceparent, request.baggage) == ("a", "", Baggage(service_name="a", region="b"))


@pytest.mark.parametrize("headers", [(), ((b":method", b"GET"), (b":authority", b"a:1")), ((b":method", b"CONNECT"),)])
def test_not_a_connect(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    with pytest.raises(BadConnect) as caught:
        connect.parse_request(headers)
    assert caught.value.status == 400


def test_response() -> None:
    assert _read(connect.response_block(FULL_TEXT)) == ((b":status", b"200"), (b"baggage", FULL_TEXT))
    assert connect.response_baggage(((b":status", b"200"), (b"baggage", FULL_TEXT))) == FULL
