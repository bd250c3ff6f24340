"""MeshConfig: what the mesh's ConfigMap (`istio`, key `mesh`) says that a proxy goes by.

It has a hundred fields, most of which concern what we are not, so unknown ones are passed over. Those that are read are read strictly: a
provider that cannot be used keeps its place, and whatever names it fails closed with the reason.
Source: Istio API reference of MeshConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.config import PathNormalization
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.manifests.elements import string
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.values import choice, duration, header_name, header_value, integer, number
from ztunnel.mesh.rules import StringKind

CONFIG_MAP, CONFIG_KEY = "istio", "mesh"
MAX_PROVIDERS = 256
STRICTEST = PathNormalization.DECODE_AND_MERGE_SLASHES
"""Where what was asked for cannot be read: less of it would let paths pass that a policy denies."""
_T = TypeVar("_T")
_KINDS = {
    StringKind.EXACT: TextKind.EXACT,
    StringKind.PREFIX: TextKind.PREFIX,
    StringKind.SUFFIX: TextKind.SUFFIX,
    StringKind.PRESENCE: TextKind.PRESENT,
}


class ProviderKind(Enum):
    """Providers that we can use; the value is the field's name."""

    AUTHZ_HTTP = "envoyExtAuthzHttp"
    AUTHZ_GRPC = "envoyExtAuthzGrpc"
    ZIPKIN = "zipkin"
    OPENTELEMETRY = "opentelemetry"
    FILE_LOG = "envoyFileAccessLog"
    PROMETHEUS = "prometheus"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Provider:
    """One of MeshConfig.extensionProviders."""

    name: str
    kind: ProviderKind
    host: str = ""
    """The service's host name."""
    namespace: str = ""
    """Of the service, where `ns/host` is written."""
    port: int = 0
    path: str = ""
    """Authorizer: in front of the request's path. Tracing: of the collector. File log: of the file."""
    timeout: float = 600.0
    fail_open: bool = False
    status_on_error: int = 403
    include_headers: tuple[TextMatch, ...] = ()
    add_headers: tuple[tuple[str, str], ...] = ()
    headers_upstream: tuple[TextMatch, ...] = ()
    headers_downstream_deny: tuple[TextMatch, ...] = ()
    headers_downstream_allow: tuple[TextMatch, ...] = ()
    body_bytes: int = 0
    body_partial: bool = False
    is_grpc: bool = False
    """Tracing: OTLP over gRPC."""
    log_json: bool = False
    log_template: str = ""
    log_fields: tuple[tuple[str, str], ...] = ()
    problem: str = ""
    """Not empty: it cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """What is read of it, with Istio's defaults."""

    path_normalization: PathNormalization = PathNormalization.BASE
    providers: dict[str, Provider] = field(default_factory=dict)
    default_tracing: tuple[str, ...] = ()
    default_metrics: tuple[str, ...] = ("prometheus",)
    default_access_logging: tuple[str, ...] = ()
    access_log_file: str = ""
    access_log_json: bool = False
    access_log_template: str = ""
    access_log_fields: tuple[tuple[str, str], ...] = ()
    sampling: float = 1.0
    """Percent."""
    enable_tracing: bool = False
    problems: tuple[str, ...] = ()
    """What of it could not be used."""


def read_mesh_config(document: Field) -> MeshConfig:
    """A MeshConfig. Never raises: what cannot be read has its default and is in `problems`."""
    reading = _Reading(document)
    defaults = document.get("defaultProviders") if isinstance(document.value, dict) else document.instead(None)
    proxy = reading.member("defaultConfig", lambda place: place, document.instead(None))
    tracing = reading.of(proxy, "tracing", lambda place: place, document.instead(None))
    template, fields = _default_format(reading)
    return MeshConfig(
        path_normalization=_path_normalization(reading),
        providers=reading.member("extensionProviders", lambda place: _providers(place, reading), {}),
        default_tracing=reading.of(defaults, "tracing", _names, ()),
        default_metrics=reading.of(defaults, "metrics", _names, ("prometheus",)),
        default_access_logging=reading.of(defaults, "accessLogging", _names, ()),
        access_log_file=reading.member("accessLogFile", lambda place: place.text(), ""),
        access_log_json=reading.member("accessLogEncoding", lambda place: choice(place, ("TEXT", "JSON")) == "JSON", False),
        access_log_template=template,
        access_log_fields=fields,
        sampling=reading.of(tracing, "sampling", lambda place: number(place, 0, 100), 1.0),
        enable_tracing=reading.member("enableTracing", lambda place: place.boolean(), False),
        problems=tuple(reading.problems),
    )


