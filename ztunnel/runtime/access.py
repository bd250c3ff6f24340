"""The line that each connection leaves in the log at its end.

There are thousands a second on a busy node. So what the lines of one path say alike is rendered once, the lines of many connections are
one log record with one time, and what differs is looked at once for whether it needs quotes. Each line is as the formatters of `logs`
would write it, and nothing in it can end it.
Source: Istio ztunnel's access log.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ztunnel.dataplane.addresses import text
from ztunnel.dataplane.flow import Direction, FlowEnd, FlowNews, FlowPath
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime.logs import BATCH, cut, quoted

FLOW_FIELDS = (
    *("src.addr", "src.workload", "src.namespace", "src.identity", "src.cluster"),
    *("dst.addr", "dst.hbone_addr", "dst.service", "dst.workload", "dst.namespace", "dst.identity", "dst.cluster"),
    *("direction", "bytes_sent", "bytes_recv", "duration"),
    *("waypoint", "policy", "flag", "trace", "connection"),
    "error",
)
"""Fields of a connection's line, in order; absent ones are left out. Waypoint to connection are ours, the others Istio's."""
_COMPLETE = "connection complete"
_TRACE = slice(3, 35)
"""The trace's id in a `traceparent`."""
_PLAIN = re.compile(r"[!#-<>-\[\]-~]{1,512}").fullmatch
"""What no form quotes, escapes or cuts."""
_ALL_PLAIN = re.compile(r"[!#-<>-\[\]-~]*").fullmatch

log = logging.getLogger("ztunnel.access")


class _Form:
    """How a line is put together: `key` makes a field's name and what is before and behind it, `string` a value that is no number."""

    def __init__(self, key: str, string: Callable[[str], str], mark: str, end: str) -> None:
        self.string, self.mark, self.end = string, mark, end
        self.sent, self.received, self.duration, self.flag, self.trace, self.connection, self.error = (
            key % name for name in ("bytes_sent", "bytes_recv", "duration", "flag", "trace", "connection", "error")
        )
        self._key = key

    def render(self, values: Mapping[str, str]) -> str:
        return "".join(f"{self._key % name}{self.string(value)}" for name, value in values.items())


def _string(value: str) -> str:
    return json.dumps(cut(value))


_TEXT = _Form(" %s=", quoted, "", "")
_JSON = _Form(',"%s":', _string, '"', "}")


class Alike:
    """What the lines of all connections of a path say, ready to be written."""

    def __init__(self, path: FlowPath, source: Workload | None, destination: Workload | None) -> None:
        self.is_inbound = path.direction is Direction.INBOUND
        given = {
            "src.workload": source and source.name,
            "src.namespace": source and source.namespace,
            "src.identity": path.source_identity,
            "src.cluster": source and source.cluster,
            "dst.addr": text(path.destination) if path.destination[0] else "",
            "dst.hbone_addr": path.target if path.mutual_tls else "",
            "dst.service": path.service,
            "dst.workload": destination and destination.name,
            "dst.namespace": destination and destination.namespace,
            "dst.identity": path.destination_identity,
            "dst.cluster": destination and destination.cluster,
            "direction": path.direction.value,
        }
        self._given = {name: value for name, value in given.items() if value}
        self._policy = {name: value for name, value in (("waypoint", path.waypoint), ("policy", path.policy)) if value}
        self._rendered: dict[_Form, tuple[str, str]] = {}

    def render(self, form: _Form) -> tuple[str, str]:
        """What is between the source's address and the bytes, and what follows the duration."""
        found = self._rendered.get(form)
        if found is None:
            found = self._rendered[form] = form.render(self._given), form.render(self._policy)
        return found


Ended = tuple[Alike, FlowNews]
"""The news of a path on which connections have ended, and what their lines say alike."""


