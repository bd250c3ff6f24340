"""Opens transports to endpoints: a stream in a tunnel or a TCP connection, a PROXY header in front of it, TLS over it."""

from __future__ import annotations

from typing import Final

from OpenSSL import SSL

from waypoint.data.sockets import SocketStream
from waypoint.data.tls import TlsStream, client_context, expecting
from waypoint.data.tunnels import Tunnels
from waypoint.http.messages import Client
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.hbone import proxy_protocol
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.l7.clusters import Cluster, Endpoint, UpstreamTls
from ztunnel.mesh.ports import INBOUND_HBONE

_MAX_CONTEXTS: Final = 1024


class Dialler:
    """See the module."""

    __slots__ = ("_contexts", "_loop", "_scratch", "_tunnels")

    def __init__(self, loop: Loop, scratch: Scratch, tunnels: Tunnels) -> None:
        self._loop = loop
        self._scratch = scratch
        self._tunnels = tunnels
        self._contexts: dict[UpstreamTls, SSL.Context] = {}

    def open(
        self,
        cluster: Cluster,
        endpoint: Endpoint,
        receiver: Receiver,
        *,
        host: str = "",
        client: Client | None = None,
        http2: bool | None = None,
    ) -> Transport:
        """A transport that is being opened; the receiver hears `opened` or `lost`, perhaps before this returns.

        Args:
            host: of the request, where the cluster's TLS has no name of its own.
            client: for a PROXY header.
            http2: what is to be spoken over TLS; None: something else.
        Raises:
            MeshError: it cannot even be tried.
        """
        tls = cluster.tls
        if tls is None:
            return self._plain(cluster, endpoint, receiver, client)
        sni = tls.sni or host
        stream = TlsStream(
            self._loop, self._context(tls), receiver, server=False, seconds=cluster.limits.connect_timeout, check=expecting(tls, sni)
        )
        stream.offer(sni, [] if http2 is None else [b"h2"] if http2 else [b"http/1.1"])
        stream.join(self._plain(cluster, endpoint, stream, client))
        return stream

    def _context(self, tls: UpstreamTls) -> SSL.Context:
        context = self._contexts.get(tls)
        if context is None:
            if len(self._contexts) >= _MAX_CONTEXTS:
                self._contexts.clear()
            context = self._contexts[tls] = client_context(tls)
        return context

    def _plain(self, cluster: Cluster, endpoint: Endpoint, receiver: Receiver, client: Client | None) -> Transport:
        seconds = cluster.limits.connect_timeout
        if not endpoint.hbone:
            stream = SocketStream(self._loop, self._scratch, receiver)
            if cluster.proxy_protocol and client is not None:
                stream.write(proxy_header(cluster.proxy_protocol, client))
            stream.connect((endpoint.address, endpoint.port), seconds, cluster.limits.keepalive)
            return stream
        if endpoint.identity is None:
            raise LocalError(f"{endpoint.address} is to be reached by HBONE and its identity is not known")
        address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
        through = endpoint.waypoint or (endpoint.address, INBOUND_HBONE)
        tunnelled = self._tunnels.stream(through, (endpoint.identity,), f"{address}:{endpoint.port}", receiver, seconds)
        if cluster.proxy_protocol and client is not None:
            tunnelled.write(proxy_header(cluster.proxy_protocol, client))
        return tunnelled


def proxy_header(version: int, client: Client) -> bytes:
    """Who the client is, in front of a connection's bytes. Source: PROXY protocol specification, §2.1 and §2.2."""
    source, destination = (client.address, client.port), (client.destination or client.address, client.service_port)
    if version == 2:
        return proxy_protocol.header(source, destination)
    if (":" in source[0]) != (":" in destination[0]):
        return b"PROXY UNKNOWN\r\n"
    family = "TCP6" if ":" in source[0] else "TCP4"
    return f"PROXY {family} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n".encode()
