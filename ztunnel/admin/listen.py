"""The TCP ports that operators reach on the node, and the control socket in the file system."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import trio

from ztunnel.runtime.unix_listener import BACKLOG, ListenError, unix_listener


async def open_ports(address: str, port: int, setting: str) -> list[trio.SocketListener]:
    """Listeners of one TCP port.

    Args:
        address: an IP literal, or `*` for all addresses of both families.
        setting: the port's name in the settings, for the error.
    Raises:
        ListenError: the port is taken, or the address is not ours.
    """
    try:
        return await trio.open_tcp_listeners(port, host=None if address == "*" else address, backlog=BACKLOG)
    except OSError as error:
        text = error.strerror or str(error)
        raise ListenError(f"{setting}: cannot listen on {address} port {port}: {text}; see `ss -ltnp sport = :{port}`") from error


def control_socket(path: Path) -> AbstractContextManager[trio.SocketListener]:
    """The listening control socket, see `unix_listener`.

    Raises:
        ListenError.
    """
    return unix_listener(path, "admin.socket")
