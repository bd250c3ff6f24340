"""Log lines: the shape that tools parse, and nothing that breaks out of it."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.runtime import logs

NASTY = 'a\nERROR\tforged\r\x1b[2J\u2028\u202e"\\=\x00'


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger("ztunnel")
    before = (root.handlers[:], root.level, root.propagate)
    yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def logged(form: str, message: str, **values: object) -> str:
    stream = io.StringIO()
    logs.configure(form, "debug", stream)
    logging.getLogger("ztunnel.node.pods").info(message, extra=logs.fields(**values))
    return stream.getvalue()


def test_a_text_line_has_istios_shape() -> None:
    line = logged("text", "enrolled", pod="shop/cart", attempts=3, strict=True, note="two words", nothing=None, empty="")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\tinfo\tnode\.pods\tenrolled\t"
        r'pod=shop/cart attempts=3 strict=true note="two words" empty=""\n',
        line,
    )


def test_a_line_without_fields() -> None:
    stream = io.StringIO()
    logs.configure("text", "info", stream)
    logging.getLogger("ztunnel.app").warning("starting %s", "now")
    assert stream.getvalue().endswith("\twarning\tapp\tstarting now\n")


def test_a_json_line_keeps_numbers() -> None:
    record = json.loads(logged("json", "enrolled", pod="shop/cart", attempts=3, strict=True, nothing=None, level="forged"))
    assert record["level"] == "info"
    assert record["scope"] == "node.pods"
    assert record["message"] == "enrolled"
    assert (record["pod"], record["attempts"], record["strict"]) == ("shop/cart", 3, True)
    assert "nothing" not in record


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_breaks_out_of_its_line(form: str) -> None:
    line = logged(form, NASTY, value=NASTY, **{NASTY: NASTY})
    assert line.count("\n") == 1
    assert line[:-1].replace("\t", "").isprintable()
    assert line.count("\t") == (4 if form == "text" else 0)


@given(st.text(), st.text())
def test_any_text_is_one_line(message: str, value: str) -> None:
    record = logging.LogRecord("ztunnel.x", logging.INFO, "", 0, message.replace("%", ""), None, None)
    record.fields = {"value": value}
    for formatter in (logs.TextFormatter(), logs.JsonFormatter()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        assert line.replace("\t", "").isprintable()


def test_long_values_are_cut() -> None:
    assert len(logged("text", "m" * 10**6, value="x" * 10**6)) < 3 * logs.LONGEST_VALUE


def test_an_exception_is_a_field() -> None:
    stream = io.StringIO()
    logs.configure("json", "info", stream)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("ztunnel.app").exception("failed")
    record = json.loads(stream.getvalue())
    assert "ValueError: why" in record["exception"]


def test_flow_lines_are_in_the_order_of_istio() -> None:
    stream = io.StringIO()
    logs.configure("text", "info", stream)
    given = {
        "duration": "13ms",
        "direction": "inbound",
        "src.identity": "spiffe://cluster.local/ns/shop/sa/cart",
        "src.addr": "10.0.0.1:5000",
        "dst.addr": "10.0.0.2:15008",
        "dst.workload": None,
        "dst.service": "",
        "bytes_recv": 0,
        "bytes_sent": 12,
    }
    logs.log_flows([{name: given.get(name) for name in logs.FLOW_FIELDS} | {"extra": "x"}])
    assert stream.getvalue().split("\t", 1)[1] == (
        "info\taccess\tconnection complete\tsrc.addr=10.0.0.1:5000 src.identity=spiffe://cluster.local/ns/shop/sa/cart "
        "dst.addr=10.0.0.2:15008 direction=inbound bytes_sent=12 bytes_recv=0 duration=13ms extra=x\n"
    )


def test_a_flow_with_an_error_is_an_error() -> None:
    stream = io.StringIO()
    logs.configure("text", "info", stream)
    logs.log_flows([{"direction": "inbound", "policy": "AuthorizationPolicy shop/deny", "error": "denied"}])
    assert (
        '\terror\taccess\tconnection complete\tdirection=inbound policy="AuthorizationPolicy shop/deny" error=denied\n' in stream.getvalue()
    )


def test_flows_are_written_together_and_none_breaks_out_of_its_line() -> None:
    for form in ("text", "json"):
        stream = io.StringIO()
        logs.configure(form, "info", stream)
        flows: list[dict[str, object]] = [
            {"direction": "outbound", "dst.service": 'a"b\nc d=e\\', "bytes_sent": 1},
            {"error": "x\ty" + "z" * 5000},
            {"bytes_sent": 2},
        ]
        logs.log_flows(flows)
        lines = stream.getvalue().splitlines()
        assert len(lines) == 3
        assert [("error" in line.split("access")[0]) for line in lines] == [False, True, False]
        assert all(len(line) < 3000 for line in lines)
        if form == "json":
            assert json.loads(lines[0])["dst.service"] == 'a"b\nc d=e\\'
        else:
            assert lines[0].endswith('direction=outbound dst.service="a\\"b\\nc d=e\\\\" bytes_sent=1')


def test_only_failed_connections_are_told_above_info() -> None:
    stream = io.StringIO()
    logs.configure("text", "warning", stream)
    logs.log_flows([{"direction": "inbound"}])
    assert stream.getvalue() == ""
    logs.log_flows([{"direction": "inbound"}, {"direction": "inbound", "error": "refused"}])
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("error=refused")


def test_levels() -> None:
    stream = io.StringIO()
    logs.configure("text", "warning", stream)
    logging.getLogger("ztunnel.app").info("no")
    assert stream.getvalue() == ""
    logs.set_level("debug")
    assert logs.level_name() == "debug"
    logging.getLogger("ztunnel.app").debug("yes")
    assert "yes" in stream.getvalue()
    with pytest.raises(ValueError, match="not a log level"):
        logs.set_level("loud")
