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
from ztunnel.dataplane.flow import Direction, FlowPath, FlowRecord
from ztunnel.mesh.errors import Flag
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


Ended = tuple[Alike, Sequence[FlowRecord]]
"""Last records of connections, and what their lines say alike."""


def log_connections(ended: Sequence[Ended]) -> None:
    """The lines of connections at their ends, INFO, or ERROR for one that has an `error`; written together, with one time."""
    level = logging.INFO
    if not log.isEnabledFor(level):
        level = logging.ERROR
        if not log.isEnabledFor(level):
            return
        failed = ((alike, [record for record in records if record.error]) for alike, records in ended)
        ended = [(alike, records) for alike, records in failed if records]
    if ended:
        log.log(level, _COMPLETE, extra={BATCH: _Lines(ended)})


@dataclass(frozen=True, slots=True)
class _Lines:
    """Implements `logs.Batch`."""

    ended: Sequence[Ended]

    def text(self, time: str, scope: str) -> str:
        good, bad = (f"{time}\t{level}\t{scope}\t{_COMPLETE}\tsrc.addr=" for level in ("info", "error"))
        return self._lines(_TEXT, good, bad)

    def json(self, time: str, scope: str) -> str:
        good, bad = (
            f'{{"level":"{level}","time":"{time}","scope":"{scope}","message":"{_COMPLETE}","src.addr":' for level in ("info", "error")
        )
        return self._lines(_JSON, good, bad)

    def _lines(self, form: _Form, good: str, bad: str) -> str:
        string, mark = form.string, form.mark
        lines: list[str] = []
        for alike, records in self.ended:
            before, after = alike.render(form)
            before += form.sent
            after = f"ms{mark}{after}"
            duration = f"{form.duration}{mark}"
            for record in records:
                source, trace, name, error = text(record.source), record.trace[_TRACE], record.id, record.error
                if _PLAIN(f"{source}{trace}{name}") is not None:
                    source = f"{mark}{source}{mark}"
                    trace = trace and f"{form.trace}{mark}{trace}{mark}"
                    name = name and f"{form.connection}{mark}{name}{mark}"
                else:
                    source = string(source)
                    trace = trace and f"{form.trace}{string(trace)}"
                    name = name and f"{form.connection}{string(name)}"
                sent, received = record.total_up_bytes, record.total_down_bytes
                if alike.is_inbound:
                    sent, received = received, sent
                flag = "" if record.flag is Flag.NONE else f"{form.flag}{mark}{record.flag.value}{mark}"
                lines.append(
                    f"{bad if error else good}{source}{before}{sent}{form.received}{received}{duration}{record.duration_seconds * 1000:.0f}"
                    f"{after}{flag}{trace}{name}{error and form.error + string(error)}{form.end}"
                )
        return "\n".join(lines)