class _Reading:
    """Reads what is there, and remembers what could not be."""

    def __init__(self, document: Field) -> None:
        self._document = document
        self.problems: list[str] = []

    def member(self, name: str, read: Callable[[Field], _T], default: _T) -> _T:
        return self.of(self._document, name, read, default)

    def of(self, place: Field, name: str, read: Callable[[Field], _T], default: _T) -> _T:
        try:
            member = place.get(name)
            return default if member.absent or member.value == "" else read(member)
        except ManifestError as error:
            self.problems.append(str(error))
            return default


def _path_normalization(reading: _Reading) -> PathNormalization:
    problems = len(reading.problems)
    found = reading.member("pathNormalization", _normalization, PathNormalization.BASE)
    return found if len(reading.problems) == problems else STRICTEST


def _normalization(place: Field) -> PathNormalization:
    text = place.get("normalization").text("DEFAULT")
    if text == "DEFAULT":
        return PathNormalization.BASE
    if text not in PathNormalization.__members__:
        raise place.get("normalization").wrong(f"not one of DEFAULT, {', '.join(PathNormalization.__members__)}")
    return PathNormalization[text]


def _names(place: Field) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.text() for item in place.items(16)))


def _default_format(reading: _Reading) -> tuple[str, tuple[tuple[str, str], ...]]:
    """accessLogFormat: a text, or (JSON) a text that is a JSON object. The object is read where the source is opened."""
    nothing: tuple[str, tuple[tuple[str, str], ...]] = ("", ())
    return reading.member("accessLogFormat", _format, nothing)


def _format(place: Field) -> tuple[str, tuple[tuple[str, str], ...]]:
    if isinstance(place.value, dict):
        return "", _labels(place)
    return place.text(), ()


def _labels(place: Field) -> tuple[tuple[str, str], ...]:
    return tuple((key, member.text()) for key, member in place.texts())


def _providers(place: Field, reading: _Reading) -> dict[str, Provider]:
    found: dict[str, Provider] = {}
    for item in place.items(MAX_PROVIDERS):
        try:
            name = item.get("name").text()
            if name in found:
                raise item.get("name").wrong("a name that another provider has")
        except ManifestError as error:
            reading.problems.append(str(error))
            continue
        try:
            found[name] = _provider(item, name)
        except ManifestError as error:
            reading.problems.append(str(error))
            found[name] = Provider(name, ProviderKind.OTHER, problem=str(error))
    return found


def _provider(place: Field, name: str) -> Provider:
    readers: dict[ProviderKind, Callable[[Field, str], Provider]] = {
        ProviderKind.AUTHZ_HTTP: _authorizer_http,
        ProviderKind.AUTHZ_GRPC: _authorizer_grpc,
        ProviderKind.ZIPKIN: _zipkin,
        ProviderKind.OPENTELEMETRY: _opentelemetry,
        ProviderKind.FILE_LOG: _file_log,
        ProviderKind.PROMETHEUS: lambda _, name: Provider(name, ProviderKind.PROMETHEUS),
    }
    for kind, read in readers.items():
        member = place.get(kind.value)
        if not member.absent:
            return read(member, name)
    others = [str(key)[:40] for key, _ in place.entries() if key != "name"]
    return Provider(name, ProviderKind.OTHER, problem=f"a provider of a kind that is not supported: {', '.join(others[:4]) or 'none'}")


def _service(place: Field) -> tuple[str, str, int]:
    """Host name, namespace if one is written, and port."""
    text = place.get("service").text()
    namespace, slash, host = text.rpartition("/")
    if slash:
        place.get("service").instead(namespace).namespace()
    return place.get("service").instead(host).name(), namespace, place.get("port").port()


