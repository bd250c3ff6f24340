"""Reads what `scripts/wiretap.py` saw: byte streams out of segments, TLS records out of streams, a dump for human eyes. Pure.

Knows no key: everything here is what anybody on the wire can see.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from scripts.wiretap import Segment


class RecordType(IntEnum):
    """TLS content types. Source: RFC 8446 §5.1."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    APPLICATION_DATA = 23


CLIENT_HELLO = 1
_TYPES = frozenset(RecordType)


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of one TCP connection: everything that was sent, in order."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    data: bytes

    @property
    def title(self) -> str:
        """Both ends, as a person writes them."""
        return f"{_endpoint(self.source, self.source_port)} → {_endpoint(self.destination, self.destination_port)}"


@dataclass(frozen=True, slots=True)
class Record:
    """A TLS record as it lies on the wire, header included."""

    type: RecordType
    raw: bytes

    @property
    def title(self) -> str:
        """What an eavesdropper can call it."""
        if self.type is RecordType.HANDSHAKE:
            return "ClientHello" if self.raw[5:6] == bytes([CLIENT_HELLO]) else "Handshake"
        return {RecordType.APPLICATION_DATA: "ApplicationData", RecordType.ALERT: "Alert"}.get(self.type, "ChangeCipherSpec")


def segments(lines: Iterable[str]) -> list[Segment]:
    """The segments of the wiretap's JSON lines; its first line, which has none, is passed over."""
    found = []
    for line in lines:
        body = json.loads(line)
        if "payload" in body:
            found.append(Segment(**{**body, "payload": bytes.fromhex(body["payload"])}))
    return found


def directions(captured: Iterable[Segment]) -> list[Direction]:
    """Each direction's bytes in sequence order, repeated segments once, in the order of first appearance."""
    flows: dict[tuple[str, int, str, int], list[Segment]] = {}
    for segment in captured:
        flows.setdefault(segment[:4], []).append(segment)
    return [Direction(*ends, _joined(parts)) for ends, parts in flows.items()]


def _joined(parts: list[Segment]) -> bytes:
    first = parts[0].sequence
    data = bytearray()
    # Distances, not numbers: sequence numbers wrap at 2^32.
    for offset, payload in sorted(((part.sequence - first) % (1 << 32), part.payload) for part in parts):
        data += payload[max(0, len(data) - offset) :]
    return bytes(data)


def records(data: bytes) -> Iterator[Record]:
    """The whole TLS records from the beginning of a stream; ends silently where the bytes are no TLS."""
    at = 0
    while at + 5 <= len(data):
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] not in _TYPES or data[at + 1] != 3 or at + 5 + length > len(data):
            return
        yield Record(RecordType(data[at]), data[at : at + 5 + length])
        at += 5 + length


def dump(data: bytes, limit: int = 64) -> list[str]:
    """Lines of offset, hexadecimal and ASCII of the first `limit` bytes."""
    lines = []
    for at in range(0, min(len(data), limit), 16):
        row = data[at : min(at + 16, limit)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:04x}  {row.hex(' '):<47}  {text}")
    return lines


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
