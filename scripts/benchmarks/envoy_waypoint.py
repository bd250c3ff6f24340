"""Configuration of an Envoy that does our waypoint's job in the same pod, in the shape that Istio gives a waypoint. PURE.

15008 takes CONNECT streams over mutual TLS 1.3; each goes into an internal listener of its service, where a chain of HTTP filters judges
and routes; what comes out is a CONNECT stream over mutual TLS 1.3 to the endpoint's own 15008.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.benchmarks.envoy_pair import DEFAULT, Json, address, http2, many, tls
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.ports import INBOUND_HBONE

_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_ANY = "0.0.0.0"  # noqa: S104 - in a pod of the benchmark


@dataclass(frozen=True, slots=True)
class Served:
    """One port of a service: what clients dial, where it goes, and by how many routes and rules."""

    authority: str
    endpoint: tuple[str, int]
    size: int
    """Routes, each by a header of its own, and rules, each by a path of its own."""
    grpc: bool = False


def waypoint(credentials: Credentials, client: SpiffeId, server: SpiffeId, services: Sequence[Served]) -> Json:
    """Envoy as the waypoint of these services. `client` and `server` are the only identities that it accepts."""
    listeners = [_hbone(credentials, client, services)]
    clusters: list[Json] = []
    for number, service in enumerate(services):
        listeners += [_internal(f"main-{number}", _manager(number, service)), _internal(f"originate-{number}", _originate(number, service))]
        clusters += [
            _to_internal(f"to-main-{number}", f"main-{number}", {"explicit_http_config": {"http_protocol_options": {}}}),
            _to_internal(f"app-{number}", f"originate-{number}", _application(service)),
            _tunnel(number, service, credentials, server),
        ]
    return {
        "bootstrap_extensions": [
            {
                "name": "envoy.bootstrap.internal_listener",
                "typed_config": {"@type": f"{_EXTENSIONS}.bootstrap.internal_listener.v3.InternalListener"},
            }
        ],
        "static_resources": {"listeners": listeners, "clusters": clusters},
        "layered_runtime": {
            "layers": [{"name": "static", "static_layer": {"envoy.reloadable_features.allow_multiplexed_upstream_half_close": True}}]
        },
    }


def _hbone(credentials: Credentials, client: SpiffeId, services: Sequence[Served]) -> Json:
    context = {
        "@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": tls(credentials, client),
    }
    upgrade = {"upgrade_type": "CONNECT", "connect_config": {}}
    hosts = [
        {
            "name": each.authority,
            "domains": [each.authority],
            "routes": [
                {
                    "match": {"connect_matcher": {}},
                    "route": {"cluster": f"to-main-{number}", "timeout": "0s", "idle_timeout": "0s", "upgrade_configs": [upgrade]},
                }
            ],
        }
        for number, each in enumerate(services)
    ]
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hbone",
        "codec_type": "HTTP2",
        "http2_protocol_options": {**http2(DEFAULT), "max_concurrent_streams": 100},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "stream_idle_timeout": "0s",
        "http_filters": [_router()],
        "route_config": {"virtual_hosts": hosts},
    }
    chain = {
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
    }
    return {"name": "hbone", "address": address(_ANY, INBOUND_HBONE), "filter_chains": [chain], "enable_reuse_port": False}


def _internal(name: str, network_filter: Json) -> Json:
    return {"name": name, "internal_listener": {}, "filter_chains": [{"filters": [network_filter]}]}


def _manager(number: int, service: Served) -> Json:
    routes = [
        {
            "match": {"prefix": "/", "headers": [{"name": "x-route", "string_match": {"exact": f"{each}"}}]},
            "route": {"cluster": f"app-{number}", "timeout": "0s"},
        }
        for each in range(service.size)
    ]
    rules = {
        "action": "ALLOW",
        "policies": {
            f"ns[default]-policy[allow]-rule[{each}]": {
                "principals": [{"any": True}],
                "permissions": [{"and_rules": {"rules": [_method(service), _path(each)]}}],
            }
            for each in range(service.size)
        },
    }
    config = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inbound",
        "codec_type": "AUTO",
        "server_name": "istio-envoy",
        "stream_idle_timeout": "0s",
        "normalize_path": True,
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "http_filters": [
            {"name": "envoy.filters.http.rbac", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.rbac.v3.RBAC", "rules": rules}},
            _router(),
        ],
        "route_config": {"virtual_hosts": [{"name": "inbound", "domains": ["*"], "routes": routes}]},
    }
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": config}


def _method(service: Served) -> Json:
    methods = ["POST"] if service.grpc else ["GET", "PUT"]
    rules = [{"header": {"name": ":method", "string_match": {"exact": each}}} for each in methods]
    return {"or_rules": {"rules": rules}}


def _path(number: int) -> Json:
    return {"url_path": {"path": {"prefix": f"/p{number}/"}}}


def _router() -> Json:
    return {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}


def _originate(number: int, service: Served) -> Json:
    config = {
        "@type": f"{_EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "originate",
        "cluster": f"tunnel-{number}",
        "idle_timeout": "0s",
        "tunneling_config": {"hostname": "{}:{}".format(*service.endpoint)},
    }
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}


def _to_internal(name: str, listener: str, options: Json) -> Json:
    raw = {
        "@type": f"{_EXTENSIONS}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
        "transport_socket": {
            "name": "envoy.transport_sockets.raw_buffer",
            "typed_config": {"@type": f"{_EXTENSIONS}.transport_sockets.raw_buffer.v3.RawBuffer"},
        },
    }
    endpoint = {"endpoint": {"address": {"envoy_internal_address": {"server_listener_name": listener}}}}
    return {
        "name": name,
        "type": "STATIC",
        "circuit_breakers": many(),
        "typed_extension_protocol_options": {_HTTP_OPTIONS: {"@type": f"type.googleapis.com/{_HTTP_OPTIONS}", **options}},
        "transport_socket": {"name": "envoy.transport_sockets.internal_upstream", "typed_config": raw},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _application(service: Served) -> Json:
    return {"explicit_http_config": {"http2_protocol_options": {}} if service.grpc else {"http_protocol_options": {}}}


def _tunnel(number: int, service: Served, credentials: Credentials, server: SpiffeId) -> Json:
    context = {"@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": tls(credentials, server)}
    options = {"explicit_http_config": {"http2_protocol_options": http2(DEFAULT)}}
    endpoint = {"endpoint": {"address": address(service.endpoint[0], INBOUND_HBONE)}}
    return {
        "name": f"tunnel-{number}",
        "type": "STATIC",
        "connect_timeout": "10s",
        "circuit_breakers": many(),
        "typed_extension_protocol_options": {_HTTP_OPTIONS: {"@type": f"type.googleapis.com/{_HTTP_OPTIONS}", **options}},
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        "load_assignment": {"cluster_name": f"tunnel-{number}", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
