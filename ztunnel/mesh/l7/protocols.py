"""What a service port carries, by what its manifest says of it.

Source: Istio `pkg/config/kube/conversion.go`, `pkg/config/protocol` (appProtocol, then the port name's prefix, then well-known numbers).
"""

from __future__ import annotations

from ztunnel.mesh.l7.clusters import UpstreamHttp
from ztunnel.mesh.l7.config import PortProtocol

_BY_NAME = {
    "http": PortProtocol.HTTP,
    "http2": PortProtocol.HTTP2,
    "h2c": PortProtocol.HTTP2,
    "grpc": PortProtocol.GRPC,
    "grpc-web": PortProtocol.GRPC_WEB,
    # What is encrypted stays closed to a waypoint: bytes are carried, not read.
    **dict.fromkeys(("https", "tls", "tcp", "mongo", "redis", "mysql"), PortProtocol.TCP),
}
_BY_APP_PROTOCOL = {
    "kubernetes.io/h2c": PortProtocol.HTTP2,
    "kubernetes.io/ws": PortProtocol.HTTP,
    "kubernetes.io/wss": PortProtocol.TCP,
}
_SERVER_FIRST_PORTS = frozenset((25, 53, 3306, 27017))
"""The server speaks first there, so that waiting for the client's first bytes would wait for ever."""
_HTTP2 = (PortProtocol.HTTP2, PortProtocol.GRPC, PortProtocol.GRPC_WEB)


def port_protocol(number: int, name: str = "", app_protocol: str = "") -> PortProtocol:
    """What a port of a Service carries."""
    declared = app_protocol.lower()
    found = _BY_APP_PROTOCOL.get(declared) or _BY_NAME.get(declared) or _by_port_name(name.lower())
    if found is not None:
        return found
    return PortProtocol.TCP if number in _SERVER_FIRST_PORTS else PortProtocol.AUTO


def declared_protocol(protocol: str) -> PortProtocol:
    """What the `protocol` of a ServiceEntry's or an Istio Gateway's port says."""
    return _BY_NAME.get(protocol.lower(), PortProtocol.AUTO)


def upstream_http(protocol: PortProtocol) -> UpstreamHttp:
    """Which HTTP the endpoints of such a port are spoken to in."""
    if protocol is PortProtocol.AUTO:
        return UpstreamHttp.CLIENT
    return UpstreamHttp.HTTP2 if protocol in _HTTP2 else UpstreamHttp.HTTP1


def _by_port_name(name: str) -> PortProtocol | None:
    if name == "grpc-web" or name.startswith("grpc-web-"):
        return PortProtocol.GRPC_WEB
    return _BY_NAME.get(name.partition("-")[0])
