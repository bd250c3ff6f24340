"""The messages between supervisor and worker, and their framing on a Unix stream socket. Sans-I/O.

A frame is a header (length of the body, number of descriptors) and a msgpack body that is decoded into one of the types below,
so that neither side trusts the other's bytes: a worker is less privileged than its supervisor. Descriptors travel as SCM_RIGHTS
beside the frame's first byte and are claimed in order.

Invariant: a decoder never holds more than one frame beyond what it was fed, and frames have a bound.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from ztunnel.dataplane.flow import ConnectionState, FlowNews, TunnelState
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.identity import SpiffeId

MAX_FRAME_BYTES = 256 << 20
"""A snapshot of a large mesh is the largest message: 100,000 workloads are about 40 MB."""
MAX_DESCRIPTORS = 250
"""The kernel passes at most 253 descriptors with one message (SCM_MAX_FD)."""

_HEADER = struct.Struct("!II")


class ChannelError(LocalError):
    """The other end broke the framing or sent a message that is none: the channel cannot go on."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the tag on the wire is the class name."""


class Configure(Message, frozen=True):
    """First message to a worker. Times in seconds."""

    prefix: str
    """Stands before the names of this worker's connections and tunnels, where there are several workers."""
    own_records: bool
    kernel_records: bool
    """Give our own records to the kernel after the handshake. The kernel has been tried."""
    optimistic_data: bool
    same_node_plaintext: bool
    idle_seconds: float
    max_streams: int
    tunnels_per_peer: int
    handshake_seconds: float
    connect_seconds: float
    response_seconds: float
    report_seconds: float
    max_connections: int
    max_handshakes_per_pod: int
    ping_seconds: float
    ping_timeout_seconds: float


class Update(Message, frozen=True):
    """A change of the mesh."""

    delta: Delta


class Certificate(Message, frozen=True):
    """A certificate for an identity: used for every handshake from now on, live tunnels go on with the old one."""

    identity: SpiffeId
    chain_pem: bytes
    key_pem: bytes
    roots_pem: bytes


class Withdraw(Message, frozen=True):
    """The identity has no valid certificate any more: handshakes for it fail from now on."""

    identity: SpiffeId


class AddPod(Message, frozen=True):
    """A pod to serve; its three listeners (15001, 15006, 15008) come as descriptors in that order."""

    uid: str
    identity: SpiffeId


class RemovePod(Message, frozen=True):
    """Stop serving a pod: listeners close, connections are reset. With `drain` they go on, and 15008 is still served: peers hear late."""

    uid: str
    drain: bool


class Sockets(Message, frozen=True):
    """Ready-made sockets of one pod's network namespace, as descriptors."""

    uid: str
    ipv6: bool


class Drain(Message, frozen=True):
    """Stop accepting, tell peers, let connections end until the deadline, then exit."""

    seconds: float


class Query(Message, frozen=True):
    """Asks for the live connections and tunnels: an `Answer` with the same `id`."""

    id: int


class NeedSockets(Message, frozen=True):
    """The stock of sockets for this pod and family runs low."""

    uid: str
    ipv6: bool
    count: int


class PodAdded(Message, frozen=True):
    """The pod's listeners are being served."""

    uid: str


class PodRemoved(Message, frozen=True):
    """`RemovePod` was carried out: unless it was to drain, no descriptor of the pod is left here."""

    uid: str


class Flows(Message, frozen=True):
    """News of connections, collected over a short while. `lost`: records dropped because the channel was full."""

    news: tuple[FlowNews, ...]
    lost: int = 0


class Activity(Message, frozen=True):
    """How many live connections each pod has (only pods whose number changed), and limits hit since the last message."""

    active: dict[str, int]
    limits: dict[str, int] = {}
    bugs: int = 0


class Answer(Message, frozen=True):
    """Answer to `Query`."""

    id: int
    connections: tuple[ConnectionState, ...]
    tunnels: tuple[TunnelState, ...]


class Drained(Message, frozen=True):
    """The worker has no connection left and exits; `cut` connections were ended by the deadline."""

    cut: int


ToWorker = Configure | Update | Certificate | Withdraw | AddPod | RemovePod | Sockets | Drain | Query
ToSupervisor = NeedSockets | PodAdded | PodRemoved | Flows | Activity | Answer | Drained

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message, descriptors: int = 0) -> bytes:
    """The frame of a message that travels with so many descriptors.

    Raises:
        ChannelError: the message or the number of descriptors is over the bound.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES or descriptors > MAX_DESCRIPTORS:
        raise ChannelError(f"message of {len(body)} bytes and {descriptors} descriptors is over the channel's bound")
    return _HEADER.pack(len(body), descriptors) + body


@dataclass(frozen=True, slots=True)
class Received:
    """A message and the descriptors that came with it; the receiver owns them."""

    message: Message
    descriptors: tuple[int, ...]


class Decoder:
    """Turns bytes and descriptors, in the order in which they arrive, into messages of one direction."""

    def __init__(self, *, to_worker: bool, kinds: object = None) -> None:
        """`kinds`: the union of the types that come, for another pair of programs than the node agent and its worker."""
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kinds or (ToWorker if to_worker else ToSupervisor))
        self._bytes = bytearray()
        self._descriptors: list[int] = []
        self._short: int | None = None
        """How many of the descriptors belong to messages up to one that lost some of its own."""

    def feed(self, data: bytes, descriptors: list[int], *, short: bool = False) -> list[Received]:
        """What is complete now.

        Args:
            short: this process had no room for all descriptors that came (MSG_CTRUNC): their message comes with fewer than announced.
        Raises:
            ChannelError: a frame over the bound, a body that is no message, descriptors that nobody announced.
        """
        self._bytes += data
        self._descriptors += descriptors
        if short:
            self._short = len(self._descriptors)
        received: list[Received] = []
        while len(self._bytes) >= _HEADER.size:
            length, count = _HEADER.unpack_from(self._bytes)
            if length > MAX_FRAME_BYTES or count > MAX_DESCRIPTORS:
                raise ChannelError(f"frame of {length} bytes and {count} descriptors is over the channel's bound")
            end = _HEADER.size + length
            if len(self._bytes) < end:
                break
            count = self._claimable(count)
            try:
                message = self._decoder.decode(memoryview(self._bytes)[_HEADER.size : end])
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                # The last two: text that is not UTF-8, and nesting in a field that nobody asked for.
                raise ChannelError(f"not a message of this channel: {error}") from error
            del self._bytes[:end]
            received.append(Received(message, tuple(self._descriptors[:count])))
            del self._descriptors[:count]
        return received

    def _claimable(self, count: int) -> int:
        """How many descriptors a message gets that announced so many."""
        if self._short is None:
            if len(self._descriptors) < count:
                raise ChannelError(f"a frame announced {count} descriptors and {len(self._descriptors)} came")
            return count
        if self._short < count:
            count, self._short = self._short, None
        else:
            self._short -= count
        return count

    def unclaimed(self) -> list[int]:
        """Descriptors that no message claimed; to be closed by the caller when the channel ends."""
        left, self._descriptors = self._descriptors, []
        return left