def _matches(place: Field) -> tuple[TextMatch, ...]:
    found: list[TextMatch] = []
    for item in place.items(128):
        text = string(item)
        found.append(TextMatch(_KINDS[text.kind], text.value.lower(), ignore_case=True))
    return tuple(dict.fromkeys(found))


def _status(place: Field) -> int:
    if place.absent:
        return 403
    text = place.value
    if isinstance(text, str) and text.isdigit() and len(text) == 3:
        text = int(text)
    return integer(place.instead(text), 200, 599)


def _authorizer_http(place: Field, name: str) -> Provider:
    place.only(
        (
            *("service", "port", "timeout", "pathPrefix", "failOpen", "statusOnError", "clearRouteCache", "includeHeadersInCheck"),
            *("includeRequestHeadersInCheck", "includeAdditionalHeadersInCheck", "includeRequestBodyInCheck"),
            *("headersToUpstreamOnAllow", "headersToDownstreamOnDeny", "headersToDownstreamOnAllow"),
        )
    )
    host, namespace, port = _service(place)
    included = place.get("includeRequestHeadersInCheck")
    body_bytes, partial = _body(place.get("includeRequestBodyInCheck"))
    prefix = place.get("pathPrefix").text("")
    if prefix and not prefix.startswith("/"):
        raise place.get("pathPrefix").wrong("not a path")
    added = [
        (header_name(member.instead(key)), header_value(member)) for key, member in place.get("includeAdditionalHeadersInCheck").texts()
    ]
    return Provider(
        name,
        ProviderKind.AUTHZ_HTTP,
        host,
        namespace,
        port,
        path=prefix,
        timeout=duration(place.get("timeout"), 600.0),
        fail_open=place.get("failOpen").boolean(),
        status_on_error=_status(place.get("statusOnError")),
        include_headers=_matches(place.get("includeHeadersInCheck") if included.absent else included),
        add_headers=tuple(added),
        headers_upstream=_matches(place.get("headersToUpstreamOnAllow")),
        headers_downstream_deny=_matches(place.get("headersToDownstreamOnDeny")),
        headers_downstream_allow=_matches(place.get("headersToDownstreamOnAllow")),
        body_bytes=body_bytes,
        body_partial=partial,
    )


def _authorizer_grpc(place: Field, name: str) -> Provider:
    place.only(("service", "port", "timeout", "failOpen", "statusOnError", "clearRouteCache", "includeRequestBodyInCheck"))
    host, namespace, port = _service(place)
    body_bytes, partial = _body(place.get("includeRequestBodyInCheck"))
    return Provider(
        name,
        ProviderKind.AUTHZ_GRPC,
        host,
        namespace,
        port,
        timeout=duration(place.get("timeout"), 600.0),
        fail_open=place.get("failOpen").boolean(),
        status_on_error=_status(place.get("statusOnError")),
        body_bytes=body_bytes,
        body_partial=partial,
    )


def _body(place: Field) -> tuple[int, bool]:
    if place.absent:
        return 0, False
    place.only(("maxRequestBytes", "allowPartialMessage", "packAsBytes"))
    return integer(place.get("maxRequestBytes"), 1, 1 << 20), place.get("allowPartialMessage").boolean()


def _zipkin(place: Field, name: str) -> Provider:
    host, namespace, port = _service(place)
    return Provider(name, ProviderKind.ZIPKIN, host, namespace, port, path=place.get("path").text("/api/v2/spans"))


def _opentelemetry(place: Field, name: str) -> Provider:
    host, namespace, port = _service(place)
    http = place.get("http")
    return Provider(
        name,
        ProviderKind.OPENTELEMETRY,
        host,
        namespace,
        port,
        path=http.get("path").text("/v1/traces"),
        is_grpc=http.absent,
    )


def _file_log(place: Field, name: str) -> Provider:
    path = place.get("path").text("/dev/stdout")
    if path not in ("/dev/stdout", "/dev/stderr"):
        raise place.get("path").wrong("only /dev/stdout and /dev/stderr are written to")
    form = place.get("logFormat")
    form.only(("text", "labels", "omitEmptyValues"))
    fields = _labels(form.get("labels"))
    return Provider(
        name, ProviderKind.FILE_LOG, path=path, log_json=bool(fields), log_template=form.get("text").text(""), log_fields=fields
    )
