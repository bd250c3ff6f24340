"""Is it ready? Questions that kubelet asks a pod and the lab asks a node agent, from inside their network namespace.

They come from loopback there, so that redirection never concerns them. Each attempt is bounded; an answer is yes or no, never an error.
"""

from __future__ import annotations

import socket

import trio

from ztunnel.lab.objects import container_port
from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, integer, text
from ztunnel.node import netns

ATTEMPT_SECONDS = 1.0
MAX_ANSWER = 4096


async def container_is_ready(fd: int, container: Tree, addresses: tuple[str, ...]) -> bool:
    """Whether a running container serves: what its readinessProbe says, else whether every TCP port accepts.

    Args:
        fd: the pod's namespace.
        addresses: the pod's own, tried after loopback: some servers listen on nothing else.
    """
    hosts = ("127.0.0.1", "::1", *addresses)
    pod: Tree = {"spec": {"containers": [container]}}
    probe = branch(container, "readinessProbe")
    if "httpGet" in probe:
        port = container_port(pod, at(probe, "httpGet", "port"), "TCP")
        path = text(probe, "httpGet", "path", default="/")
        return port is not None and await any_http(fd, hosts, port, path)
    if "tcpSocket" in probe:
        port = container_port(pod, at(probe, "tcpSocket", "port"), "TCP")
        return port is not None and await _any_accepts(fd, hosts, port)
    ports = [integer(port, "containerPort") for port in branches(container, "ports") if text(port, "protocol", default="TCP") == "TCP"]
    for port in ports:
        if not await _any_accepts(fd, hosts, port):
            return False
    return True


async def any_http(fd: int, hosts: tuple[str, ...], port: int, path: str) -> bool:
    """Whether a GET is answered with a status from 200 to 399 on one of the hosts."""
    for host in hosts:
        if await _answers(fd, host, port, path):
            return True
    return False


async def _any_accepts(fd: int, hosts: tuple[str, ...], port: int) -> bool:
    for host in hosts:
        if await _accepts(fd, host, port):
            return True
    return False


async def _accepts(fd: int, host: str, port: int) -> bool:
    stream = await _connect(fd, host, port)
    if stream is None:
        return False
    stream.close()
    return True


async def _connect(fd: int, host: str, port: int) -> trio.socket.SocketType | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with netns.inside(fd):
            plain = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, netns.NetnsError):  # no IPv6 on this machine, or the namespace is going
        return None
    sock = trio.socket.from_stdlib_socket(plain)
    try:
        with trio.move_on_after(ATTEMPT_SECONDS):
            await sock.connect((host, port))
            return sock
    except OSError:
        sock.close()
        return None
    except trio.Cancelled:
        sock.close()
        raise
    sock.close()
    return None


async def _answers(fd: int, host: str, port: int, path: str) -> bool:
    sock = await _connect(fd, host, port)
    if sock is None:
        return False
    request = f"GET {path} HTTP/1.1\r\nhost: {host}:{port}\r\nuser-agent: kube-probe/lab\r\nconnection: close\r\n\r\n".encode()
    answer = b""
    try:
        with sock, trio.move_on_after(ATTEMPT_SECONDS):
            await sock.send(request)
            while b"\r\n" not in answer and len(answer) < MAX_ANSWER:
                data = await sock.recv(MAX_ANSWER)
                if not data:
                    break
                answer += data
    except OSError:
        return False
    fields = answer.split(b" ", 2)
    return len(fields) > 1 and fields[0].startswith(b"HTTP/1.") and fields[1][:3].isdigit() and 200 <= int(fields[1][:3]) < 400
