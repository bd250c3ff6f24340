"""Starts worker processes with the priority that this process had before it made way for them (`scheduling`)."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Sequence

import trio


class Launcher:
    """Starts processes with the priority of whoever made it, however patient the caller is. Its thread lives as long as this process.

    That is more than convenience: the signal that a worker is sent at its parent's death is sent when the *thread* ends that forked it.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="launcher", daemon=True).start()

    async def launch(self, command: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
        """A process that inherits these descriptors and our output, and reads nothing.

        Raises:
            OSError: it cannot be started.
            ValueError, subprocess.SubprocessError: nor could such a command ever be.
        """
        order = _Order(command, descriptors)
        self._orders.put(order)
        with trio.CancelScope(shield=True):  # a process that nobody knows would be nobody's to end
            await order.done.wait()
        if order.error is not None:
            raise order.error
        assert order.process is not None
        return order.process

    def _serve(self) -> None:
        while True:
            order = self._orders.get()
            order.carry_out()
            try:
                order.token.run_sync_soon(order.done.set)
            except trio.RunFinishedError:
                return


class _Order:
    """One process to start."""

    def __init__(self, command: Sequence[str], descriptors: Sequence[int]) -> None:
        self.command = command
        self.descriptors = descriptors
        self.token = trio.lowlevel.current_trio_token()
        self.done = trio.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.error: OSError | ValueError | subprocess.SubprocessError | None = None

    def carry_out(self) -> None:
        try:
            self.process = subprocess.Popen(self.command, pass_fds=self.descriptors, stdin=subprocess.DEVNULL)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            # All that `Popen` raises: an order that ended the thread would be waited for without end, and so would all after it.
            self.error = error
