"""The echo server by itself: what it tells, what it echoes, and what it does with peers that do not behave."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.kit.polling import eventually
from ztunnel.lab.images import ECHO

HTTP, TCP = 18080, 19000
Answer = dict[str, object]


@pytest.fixture(scope="module")
def echo() -> Iterator[None]:
    """The server, on ports of this test process' own network namespace."""
    environment = {"POD_NAME": "p", "POD_NAMESPACE": "n", "NODE_NAME": "k"}
    command = [sys.executable, "-I", "-S", ECHO, "--port", str(HTTP), "--tcp-port", str(TCP)]
    with subprocess.Popen(command, env=environment) as process:
        try:
            eventually(_answers)
            yield
        finally:
            process.terminate()


def _answers() -> bool:
    try:
        _connect(TCP).close()
    except ConnectionRefusedError:
        return False
    return True


def _connect(port: int = HTTP, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), 5)


def _send(sock: socket.socket, count: int) -> None:
    while count > 0:
        count -= sock.send(bytes(1 << 20))


def _read(sock: socket.socket) -> tuple[str, dict[str, str], bytes]:
    """One response: its status, headers and body."""
    with sock.makefile("rb", buffering=0) as unbuffered:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = unbuffered.read(1)
            assert byte, head
            head += byte
        status, *lines = head.decode().strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body, length = b"", int(headers.get("content-length", "0"))
        while len(body) < length:
            part = unbuffered.read(length - len(body))
            assert part
            body += part
    return status.split()[1], headers, body


def _ask(request: str, body: bytes = b"", host: str = "127.0.0.1") -> Answer:
    with closing(_connect(host=host)) as sock:
        sock.sendall(request.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        found: Answer = json.loads(_read(sock)[2])
        return found


pytestmark = pytest.mark.usefixtures("echo")


def test_it_tells_who_answered_and_what_arrived() -> None:
    assert _ask("GET /a?b=c HTTP/1.1\nHost: x\nX-Y: z") == {
        "pod": "p",
        "namespace": "n",
        "node": "k",
        "remote_address": "127.0.0.1",
        "method": "GET",
        "path": "/a?b=c",
        "host": "x",
        "headers": {"host": "x", "x-y": "z"},
        "body_length": 0,
    }
    assert _ask("POST / HTTP/1.1\nHost: x\nContent-Length: 70000", bytes(70000))["body_length"] == 70000
    assert _ask("GET / HTTP/1.1\nHost: x", host="::1")["remote_address"] == "::1"


def test_connections_are_kept_and_requests_may_be_pipelined() -> None:
    with closing(_connect()) as sock:
        sock.sendall(b"GET /1 HTTP/1.1\r\n\r\nPOST /2 HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcGET /3 HTTP/1.1\r\nconnection: close\r\n\r\n")
        paths = [json.loads(_read(sock)[2])["path"] for _ in range(3)]
        assert (paths, sock.recv(1)) == (["/1", "/2", "/3"], b"")


def test_it_answers_with_a_status_a_size_and_a_delay() -> None:
    with closing(_connect()) as sock:
        sock.sendall(b"GET /?status=503&bytes=1000000 HTTP/1.1\r\n\r\n")
        status, headers, body = _read(sock)
        assert (status, len(body), headers["content-type"]) == ("503", 1_000_000, "application/octet-stream")
        sock.sendall(b"HEAD /?bytes=5 HTTP/1.1\r\n\r\nGET /next HTTP/1.1\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with closing(_connect()) as slow, closing(_connect()) as fast:
        slow.sendall(b"GET /?delay=0.3 HTTP/1.1\r\n\r\n")
        fast.sendall(b"GET / HTTP/1.1\r\n\r\n")
        _read(fast)
        slow.setblocking(False)
        with pytest.raises(BlockingIOError):
            slow.recv(1)
        slow.settimeout(5)
        assert _read(slow)[0] == "200"


@pytest.mark.parametrize("port", [HTTP, TCP])
def test_bytes_come_back_and_half_close_is_passed_on(port: int) -> None:
    with closing(_connect(port)) as sock:
        sent = b"no request " * 20_000
        sock.setblocking(True)
        received, at = b"", 0
        while at < len(sent):
            at += sock.send(sent[at : at + 30_000])
            received += sock.recv(1 << 16)
        sock.shutdown(socket.SHUT_WR)
        received += b"".join(iter(lambda: sock.recv(1 << 16), b""))
        assert received == sent


def test_a_tcp_port_does_not_look_at_the_bytes() -> None:
    with closing(_connect(TCP)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(18, socket.MSG_WAITALL) == b"GET / HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/2.0 x\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000, "431"),
    ],
)
def test_requests_that_it_does_not_serve(request_bytes: bytes, status: str) -> None:
    with closing(_connect()) as sock:
        sock.sendall(request_bytes)
        assert _read(sock)[0] == status


def test_a_peer_that_does_not_read_is_not_read_from() -> None:
    with closing(_connect(TCP)) as sock:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            _send(sock, 1 << 28)
        assert _ask("GET / HTTP/1.1\nHost: x")["pod"] == "p"


def test_resets_and_many_connections_do_not_disturb_it() -> None:
    for _ in range(50):
        sock = _connect()
        sock.sendall(b"GET /?bytes=10000000 HTTP/1.1\r\n\r\n")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    many = [_connect() for _ in range(800)]
    for sock in many:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert {_read(sock)[0] for sock in many} == {"200"}
    for sock in many:
        sock.close()