def log_connections(ended: Sequence[Ended], prefix: str = "") -> None:
    """The lines of connections at their ends, INFO, or ERROR for one that has an `error`; written together, with one time.

    Args:
        prefix: stands before the connections' names.
    """
    level = logging.INFO
    if not log.isEnabledFor(level):
        level = logging.ERROR
        if not log.isEnabledFor(level):
            return
        ended = [(alike, _only_failed(news)) for alike, news in ended if any(each.error for each in news.failures)]
    if ended:
        log.log(level, _COMPLETE, extra={BATCH: _Lines(ended, prefix)})


def _only_failed(news: FlowNews) -> FlowNews:
    return FlowNews(news.path, failures=tuple(each for each in news.failures if each.error))


@dataclass(frozen=True, slots=True)
class _Lines:
    """Implements `logs.Batch`."""

    ended: Sequence[Ended]
    prefix: str

    def text(self, time: str, scope: str) -> str:
        good, bad = (f"{time}\t{level}\t{scope}\t{_COMPLETE}\tsrc.addr=" for level in ("info", "error"))
        return self._lines(_TEXT, good, bad)

    def json(self, time: str, scope: str) -> str:
        good, bad = (
            f'{{"level":"{level}","time":"{time}","scope":"{scope}","message":"{_COMPLETE}","src.addr":' for level in ("info", "error")
        )
        return self._lines(_JSON, good, bad)

    def _lines(self, form: _Form, good: str, bad: str) -> str:
        lines: list[str] = []
        for alike, news in self.ended:
            template = _Template(form, alike, self.prefix)
            lines += template.lines(good, news.ends)
            lines += [template.line(bad if each.error else good, each, each.flag.value, each.error) for each in news.failures]
        return "\n".join(lines)


class _Template:
    """What is between the values of one path's lines."""

    def __init__(self, form: _Form, alike: Alike, prefix: str) -> None:
        before, after = alike.render(form)
        self._form = form
        self._is_inbound = alike.is_inbound
        self._sent = f"{before}{form.sent}"
        self._duration = f"{form.duration}{form.mark}"
        self._after = f"ms{form.mark}{after}"
        self._name = f"{form.connection}{form.mark}{prefix}c"

    def lines(self, head: str, ends: Sequence[FlowEnd]) -> list[str]:
        """The lines of connections that ended well."""
        ips = {each.ip for each in ends}
        traces = [each.trace[_TRACE] for each in ends]
        if not all(map(_PLAIN, ips)) or not _ALL_PLAIN("".join(traces)):
            return [self.line(head, each) for each in ends]
        form, mark = self._form, self._form.mark
        begin = {ip: f"{head}{mark}[{ip}]:" if ":" in ip else f"{head}{mark}{ip}:" for ip in ips}
        sent, received, duration, after, name = f"{mark}{self._sent}", form.received, self._duration, self._after, self._name
        traced, last = f"{form.trace}{mark}", f"{mark}{form.end}"
        counts = [(each.down_bytes, each.up_bytes) if self._is_inbound else (each.up_bytes, each.down_bytes) for each in ends]
        return [
            f"{begin[each.ip]}{each.port}{sent}{out}{received}{back}{duration}{each.duration_seconds * 1000:.0f}{after}"
            f"{trace and f'{traced}{trace}{mark}'}{name}{each.number}{last}"
            for each, (out, back), trace in zip(ends, counts, traces, strict=True)
        ]

    def line(self, head: str, end: FlowEnd, flag: str = "", error: str = "") -> str:
        """The line of one connection, whatever its values are."""
        form = self._form
        out, back = (end.down_bytes, end.up_bytes) if self._is_inbound else (end.up_bytes, end.down_bytes)
        trace = end.trace[_TRACE]
        return (
            f"{head}{form.string(text((end.ip, end.port)))}{self._sent}{out}{form.received}{back}"
            f"{self._duration}{end.duration_seconds * 1000:.0f}{self._after}{flag and form.flag + form.string(flag)}"
            f"{trace and form.trace + form.string(trace)}{self._name}{end.number}{form.mark}"
            f"{error and form.error + form.string(error)}{form.end}"
        )
