"""Agents that are told to leave TLS to the kernel: they do where it can, and carry the same bytes where it cannot."""

from __future__ import annotations

import socket

from tests.kit.mesh import DEFAULT_SETTINGS, Mesh
from tests.kit.traffic import accept, talk

APP = 8080


def test_bytes_arrive_whatever_the_kernel_can() -> None:
    with Mesh(nodes=2, settings=f"{DEFAULT_SETTINGS}tunnel: {{records: kernel}}\n") as mesh:
        client, server = mesh.pod("client", node=0, ambient=True), mesh.pod("server", node=1, ambient=True)
        mesh.settle()
        with server.listener(APP) as listener, client.connect((server.address(socket.AF_INET), APP)) as near:
            near.sendall(b"!")
            with accept(listener) as far:
                assert far.recv(1) == b"!"
                talk(near, far)
                for agent in mesh.agents:
                    (row,) = agent.rows("tunnels")
                    # Whoever refuses it has said why, in one line.
                    assert row["records"] == ("own" if agent.said("kernel TLS is not used") else "kernel")
                    assert agent.log.count("kernel TLS") == 1
