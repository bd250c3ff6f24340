"""The relay that one writes first: trio streams, trio's SSLStream, the h2 library, a task for each direction of each connection.

`python -m scripts.benchmarks.naive outbound|inbound CHAIN KEY ROOTS`, in a pod's namespace. The baseline of `--baseline naive`, so that
what the product's own engine gains stays visible. No policy, no limits, no metrics: it is allowed to be faster than it could be in use.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import H2Error, NoSuchStreamError
from h2.settings import SettingCodes

from ztunnel.mesh.ports import INBOUND_HBONE, OUTBOUND
from ztunnel.node.redirect import PROXY_MARK

CHUNK = 65536
STREAM_WINDOW, CONNECTION_WINDOW = 1 << 20, 16 << 20
BACKLOG = 4096
SO_MARK, SO_ORIGINAL_DST, IP_TRANSPARENT = 36, 80, 19
ANYWHERE = "0.0.0.0"  # noqa: S104 - in a pod of the benchmark
Target = tuple[str, int]
Piece = tuple[bytes, int]
"""Bytes of a stream and what they took of its window; no bytes: its end."""
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, H2Error, KeyError)


@dataclass
class Stream:
    """One CONNECT stream of a tunnel."""

    send: trio.MemorySendChannel[Piece]
    receive: trio.MemoryReceiveChannel[Piece]
    answered: trio.Event = field(default_factory=trio.Event)


class Tunnel:
    """One HTTP/2 connection and its streams."""

    def __init__(self, transport: trio.SSLStream[trio.SocketStream], nursery: trio.Nursery, *, client: bool) -> None:
        self._transport = transport
        self._nursery = nursery
        self._h2 = H2Connection(H2Configuration(client_side=client, header_encoding=None, validate_outbound_headers=False))
        self._sending = trio.Lock()
        self._streams: dict[int, Stream] = {}
        self._windows = trio.Event()

    async def start(self) -> None:
        """Says hello."""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW)
        self._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW, SettingCodes.MAX_CONCURRENT_STREAMS: 10_000})
        await self._flush()

    async def run(self, peer: str) -> None:
        """Reads until the end."""
        try:
            while data := await self._transport.receive_some(CHUNK):
                for event in self._h2.receive_data(bytes(data)):
                    self._handle(event, peer)
                await self._flush()
        except BROKEN:
            pass

    async def connect(self, application: trio.SocketStream, target: Target) -> None:
        """Client: carries a connection to its target."""
        number = self._h2.get_next_available_stream_id()
        stream = self._open(number)
        self._h2.send_headers(number, [(":method", "CONNECT"), (":authority", f"{target[0]}:{target[1]}")])
        await self._flush()
        await stream.answered.wait()
        await self._relay(application, number, stream)

    def _handle(self, event: events.Event, peer: str) -> None:
        match event:
            case events.RequestReceived(stream_id=int(number), headers=list(headers)):
                address, _, port = dict(headers)[b":authority"].decode().rpartition(":")
                self._nursery.start_soon(self._serve, number, self._open(number), (address, int(port)), peer)
            case events.ResponseReceived(stream_id=int(number)) if number in self._streams:
                self._streams[number].answered.set()
            case events.DataReceived(stream_id=int(number), data=bytes(data), flow_controlled_length=int(size)) if number in self._streams:
                self._streams[number].send.send_nowait((data, size))
            case events.StreamEnded(stream_id=int(number)) if number in self._streams:
                self._streams[number].send.send_nowait((b"", 0))
            case events.StreamReset(stream_id=int(number)) if number in self._streams:
                self._streams[number].send.close()
            case events.WindowUpdated() | events.RemoteSettingsChanged():
                self._windows.set()
                self._windows = trio.Event()
            case _:
                pass

    def _open(self, number: int) -> Stream:
        send, receive = trio.open_memory_channel[Piece](math.inf)
        stream = self._streams[number] = Stream(send, receive)
        return stream

    async def _serve(self, number: int, stream: Stream, target: Target, peer: str) -> None:
        try:
            application = await dial(target, source=peer)
        except OSError:
            self._h2.reset_stream(number)
            await self._flush()
            return
        self._h2.send_headers(number, [(":status", "200")])
        await self._flush()
        await self._relay(application, number, stream)

    async def _relay(self, application: trio.SocketStream, number: int, stream: Stream) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._to_application, application, number, stream)
                nursery.start_soon(self._from_application, application, number)
        except* BROKEN:
            pass
        finally:
            self._streams.pop(number, None)
            await trio.aclose_forcefully(application)

    async def _to_application(self, application: trio.SocketStream, number: int, stream: Stream) -> None:
        async for data, size in stream.receive:
            if not data:
                await application.send_eof()
                return
            await application.send_all(data)
            try:
                self._h2.acknowledge_received_data(size, number)
            except NoSuchStreamError:
                pass  # both directions have ended: nobody needs the credit
            if not stream.receive.statistics().current_buffer_used:
                await self._flush()

    async def _from_application(self, application: trio.SocketStream, number: int) -> None:
        while data := await application.receive_some(CHUNK):
            view = memoryview(bytes(data))
            while view:
                windows = self._windows
                room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size, len(view))
                if room <= 0:
                    await self._flush()
                    await windows.wait()
                    continue
                self._h2.send_data(number, bytes(view[:room]))
                view = view[room:]
            await self._flush()
        self._h2.end_stream(number)
        await self._flush()

    async def _flush(self) -> None:
        async with self._sending:
            if data := self._h2.data_to_send():
                await self._transport.send_all(data)


async def dial(target: Target, source: str = "") -> trio.SocketStream:
    """A connection that the redirection lets pass, from `source` if it is given."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, PROXY_MARK)
        if source:
            sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
            await sock.bind((source, 0))
        await sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def context(words: list[str], *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides; a name is nobody's here, the root is."""
    chain, key, roots = words
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(chain, key)
    made.load_verify_locations(roots)
    made.set_alpn_protocols(["h2"])
    return made


async def serve_inbound(tls: ssl.SSLContext) -> None:
    """Takes tunnels."""
    async with trio.open_nursery() as nursery:

        async def accept(stream: trio.SocketStream) -> None:
            tunnel = Tunnel(trio.SSLStream(stream, tls, server_side=True), nursery, client=False)
            await tunnel.start()
            await tunnel.run(stream.socket.getpeername()[0])

        await trio.serve_tcp(accept, INBOUND_HBONE, host=ANYWHERE, backlog=BACKLOG)


async def serve_outbound(tls: ssl.SSLContext) -> None:
    """Takes redirected connections; one tunnel to each address."""
    tunnels: dict[str, Tunnel] = {}
    opening = trio.Lock()
    async with trio.open_nursery() as nursery:

        async def tunnel_to(address: str) -> Tunnel:
            async with opening:
                if address not in tunnels:
                    transport = trio.SSLStream(await dial((address, INBOUND_HBONE)), tls)
                    tunnels[address] = Tunnel(transport, nursery, client=True)
                    await tunnels[address].start()
                    nursery.start_soon(tunnels[address].run, address)
            return tunnels[address]

        async def accept(stream: trio.SocketStream) -> None:
            _, port, packed = struct.unpack("!HH4s8x", stream.socket.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16))
            address = socket.inet_ntop(socket.AF_INET, packed)
            await (await tunnel_to(address)).connect(stream, (address, port))

        await trio.serve_tcp(accept, OUTBOUND, host="127.0.0.1", backlog=BACKLOG)


def main(words: list[str]) -> None:
    """Runs one side for ever."""
    sides: dict[str, Callable[[ssl.SSLContext], object]] = {"inbound": serve_inbound, "outbound": serve_outbound}
    side = words[0]
    tls = context(words[1:], server=side == "inbound")
    trio.run(sides[side], tls)  # type: ignore[arg-type]  # a coroutine function by construction


if __name__ == "__main__":
    main(sys.argv[1:])
