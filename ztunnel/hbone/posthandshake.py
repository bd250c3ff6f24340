"""What a peer may say after the handshake besides data: KeyUpdates, session tickets, alerts. Whoever opened the record asks here.

It owns the beginning of a message whose rest has not arrived, the answer that a KeyUpdate asks for, and the budget for records that
bring no data; it knows no keys and no sequence numbers, so that it serves our own record layer and the kernel's alike.

Invariant: everything that a peer makes us keep or do without sending data is bounded.
Source: RFC 8446 §4.6, §5.1, §6.
"""

from __future__ import annotations

from typing import Final

from ztunnel.hbone.records import Alert, AlertReceived, ContentType, RecordError

MAX_MESSAGE: Final = 1 << 16
"""Bytes of one post-handshake message. Tickets that hold a client certificate take one to three KiB."""
IDLE_COST: Final = 1024
"""Bytes of application data that pay for one record that brings none (empty, KeyUpdate, ticket, user_canceled)."""
IDLE_ALLOWANCE: Final = 128 * IDLE_COST
"""What a peer may have saved up: 128 such records in a row, far above the few tickets and KeyUpdates that real peers send."""
KEY_UPDATE: Final = bytes((24, 0, 0, 1, 0))
"""Ours says update_not_requested: the peer's own limits are its own business, and two sides that ask each other never stop."""

_NEW_SESSION_TICKET, _KEY_UPDATE = 4, 24


class PostHandshake:
    """One connection's side conversation. `partial` is always the same bytearray: hot code may keep it."""

    __slots__ = ("_server", "allowance", "answer_due", "partial", "peer_closed")

    def __init__(self, *, server: bool, partial: bytes, answer_due: bool, peer_closed: bool, allowance: int) -> None:
        """The values are those of `RecordState`; an allowance above IDLE_ALLOWANCE is cut to it."""
        self._server = server
        self.partial = bytearray(partial)
        self.answer_due = answer_due
        self.peer_closed = peer_closed
        self.allowance = min(allowance, IDLE_ALLOWANCE)

    def credit(self, n: int) -> None:
        """So many bytes of data came."""
        self.allowance = min(self.allowance + n, IDLE_ALLOWANCE)

    def take(self, kind: int, content: bytes) -> bool:
        """Deal with a record that brings no application data: at least it costs its allowance.

        Returns: whether the peer seals with its next key from now on.
        Raises:
            RecordError: the record breaks the rules, is one too many, or is a fatal alert.
        """
        self.allowance -= IDLE_COST
        if self.allowance < 0:
            raise RecordError("too many records without data", Alert.UNEXPECTED_MESSAGE)
        if self.partial and kind != ContentType.HANDSHAKE:
            raise interrupted()
        if kind == ContentType.HANDSHAKE:
            return self._handshake(content)
        if kind == ContentType.ALERT:
            self._alert(content)
        elif kind != ContentType.DATA:
            raise RecordError(f"a record of type {kind} after the handshake", Alert.UNEXPECTED_MESSAGE)
        return False

    def _alert(self, content: bytes) -> None:
        if len(content) == 0:
            raise RecordError("an empty alert record", Alert.UNEXPECTED_MESSAGE)
        if len(content) != 2:
            raise RecordError("an alert record that is not one alert", Alert.DECODE_ERROR)
        if content[1] == Alert.CLOSE_NOTIFY:
            self.peer_closed = True
        elif content[1] != Alert.USER_CANCELED:
            raise AlertReceived(content[1])

    def _handshake(self, content: bytes) -> bool:
        """Take a fragment of post-handshake messages: messages may share a record and may span several."""
        if not content:
            raise RecordError("an empty handshake record", Alert.UNEXPECTED_MESSAGE)
        messages = self.partial
        messages += content
        updated = False
        while len(messages) >= 4:
            size = int.from_bytes(messages[1:4], "big")
            self._check_message(messages[0], size)
            if len(messages) < 4 + size:
                break
            if messages[0] == _KEY_UPDATE:
                if len(messages) > 5:
                    raise RecordError("a KeyUpdate that does not end its record", Alert.UNEXPECTED_MESSAGE)
                if messages[4] > 1:
                    raise RecordError(f"a KeyUpdate that asks {messages[4]}", Alert.ILLEGAL_PARAMETER)
                self.answer_due = self.answer_due or messages[4] == 1
                updated = True
            del messages[: 4 + size]
        return updated

    def _check_message(self, kind: int, size: int) -> None:
        """Refuse a message by its header, before anything of its body is kept."""
        if kind == _KEY_UPDATE:
            if size != 1:
                raise RecordError("a KeyUpdate of the wrong size", Alert.DECODE_ERROR)
        elif kind != _NEW_SESSION_TICKET or self._server:
            # That includes CertificateRequest: our client does not offer post_handshake_auth.
            raise RecordError(f"a handshake message of type {kind} after the handshake", Alert.UNEXPECTED_MESSAGE)
        elif size > MAX_MESSAGE:
            raise RecordError(f"a session ticket of {size} bytes", Alert.ILLEGAL_PARAMETER)


def interrupted() -> RecordError:
    """The error for a record of another type in the middle of a handshake message (RFC 8446 §5.1)."""
    return RecordError("a handshake message interrupted by another record", Alert.UNEXPECTED_MESSAGE)
