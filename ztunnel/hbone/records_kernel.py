"""A connection whose records the kernel seals and opens: the keys to give it, and what it leaves to us. Without I/O.

The kernel has the keys of the moment and the sequence numbers; here are the traffic secrets that the next keys come from, the rules for
everything that is not data (`posthandshake`, the same as for our own records), and the count that says when a key has sealed enough.
Whoever holds the socket asks before it sends (`update_due`), says what the kernel took and gave (`sealed`, `opened`), and brings every
other record here (`control`).

Invariant: no key is ever given to the kernel twice, which would start its sequence numbers again; the kernel does not check that.
Source: Linux `Documentation/networking/tls.rst` and `include/uapi/linux/tls.h`; RFC 8446 §4.6.3, §5.5, §7.2, §7.3.
"""

from __future__ import annotations

from struct import Struct

from ztunnel.hbone.posthandshake import interrupted
from ztunnel.hbone.records import Alert, AlertReceived, RecordError, RecordsClosed, RecordState
from ztunnel.hbone.records_own import REKEY_RECORDS, check_state, messages_of, next_secret, traffic_keys

_TLS_1_3 = 0x0304
_CIPHER_TYPES = {"TLS_AES_128_GCM_SHA256": 51, "TLS_AES_256_GCM_SHA384": 52}
_VERSION_AND_CIPHER = Struct("=HH")
_SALT_SIZE = 4
_SEQUENCE_SIZE = 8
_KEY_SIZES = {51: 16, 52: 32}
_HALF_FRAGMENT_BITS = 13


def crypto_info(cipher: str, secret: bytes, sequence: int) -> bytes:
    """What setsockopt TLS_TX and TLS_RX take, `struct tls12_crypto_info_aes_gcm_…`: version, cipher, iv, key, salt, rec_seq.

    TLS 1.3 has one IV of twelve bytes; the kernel wants its first four as the salt. Version and cipher are in the machine's byte order,
    the number of the next record in the network's.
    """
    key, iv = traffic_keys(cipher, secret)
    head = _VERSION_AND_CIPHER.pack(_TLS_1_3, _CIPHER_TYPES[cipher])
    return head + iv[_SALT_SIZE:] + key + iv[:_SALT_SIZE] + sequence.to_bytes(_SEQUENCE_SIZE, "big")


def next_record(info: bytes) -> int:
    """The number of the next record in a `crypto_info` that getsockopt gave back."""
    return int.from_bytes(info[-_SEQUENCE_SIZE:], "big")


def first_keys(state: RecordState) -> tuple[bytes, bytes]:
    """What TLS_TX and TLS_RX have to be set to for a connection that comes from other hands. Once: nobody may seal with the state then.

    Raises:
        ValueError: the state is none of ours.
    """
    check_state(state)
    return crypto_info(state.cipher, state.tx_secret, state.tx_seq), crypto_info(state.cipher, state.rx_secret, state.rx_seq)


class KernelRecords:
    """See the module. After an error nothing is said any more but the one alert, and `control` and `export` raise RecordsClosed."""

    __slots__ = ("_cipher", "_closed", "_count", "_failed", "_limit", "_messages", "_rx_secret", "_server", "_tx_secret")

    def __init__(self, state: RecordState, *, rekey_records: int = REKEY_RECORDS) -> None:
        """Carry on from a state, whether the kernel has its keys already or is to get them now (`first_keys`).

        Args:
            rekey_records: records under one key of ours before a KeyUpdate is due, counted with a margin (`sealed`).
        Raises:
            ValueError: the state is none of ours.
        """
        check_state(state)
        self._server = state.server
        self._cipher = state.cipher
        self._tx_secret = state.tx_secret
        self._rx_secret = state.rx_secret
        self._messages = messages_of(state)
        self._limit = rekey_records
        self._count = state.tx_seq
        self._closed = state.closed
        self._failed = False

    @property
    def peer_closed(self) -> bool:
        """close_notify was received: the peer sends nothing more."""
        return self._messages.peer_closed

    @property
    def info_size(self) -> int:
        """Bytes of this connection's `crypto_info`."""
        return _VERSION_AND_CIPHER.size + 12 + _KEY_SIZES[_CIPHER_TYPES[self._cipher]] + _SEQUENCE_SIZE

    # Sending

    @property
    def update_due(self) -> bool:
        """Whether KEY_UPDATE has to be sent, and `next_key` given to the kernel, before more data."""
        return self._messages.answer_due or self._count >= self._limit

    def sealed(self, n: int) -> None:
        """The kernel took n bytes of data from one call.

        It cuts records at 2^14 bytes, at the end of a call, and where a record's pages are used up, which falls in its second half at
        the earliest. The count is therefore no less than the records; a key that is changed early costs nothing.
        """
        self._count += (n >> _HALF_FRAGMENT_BITS) + 1

    def next_key(self) -> bytes:
        """KEY_UPDATE was sent: what TLS_TX has to be set to before anything else is."""
        self._tx_secret = next_secret(self._cipher, self._tx_secret)
        self._count = 0
        self._messages.answer_due = False
        return crypto_info(self._cipher, self._tx_secret, 0)

    def close_notify(self) -> bytes:
        """The content of the alert to send before FIN; empty if we closed already or have failed."""
        if self._closed or self._failed:
            return b""
        self._closed = True
        return bytes((1, Alert.CLOSE_NOTIFY))

    def alert(self, error: RecordError) -> bytes:
        """The content of the alert that tells the peer of a fatal error; empty if it was the peer's own, or we closed already."""
        if self._closed or isinstance(error, AlertReceived):
            return b""
        self._closed = True
        return bytes((2, error.alert))

    # Receiving

    def opened(self, n: int) -> None:
        """The kernel gave n bytes of data. Raises RecordError if they interrupt a handshake message."""
        messages = self._messages
        if messages.partial:
            self.fail()
            raise interrupted()
        messages.credit(n)

    def control(self, kind: int, content: bytes) -> bytes:
        """Deal with a record that is not data.

        Returns: what TLS_RX has to be set to before anything more is read, if that was a KeyUpdate; else nothing.
        Raises:
            RecordError: the record breaks the rules, is one too many, or is a fatal alert.
            RecordsClosed: after an error and after `export`.
        """
        if self._failed:
            raise RecordsClosed("records: opening after the end")
        try:
            updated = self._messages.take(kind, content)
        except RecordError:
            self.fail()
            raise
        if not updated:
            return b""
        self._rx_secret = next_secret(self._cipher, self._rx_secret)
        return crypto_info(self._cipher, self._rx_secret, 0)

    def fail(self) -> None:
        """The connection is over: nothing is said any more but the one alert."""
        self._failed = True
        self._messages.partial.clear()

    # Moving

    def export(self, tx_info: bytes, rx_info: bytes) -> RecordState:
        """Everything that another process needs to carry on with the socket, whose kernel side stays as it is. This object is spent.

        Args:
            tx_info, rx_info: what getsockopt TLS_TX and TLS_RX say now.
        Raises:
            RecordsClosed: after an error, or exported before.
        """
        if self._failed:
            raise RecordsClosed("records: exported after the end")
        state = RecordState(
            server=self._server,
            cipher=self._cipher,
            tx_secret=self._tx_secret,
            rx_secret=self._rx_secret,
            tx_seq=next_record(tx_info),
            rx_seq=next_record(rx_info),
            partial=bytes(self._messages.partial),
            answer_due=self._messages.answer_due,
            peer_closed=self._messages.peer_closed,
            closed=self._closed,
            allowance=self._messages.allowance,
        )
        self._failed = self._closed = True
        return state
