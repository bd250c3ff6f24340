"""Envoy against Envoy over HBONE: proves the kit, so that a failure of a later interop test is ours."""

from __future__ import annotations

import socket

import pytest

from tests.kit import envoy
from tests.kit.pki import FakePki
from tests.kit.polling import eventually

CLIENT, SERVER = "client", "server"


def exchange(port: int, data: bytes) -> bytes:
    """What comes back through the tunnel for `data` and a half-close, until the end or a reset."""
    parts = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                parts.append(part)
        except (ConnectionResetError, BrokenPipeError):
            pass
    return b"".join(parts)


def test_bytes_and_half_close_pass_both_ways(pki: FakePki, echo: tuple[str, int]) -> None:
    client, server = pki.identity(CLIENT), pki.identity(SERVER)
    inbound = envoy.hbone_server(pki.credentials(server), app=echo, client=client)
    with envoy.running(inbound) as there:
        peer = ("127.0.0.1", there.port("hbone"))
        outbound = envoy.hbone_client(pki.credentials(client), peer=peer, authority="10.0.0.1:80", server=server)
        with envoy.running(outbound) as here:
            data = bytes(range(256)) * 1024
            assert exchange(here.port("tcp"), data) == data
            eventually(lambda: there.counter("http.hbone.downstream_rq_2xx") == 1)
            assert here.counter("cluster.tunnel.upstream_cx_http2_total") == 1


@pytest.mark.parametrize("side", [CLIENT, SERVER])
def test_an_identity_that_does_not_match_is_refused(pki: FakePki, echo: tuple[str, int], side: str) -> None:
    client, server, other = pki.identity(CLIENT), pki.identity(SERVER), pki.identity("other")
    inbound = envoy.hbone_server(pki.credentials(server), app=echo, client=other if side == CLIENT else client)
    with envoy.running(inbound) as there:
        peer = ("127.0.0.1", there.port("hbone"))
        expected = other if side == SERVER else server
        outbound = envoy.hbone_client(pki.credentials(client), peer=peer, authority="10.0.0.1:80", server=expected)
        with envoy.running(outbound) as here:
            assert exchange(here.port("tcp"), b"hello") == b""
            refusals = {
                SERVER: lambda: here.counter("cluster.tunnel.ssl.fail_verify_san"),
                CLIENT: lambda: there.counter("listener.hbone.ssl.fail_verify_san"),
            }
            eventually(refusals[side])
            assert there.counter("http.hbone.downstream_rq_2xx") == 0
