"""Prints every TCP segment with payload that passes one network interface, one JSON line each: the demo's witness.

Stand-alone, standard library only: it runs in a network namespace as `python -I -S wiretap.py INTERFACE SECONDS`, on a packet socket
(CAP_NET_RAW there), until its standard input ends, at most that long. The first line is `{"listening": INTERFACE}`, so that the caller
knows when to begin. It refuses to interpret: what the bytes mean is `scripts/wire.py`'s business.
"""

import json
import select
import socket
import struct
import sys
import time
from typing import NamedTuple

ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP = 1
PACKET_MR_PROMISC = 1
FRAME_BYTES = 1 << 17  # segmentation offload hands over frames beyond the MTU
BUFFER_BYTES = 8 << 20


class Segment(NamedTuple):
    """One TCP segment; addresses as text, `payload` as it was on the wire."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    sequence: int
    payload: bytes


def segment_of(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame; None for anything else, for a segment without payload and for a frame cut short."""
    if len(frame) < 14:
        return None
    kind = int.from_bytes(frame[12:14], "big")
    packet = frame[14:]
    if kind == ETH_P_IP and len(packet) >= 20 and packet[9] == socket.IPPROTO_TCP:
        family, start = socket.AF_INET, (packet[0] & 0x0F) * 4
        source, destination, end = packet[12:16], packet[16:20], int.from_bytes(packet[2:4], "big")
    elif kind == ETH_P_IPV6 and len(packet) >= 40 and packet[6] == socket.IPPROTO_TCP:
        family, start = socket.AF_INET6, 40
        source, destination, end = packet[8:24], packet[24:40], 40 + int.from_bytes(packet[4:6], "big")
    else:
        return None
    # A length of 0 is a frame of segmentation offload beyond 64 KiB: all of it is payload. Otherwise the rest is Ethernet's padding.
    tcp = packet[start : end if end > start else len(packet)]
    if len(tcp) < 20:
        return None
    source_port, destination_port, sequence = struct.unpack_from("!HHI", tcp)
    payload = bytes(tcp[(tcp[12] >> 4) * 4 :])
    if not payload:
        return None
    return Segment(
        socket.inet_ntop(family, source), source_port, socket.inet_ntop(family, destination), destination_port, sequence, payload
    )


def listen(interface: str, seconds: float) -> None:
    """Print what passes until standard input ends or the seconds are over, whichever is first."""
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as tap:
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        tap.bind((interface, ETH_P_ALL))
        # A bridge shows its own interface what it forwards only while somebody listens to everything.
        everything = struct.pack("iHH8s", socket.if_nametoindex(interface), PACKET_MR_PROMISC, 0, b"")
        tap.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, everything)
        say({"listening": interface})
        ending = False
        while not ending and (left := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([tap, sys.stdin], [], [], left)
            ending = sys.stdin in readable
            report(tap)


def report(tap: socket.socket) -> None:
    """Print every segment that waits in the socket."""
    while True:
        try:
            frame = tap.recv(FRAME_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        segment = segment_of(frame)
        if segment is not None:
            say({**segment._asdict(), "payload": segment.payload.hex()})


def say(line: dict[str, object]) -> None:
    """One JSON line, at once."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    listen(sys.argv[1], float(sys.argv[2]))
