"""Log lines: one per record, whatever is in it, to one stream.

Text is the form that Istio's tools parse: RFC 3339 time in UTC with microseconds, level, scope, message, `key=value` fields, separated
by tabs. JSON has the same in flat keys. Invariant: nothing that a peer or a manifest says can end a line, start a second one or move
a terminal's cursor, in either form.

Fields are given as `extra=fields(pod="shop/cart", attempts=3)`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import TextIO

FLOW_FIELDS = (
    *("src.addr", "src.workload", "src.namespace", "src.identity", "src.cluster"),
    *("dst.addr", "dst.hbone_addr", "dst.service", "dst.workload", "dst.namespace", "dst.identity", "dst.cluster"),
    *("direction", "bytes_sent", "bytes_recv", "duration"),
    *("policy", "flag", "trace", "connection"),
    "error",
)
"""Fields of a connection's line, in order. Source: Istio ztunnel's access log; policy to connection are ours."""
LEVELS = ("debug", "info", "warning", "error")
LONGEST_VALUE = 2048
"""Characters of one value; what a peer sends is cut there."""
LONGEST_TRACEBACK = 16384

_ROOT = "ztunnel"
_ATTRIBUTE = "fields"
_BATCH = "flows"
_COMPLETE = "connection complete"
_CACHED_LENGTH = 128
_FRESH = frozenset({"src.addr", "duration", "trace", "connection", "error"})
"""Fields that are another in each line: not worth remembering."""
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")
"""What needs no quotes: visible ASCII without the quotation mark, the equals sign and the backslash."""


def fields(**values: object) -> dict[str, dict[str, object]]:
    """The `extra` of a log call. None means absent."""
    return {_ATTRIBUTE: values}


def configure(form: str, level: str, stream: TextIO = sys.stderr) -> None:
    """Send everything logged under `ztunnel` to a stream, and only there; may be called again.

    Args:
        form: `text` or `json`.
        level: one of LEVELS.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.propagate = False
    set_level(level)


def set_level(level: str) -> None:
    """Change what is written from now on.

    Raises:
        ValueError: not one of LEVELS.
    """
    if level not in LEVELS:
        raise ValueError(f"{level[:40]!r} is not a log level; one of {', '.join(LEVELS)} is")
    logging.getLogger(_ROOT).setLevel(level.upper())


def level_name() -> str:
    """The present level, one of LEVELS."""
    return logging.getLevelName(logging.getLogger(_ROOT).getEffectiveLevel()).lower()


def log_flows(flows: Iterable[Mapping[str, object]]) -> None:
    """The lines of connections at their ends, INFO, or ERROR for one that has an `error`; written together, with one time.

    There is a line for each connection, thousands a second on a busy node, so they do not go through a log record each.

    Args:
        flows: values by the dotted names of FLOW_FIELDS, in that order, other names behind. None and "" are absent.
    """
    access = logging.getLogger(f"{_ROOT}.access")
    infos, errors = access.isEnabledFor(logging.INFO), access.isEnabledFor(logging.ERROR)
    enabled = [flow for flow in flows if (errors if flow.get("error") else infos)]
    if enabled:
        access.log(logging.ERROR if not infos else logging.INFO, _COMPLETE, extra={_BATCH: enabled})


class TextFormatter(logging.Formatter):
    """`time<TAB>level<TAB>scope<TAB>message<TAB>key=value key="va lue"`."""

    def format(self, record: logging.LogRecord) -> str:
        flows: list[Mapping[str, object]] | None = getattr(record, _BATCH, None)
        if flows is not None:
            return self._format_flows(record, flows)
        line = f"{_time(record)}\t{record.levelname.lower()}\t{_scope(record)}\t{_clean(record.getMessage())}"
        pairs = [f"{_key(name)}={_quoted(_text(name, value))}" for name, value in _fields_of(self, record).items() if value is not None]
        return f"{line}\t{' '.join(pairs)}" if pairs else line

    def _format_flows(self, record: logging.LogRecord, flows: list[Mapping[str, object]]) -> str:
        time, scope = _time(record), _scope(record)
        good, bad = (f"{time}\t{level}\t{scope}\t{_COMPLETE}\t" for level in ("info", "error"))
        return "\n".join(
            (bad if flow.get("error") else good)
            + " ".join([f"{name}={_value(name, value)}" for name, value in flow.items() if value is not None and value != ""])
            for flow in flows
        )


class JsonFormatter(logging.Formatter):
    """One flat object; numbers and booleans keep their type."""

    def format(self, record: logging.LogRecord) -> str:
        flows: list[Mapping[str, object]] | None = getattr(record, _BATCH, None)
        if flows is not None:
            return "\n".join(self._format_flow(record, flow) for flow in flows)
        line: dict[str, object] = {
            "level": record.levelname.lower(),
            "time": _time(record),
            "scope": _scope(record),
            "message": _cut(record.getMessage()),
        }
        for name, value in _fields_of(self, record).items():
            if value is not None and name not in line:
                line[name] = value if isinstance(value, (bool, int, float)) else _text(name, value)
        # ASCII only: control characters, line separators and bidirectional overrides all leave as \u escapes.
        return json.dumps(line, ensure_ascii=True, separators=(",", ":"))

    def _format_flow(self, record: logging.LogRecord, flow: Mapping[str, object]) -> str:
        line: dict[str, object] = {
            "level": "error" if flow.get("error") else "info",
            "time": _time(record),
            "scope": _scope(record),
            "message": _COMPLETE,
        }
        for name, value in flow.items():
            if value is not None and value != "":
                line[name] = value if isinstance(value, (bool, int, float)) else _cut(str(value))
        return json.dumps(line, ensure_ascii=True, separators=(",", ":"))


def _fields_of(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, object]:
    given: object = getattr(record, _ATTRIBUTE, None)
    found = dict(given) if isinstance(given, Mapping) else {}
    if record.exc_info:
        found["exception"] = formatter.formatException(record.exc_info)
    return found


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _scope(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{_ROOT}.")


def _text(name: str, value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return _cut(text, LONGEST_TRACEBACK if name == "exception" else LONGEST_VALUE)


def _cut(text: str, longest: int = LONGEST_VALUE) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"


def _clean(text: str) -> str:
    cut = _cut(text)
    return cut if cut.isprintable() else json.dumps(cut)[1:-1]


def _key(name: str) -> str:
    return name if name.isidentifier() or name.replace(".", "_").isidentifier() else _quoted(name)


def _value(name: str, value: object) -> str:
    if type(value) is int:
        return str(value)
    text = str(value)
    if name not in _FRESH and len(text) <= _CACHED_LENGTH:
        return _again_quoted(text)
    return _quoted(_cut(text))


@lru_cache(maxsize=4096)
def _again_quoted(text: str) -> str:
    """Names and identities come again and again."""
    return _quoted(text)


def _quoted(text: str) -> str:
    """As it is where that is unambiguous, else as a JSON string."""
    if _PLAIN.fullmatch(text) is not None:
        return text
    if text and text.isprintable() and not any(mark in text for mark in ' "=\\'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
