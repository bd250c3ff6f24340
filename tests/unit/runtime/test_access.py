"""The lines of connections: Istio's order, one line each, and nothing that breaks out of it."""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.builders import workload
from ztunnel.dataplane.flow import Direction, FlowEnd, FlowFailure, FlowNews, FlowPath
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime import logs
from ztunnel.runtime.access import FLOW_FIELDS, Alike, Ended, log_connections

CLIENT, SERVER = workload("client", "10.0.0.1", account="client"), workload("server", "10.0.0.2", namespace="back")
PATH = FlowPath(
    Direction.OUTBOUND,
    CLIENT.uid,
    ("10.0.0.2", 15008),
    "10.0.0.2:8080",
    mutual_tls=True,
    source_identity="spiffe://cluster.local/ns/default/sa/client",
    destination_identity="spiffe://cluster.local/ns/back/sa/default",
    service="web.back.svc",
    policy="AuthorizationPolicy back/p",
    waypoint="back/waypoint",
)
STRANGE = FlowPath(Direction.INBOUND, SERVER.uid, ("", 0), "10.0.0.2:8080", mutual_tls=False)
GOOD = FlowEnd(
    1,
    "10.0.0.1",
    4000,
    trace="00-0123456789abcdef0123456789abcdef-0123456789abcdef-01",
    up_bytes=10,
    down_bytes=100,
    duration_seconds=1.5,
)
BAD = FlowFailure(1, "10.0.0.1", 4000, GOOD.trace, 10, 100, 1.5, Flag.DENY, "no way")
BARE = FlowEnd(7, "fd00::1", 1)
but = msgspec.structs.replace


def written(form: str, *ended: Ended, level: str = "info", prefix: str = "") -> list[str]:
    stream = io.StringIO()
    logs.configure(form, level, stream)
    log_connections(ended, prefix)
    return stream.getvalue().splitlines()


def ended(path: FlowPath, *ends: FlowEnd, source: Workload | None = CLIENT, destination: Workload | None = SERVER) -> Ended:
    failures = tuple(each for each in ends if isinstance(each, FlowFailure))
    good = tuple(each for each in ends if not isinstance(each, FlowFailure))
    return Alike(path, source, destination), FlowNews(path, len(ends), ends=good, failures=failures)


def as_json(path: FlowPath, end: FlowEnd, source: Workload | None = CLIENT, destination: Workload | None = SERVER) -> dict[str, object]:
    (line,) = written("json", ended(path, end, source=source, destination=destination))
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_what_a_line_says() -> None:
    line = as_json(PATH, BAD)
    head = {name: line.pop(name) for name in ("level", "time", "scope", "message")}
    assert re.fullmatch(r"[\dT:.-]+Z", str(head.pop("time")))
    assert head == {"level": "error", "scope": "access", "message": "connection complete"}
    assert line == {
        "src.addr": "10.0.0.1:4000",
        "src.workload": "client",
        "src.namespace": "default",
        "src.identity": PATH.source_identity,
        "src.cluster": CLIENT.cluster,
        "dst.addr": "10.0.0.2:15008",
        "dst.hbone_addr": "10.0.0.2:8080",
        "dst.service": "web.back.svc",
        "dst.workload": "server",
        "dst.namespace": "back",
        "dst.identity": PATH.destination_identity,
        "dst.cluster": SERVER.cluster,
        "direction": "outbound",
        "bytes_sent": 10,
        "bytes_recv": 100,
        "duration": "1500ms",
        "waypoint": "back/waypoint",
        "policy": "AuthorizationPolicy back/p",
        "flag": "DENY",
        "trace": "0123456789abcdef0123456789abcdef",
        "connection": "c1",
        "error": "no way",
    }
    assert tuple(line) == FLOW_FIELDS


def test_text_has_the_same_in_istios_order() -> None:
    (line,) = written("text", ended(PATH, BAD))
    assert re.sub(r"^[\dT:.-]+Z\t", "", line) == (
        "error\taccess\tconnection complete\tsrc.addr=10.0.0.1:4000 src.workload=client src.namespace=default "
        f"src.identity={PATH.source_identity} src.cluster={CLIENT.cluster} dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 "
        f"dst.service=web.back.svc dst.workload=server dst.namespace=back dst.identity={PATH.destination_identity} "
        f"dst.cluster={SERVER.cluster} direction=outbound bytes_sent=10 bytes_recv=100 duration=1500ms waypoint=back/waypoint "
        'policy="AuthorizationPolicy back/p" flag=DENY trace=0123456789abcdef0123456789abcdef connection=c1 error="no way"'
    )


