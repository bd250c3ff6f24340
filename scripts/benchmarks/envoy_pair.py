"""Configurations of a pair of Envoys that does our agents' job in the same pods, behind the same redirection. PURE.

Outbound: an original-destination listener on 15001; each connection becomes a CONNECT stream to its destination's address, port 15008,
over mutual TLS 1.3. Inbound: 15008 takes CONNECT streams of one identity to the applications, with the client's address as source.
Sockets carry the proxy's mark, so that the redirection lets them pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.ports import INBOUND_HBONE, OUTBOUND
from ztunnel.node.redirect import PROXY_MARK

Json = dict[str, object]

_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_SOL_SOCKET, _SO_MARK = 1, 36
_SETTINGS_MAX_FRAME_SIZE = 5
_MEBIBYTE = 1 << 20
_ANY = "0.0.0.0"  # noqa: S104 - in a pod of the benchmark


@dataclass(frozen=True, slots=True)
class Tuning:
    """What differs between the Envoys that we compare ourselves with. None: Envoy's own default."""

    buffer_bytes: int | None = None
    """Limit of each connection's buffers."""
    stream_window_bytes: int | None = None
    connection_window_bytes: int | None = None
    frame_bytes: int | None = None


DEFAULT = Tuning()
LARGE = Tuning(
    buffer_bytes=4 * _MEBIBYTE, stream_window_bytes=16 * _MEBIBYTE, connection_window_bytes=64 * _MEBIBYTE, frame_bytes=_MEBIBYTE
)
"""Buffers, windows and frames as large as ours or larger."""


def outbound(credentials: Credentials, server: SpiffeId, tuning: Tuning) -> Json:
    """The client pod's Envoy. `server` is the only identity that it accepts."""
    context = {"@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": tls(credentials, server)}
    options = {
        "@type": f"{_EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": http2(tuning)},
    }
    cluster: Json = {
        "name": "tunnel",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"upstream_port_override": INBOUND_HBONE},
        "cleanup_interval": "3600s",  # a host that nobody uses for a moment keeps its tunnel
        "connect_timeout": "5s",
        "circuit_breakers": many(),
        "upstream_bind_config": {"source_address": {"address": _ANY, "port_value": 0}, "socket_options": [_mark()]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        **_buffers(tuning),
    }
    proxy = {
        "@type": f"{_EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp",
        "cluster": "tunnel",
        "idle_timeout": "0s",
        "tunneling_config": {"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"},
    }
    listener: Json = {
        "name": "outbound",
        "address": address("127.0.0.1", OUTBOUND),
        "listener_filters": [_listener_filter("original_dst", "OriginalDst")],
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}],
        **_buffers(tuning),
    }
    return _bootstrap(listener, [cluster])


def inbound(credentials: Credentials, client: SpiffeId, applications: Sequence[tuple[str, int]], tuning: Tuning) -> Json:
    """The server pod's Envoy. `client` is the only identity that it lets in, to these applications."""
    context = {
        "@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": tls(credentials, client),
    }
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hbone",
        "codec_type": "HTTP2",
        "http2_protocol_options": http2(tuning),
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "stream_idle_timeout": "0s",
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}],
        "route_config": {"virtual_hosts": [_virtual_host(*each) for each in applications]},
    }
    listener: Json = {
        "name": "hbone",
        "address": address(_ANY, INBOUND_HBONE),
        "listener_filters": [_listener_filter("original_src", "OriginalSrc", mark=PROXY_MARK)],
        "filter_chains": [
            {
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
                "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
            }
        ],
        **_buffers(tuning),
    }
    return _bootstrap(listener, [_application(*each, tuning) for each in applications])


def _virtual_host(host: str, port: int) -> Json:
    upgrade = {"upgrade_type": "CONNECT", "connect_config": {}}
    route = {"cluster": f"{host}:{port}", "timeout": "0s", "idle_timeout": "0s", "upgrade_configs": [upgrade]}
    return {"name": f"{host}:{port}", "domains": [f"{host}:{port}"], "routes": [{"match": {"connect_matcher": {}}, "route": route}]}


def _application(host: str, port: int, tuning: Tuning) -> Json:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(host, port)}}]}]
    # Envoy 1.40 puts a connection that both sides have half-closed back into its pool, and the next stream finds it dead.
    options = {
        "@type": f"{_EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions",
        "common_http_protocol_options": {"max_requests_per_connection": 1},
        "explicit_http_config": {"http_protocol_options": {}},
    }
    return {
        "name": f"{host}:{port}",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": many(),
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "load_assignment": {"cluster_name": f"{host}:{port}", "endpoints": endpoints},
        **_buffers(tuning),
    }


def _bootstrap(listener: Json, clusters: list[Json]) -> Json:
    # Without the first, Envoy resets a stream whose upstream has half-closed before its downstream.
    features = {"envoy.reloadable_features.allow_multiplexed_upstream_half_close": True}
    return {
        "static_resources": {"listeners": [{**listener, "enable_reuse_port": False, "tcp_backlog_size": 4096}], "clusters": clusters},
        "layered_runtime": {"layers": [{"name": "static", "static_layer": features}]},
    }


def _buffers(tuning: Tuning) -> Json:
    return {} if tuning.buffer_bytes is None else {"per_connection_buffer_limit_bytes": tuning.buffer_bytes}


def http2(tuning: Tuning) -> Json:
    """HTTP/2 options that allow CONNECT."""
    options: Json = {"allow_connect": True}
    if tuning.stream_window_bytes is not None:
        options["initial_stream_window_size"] = tuning.stream_window_bytes
    if tuning.connection_window_bytes is not None:
        options["initial_connection_window_size"] = tuning.connection_window_bytes
    if tuning.frame_bytes is not None:
        options["custom_settings_parameters"] = [{"identifier": _SETTINGS_MAX_FRAME_SIZE, "value": tuning.frame_bytes}]
    return options


def _listener_filter(name: str, message: str, **fields: object) -> Json:
    return {
        "name": f"envoy.filters.listener.{name}",
        "typed_config": {"@type": f"{_EXTENSIONS}.filters.listener.{name}.v3.{message}", **fields},
    }


def many() -> Json:
    """Circuit breakers that nothing here trips."""
    return {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}]}


def _mark() -> Json:
    return {"level": _SOL_SOCKET, "name": _SO_MARK, "int_value": PROXY_MARK, "state": "STATE_PREBIND"}


def address(host: str, port: int) -> Json:
    """A socket's."""
    return {"socket_address": {"address": host, "port_value": port}}


def tls(credentials: Credentials, peer: SpiffeId) -> Json:
    """Mutual TLS 1.3 with one peer."""
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"inline_string": credentials.chain_pem.decode()},
                "private_key": {"inline_string": credentials.key_pem.decode()},
            }
        ],
        "validation_context": {
            "trusted_ca": {"inline_string": credentials.roots_pem.decode()},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": str(peer)}}],
        },
    }
