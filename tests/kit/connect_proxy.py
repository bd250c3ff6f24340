"""An HTTP proxy that knows CONNECT, as companies have one between their nodes and their API servers."""

from __future__ import annotations

import base64
import socket
import threading
from types import TracebackType
from typing import Self

JOIN_SECONDS = 10.0


class ConnectProxy:
    """On loopback, for as long as a block lasts.

    Args:
        credentials: `user:password` that it wants; none if empty.
    """

    def __init__(self, credentials: str = "") -> None:
        self._wanted = f"basic {base64.b64encode(credentials.encode()).decode()}".lower() if credentials else ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self.asked: list[str] = []
        """What was to be connected to."""

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for each in self._open:
            _shut(each)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        for each in (self._listener, *self._open):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # shut down
                return
            self._open.append(client)
            self._start(self._serve, client)

    def _start(self, what: object, *arguments: socket.socket) -> None:
        assert callable(what)
        self._threads.append(threading.Thread(target=what, args=arguments, daemon=True))
        self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(4096)
            if not data:
                return
            head += data
        first, *lines = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        self.asked.append(target)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if method != "CONNECT" or (self._wanted and headers.get("proxy-authorization", "").lower() != self._wanted):
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            _shut(client)
            return
        host, _, port = target.rpartition(":")
        server = socket.create_connection((host, int(port)), timeout=JOIN_SECONDS)
        server.settimeout(None)
        self._open.append(server)
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self._start(_copy, server, client)
        _copy(client, server)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        # One side is gone.
        pass
    _shut(source)
    _shut(sink)


def _shut(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It was already.
        return