def test_what_a_line_does_not_know_is_left_out() -> None:
    for form in ("text", "json"):
        (line,) = written(form, ended(STRANGE, BARE, source=None, destination=None))
        assert "info" in line
        words = [name for name in FLOW_FIELDS if re.search(rf'[\t ,"]{re.escape(name)}[="]', line)]
        assert words == ["src.addr", "direction", "bytes_sent", "bytes_recv", "duration", "connection"]
    assert as_json(STRANGE, BARE, None, None)["src.addr"] == "[fd00::1]:1"


@pytest.mark.parametrize(("direction", "sent", "received"), [(Direction.OUTBOUND, 10, 100), (Direction.INBOUND, 100, 10)])
@pytest.mark.parametrize("end", [GOOD, BAD])
def test_the_lines_bytes_are_the_pods_own(end: FlowEnd, direction: Direction, sent: int, received: int) -> None:
    line = as_json(but(PATH, direction=direction), end)
    assert (line["bytes_sent"], line["bytes_recv"], line["direction"]) == (sent, received, direction.value)


def test_lines_of_several_paths_are_written_together() -> None:
    for form in ("text", "json"):
        lines = written(form, ended(PATH, GOOD, BAD), ended(STRANGE, BARE))
        assert [("error" in line.split("access")[0]) for line in lines] == [False, True, False]
        assert [("10.0.0.1:4000" in line) for line in lines] == [True, True, False]


def test_a_connections_name_says_whose_it_is() -> None:
    lines = written("text", ended(PATH, GOOD, BAD), prefix="w3-")
    assert all("connection=w3-c1" in line for line in lines)


ODD = [but(GOOD, ip="not an address"), but(GOOD, trace="00-\n")]
"""Values that need quotes: their lines, and those of their batch, are written one by one."""


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("direction", Direction)
def test_lines_of_a_batch_are_those_of_its_connections(form: str, direction: Direction) -> None:
    path = but(PATH, direction=direction)
    ends = [
        but(GOOD, number=number, port=number, ip=ip, trace=trace)
        for number, (ip, trace) in enumerate([("10.0.0.1", GOOD.trace), ("10.0.0.2", ""), ("fd00::1", GOOD.trace), ("fd00::2", "")])
    ]
    one_by_one = [line for odd in (ends[0], *ODD) for line in written(form, ended(path, odd, *ends))[1:]]
    times = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")
    assert {times.sub("", line) for line in one_by_one} == {
        times.sub("", line) for line in written(form, *(ended(path, each) for each in ends))
    }


def test_only_failed_connections_are_told_above_info() -> None:
    silent = but(BAD, error="")
    assert written("text", ended(PATH, GOOD, silent), level="warning") == []
    (line,) = written("text", ended(PATH, GOOD), ended(PATH, GOOD, silent, BAD), level="warning")
    assert line.endswith('error="no way"')
    logs.configure("text", "error", stream := io.StringIO())
    logging.getLogger("ztunnel").setLevel(logging.CRITICAL)
    log_connections([ended(PATH, BAD)])
    assert stream.getvalue() == ""


ANY = st.text() | st.text('a\n\r\t\x1b\u2028\u202e"\\= é\ud800', max_size=20) | st.text("ab", min_size=2000, max_size=5000)


@given(ip=ANY, trace=ANY, error=ANY, service=ANY, policy=ANY, workload_name=ANY)
def test_nothing_breaks_out_of_its_line_and_json_says_what_was_given(
    ip: str, trace: str, error: str, service: str, policy: str, workload_name: str
) -> None:
    path, client = but(PATH, service=service, policy=policy), replace(CLIENT, name=workload_name)
    for end in (but(GOOD, ip=ip, trace=trace), but(BAD, ip=ip, trace=trace, error=error)):
        (text_line,) = written("text", ended(path, end, source=client))
        assert text_line.replace("\t", "", 4).isprintable()
        fields = text_line.split("\t", 4)[4]
        names = re.findall(r'(?:^| )([a-z_.]+)=(?:[^ "=\\]+|"(?:[^"\\]|\\.)*")(?= |$)', fields)
        line = as_json(path, end, client)
        assert names == [key for key in FLOW_FIELDS if key in line]
        for key, value in {
            "trace": trace[3:35],
            "connection": "c1",
            "error": error if isinstance(end, FlowFailure) else "",
            "dst.service": service,
            "src.workload": workload_name,
        }.items():
            assert line.get(key, "") == logs.cut(value)
