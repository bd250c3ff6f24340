"""What the kernel is given to seal and open records, and what is decided about the rest."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests.kit.tls import CIPHERS
from ztunnel.hbone.posthandshake import IDLE_ALLOWANCE, IDLE_COST
from ztunnel.hbone.records import Alert, AlertReceived, ContentType, RecordError, RecordsClosed, RecordState, missing
from ztunnel.hbone.records_kernel import KernelRecords, crypto_info, first_keys, next_record
from ztunnel.hbone.records_own import CIPHERS as SUITES
from ztunnel.hbone.records_own import fresh_state

UPDATE, UPDATE_REQUESTED = bytes((24, 0, 0, 1, 0)), bytes((24, 0, 0, 1, 1))
TICKET = bytes((4, 0, 0, 8)) + b"a ticket"

RFC8448_SERVER_SECRET = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
"""RFC 8448 §3: server_application_traffic_secret_0, and what it gives."""
RFC8448_KEY, RFC8448_IV = bytes.fromhex("9f02283b6c9c07efc26bb9f2ac92e356"), bytes.fromhex("cf782b88dd83549aadf1e984")


def state(cipher: str = CIPHERS[0], *, server: bool = False) -> RecordState:
    size = SUITES[cipher][2]
    return fresh_state(server=server, cipher=cipher, client_secret=b"c" * size, server_secret=b"s" * size, tx_seq=3)


def due(records: KernelRecords) -> bool:
    return records.update_due


def heard_the_end(records: KernelRecords) -> bool:
    return records.peer_closed


def test_the_layout_is_that_of_linux() -> None:
    """struct tls12_crypto_info_aes_gcm_128 of include/uapi/linux/tls.h, with the keys that RFC 8448 prints."""
    info = crypto_info(CIPHERS[0], RFC8448_SERVER_SECRET, 0x0102)
    version, cipher, iv, key, salt, sequence = struct.unpack("=HH8s16s4s8s", info)
    assert (version, cipher) == (0x0304, 51)
    assert (salt + iv, key) == (RFC8448_IV, RFC8448_KEY)
    assert sequence == bytes.fromhex("0000000000000102")
    assert next_record(info) == 0x0102


def test_the_longer_cipher_has_the_longer_key() -> None:
    info = crypto_info(CIPHERS[1], b"s" * 48, 0)
    assert len(info) == struct.calcsize("=HH8s32s4s8s") == KernelRecords(state(CIPHERS[1])).info_size
    assert struct.unpack_from("=HH", info) == (0x0304, 52)


def test_the_first_keys_go_on_counting() -> None:
    tx, rx = first_keys(state())
    assert (next_record(tx), next_record(rx)) == (3, 0)
    assert tx == crypto_info(CIPHERS[0], b"c" * 32, 3)
    assert rx == crypto_info(CIPHERS[0], b"s" * 32, 0)


def test_a_state_that_is_none_of_ours() -> None:
    for bad in (replace(state(), cipher="TLS_CHACHA20_POLY1305_SHA256"), replace(state(), tx_secret=b"short"), replace(state(), rx_seq=-1)):
        with pytest.raises(ValueError, match=r"unknown cipher|not a state"):
            KernelRecords(bad)
        with pytest.raises(ValueError, match=r"unknown cipher|not a state"):
            first_keys(bad)


def test_a_key_seals_so_many_records_at_most() -> None:
    records = KernelRecords(state(), rekey_records=40)
    assert not due(records)
    records.sealed(512 * 1024)
    assert due(records)
    key = records.next_key()
    assert not due(records)
    assert next_record(key) == 0
    assert key != records.next_key()


@pytest.mark.parametrize("n", [1, 100, 8191, 8192, 16384, 16385, 524288])
def test_the_count_is_no_less_than_the_records(n: int) -> None:
    """Even if the kernel cut each record but the last in its middle."""
    records = KernelRecords(replace(state(), tx_seq=0), rekey_records=-(-n // 8192))
    records.sealed(n)
    assert due(records)


def test_a_key_update_gives_the_kernel_the_next_key_and_is_answered_once() -> None:
    records = KernelRecords(state())
    first = records.control(ContentType.HANDSHAKE, UPDATE)
    assert not due(records)
    second = records.control(ContentType.HANDSHAKE, UPDATE_REQUESTED)
    third = records.control(ContentType.HANDSHAKE, UPDATE_REQUESTED)
    assert due(records)
    assert len({first_keys(state())[1], first, second, third}) == 4
    records.next_key()
    assert not due(records)


def test_a_ticket_is_passed_over_in_pieces_too() -> None:
    records = KernelRecords(state())
    assert records.control(ContentType.HANDSHAKE, TICKET + TICKET[:5]) == b""
    assert records.control(ContentType.HANDSHAKE, TICKET[5:]) == b""
    records.opened(1)


def test_data_may_not_come_in_the_middle_of_a_message() -> None:
    records = KernelRecords(state())
    records.control(ContentType.HANDSHAKE, TICKET[:5])
    with pytest.raises(RecordError, match="interrupted") as caught:
        records.opened(1)
    assert records.alert(caught.value) == bytes((2, Alert.UNEXPECTED_MESSAGE))
    with pytest.raises(RecordsClosed):
        records.control(ContentType.HANDSHAKE, UPDATE)


def test_records_without_data_are_paid_for_with_data() -> None:
    records = KernelRecords(state())
    for _ in range(IDLE_ALLOWANCE // IDLE_COST):
        records.control(ContentType.HANDSHAKE, UPDATE)
    records.opened(IDLE_COST)
    records.control(ContentType.HANDSHAKE, UPDATE)
    with pytest.raises(RecordError, match="too many"):
        records.control(ContentType.HANDSHAKE, UPDATE)


def test_close_notify_is_the_end_of_what_the_peer_says_and_of_what_we_say() -> None:
    records = KernelRecords(state())
    assert not heard_the_end(records)
    records.control(ContentType.ALERT, bytes((1, 0)))
    assert heard_the_end(records)
    assert records.close_notify() == bytes((1, 0))
    assert records.close_notify() == records.alert(RecordError("late", 80)) == b""


def test_a_fatal_alert_is_not_answered() -> None:
    records = KernelRecords(state())
    with pytest.raises(AlertReceived) as caught:
        records.control(ContentType.ALERT, bytes((2, 20)))
    assert records.alert(caught.value) == records.close_notify() == b""


@pytest.mark.parametrize(
    ("kind", "content"), [(20, b"\x01"), (99, b""), (ContentType.HANDSHAKE, b""), (ContentType.HANDSHAKE, b"\x0d\0\0\0")]
)
def test_what_nobody_may_send_after_the_handshake(kind: int, content: bytes) -> None:
    with pytest.raises(RecordError):
        KernelRecords(state(server=True)).control(kind, content)


def test_an_exported_state_has_the_kernels_numbers_and_spends_its_object() -> None:
    records = KernelRecords(state())
    records.control(ContentType.HANDSHAKE, UPDATE_REQUESTED)
    records.control(ContentType.HANDSHAKE, TICKET[:5])
    moved = records.export(crypto_info(CIPHERS[0], b"c" * 32, 70), crypto_info(CIPHERS[0], b"s" * 32, 80))
    assert (moved.tx_seq, moved.rx_seq, moved.partial, moved.answer_due, moved.closed) == (70, 80, TICKET[:5], True, False)
    assert (moved.tx_secret, len(moved.rx_secret)) == (b"c" * 32, 32)
    assert moved.rx_secret != b"s" * 32
    assert records.close_notify() == b""
    with pytest.raises(RecordsClosed):
        records.export(b"", b"")


def test_how_much_a_record_lacks() -> None:
    assert [missing(bytes.fromhex("1703030010")[:n]) for n in range(6)] == [5, 4, 3, 2, 1, 16]
    assert missing(bytes.fromhex("1703030010") + bytes(15)) == 1
