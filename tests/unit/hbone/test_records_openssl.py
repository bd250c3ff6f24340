"""The oracle keeps the interface's promises; how OpenSSL judges records is OpenSSL's to test."""

from __future__ import annotations

import pytest

from tests.kit.tls import CIPHERS, End, joined
from ztunnel.hbone.records import MAX_FRAGMENT, MAX_OPENED, Alert, AlertReceived, NotExportable, RecordError, RecordsClosed, sealed_size

OPENSSL = (False, False)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", [0, 1, MAX_FRAGMENT - 1, MAX_FRAGMENT, MAX_FRAGMENT + 1, 200_000])
def test_what_is_sealed_opens(cipher: str, size: int) -> None:
    plain = bytes(i * 7 & 0xFF for i in range(size))
    client, server = joined(OPENSSL, cipher)
    server.receive(client.seal(plain))
    client.receive(server.seal(plain))
    assert client.plain == server.plain == plain


def test_its_keys_stay() -> None:
    with pytest.raises(NotExportable):
        joined(OPENSSL)[0].records.export()


def test_buffers_that_are_too_small_are_the_callers_mistake() -> None:
    layer = joined(OPENSSL)[0].records
    with pytest.raises(ValueError, match="spare byte"):
        layer.seal(bytearray(10), 0, 10, memoryview(bytearray(1000)), 0)
    with pytest.raises(ValueError, match="room"):
        layer.seal(bytearray(11), 0, 10, memoryview(bytearray(sealed_size(10) - 1)), 0)


def test_opening_stops_when_the_room_is_used_up_and_goes_on_later() -> None:
    client, server = joined(OPENSSL)
    wire, room = memoryview(client.seal(b"a" * MAX_FRAGMENT + b"b" * 100)), memoryview(bytearray(MAX_OPENED + 50))
    consumed, end = server.records.open(wire, 0, len(wire), room, 0)
    assert (consumed, end) == (MAX_FRAGMENT + 22, MAX_FRAGMENT)
    assert server.records.open(wire, consumed, len(wire) - 1, room, 0) == (consumed, 0)
    consumed, end = server.records.open(wire, consumed, len(wire), room, 0)
    assert (consumed, bytes(room[:end])) == (len(wire), b"b" * 100)


def test_a_changed_byte_ends_it_and_the_alert_reaches_the_peer() -> None:
    client, server = joined(OPENSSL)
    wire = bytearray(client.seal(b"some bytes"))
    wire[-1] ^= 1
    with pytest.raises(RecordError) as caught:
        server.receive(bytes(wire))
    assert caught.value.alert == Alert.BAD_RECORD_MAC
    with pytest.raises(RecordsClosed):
        server.seal(b"x")
    with pytest.raises(RecordsClosed):
        server.receive(b"")
    assert server.records.close_notify() == server.records.pending() == b""
    with pytest.raises(AlertReceived) as told:
        client.receive(server.records.alert(caught.value))
    assert told.value.alert == Alert.BAD_RECORD_MAC
    assert server.records.alert(caught.value) == client.records.alert(told.value) == b""


@pytest.mark.parametrize("header", ["17 0303 ffff", "17 0303 4101"])
def test_headers_are_refused_before_their_body_arrives(header: str) -> None:
    end = joined(OPENSSL)[0]
    with pytest.raises(RecordError):
        end.receive(bytes.fromhex(header))


def test_close_notify_both_ways() -> None:
    client, server = joined(OPENSSL)
    server.receive(client.seal(b"bye") + client.records.close_notify() + b"junk")
    assert (bytes(server.plain), server.records.peer_closed) == (b"bye", True)
    assert client.records.close_notify() == b""
    with pytest.raises(RecordsClosed):
        client.seal(b"x")
    client.receive(server.seal(b"last words") + server.records.close_notify())
    assert (bytes(client.plain), client.records.peer_closed) == (b"last words", True)


def test_it_answers_a_requested_key_update_of_ours() -> None:
    ours, theirs = joined((True, False))
    assert isinstance(theirs, End)
    theirs.receive(ours.records._control(22, b"\x18\x00\x00\x01\x01"))  # type: ignore[attr-defined]  # our own layer never asks
    ours.records._tx.update()  # type: ignore[attr-defined]
    theirs.receive(ours.seal(b"new key"))
    ours.receive(theirs.records.pending() + theirs.seal(b"new key too"))
    assert (bytes(theirs.plain), bytes(ours.plain)) == (b"new key", b"new key too")
    assert ours.records.export().rx_seq == 1
