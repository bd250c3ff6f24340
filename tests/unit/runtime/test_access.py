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
from ztunnel.dataplane.flow import Direction, FlowPath, FlowRecord
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime import logs
from ztunnel.runtime.access import FLOW_FIELDS, Alike, log_connections

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
RECORD = FlowRecord(
    "c1",
    ("10.0.0.1", 4000),
    flag=Flag.DENY,
    error="no way",
    trace="00-0123456789abcdef0123456789abcdef-0123456789abcdef-01",
    closed=True,
    total_up_bytes=10,
    total_down_bytes=100,
    duration_seconds=1.5,
)
BARE = FlowRecord("", ("fd00::1", 1), closed=True)
but = msgspec.structs.replace


def written(form: str, *ended: tuple[Alike, list[FlowRecord]], level: str = "info") -> list[str]:
    stream = io.StringIO()
    logs.configure(form, level, stream)
    log_connections(ended)
    return stream.getvalue().splitlines()


def alike(path: FlowPath, source: Workload | None = CLIENT, destination: Workload | None = SERVER) -> Alike:
    return Alike(path, source, destination)


def as_json(
    path: FlowPath, record: FlowRecord, source: Workload | None = CLIENT, destination: Workload | None = SERVER
) -> dict[str, object]:
    (line,) = written("json", (alike(path, source, destination), [record]))
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_what_a_line_says() -> None:
    line = as_json(PATH, RECORD)
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
    (line,) = written("text", (alike(PATH), [RECORD]))
    assert re.sub(r"^[\dT:.-]+Z\t", "", line) == (
        "error\taccess\tconnection complete\tsrc.addr=10.0.0.1:4000 src.workload=client src.namespace=default "
        f"src.identity={PATH.source_identity} src.cluster={CLIENT.cluster} dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 "
        f"dst.service=web.back.svc dst.workload=server dst.namespace=back dst.identity={PATH.destination_identity} "
        f"dst.cluster={SERVER.cluster} direction=outbound bytes_sent=10 bytes_recv=100 duration=1500ms waypoint=back/waypoint "
        'policy="AuthorizationPolicy back/p" flag=DENY trace=0123456789abcdef0123456789abcdef connection=c1 error="no way"'
    )


def test_what_a_line_does_not_know_is_left_out() -> None:
    for form in ("text", "json"):
        (line,) = written(form, (alike(STRANGE, None, None), [BARE]))
        assert "info" in line
        words = [name for name in FLOW_FIELDS if re.search(rf'[\t ,"]{re.escape(name)}[="]', line)]
        assert words == ["src.addr", "direction", "bytes_sent", "bytes_recv", "duration"]
    assert as_json(STRANGE, BARE, None, None)["src.addr"] == "[fd00::1]:1"


@pytest.mark.parametrize(("direction", "sent", "received"), [(Direction.OUTBOUND, 10, 100), (Direction.INBOUND, 100, 10)])
def test_the_lines_bytes_are_the_pods_own(direction: Direction, sent: int, received: int) -> None:
    line = as_json(but(PATH, direction=direction), RECORD)
    assert (line["bytes_sent"], line["bytes_recv"], line["direction"]) == (sent, received, direction.value)


def test_lines_of_several_paths_are_written_together() -> None:
    good = but(RECORD, error="", flag=Flag.NONE)
    for form in ("text", "json"):
        lines = written(form, (alike(PATH), [good, RECORD]), (alike(STRANGE), [BARE]))
        assert [("error" in line.split("access")[0]) for line in lines] == [False, True, False]
        assert [("10.0.0.1:4000" in line) for line in lines] == [True, True, False]


def test_only_failed_connections_are_told_above_info() -> None:
    good = but(RECORD, error="", flag=Flag.NONE)
    assert written("text", (alike(PATH), [good]), level="warning") == []
    (line,) = written("text", (alike(PATH), [good]), (alike(PATH), [good, RECORD]), level="warning")
    assert line.endswith('error="no way"')
    logs.configure("text", "error", stream := io.StringIO())
    logging.getLogger("ztunnel").setLevel(logging.CRITICAL)
    log_connections([(alike(PATH), [RECORD])])
    assert stream.getvalue() == ""


ANY = st.text() | st.text('a\n\r\t\x1b\u2028\u202e"\\= é\ud800', max_size=20) | st.text("ab", min_size=2000, max_size=5000)


@given(ip=ANY, trace=ANY, name=ANY, error=ANY, service=ANY, policy=ANY, workload_name=ANY)
def test_nothing_breaks_out_of_its_line_and_json_says_what_was_given(
    ip: str, trace: str, name: str, error: str, service: str, policy: str, workload_name: str
) -> None:
    path, record = but(PATH, service=service, policy=policy), but(RECORD, source=(ip, 1), trace=trace, id=name, error=error)
    ends = alike(path, replace(CLIENT, name=workload_name))
    (text_line,) = written("text", (ends, [record]))
    assert text_line.replace("\t", "", 4).isprintable()
    fields = text_line.split("\t", 4)[4]
    names = re.findall(r'(?:^| )([a-z_.]+)=(?:[^ "=\\]+|"(?:[^"\\]|\\.)*")(?= |$)', fields)
    line = as_json(path, record, replace(CLIENT, name=workload_name))
    assert names == [key for key in FLOW_FIELDS if key in line]
    for key, value in {
        "trace": trace[3:35],
        "connection": name,
        "error": error,
        "dst.service": service,
        "src.workload": workload_name,
    }.items():
        assert line.get(key, "") == logs.cut(value)
