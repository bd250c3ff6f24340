"""`exec -t`: the command gets a terminal of its own, and this process carries bytes between it and the user's."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.lab.client import Client

_CHUNK = 1 << 16


def exec_in_terminal(client: Client, arguments: dict[str, object]) -> int:
    """Run a command with a terminal; its exit code. Standard input must be a terminal."""
    master, slave = os.openpty()
    stop_read, stop_write = os.pipe()
    _copy_size(master)
    before = termios.tcgetattr(0)
    carrier = threading.Thread(target=_carry, args=(master, stop_read))

    def on_start(send: Callable[[int], None]) -> None:
        os.close(slave)
        tty.setraw(0)
        carrier.start()
        # The kernel tells the command itself when its terminal's size changes.
        signal.signal(signal.SIGWINCH, lambda *_: _copy_size(master))
        signal.signal(signal.SIGTERM, lambda number, _: send(number))

    try:
        return client.exec((slave, slave, slave), on_start=on_start, tty=True, **arguments)
    finally:
        os.close(stop_write)
        if carrier.is_alive():
            carrier.join()
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        os.close(stop_read)
        os.close(master)


def _copy_size(master: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))


def _carry(master: int, stop: int) -> None:
    """Carry bytes both ways until the command's side is closed; `stop` ends the reading of the user's side."""
    watched = [0, master, stop]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if master in ready:
            try:
                data = os.read(master, _CHUNK)
            except OSError:  # EIO: nobody has the other side open any more
                return
            if not data:
                return
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif stop in ready:
            # The command has ended and everything that it wrote was read.
            return
        elif 0 in ready:
            data = os.read(0, _CHUNK)
            if data:
                os.write(master, data)
            else:
                watched.remove(0)
