"""Istio's Gateway: which ports, hosts and certificates an ingress gateway has; VirtualServices bound to it say where requests go.

What would weaken a server if it were left out (pinned certificates, cipher suites, files of the proxy's disk) makes the server unusable,
with the reason in `problem`.
Source: Istio API reference of Gateway, and its validation (`pkg/config/validation`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import choice
from ztunnel.mesh.manifests.virtual_hosts import read_host

MAX_SERVERS = 256
_PROTOCOLS = ("HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP", "TLS", "HTTP_PROXY", "MYSQL", "REDIS")
_MODES = ("PASSTHROUGH", "SIMPLE", "MUTUAL", "AUTO_PASSTHROUGH", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL")
_VERSIONS = ("TLS_AUTO", "TLSV1_0", "TLSV1_1", "TLSV1_2", "TLSV1_3")
_FILES = ("serverCertificate", "privateKey", "caCertificates")
_UNSUPPORTED = (
    *("verifyCertificateSpki", "verifyCertificateHash", "cipherSuites", "caCrl", "caCertCredentialName"),
    *("subjectAltNames", "tlsCertificates"),
)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """TLS of one server. `mode` empty: only `redirect` counts."""

    mode: str = ""
    credential: str = ""
    redirect: bool = False
    min_version: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """One server. `hosts`: (namespace that VirtualServices must be of, empty for any, and host)."""

    name: str
    port: int
    protocol: str
    hosts: tuple[tuple[str, str], ...]
    tls: ServerTls | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class IstioGatewayObject:
    """One Gateway of networking.istio.io."""

    metadata: Metadata
    selector: dict[str, str]
    servers: tuple[Server, ...] = ()


def read_istio_gateway(document: Field) -> IstioGatewayObject:
    """A Gateway of networking.istio.io."""
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(("servers", "selector"))
    servers = tuple(_server(item, index, metadata) for index, item in enumerate(spec.get("servers").items(MAX_SERVERS)))
    if not servers:
        raise spec.get("servers").error("at least one")
    return IstioGatewayObject(metadata, spec.get("selector").labels(), servers)


def _server(place: Field, index: int, metadata: Metadata) -> Server:
    place.only(("port", "bind", "hosts", "tls", "defaultEndpoint", "name"))
    port = place.get("port")
    port.only(("number", "protocol", "name", "targetPort"))
    protocol = choice(port.get("protocol").instead(port.get("protocol").text().upper()), _PROTOCOLS)
    tls, problem = _tls(place.get("tls"))
    if protocol == "HTTPS" and (tls is None or not tls.mode):
        raise place.get("tls").error("required with HTTPS")
    if protocol == "TLS" and tls is None:
        raise place.get("tls").error("required with TLS")
    if protocol == "HTTP_PROXY":
        problem = problem or f"{port.path}.protocol: HTTP_PROXY is not supported"
    if not place.get("bind").absent and place.get("bind").value != "":
        problem = problem or f"{place.path}.bind: a server listens on all addresses of its pod"
    hosts = tuple(_host(item, metadata.namespace) for item in place.get("hosts").items())
    if not hosts:
        raise place.get("hosts").error("at least one")
    return Server(
        name=place.get("name").text("") or f"{metadata.namespace}/{metadata.name}/{index}",
        port=port.get("number").port(),
        protocol=protocol,
        hosts=hosts,
        tls=tls,
        problem=problem,
    )


def _host(place: Field, own: str) -> tuple[str, str]:
    text = place.text()
    namespace, slash, host = text.partition("/")
    if not slash:
        return "", read_host(place)
    if namespace not in ("*", "."):
        place.instead(namespace).namespace()
    return {"*": "", ".": own}.get(namespace, namespace), read_host(place.instead(host))


def _tls(place: Field) -> tuple[ServerTls | None, str]:
    """The settings, and why they cannot be carried out."""
    if place.absent:
        return None, ""
    place.only(
        (
            *("httpsRedirect", "mode", "credentialName", "credentialNames", "minProtocolVersion", "maxProtocolVersion"),
            *_FILES,
            *_UNSUPPORTED,
        )
    )
    redirect = place.get("httpsRedirect").boolean()
    mode = "" if place.get("mode").absent and redirect else choice(place.get("mode"), _MODES, "PASSTHROUGH")
    least = choice(place.get("minProtocolVersion"), _VERSIONS, "TLS_AUTO")
    most = choice(place.get("maxProtocolVersion"), _VERSIONS, "TLS_AUTO")
    names = [item.text() for item in place.get("credentialNames").items()]
    credential = place.get("credentialName").text("") or (names[0] if len(names) == 1 else "")
    tls = ServerTls(mode, credential, redirect, least if least == "TLSV1_3" else "")
    if mode in ("", "PASSTHROUGH"):
        return tls, ""
    unsupported = next((place.get(name).path for name in _UNSUPPORTED if not place.get(name).absent), "")
    if mode in ("AUTO_PASSTHROUGH", "ISTIO_MUTUAL"):
        return tls, f"{place.path}.mode: {mode} is not supported"
    if unsupported:
        return tls, f"{unsupported}: not supported"
    if len(names) > 1:
        return tls, f"{place.path}.credentialNames: one certificate for each server is supported"
    if most not in ("TLS_AUTO", "TLSV1_3"):
        return tls, f"{place.path}.maxProtocolVersion: limits below TLS 1.3 are not supported"
    if not credential:
        files = next((name for name in _FILES if not place.get(name).absent), "")
        if not files:
            raise place.get("credentialName").error(f"required with {mode}")
        return tls, f"{place.path}.{files}: files of the proxy's own disk are not read; use credentialName"
    return tls, ""
