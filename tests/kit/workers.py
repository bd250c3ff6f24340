"""How many data-plane workers the agents of a test have, and one that a test plays: the other end of a supervisor's channel."""

from __future__ import annotations

import os
import socket

import trio

from ztunnel.dataplane.channel import Decoder, Message, Received, encode
from ztunnel.settings import variable

WORKERS_VARIABLE = variable("workers")


def worker_count() -> int:
    """What `--workers` or the environment asks for; a mesh's agents follow it unless their test says otherwise."""
    return int(os.environ.get(WORKERS_VARIABLE, "1"))


class FakeWorker:
    """A worker's end of the channel, driven by a test. Implements `Running`."""

    def __init__(self, theirs: socket.socket) -> None:
        self.channel = theirs
        theirs.setblocking(False)
        self.decoder = Decoder(to_worker=True)
        self.ended = trio.Event()
        self.reason = "it ended"
        self.kills = 0

    async def wait(self) -> str:
        await self.ended.wait()
        return self.reason

    def kill(self) -> None:
        self.kills += 1
        self.leave("killed")

    def leave(self, reason: str = "it ended") -> None:
        """Its process is gone, and so is its end of the channel."""
        self.reason = reason
        self.channel.close()
        self.ended.set()

    def say(self, *messages: Message) -> None:
        self.channel.sendall(b"".join(encode(message) for message in messages))

    def hear(self) -> list[Received]:
        """What has come."""
        heard: list[Received] = []
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.channel, 1 << 16, 250)
            except BlockingIOError:
                return heard
            if not data:
                return heard
            heard += self.decoder.feed(data, descriptors)

    @property
    def is_hung_up_on(self) -> bool:
        self.hear()
        try:
            return self.channel.recv(1) == b""
        except BlockingIOError:
            return False
