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
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Protocol, TextIO

LEVELS = ("debug", "info", "warning", "error")
LONGEST_VALUE = 2048
"""Characters of one value; what a peer sends is cut there."""
LONGEST_TRACEBACK = 16384

BATCH = "batch"
"""In the `extra` of a log call: a `Batch` that is written in place of the message."""

_ROOT = "ztunnel"
_ATTRIBUTE = "fields"
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


class Batch(Protocol):
    """Many lines that are one record for logging. They say the same in both forms, and keep this module's invariant."""

    def text(self, time: str, scope: str) -> str:
        """Lines of text, without the last one's end."""

    def json(self, time: str, scope: str) -> str:
        """Objects, one in a line."""


class TextFormatter(logging.Formatter):
    """`time<TAB>level<TAB>scope<TAB>message<TAB>key=value key="va lue"`."""

    def format(self, record: logging.LogRecord) -> str:
        batch: Batch | None = getattr(record, BATCH, None)
        if batch is not None:
            return batch.text(_time(record), _scope(record))
        line = f"{_time(record)}\t{record.levelname.lower()}\t{_scope(record)}\t{_clean(record.getMessage())}"
        pairs = [f"{_key(name)}={_quoted(_text(name, value))}" for name, value in _fields_of(self, record).items() if value is not None]
        return f"{line}\t{' '.join(pairs)}" if pairs else line


class JsonFormatter(logging.Formatter):
    """One flat object; numbers and booleans keep their type."""

    def format(self, record: logging.LogRecord) -> str:
        batch: Batch | None = getattr(record, BATCH, None)
        if batch is not None:
            return batch.json(_time(record), _scope(record))
        line: dict[str, object] = {
            "level": record.levelname.lower(),
            "time": _time(record),
            "scope": _scope(record),
            "message": cut(record.getMessage()),
        }
        for name, value in _fields_of(self, record).items():
            if value is not None and name not in line:
                line[name] = value if isinstance(value, (bool, int, float)) else _text(name, value)
        # ASCII only: control characters, line separators and bidirectional overrides all leave as \u escapes.
        return json.dumps(line, ensure_ascii=True, separators=(",", ":"))


def cut(text: str, longest: int = LONGEST_VALUE) -> str:
    """Of an overlong text the first and the last part."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"


def quoted(text: str) -> str:
    """A value as text has it: bounded, and what is not plain in quotes."""
    return _quoted(cut(text))


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
    return cut(text, LONGEST_TRACEBACK if name == "exception" else LONGEST_VALUE)


def _clean(text: str) -> str:
    text = cut(text)
    return text if text.isprintable() else json.dumps(text)[1:-1]


def _key(name: str) -> str:
    return name if name.isidentifier() or name.replace(".", "_").isidentifier() else _quoted(name)


def _quoted(text: str) -> str:
    """As it is where that is unambiguous, else as a JSON string."""
    if _PLAIN.fullmatch(text) is not None:
        return text
    if text and text.isprintable() and not any(mark in text for mark in ' "=\\'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
