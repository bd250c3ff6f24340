"""Log lines: the shape that tools parse, and nothing that breaks out of it."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.runtime import logs

NASTY = 'a\nERROR\tforged\r\x1b[2J\u2028\u202e"\\=\x00'


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


def test_a_batch_is_written_in_place_of_the_message() -> None:
    class Lines:
        def text(self, time: str, scope: str) -> str:
            return f"{time} {scope} one\ntwo"

        def json(self, time: str, scope: str) -> str:
            return f'"{time} {scope}"'

    for form, shape in (("text", r"[\dT:.-]+Z node one\ntwo\n"), ("json", r'"[\dT:.-]+Z node"\n')):
        stream = io.StringIO()
        logs.configure(form, "info", stream)
        logging.getLogger("ztunnel.node").info("many", extra={logs.BATCH: Lines()})
        assert re.fullmatch(shape, stream.getvalue())


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
