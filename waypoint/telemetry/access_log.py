"""Access logs: one line for each request or connection, as Istio writes them by default or as a format of Envoy's operators says.

Text: what is missing is `-`. JSON: what is missing is null, and a field that is one operator keeps the operator's type. Bytes that are no
text are escaped, so that nobody can end a line or a field's quotes by what he sends.
Source: Envoy, "Access logging: command operators"; Istio's default formats.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from waypoint.http.messages import Headers, header
from waypoint.telemetry.summary import Flow, Summary
from ztunnel.mesh.l7.evaluation import Attributes, EvaluationError, ExpressionError
from ztunnel.mesh.l7.expressions import Expression
from ztunnel.mesh.l7.telemetry import AccessLog
from ztunnel.rpc.messages import Status

Known = Summary | Flow
Value = str | int | None

DEFAULT_TEXT: Final = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    '%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% %BYTES_SENT% '
    '%DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" '
    '"%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%"
)
DEFAULT_FIELDS: Final = (
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
)
LONGEST_VALUE: Final = 4096
"""Characters of one value; a path may have sixty thousand."""
_OPERATOR = re.compile(r"%(?:%|([A-Z_0-9]+)(?:\((.*?)\))?(?::(\d{1,5}))?%)")
_PROTOCOLS: Final = {10: "HTTP/1.0", 11: "HTTP/1.1", 20: "HTTP/2"}


class AccessLogger:
    """One log, compiled."""

    __slots__ = ("_fields", "_filter", "_parts")

    def __init__(self, log: AccessLog, hostname: str = "") -> None:
        """
        Args:
            hostname: of this proxy's pod.
        """
        self._filter = Expression(log.filter) if log.filter else None
        self._fields: list[tuple[str, _Template]] = []
        self._parts: _Template | None = None
        if log.json or log.fields:
            self._fields = [(name, _Template(text, hostname)) for name, text in log.fields or DEFAULT_FIELDS]
        else:
            self._parts = _Template(log.template.rstrip("\n") or DEFAULT_TEXT, hostname)

    def line(self, known: Known, attributes: Attributes) -> bytes | None:
        """What to write, with its line feed; None where the filter says no."""
        if self._filter is not None and not self._filter.holds(attributes):
            return None
        if self._parts is not None:
            return self._parts.text(known, attributes).encode("utf-8", "backslashreplace") + b"\n"
        said = {name: template.value(known, attributes) for name, template in self._fields}
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


class _Operator:
    """One `%…%`."""

    __slots__ = ("_expression", "_limit", "_of", "argument")

    def __init__(self, of: Callable[[Known, str], Value], argument: str, limit: int, expression: Expression | None = None) -> None:
        self._of = of
        self.argument = argument
        self._limit = limit
        self._expression = expression

    def value(self, known: Known, attributes: Attributes) -> Value:
        if self._expression is not None:
            try:
                found = self._expression.evaluate(attributes)
            except EvaluationError:
                return None
            return found if isinstance(found, str | int) else str(found)
        value = self._of(known, self.argument)
        if isinstance(value, str):
            return (value[: self._limit] if self._limit else value[:LONGEST_VALUE]) or None
        return value


class _Template:
    """Text with operators."""

    __slots__ = ("_parts",)

    def __init__(self, text: str, hostname: str) -> None:
        self._parts: list[str | _Operator] = []
        literal, at = "", 0
        for match in _OPERATOR.finditer(text):
            literal += text[at : match.start()]
            at = match.end()
            operator = _compile(match, hostname)
            if isinstance(operator, str):
                literal += operator
                continue
            if literal:
                self._parts.append(literal)
            self._parts.append(operator)
            literal = ""
        literal += text[at:]
        if literal:
            self._parts.append(literal)

    def text(self, known: Known, attributes: Attributes) -> str:
        return "".join([part if isinstance(part, str) else _shown(part.value(known, attributes)) for part in self._parts])

    def value(self, known: Known, attributes: Attributes) -> Value:
        """With its type, if it is one operator and nothing else."""
        if len(self._parts) == 1 and isinstance(self._parts[0], _Operator):
            return self._parts[0].value(known, attributes)
        return self.text(known, attributes)


def _compile(match: re.Match[str], hostname: str) -> _Operator | str:
    """An operator; text for one that always says the same, or that is not known (it stays as it is written)."""
    name, argument, limit = match.groups()
    if name is None:
        return "%"
    if name == "HOSTNAME":
        return hostname or "-"
    if name == "ENVIRONMENT":
        return os.environ.get(argument or "", "-")
    size = int(limit or 0)
    if name == "CEL":
        try:
            return _Operator(_nothing, "", size, Expression(argument or ""))
        except ExpressionError:
            return match.group()
    of = _OPERATORS.get(name)
    return match.group() if of is None else _Operator(of, argument or "", size)


def unknown_operators(text: str) -> list[str]:
    """Operators in a format that mean nothing here."""
    return [match.group() for match in _OPERATOR.finditer(text) if match[1] is not None and _compile(match, "h") == match.group()]


_CONTROL = re.compile(r"[\x00-\x1f\x7f\"\\]")


def _shown(value: Value) -> str:
    if value is None or value == "":
        return "-"
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", str(value)) if isinstance(value, str) else str(value)


# Operators.


def _nothing(_known: Known, _argument: str) -> Value:
    return None


def _decoded(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")


def _request_header(known: Known, argument: str) -> Value:
    if not isinstance(known, Summary):
        return None
    request = known.request
    for name in argument.lower().split("?", 1):
        value: bytes | None
        if name == "x-envoy-original-path":
            value = request.original_path if request.original_path != request.path else None
        elif name.startswith(":"):
            value = {":method": request.method, ":path": request.path, ":authority": request.authority, ":scheme": request.scheme}.get(name)
        else:
            value = request.get(name.encode())
        if value:
            return _decoded(value)
    return None


def _without_query(known: Known, argument: str) -> Value:
    value = _request_header(known, argument)
    return value.partition("?")[0] if isinstance(value, str) else value


def _path(known: Known, argument: str) -> Value:
    """`%PATH(WQ|NQ:ORIG|PATH|ORIG_OR_PATH)%`."""
    if not isinstance(known, Summary):
        return None
    kind, _, which = argument.partition(":")
    path = known.request.path if which == "PATH" else known.request.original_path
    return _decoded(path.partition(b"?")[0] if kind == "NQ" else path)


def _from(headers: Headers, argument: str) -> Value:
    for name in argument.lower().split("?", 1):
        value = header(headers, name.encode())
        if value:
            return _decoded(value)
    return None


def _response_header(known: Known, argument: str) -> Value:
    if not isinstance(known, Summary) or known.response is None:
        return None
    return known.response.status if argument.lower() == ":status" else _from(known.response.headers, argument)


def _trailer(known: Known, argument: str) -> Value:
    return _from(known.trailers, argument) if isinstance(known, Summary) else None


def _start_time(known: Known, argument: str) -> Value:
    moment = datetime.fromtimestamp(known.started, UTC)
    milliseconds = f"{moment.microsecond // 1000:03d}"
    if not argument:
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds}Z"
    text = argument.replace("%3f", milliseconds).replace("%6f", f"{moment.microsecond:06d}").replace("%s", str(int(known.started)))
    return moment.strftime(text)


def _address(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _upstream_host(known: Known, _: str) -> Value:
    return None if known.endpoint is None else _address(known.endpoint.address, known.endpoint.port)


def _grpc_status(known: Known, argument: str) -> Value:
    number = known.grpc_status if isinstance(known, Summary) else None
    if number is None:
        return None
    try:
        name = Status(number).name
    except ValueError:
        return str(number)
    if argument == "SNAKE_STRING":
        return name
    return str(number) if argument == "NUMBER" else "".join(word.capitalize() for word in name.split("_")).replace("Ok", "OK")


_FLAGS_LONG: Final = {
    "UH": "NoHealthyUpstream", "UF": "UpstreamConnectionFailure", "UO": "UpstreamOverflow", "NR": "NoRouteFound",
    "URX": "UpstreamRetryLimitExceeded", "NC": "NoClusterFound", "UT": "UpstreamRequestTimeout", "UC": "UpstreamConnectionTermination",
    "UR": "UpstreamRemoteReset", "DC": "DownstreamConnectionTermination", "DI": "DelayInjected", "FI": "FaultInjected",
    "RL": "RateLimited", "UAEX": "UnauthorizedExternalService", "SI": "StreamIdleTimeout", "DPE": "DownstreamProtocolError",
    "LR": "LocalReset", "UPE": "UpstreamProtocolError", "OM": "OverloadManagerTerminated",
}  # fmt: skip


def _flags_long(known: Known, _: str) -> Value:
    return ",".join(_FLAGS_LONG.get(flag, flag) for flag in known.flags.split(",")) if known.flags else None


def _uri(known: Known, _: str) -> Value:
    return None if known.client.identity is None else known.client.identity.uri


def _of_request(of: Callable[[Summary], Value]) -> Callable[[Known, str], Value]:
    return lambda known, _: of(known) if isinstance(known, Summary) else None


def _of_any(of: Callable[[Known], Value]) -> Callable[[Known, str], Value]:
    return lambda known, _: of(known)


_LOCAL = _of_any(lambda known: _address(known.client.destination, known.client.service_port))
_REMOTE = _of_any(lambda known: _address(known.client.address, known.client.port))
_REMOTE_ADDRESS = _of_any(lambda known: known.client.address)
_CLUSTER = _of_any(lambda known: known.cluster)
_OPERATORS: Final[dict[str, Callable[[Known, str], Value]]] = {
    "START_TIME": _start_time,
    "REQ": _request_header,
    "REQ_WITHOUT_QUERY": _without_query,
    "PATH": _path,
    "RESP": _response_header,
    "TRAILER": _trailer,
    "PROTOCOL": _of_request(lambda known: _PROTOCOLS.get(known.request.version)),
    "RESPONSE_CODE": lambda known, _: known.status if isinstance(known, Summary) else 0,
    "RESPONSE_CODE_DETAILS": _of_any(lambda known: "_".join(known.details.split())),
    "RESPONSE_FLAGS": _of_any(lambda known: known.flags or "-"),
    "RESPONSE_FLAGS_LONG": _flags_long,
    "CONNECTION_TERMINATION_DETAILS": _of_any(lambda known: "_".join(known.termination.split())),
    "UPSTREAM_TRANSPORT_FAILURE_REASON": _of_any(lambda known: known.transport_failure),
    "BYTES_RECEIVED": lambda known, _: known.bytes_in if isinstance(known, Summary) else known.received,
    "BYTES_SENT": lambda known, _: known.bytes_out if isinstance(known, Summary) else known.sent,
    "DURATION": _of_any(lambda known: int(known.duration * 1000)),
    "UPSTREAM_HOST": _upstream_host,
    "UPSTREAM_REMOTE_ADDRESS": _upstream_host,
    "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": _of_any(lambda known: None if known.endpoint is None else known.endpoint.address),
    "UPSTREAM_REMOTE_PORT": _of_any(lambda known: None if known.endpoint is None else known.endpoint.port),
    "UPSTREAM_CLUSTER": _CLUSTER,
    "UPSTREAM_CLUSTER_RAW": _CLUSTER,
    "UPSTREAM_LOCAL_ADDRESS": _of_any(lambda known: known.upstream_local),
    "UPSTREAM_REQUEST_ATTEMPT_COUNT": _of_request(lambda known: known.attempts),
    "DOWNSTREAM_LOCAL_ADDRESS": _LOCAL,
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": _of_any(lambda known: known.client.destination),
    "DOWNSTREAM_LOCAL_PORT": _of_any(lambda known: known.client.service_port),
    "DOWNSTREAM_REMOTE_ADDRESS": _REMOTE,
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": _REMOTE_ADDRESS,
    "DOWNSTREAM_REMOTE_PORT": _of_any(lambda known: known.client.port),
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": _REMOTE,
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": _REMOTE_ADDRESS,
    "DOWNSTREAM_PEER_URI_SAN": _uri,
    "REQUESTED_SERVER_NAME": _of_any(lambda known: known.client.sni),
    "ROUTE_NAME": _of_any(lambda known: known.route),
    "GRPC_STATUS": _grpc_status,
    "GRPC_STATUS_NUMBER": _of_request(lambda known: known.grpc_status),
    "EMPTY_VALUE": _nothing,
}
