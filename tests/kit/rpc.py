"""A gRPC server of ours on a loopback port, and a raw HTTP/2 client that need not behave."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import trio
from cryptography import x509

from tests.kit.pki import FakePki
from ztunnel.rpc.client import Target
from ztunnel.rpc.server import Bounds, Method, RpcServer
from ztunnel.rpc.tls import server_context

NAME = "ca.test"


def server_credentials(pki: FakePki, name: str = NAME) -> tuple[bytes, bytes]:
    """Chain and key in PEM for a server of that DNS name."""
    credentials = pki.credentials(san_der=x509.SubjectAlternativeName([x509.DNSName(name)]).public_bytes())
    return credentials.chain_pem, credentials.key_pem


@asynccontextmanager
async def serving(pki: FakePki, methods: Mapping[str, Method], bounds: Bounds | None = None) -> AsyncIterator[tuple[Target, RpcServer]]:
    """A server on a free port of this machine."""
    context = server_context(*server_credentials(pki))
    server = RpcServer(methods, lambda: context, bounds or Bounds())
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(server.run, listeners)
        yield Target("127.0.0.1", listeners[0].socket.getsockname()[1], NAME), server
        nursery.cancel_scope.cancel()


class RawClient:
    """HTTP/2 over TLS with every freedom."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.events: list[h2.events.Event] = []

    async def flush(self) -> None:
        """Send what h2 has."""
        await self.stream.send_all(self.http.data_to_send())

    async def until_closed(self) -> bytes:
        """All that the server sends until it closes, which it must do; kept as events as far as they can be read."""
        received = b""
        try:
            while data := bytes(await self.stream.receive_some(65536)):
                received += data
        except trio.BrokenResourceError:
            pass
        return received

    async def next(self, kind: type[h2.events.Event]) -> h2.events.Event:
        """The next event of that kind; others are kept in `events`."""
        while True:
            for index, event in enumerate(self.events):
                if isinstance(event, kind):
                    return self.events.pop(index)
            data = bytes(await self.stream.receive_some(65536))
            assert data, f"the server closed before {kind.__name__}"
            self.events += self.http.receive_data(data)
            await self.flush()


@asynccontextmanager
async def raw_client(pki: FakePki, target: Target, alpn: str = "h2") -> AsyncIterator[RawClient]:
    """A connection whose handshake is done; the preface is not sent."""
    context = ssl.create_default_context(cadata=pki.root_pem.decode())
    context.set_alpn_protocols([alpn])
    transport = await trio.open_tcp_stream(target.host, target.port)
    try:
        stream = trio.SSLStream(transport, context, server_hostname=target.server_name)
        await stream.do_handshake()
        yield RawClient(stream)
    finally:
        await trio.aclose_forcefully(transport)
