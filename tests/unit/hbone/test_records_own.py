"""The record layer against a peer that seals whatever it likes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tests.kit.tls import End
from ztunnel.hbone.posthandshake import IDLE_ALLOWANCE, IDLE_COST, MAX_MESSAGE
from ztunnel.hbone.records import KEY_UPDATE_SIZE, MAX_FRAGMENT, MAX_OPENED, Alert, AlertReceived, RecordError, RecordsClosed, sealed_size
from ztunnel.hbone.records_own import OwnRecords, expand_label, fresh_state
from ztunnel.mesh.errors import LocalError

CLIENT, SERVER = bytes(range(32)), bytes(range(100, 132))
ALERT, HANDSHAKE, DATA = 21, 22, 23
TICKET = b"\x04\x00\x00\x0d" + bytes(13)
KEY_UPDATE = b"\x18\x00\x00\x01\x00"
KEY_UPDATE_REQUEST = b"\x18\x00\x00\x01\x01"


class Forger:
    """A peer that keeps the keys right and nothing else: it seals any content as any type. Keys by `cryptography`, not by our code."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._use()

    def _label(self, label: bytes, length: int) -> bytes:
        full = b"tls13 " + label
        info = length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
        return HKDFExpand(hashes.SHA256(), length, info).derive(self._secret)

    def _use(self) -> None:
        self._aead, self._iv, self._sequence = AESGCM(self._label(b"key", 16)), int.from_bytes(self._label(b"iv", 12), "big"), 0

    def update(self) -> None:
        self._secret = self._label(b"traffic upd", 32)
        self._use()

    def inner(self, plain: bytes) -> bytes:
        header = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2, "big")
        sealed = self._aead.encrypt((self._iv ^ self._sequence).to_bytes(12, "big"), plain, header)
        self._sequence += 1
        return header + sealed

    def record(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        return self.inner(content + bytes([kind]) + bytes(padding))


def records(*, server: bool = False, rekey_records: int = 1 << 24) -> OwnRecords:
    state = fresh_state(server=server, cipher="TLS_AES_128_GCM_SHA256", client_secret=CLIENT, server_secret=SERVER, tx_seq=0)
    return OwnRecords(state, rekey_records=rekey_records)


def client() -> tuple[End, Forger]:
    """A client of ours and the server that forges for it."""
    return End(records()), Forger(SERVER)


def refusal(end: End, wire: bytes) -> RecordError:
    with pytest.raises(RecordError) as caught:
        end.receive(wire)
    return caught.value


# Keys and the wire


def test_keys_and_a_record_are_those_of_rfc_8448() -> None:
    """Source: RFC 8448 §3 (simple 1-RTT handshake), client application traffic secret and the client's first application record."""
    secret = bytes.fromhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
    assert expand_label(secret, b"key", 16, SHA256()).hex() == "17422dda596ed5d9acd890e3c63f5051"
    assert expand_label(secret, b"iv", 12, SHA256()).hex() == "5b78923dee08579033e523d9"
    wire = bytes.fromhex(
        "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae63a"
        "eebb21694915e4"
    )
    state = fresh_state(server=False, cipher="TLS_AES_128_GCM_SHA256", client_secret=secret, server_secret=SERVER, tx_seq=0)
    assert End(OwnRecords(state)).seal(bytes(range(50))) == wire


@pytest.mark.parametrize("size", [0, 1, MAX_FRAGMENT - 1, MAX_FRAGMENT, MAX_FRAGMENT + 1, 3 * MAX_FRAGMENT + 7])
def test_what_is_sealed_opens(size: int) -> None:
    plain = bytes(i * 7 & 0xFF for i in range(size))
    sender, receiver = End(records()), End(records(server=True))
    receiver.receive(sender.seal(plain))
    assert receiver.plain == plain


def test_sealing_works_in_the_middle_of_buffers_and_touches_nothing_else() -> None:
    source, out = bytearray(b"<" + b"x" * 20000 + b">tail"), bytearray(b"\xee" * 30000)
    end = records().seal(source, 1, 20001, memoryview(out), 100)
    assert source == b"<" + b"x" * 20000 + b">tail"
    assert out[:100] == b"\xee" * 100
    assert not out[end:].strip(b"\xee")
    room = bytearray(b"\xdd" * 40000)
    assert records(server=True).open(memoryview(out), 100, end, memoryview(room), 50) == (end, 20050)
    assert room[50:20050] == b"x" * 20000


def test_buffers_that_are_too_small_are_the_callers_mistake_and_nothing_is_sealed() -> None:
    layer = records()
    with pytest.raises(ValueError, match="spare byte"):
        layer.seal(bytearray(10), 0, 10, memoryview(bytearray(1000)), 0)
    with pytest.raises(ValueError, match="room"):
        layer.seal(bytearray(11), 0, 10, memoryview(bytearray(sealed_size(10) - 1)), 0)
    assert layer.export().tx_seq == 0


def test_incomplete_records_wait() -> None:
    wire = End(records()).seal(b"hello")
    layer, room = records(server=True), memoryview(bytearray(MAX_OPENED))
    for size in range(len(wire)):
        assert layer.open(memoryview(wire), 0, size, room, 0) == (0, 0)
    assert layer.open(memoryview(wire + wire[:7]), 0, len(wire) + 7, room, 0) == (len(wire), 5)


def test_opening_stops_when_the_room_is_used_up_and_goes_on_later() -> None:
    wire = memoryview(End(records()).seal(b"a" * MAX_FRAGMENT + b"b" * 100))
    layer, room = records(server=True), memoryview(bytearray(MAX_OPENED + 50))
    consumed, end = layer.open(wire, 0, len(wire), room, 0)
    assert (consumed, end) == (MAX_FRAGMENT + 22, MAX_FRAGMENT)
    consumed, end = layer.open(wire, consumed, len(wire), room, 0)
    assert (consumed, bytes(room[:end])) == (len(wire), b"b" * 100)


@pytest.mark.parametrize("padding", [0, 1, 300])
def test_padding_is_removed_and_zeros_of_the_content_stay(padding: int) -> None:
    end, forger = client()
    end.receive(forger.record(DATA, b"zeros\0\0", padding) + forger.record(DATA, b"next"))
    assert end.plain == b"zeros\0\0next"


# Refusals


@pytest.mark.parametrize(
    ("header", "alert"),
    [
        ("14 0303 0001", Alert.UNEXPECTED_MESSAGE),
        ("15 0303 0002", Alert.UNEXPECTED_MESSAGE),
        ("16 0303 0020", Alert.UNEXPECTED_MESSAGE),
        ("00 0303 0020", Alert.UNEXPECTED_MESSAGE),
        ("47 4554 202f", Alert.UNEXPECTED_MESSAGE),
        ("17 0301 0020", Alert.DECODE_ERROR),
        ("17 0304 0020", Alert.DECODE_ERROR),
        ("17 0303 4012", Alert.RECORD_OVERFLOW),
        ("17 0303 ffff", Alert.RECORD_OVERFLOW),
        ("17 0303 000f", Alert.BAD_RECORD_MAC),
        ("17 0303 0000", Alert.BAD_RECORD_MAC),
    ],
)
def test_headers_are_refused_before_their_body_arrives(header: str, alert: Alert) -> None:
    assert refusal(client()[0], bytes.fromhex(header)).alert == alert


@pytest.mark.parametrize(
    ("kind", "content", "alert"),
    [
        (HANDSHAKE, b"", Alert.UNEXPECTED_MESSAGE),
        (ALERT, b"", Alert.UNEXPECTED_MESSAGE),
        (ALERT, b"\x02", Alert.DECODE_ERROR),
        (ALERT, b"\x01\x00\x01\x00", Alert.DECODE_ERROR),
        (20, b"\x01", Alert.UNEXPECTED_MESSAGE),
        (24, b"heartbeat", Alert.UNEXPECTED_MESSAGE),
        (99, b"", Alert.UNEXPECTED_MESSAGE),
        (HANDSHAKE, b"\x18\x00\x00\x02\x00\x00", Alert.DECODE_ERROR),
        (HANDSHAKE, b"\x18\x00\x00\x00", Alert.DECODE_ERROR),
        (HANDSHAKE, b"\x18\x00\x00\x01\x02", Alert.ILLEGAL_PARAMETER),
        (HANDSHAKE, KEY_UPDATE + TICKET, Alert.UNEXPECTED_MESSAGE),
        (HANDSHAKE, KEY_UPDATE + b"\x04", Alert.UNEXPECTED_MESSAGE),
        (HANDSHAKE, b"\x01\x00\x00\x40hello", Alert.UNEXPECTED_MESSAGE),
        (HANDSHAKE, b"\x0d\x00\x00\x20", Alert.UNEXPECTED_MESSAGE),
        (HANDSHAKE, b"\x14\x00\x00\x20" + bytes(32), Alert.UNEXPECTED_MESSAGE),
        (HANDSHAKE, b"\x04" + (MAX_MESSAGE + 1).to_bytes(3, "big"), Alert.ILLEGAL_PARAMETER),
    ],
)
def test_protected_nonsense_gets_its_alert(kind: int, content: bytes, alert: Alert) -> None:
    end, forger = client()
    assert refusal(end, forger.record(kind, content)).alert == alert


@pytest.mark.parametrize("inner", [b"", b"\0", bytes(MAX_OPENED)])
def test_a_record_without_a_type_is_refused(inner: bytes) -> None:
    end, forger = client()
    assert refusal(end, forger.inner(inner)).alert == Alert.UNEXPECTED_MESSAGE


def test_the_longest_plaintext_opens_and_one_byte_more_overflows() -> None:
    end, forger = client()
    end.receive(forger.record(DATA, bytes(MAX_FRAGMENT)))
    assert len(end.plain) == MAX_FRAGMENT
    assert refusal(end, forger.record(DATA, bytes(MAX_FRAGMENT + 1))).alert == Alert.RECORD_OVERFLOW


def test_a_ticket_is_for_clients() -> None:
    assert refusal(End(records(server=True)), Forger(CLIENT).record(HANDSHAKE, TICKET)).alert == Alert.UNEXPECTED_MESSAGE


@pytest.mark.parametrize("position", [0, 5, 20, -1])
def test_a_changed_byte_is_noticed(position: int) -> None:
    end, forger = client()
    wire = bytearray(forger.record(DATA, b"some bytes"))
    wire[position] ^= 1
    refusal(end, bytes(wire))


def test_replayed_and_reordered_records_are_noticed() -> None:
    end, forger = client()
    first, second = forger.record(DATA, b"1"), forger.record(DATA, b"2")
    assert refusal(end, second).alert == Alert.BAD_RECORD_MAC
    end = client()[0]
    end.receive(first)
    assert refusal(end, first).alert == Alert.BAD_RECORD_MAC


def test_after_an_error_only_its_alert_is_sealed() -> None:
    end, forger = client()
    error = refusal(end, forger.record(99, b""))
    layer = end.records
    with pytest.raises(RecordsClosed):
        end.seal(b"x")
    with pytest.raises(RecordsClosed):
        end.receive(b"")
    with pytest.raises(RecordsClosed):
        layer.export()
    assert layer.pending() == layer.close_notify() == b""
    peer = End(records(server=True))
    with pytest.raises(AlertReceived) as told:
        peer.receive(layer.alert(error))
    assert told.value.alert == Alert.UNEXPECTED_MESSAGE
    assert layer.alert(error) == b""


def test_a_fatal_alert_is_raised_and_not_answered() -> None:
    end, forger = client()
    error = refusal(end, forger.record(ALERT, bytes((2, Alert.CERTIFICATE_UNKNOWN))))
    assert isinstance(error, AlertReceived)
    assert error.alert == Alert.CERTIFICATE_UNKNOWN
    assert end.records.alert(error) == b""


def test_errors_do_not_pin_the_callers_buffers() -> None:
    wire, room = bytearray(Forger(SERVER).record(99, b"")), bytearray(MAX_OPENED)
    with memoryview(wire) as sealed, memoryview(room) as out, pytest.raises(RecordError) as caught:
        records().open(sealed, 0, len(wire), out, 0)
    wire += b"more"
    room += b"more"
    assert caught.value.__traceback__ is not None


# Closing


def test_close_notify_ends_reading_and_what_follows_is_dropped() -> None:
    end, forger = client()
    end.receive(forger.record(DATA, b"last") + forger.record(ALERT, b"\x01\x00") + b"anything \xff at all")
    assert (end.records.peer_closed, bytes(end.plain)) == (True, b"last")
    end.receive(b"more")
    assert End(records()).seal(b"still") == end.seal(b"still")


def test_our_close_notify_ends_sending_but_not_reading() -> None:
    end, forger = client()
    peer = End(records(server=True))
    peer.receive(end.seal(b"bye") + end.records.close_notify())
    assert (bytes(peer.plain), peer.records.peer_closed) == (b"bye", True)
    with pytest.raises(RecordsClosed):
        end.seal(b"x")
    assert end.records.close_notify() == b""
    end.receive(forger.record(HANDSHAKE, KEY_UPDATE_REQUEST))
    assert end.records.pending() == b""
    forger.update()
    end.receive(forger.record(DATA, b"answer"))
    assert end.plain == b"answer"


def test_user_canceled_is_ignored() -> None:
    end, forger = client()
    end.receive(forger.record(ALERT, bytes((1, Alert.USER_CANCELED))) + forger.record(DATA, b"x"))
    assert end.plain == b"x"


# Post-handshake messages


def test_messages_may_share_records_and_span_them() -> None:
    end, forger = client()
    stream = TICKET + TICKET + KEY_UPDATE
    for at in range(len(stream)):
        end.receive(forger.record(HANDSHAKE, stream[at : at + 1]))
    forger.update()
    end.receive(forger.record(HANDSHAKE, stream))
    forger.update()
    end.receive(forger.record(DATA, b"after"))
    assert end.plain == b"after"


@pytest.mark.parametrize(("kind", "content"), [(DATA, b"x"), (DATA, b""), (ALERT, b"\x01\x00")])
def test_nothing_may_interrupt_a_message(kind: int, content: bytes) -> None:
    end, forger = client()
    end.receive(forger.record(HANDSHAKE, TICKET[:7]))
    assert refusal(end, forger.record(kind, content)).alert == Alert.UNEXPECTED_MESSAGE


def test_a_requested_update_is_answered_once_before_anything_else() -> None:
    end, forger = client()
    for _ in range(3):
        end.receive(forger.record(HANDSHAKE, KEY_UPDATE_REQUEST))
        forger.update()
    peer = End(records(server=True))
    answer = end.records.pending()
    assert len(answer) == KEY_UPDATE_SIZE
    assert end.records.pending() == b""
    peer.receive(answer + end.seal(b"under the new key"))
    assert peer.plain == b"under the new key"
    assert peer.records.pending() == b""


def test_seal_writes_the_answer_that_nobody_fetched() -> None:
    end, forger = client()
    end.receive(forger.record(HANDSHAKE, KEY_UPDATE_REQUEST))
    wire = end.seal(b"x")
    assert len(wire) == KEY_UPDATE_SIZE + 23
    peer = End(records(server=True))
    peer.receive(wire)
    assert peer.plain == b"x"


def test_an_update_that_asks_nothing_is_not_answered() -> None:
    end, forger = client()
    end.receive(forger.record(HANDSHAKE, KEY_UPDATE))
    assert end.records.pending() == b""


@pytest.mark.parametrize("moved", [255, 256, 300])
def test_sequence_numbers_outgrow_a_byte_and_move_in_the_middle(moved: int) -> None:
    end, forger = client()
    peer = End(records(server=True))
    for number in range(600):
        if number == moved:
            end = End(OwnRecords(end.records.export()))
        end.receive(forger.record(DATA, b"x"))
        peer.receive(end.seal(b"y"))
    assert end.plain == b"x" * (600 - moved)
    assert peer.plain == b"y" * 600


def test_keys_are_renewed_before_their_limit() -> None:
    sender, receiver = End(records(rekey_records=3)), End(records(server=True))
    sizes = []
    for i in range(10):
        wire = sender.seal(bytes([i]))
        sizes.append(len(wire) - 23)
        receiver.receive(wire)
    assert sizes == [0, 0, 0, KEY_UPDATE_SIZE, 0, 0, KEY_UPDATE_SIZE, 0, 0, KEY_UPDATE_SIZE]
    assert receiver.plain == bytes(range(10))


# Floods


@pytest.mark.parametrize(
    ("kind", "content"),
    [(DATA, b""), (HANDSHAKE, TICKET), (ALERT, bytes((1, Alert.USER_CANCELED)))],
    ids=["empty", "tickets", "user_canceled"],
)
def test_records_without_data_are_bounded_by_the_data(kind: int, content: bytes) -> None:
    end, forger = client()
    burst = IDLE_ALLOWANCE // IDLE_COST
    for _ in range(burst):
        end.receive(forger.record(kind, content))
    end.receive(forger.record(DATA, bytes(IDLE_COST)))
    end.receive(forger.record(kind, content))
    assert refusal(end, forger.record(kind, content)).alert == Alert.UNEXPECTED_MESSAGE


def test_key_updates_are_bounded() -> None:
    end, forger = client()
    for _ in range(IDLE_ALLOWANCE // IDLE_COST):
        end.receive(forger.record(HANDSHAKE, KEY_UPDATE_REQUEST))
        forger.update()
    assert refusal(end, forger.record(HANDSHAKE, KEY_UPDATE_REQUEST)).alert == Alert.UNEXPECTED_MESSAGE


# Moving


def test_a_connection_moves_in_the_middle_of_everything_and_leaves_nothing_behind() -> None:
    end, forger = client()
    peer = End(records(server=True))
    end.receive(forger.record(DATA, b"one") + forger.record(HANDSHAKE, KEY_UPDATE_REQUEST))
    forger.update()
    end.receive(forger.record(HANDSHAKE, TICKET[:5]))
    peer.receive(end.seal(b"before"))
    end.receive(forger.record(HANDSHAKE, TICKET[5:] + KEY_UPDATE_REQUEST[:4]))
    state = end.records.export()
    for use in (lambda: end.seal(b"x"), lambda: end.receive(b""), end.records.export):
        with pytest.raises(RecordsClosed):
            use()
    assert end.records.pending() == end.records.close_notify() == end.records.alert(RecordError("", 80)) == b""

    moved = End(OwnRecords(state))
    moved.receive(forger.record(HANDSHAKE, KEY_UPDATE_REQUEST[4:]))
    forger.update()
    moved.receive(forger.record(DATA, b"two"))
    peer.receive(moved.records.pending() + moved.seal(b" after"))
    assert (bytes(moved.plain), bytes(peer.plain)) == (b"two", b"before after")


def test_flags_and_budget_move_too() -> None:
    end, forger = client()
    end.receive(forger.record(DATA, b"") + forger.record(ALERT, b"\x01\x00"))
    end.records.close_notify()
    state = end.records.export()
    assert (state.peer_closed, state.closed, state.allowance) == (True, True, IDLE_ALLOWANCE - 2 * IDLE_COST)
    moved = OwnRecords(state)
    assert moved.peer_closed
    with pytest.raises(RecordsClosed):
        End(moved).seal(b"x")


def test_a_state_that_cannot_be_ours_is_refused() -> None:
    state = records().export()
    for wrong in (
        replace(state, cipher="TLS_CHACHA20_POLY1305_SHA256"),
        replace(state, tx_secret=bytes(48)),
        replace(state, rx_secret=b""),
        replace(state, tx_seq=-1),
        replace(state, rx_seq=1 << 62),
    ):
        with pytest.raises(ValueError, match=r"cipher|state"):
            OwnRecords(wrong)


def test_secrets_stay_out_of_texts() -> None:
    assert CLIENT.hex() not in repr(records().export())
    assert repr(CLIENT) not in repr(records().export())
    assert issubclass(RecordsClosed, LocalError)
