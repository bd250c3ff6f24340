"""Certificates with the reference gRPC at the other end: as a client of our authority, and as an authority for our client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import trio

from tests.kit.citadel import REQUEST, RESPONSE, TOKEN, Desk, files
from tests.kit.pki import FakePki
from tests.kit.rpc import NAME, server_credentials
from ztunnel.ca.authority import Authority
from ztunnel.ca.csr_protocol import PATH
from ztunnel.ca.issuance import Reason
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.request import IssueError, Request, Signed, accept, check_chain, new_request
from ztunnel.ca.root import new_root
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.rpc.client import Target

CART = SpiffeId("cluster.local", "shop", "cart")
SECONDS = 40.0


def call(target: Target, pki: FakePki, request: object, token: str = TOKEN) -> list[str]:
    """What a grpcio client gets."""
    options = (("grpc.ssl_target_name_override", NAME),)
    credentials = grpc.ssl_channel_credentials(pki.root_pem)
    with grpc.secure_channel(f"{target.host}:{target.port}", credentials, options) as channel:
        method = channel.unary_unary(PATH, request_serializer=REQUEST.SerializeToString, response_deserializer=RESPONSE.FromString)
        metadata = (("authorization", f"Bearer {token}"), ("clusterid", "Kubernetes"))
        chain: list[str] = list(method(request, metadata=metadata, timeout=SECONDS).cert_chain)
        return chain


def request_for(made: Request) -> object:
    message = REQUEST(csr=made.csr_pem.decode(), validity_duration=3600)
    message.metadata.update({"ImpersonatedIdentity": made.identity.uri, "ClusterID": "Kubernetes"})
    return message


async def test_a_grpcio_client_gets_a_certificate_from_our_authority(pki: FakePki) -> None:
    desk, made = Desk(), new_request(CART)
    async with desk.serving(pki) as target:
        chain = await trio.to_thread.run_sync(call, target, pki, request_for(made))  # noqa: TID251 - no namespace is entered here
    signed = Signed(chain[0].encode(), chain[-1].encode())
    check_chain(signed, time.time())
    assert accept(made, signed).identity == CART


async def test_a_grpcio_client_hears_that_it_is_refused(pki: FakePki) -> None:
    desk = Desk()
    async with desk.serving(pki) as target:
        with pytest.raises(grpc.RpcError) as caught:
            await trio.to_thread.run_sync(call, target, pki, request_for(new_request(CART)), "stolen")  # noqa: TID251 - as above
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "request authenticate failure"
    assert desk.outcomes == [Reason.TOKEN_REFUSED]


class Istiod(grpc.GenericRpcHandler):  # type: ignore[misc]  # published without types
    """What istiod answers: the chain, and the root last."""

    def __init__(self) -> None:
        self.root = new_root("cluster.local", time.time())
        self.seen: list[tuple[dict[str, str], str]] = []
        self.refuse: tuple[grpc.StatusCode, str] | None = None
        self.spoil = False

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method != PATH:
            return None
        return grpc.unary_unary_rpc_method_handler(self._create, REQUEST.FromString, RESPONSE.SerializeToString)

    def _create(self, request: object, context: grpc.ServicerContext) -> object:
        metadata = {entry.key: entry.value for entry in context.invocation_metadata()}
        wanted = request.metadata["ImpersonatedIdentity"]  # type: ignore[attr-defined]  # made from a descriptor
        self.seen.append((metadata, wanted))
        if self.refuse is not None:
            context.abort(*self.refuse)
        signed = Authority(self.root).sign(request.csr.encode(), CART, time.time(), request.validity_duration)  # type: ignore[attr-defined]  # as above
        roots = new_root("cluster.local", time.time()).pem if self.spoil else signed.roots_pem
        return RESPONSE(cert_chain=[signed.chain_pem.decode(), roots.decode()])


@contextmanager
def istiod(pki: FakePki) -> Iterator[tuple[Target, Istiod]]:
    """A grpcio server on a loopback port."""
    handler = Istiod()
    chain, key = server_credentials(pki)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    try:
        yield Target("127.0.0.1", port, NAME), handler
    finally:
        server.stop(None).wait(30)


async def obtain(target: Target, directory: Path, pki: FakePki) -> SpiffeId:
    roots, token = files(directory, pki)
    credentials = await RemoteAuthority(target, roots, token, "east", 3600).obtain(CART, time.time())
    return credentials.identity


async def test_our_client_gets_a_certificate_from_a_grpcio_server(pki: FakePki, tmp_path: Path) -> None:
    with istiod(pki) as (target, server):
        assert await obtain(target, tmp_path, pki) == CART
    ((metadata, wanted),) = server.seen
    assert metadata["authorization"] == f"Bearer {TOKEN}"
    assert metadata["clusterid"] == "east"
    assert wanted == CART.uri


async def test_our_client_understands_a_grpcio_servers_refusals(pki: FakePki, tmp_path: Path) -> None:
    with istiod(pki) as (target, server):
        server.refuse = (grpc.StatusCode.UNAUTHENTICATED, "request authenticate failure: ä")
        with pytest.raises(IssueError, match="UNAUTHENTICATED: request authenticate failure: ä"):
            await obtain(target, tmp_path, pki)
        server.refuse = (grpc.StatusCode.UNAVAILABLE, "later")
        with pytest.raises(MeshError, match="UNAVAILABLE: later"):
            await obtain(target, tmp_path, pki)
        server.refuse, server.spoil = None, True
        with pytest.raises(IssueError, match="does not lead to any of the roots"):
            await obtain(target, tmp_path, pki)
