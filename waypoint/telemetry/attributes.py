"""What expressions of telemetry may ask about a request. Implements `mesh.l7.evaluation.Attributes` over a `Summary`.

Source: Envoy's attributes; Istio's peer metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from waypoint.http.messages import Headers, Response
from waypoint.telemetry.summary import Flow, Summary
from ztunnel.mesh.l7.telemetry import PeerWorkload


class HeaderTexts(Mapping[str, str]):
    """Headers as texts, by lower-case name; several of one name are joined."""

    __slots__ = ("_headers",)

    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    def __getitem__(self, name: str) -> str:
        wanted = name.lower().encode()
        found = [value for key, value in self._headers if key == wanted]
        if not found:
            raise KeyError(name)
        return b",".join(found).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return iter({name.decode("utf-8", "replace"): None for name, _ in self._headers})

    def __len__(self) -> int:
        return len({name for name, _ in self._headers})


class SummaryAttributes:
    """Of one request or connection."""

    __slots__ = ("flow", "source", "summary", "target")

    def __init__(self, summary: Summary | Flow, source: PeerWorkload | None, target: PeerWorkload | None) -> None:
        """
        Args:
            source: the client's workload, as far as it is known.
            target: the endpoint's.
        """
        self.summary = summary if isinstance(summary, Summary) else None
        self.flow = summary
        self.source = source
        self.target = target

    def value(self, name: str) -> object:
        """As the protocol says."""
        owner, _, member = name.partition(".")
        if owner == "downstream_peer":
            return _of_peer(self.source, member)
        if owner == "upstream_peer":
            return _of_peer(self.target, member)
        anywhere = _ANYWHERE.get(name)
        if anywhere is not None:
            return anywhere(self.flow)
        if name == "source.workload":
            return _of_peer(self.source, "workload")
        if name == "destination.workload":
            return _of_peer(self.target, "workload")
        of_request = _OF_REQUESTS.get(name)
        return None if of_request is None or self.summary is None else of_request(self.summary)


_PEER: Final[dict[str, Callable[[PeerWorkload], str | None]]] = {
    "name": lambda peer: peer.name,
    "namespace": lambda peer: peer.namespace,
    "workload": lambda peer: peer.workload,
    "app": lambda peer: peer.app,
    "version": lambda peer: peer.version,
    "service": lambda peer: peer.canonical_service,
    "revision": lambda peer: peer.canonical_revision,
    "cluster": lambda peer: peer.cluster,
    "principal": lambda peer: None if peer.identity is None else peer.identity.uri,
}


def _of_peer(peer: PeerWorkload | None, member: str) -> object:
    return None if peer is None else _PEER[member](peer)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _response(summary: Summary) -> Response:
    return Response(0, []) if summary.response is None else summary.response


def _principal(summary: Summary | Flow) -> str | None:
    return None if summary.client.identity is None else summary.client.identity.uri


_ANYWHERE: Final[dict[str, Callable[[Summary | Flow], object]]] = {
    "source.address": lambda flow: f"{flow.client.address}:{flow.client.port}",
    "source.port": lambda flow: flow.client.port,
    "source.principal": _principal,
    "source.namespace": lambda flow: flow.client.namespace or None,
    "destination.address": lambda flow: f"{flow.client.destination}:{flow.client.service_port}",
    "destination.port": lambda flow: flow.client.service_port,
    "destination.principal": lambda flow: None if flow.endpoint is None or flow.endpoint.identity is None else flow.endpoint.identity.uri,
    "destination.namespace": lambda flow: flow.service.namespace,
    "connection.mtls": lambda flow: flow.client.identity is not None and flow.client.tls,
    "connection.requested_server_name": lambda flow: flow.client.sni or None,
    "connection.uri_san_peer_certificate": _principal,
    "connection.termination_details": lambda flow: flow.termination or None,
    "upstream.address": lambda flow: None if flow.endpoint is None else f"{flow.endpoint.address}:{flow.endpoint.port}",
    "upstream.port": lambda flow: None if flow.endpoint is None else flow.endpoint.port,
    "upstream.transport_failure_reason": lambda flow: flow.transport_failure or None,
    "xds.cluster_name": lambda flow: flow.cluster or None,
    "xds.route_name": lambda flow: flow.route or None,
    "response.flags": lambda flow: flow.flags or "-",
    "response.code_details": lambda flow: flow.details or None,
}
_PROTOCOLS: Final = {10: "HTTP/1.0", 11: "HTTP/1.1", 20: "HTTP/2"}
_OF_REQUESTS: Final[dict[str, Callable[[Summary], object]]] = {
    "request.path": lambda summary: _text(summary.request.original_path),
    "request.url_path": lambda summary: _text(summary.request.original_path.partition(b"?")[0]),
    "request.query": lambda summary: _text(summary.request.original_path.partition(b"?")[2]),
    "request.host": lambda summary: _text(summary.request.authority),
    "request.scheme": lambda summary: _text(summary.request.scheme),
    "request.method": lambda summary: _text(summary.request.method),
    "request.headers": lambda summary: HeaderTexts(summary.request.headers),
    "request.referer": lambda summary: _text(summary.request.get(b"referer")),
    "request.useragent": lambda summary: _text(summary.request.get(b"user-agent")),
    "request.id": lambda summary: _text(summary.request.get(b"x-request-id")),
    "request.protocol": lambda summary: _PROTOCOLS.get(summary.request.version),
    "request.time": lambda summary: summary.started,
    "request.duration": lambda summary: summary.duration,
    "request.size": lambda summary: summary.bytes_in,
    "request.total_size": lambda summary: summary.request_bytes or summary.bytes_in,
    "response.code": lambda summary: summary.status,
    "response.grpc_status": lambda summary: summary.grpc_status,
    "response.headers": lambda summary: HeaderTexts(_response(summary).headers),
    "response.trailers": lambda summary: HeaderTexts(summary.trailers),
    "response.size": lambda summary: summary.bytes_out,
    "response.total_size": lambda summary: summary.response_bytes or summary.bytes_out,
    "upstream.request_attempt_count": lambda summary: summary.attempts,
}
