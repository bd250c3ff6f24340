"""The netlink seam: pyroute2 encodes and decodes the messages, a plain socket of ours carries them.

pyroute2's own sockets are not used, for three measured reasons: each is an asyncio loop per thread, and used from another
thread silently speaks to that thread's namespace; its `netns=` argument forks; and a socket that owns nf_tables tables
must be one socket for as long as the agent lives, whichever thread speaks through it.

Rules of use: make a `Netlink` inside the pod's namespace (`netns.run_inside`); after that it may be used from any thread,
by one thread at a time. The kernel works a change off inside send(2), so no answer is ever waited for longer than that.
This module and those that build messages from it are the only place with explicit `Any`: pyroute2 publishes no types.
Source: netlink(7), linux/net/netlink/af_netlink.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ztunnel.mesh.errors import NetlinkError

Message: TypeAlias = Any
Attributes: TypeAlias = list[tuple[str, Any]]

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10

REQUEST = 0x1
ACK = 0x4
DUMP = 0x300
REPLACE = 0x100
EXCL = 0x200
CREATE = 0x400
APPEND = 0x800

_ERROR = 2
_DONE = 3
_DUMP_INTERRUPTED = 0x10
_HEADER = struct.Struct("=IHHII")
_SEQUENCE = struct.Struct("=I")
_SEQUENCE_AT = 8
# A pod may fill its own tables; what we ask for is a few dozen messages. More is refused rather than read.
MAX_REPLIES = 4096
_RECEIVE_BYTES = 1 << 17
_SEND_BUFFER_BYTES = 1 << 20


class KernelRefused(NetlinkError):
    """The kernel answered a request with an error; `errno` says which, the text names the operation."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what}: {os.strerror(number)}")
        self.what = what
        self.errno = number


class TooManyAnswersError(NetlinkError):
    """A dump is longer than anything that we put there: somebody else has."""


@dataclass(frozen=True, slots=True)
class Request:
    """One encoded message to the kernel, and the words for it in an error text. Reusable: its sequence number is set when it is sent."""

    data: bytes
    is_dump: bool
    what: str


def request(message: Message, kind: int, flags: int, what: str) -> Request:
    """A request out of a pyroute2 message whose fields and attributes are set; REQUEST is implied in `flags`."""
    message["header"]["type"] = kind
    message["header"]["flags"] = flags | REQUEST
    message.encode()
    return Request(bytes(message.data), flags & DUMP == DUMP, what)


class Netlink:
    """One netlink socket, bound to the namespace that the constructing thread is in."""

    def __init__(self, protocol: int) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setblocking(False)
            self._socket.bind((0, 0))
        except OSError as error:
            raise NetlinkError(f"cannot open a netlink socket: {error.strerror}") from error
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; tables that it owned stay if they are persistent."""
        self._socket.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._socket.fileno() == -1

    def change(self, requests: Sequence[Request]) -> None:
        """Send the requests in one datagram and see each of them accepted. The last one carries ACK.

        Raises: KernelRefused for the first request that was refused; NetlinkError when the kernel did not answer.
        """
        first = self._send(requests)
        acknowledged = set()
        for sequence, kind, _, body in self._replies():
            if kind != _ERROR or not first <= sequence < first + len(requests):
                continue
            if number := _error_number(body):
                raise KernelRefused(requests[sequence - first].what, number)
            acknowledged.add(sequence - first)
        # nf_tables acknowledges the end of a batch only since 6.10; an acknowledged change says the same, because all
        # answers are delivered after the commit.
        if not acknowledged:
            raise NetlinkError(f"{requests[-1].what}: the kernel did not answer")

    def query(self, question: Request, reply: type[Message]) -> list[Message]:
        """The decoded answers to one request: all of a DUMP, or the single one of a plain GET.

        Raises: KernelRefused (ENOENT: no such thing); TooManyAnswersError; NetlinkError when the dump stays inconsistent.
        """
        for _ in range(3):
            try:
                return self._query(question, reply)
            except InterruptedError:
                continue  # something changed during the dump: what was read may be half old, half new
        raise NetlinkError(f"{question.what}: changes faster than it can be read")

    def _query(self, question: Request, reply: type[Message]) -> list[Message]:
        first = self._send([question])
        found: list[Message] = []
        interrupted = complete = False
        for sequence, kind, flags, body in self._replies():
            if sequence != first:
                continue
            interrupted = interrupted or bool(flags & _DUMP_INTERRUPTED)
            if kind == _ERROR and (number := _error_number(body)):
                raise KernelRefused(question.what, number)
            complete = kind in (_DONE, _ERROR)
            if complete:
                break
            if len(found) == MAX_REPLIES:
                raise TooManyAnswersError(f"{question.what}: more than {MAX_REPLIES} answers")
            found.append(_decoded(reply, body))
            complete = not question.is_dump
            if complete:
                break
        if not complete:
            raise NetlinkError(f"{question.what}: the kernel did not answer")
        if interrupted:
            raise InterruptedError
        return found

    def dump(self, question: Request, limit: int) -> list[bytes]:
        """The answers to a DUMP as they are; what changes meanwhile may be missing.

        Raises: KernelRefused; TooManyAnswersError for more than `limit`.
        """
        first = self._send([question])
        found: list[bytes] = []
        for sequence, kind, _, body in self._replies():
            if sequence != first:
                continue
            if kind == _ERROR and (number := _error_number(body)):
                raise KernelRefused(question.what, number)
            if kind in (_DONE, _ERROR):
                break
            if len(found) == limit:
                raise TooManyAnswersError(f"{question.what}: more than {limit} answers")
            found.append(body)
        return found

    def _send(self, requests: Sequence[Request]) -> int:
        self._discard_leftovers()
        first = self._sequence + 1
        data = bytearray()
        for each in requests:
            self._sequence += 1
            at = len(data)
            data += each.data
            _SEQUENCE.pack_into(data, at + _SEQUENCE_AT, self._sequence)
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            raise KernelRefused(requests[0].what, error.errno or errno.EIO) from error
        return first

    def _discard_leftovers(self) -> None:
        """What an earlier request that ended with an error did not read."""
        for _ in self._replies():
            continue

    def _replies(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What the kernel has answered. It answers within send(2), and continues a dump within recv(2): nothing is awaited."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                raise NetlinkError(f"reading from netlink: {error.strerror}") from error
            yield from _messages(data)


def attribute(message: Message, name: str) -> Any:
    """The value of an attribute of a decoded message, None when it is absent."""
    return message.get_attr(name)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(sequence, kind, flags, whole message) of each message in a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            raise NetlinkError("reading from netlink: a message is cut short")
        yield sequence, kind, flags, data[at : at + length]
        at += (length + 3) & ~3


def _error_number(message: bytes) -> int:
    (code,) = struct.unpack_from("=i", message, _HEADER.size)
    return -int(code)


def _decoded(cls: type[Message], data: bytes) -> Message:
    message = cls(data)
    message.decode()
    return message
