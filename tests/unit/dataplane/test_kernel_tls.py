"""A connection in the hands of the kernel's TLS. The kernel is the kit's; the peer that reads and writes its records is OpenSSL.

The last test asks the real kernel, if it has TLS.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.kit.kernel_tls import KernelRules, KernelSocket
from tests.kit.polling import eventually
from tests.kit.tls import CIPHERS, End, joined
from tests.kit.wire import received, tcp_pair
from ztunnel.dataplane import kernel_tls
from ztunnel.dataplane.kernel_tls import KernelHalfway, KernelRefused, KernelSwitch, KernelTls, take_over
from ztunnel.hbone.posthandshake import IDLE_ALLOWANCE, IDLE_COST
from ztunnel.hbone.records import Alert, AlertReceived, ContentType, RecordError, RecordState
from ztunnel.hbone.records_kernel import KernelRecords
from ztunnel.hbone.records_own import OwnRecords
from ztunnel.mesh.errors import LocalError

FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
UPDATE, UPDATE_REQUESTED = bytes((24, 0, 0, 1, 0)), bytes((24, 0, 0, 1, 1))
OURS, OPENSSL = True, False


class Pair:
    """Our end after a real handshake with the kernel's TLS, and the peer's with its record layer on the other socket."""

    def __init__(self, *, peer: bool, server: bool = False, cipher: str = CIPHERS[0], rules: KernelRules | None = None) -> None:
        near, self.far = tcp_pair()
        self.near = KernelSocket(near, rules or KernelRules())
        client_end, server_end = joined((peer, OURS) if server else (OURS, peer), cipher)
        mine, self.peer = (server_end, client_end) if server else (client_end, server_end)
        assert isinstance(mine.records, OwnRecords)
        self.state: RecordState = mine.records.export()
        self.kernel: KernelTls | None = None

    def take_over(self, *, rekey_records: int = 1 << 24) -> KernelTls:
        take_over(self.near, self.state)
        self.kernel = KernelTls(self.near, KernelRecords(self.state, rekey_records=rekey_records))
        return self.kernel

    def read(self, size: int = 1 << 16) -> bytes:
        """What our end reads at once."""
        assert self.kernel is not None
        room = memoryview(bytearray(size))
        return bytes(room[: self.kernel.receive(room)])

    def write(self, plain: bytes) -> None:
        assert self.kernel is not None
        assert self.kernel.send(memoryview(plain), FLAGS) == len(plain)

    def peer_reads(self, size: int) -> bytes:
        """The next plaintext of the peer."""

        def arrived() -> bool:
            self.near.tick()
            self.peer.receive(received(self.far) or b"")
            return len(self.peer.plain) >= size

        eventually(arrived)
        plain = bytes(self.peer.plain)
        self.peer.plain.clear()
        return plain

    def say(self, kind: int, content: bytes) -> None:
        """The peer's own layer sends a record of any kind."""
        layer = self.peer.records
        assert isinstance(layer, OwnRecords)
        self.far.send(layer._control(kind, content))
        if content in (UPDATE, UPDATE_REQUESTED):
            layer._tx.update()


@pytest.fixture(name="make")
def fixture_make() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**how: object) -> Pair:
        made.append(Pair(**how))  # type: ignore[arg-type]  # passed on as they are
        return made[-1]

    yield make
    for pair in made:
        pair.near.close()
        pair.far.close()


# Against OpenSSL: the keys, IVs and numbers that the kernel is given are those of the wire


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("server", [False, True], ids=["client", "server"])
def test_openssl_reads_what_it_seals_and_it_what_openssl_seals(make: Callable[..., Pair], cipher: str, server: bool) -> None:
    """A server's own number is not 0 then, and neither is the peer's for a client: two session tickets went before."""
    pair = make(peer=OPENSSL, server=server, cipher=cipher)
    assert (pair.state.tx_seq, pair.state.rx_seq) == ((2, 0) if server else (0, 2))
    kernel = pair.take_over()
    for plain in (b"hello", os.urandom(40_000), b"x"):
        pair.write(plain)
        assert pair.peer_reads(len(plain)) == plain
        pair.far.send(pair.peer.seal(plain))
        assert pair.read() == plain
    assert kernel.sendmsg([memoryview(b"in "), memoryview(b"parts")], (), FLAGS) == 8
    assert pair.peer_reads(8) == b"in parts"


def test_openssl_follows_its_key_updates(make: Callable[..., Pair]) -> None:
    pair = make(peer=OPENSSL)
    pair.take_over(rekey_records=1)
    for number in range(4):
        pair.write(b"under key %d" % number)
        assert pair.peer_reads(11) == b"under key %d" % number
    assert pair.near.rekeys == 3


def test_close_notify_both_ways_with_openssl(make: Callable[..., Pair]) -> None:
    pair = make(peer=OPENSSL)
    kernel = pair.take_over()
    kernel.end(None)
    pair.peer.receive(received(pair.far) or b"")
    assert pair.peer.records.peer_closed
    pair.far.send(pair.peer.records.close_notify())
    assert pair.read() == b""
    assert kernel.ended
    kernel.end(None)
    assert received(pair.far) is None


def test_an_exported_connection_goes_on_in_another_process(make: Callable[..., Pair]) -> None:
    """The socket keeps its keys; the state has what the next ones come from. Its numbers are those that the wire is at."""
    pair = make(peer=OPENSSL)
    pair.take_over(rekey_records=2)
    for _ in range(3):
        pair.write(b"before")
        assert pair.peer_reads(6) == b"before"
    pair.far.send(pair.peer.seal(b"behind two tickets"))
    pair.read()
    assert pair.kernel is not None
    state = pair.kernel.export()
    assert (state.tx_seq, state.rx_seq) == (1, 3)
    pair.kernel = KernelTls(pair.near, KernelRecords(state, rekey_records=2))
    for _ in range(3):
        pair.write(b"after")
        assert pair.peer_reads(5) == b"after"
    assert pair.near.rekeys == 2


# What is not data


def test_the_peers_key_updates(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS)
    pair.take_over()
    for _ in range(3):
        pair.far.send(pair.peer.seal(b"old"))
        pair.say(ContentType.HANDSHAKE, UPDATE_REQUESTED)
        pair.far.send(pair.peer.seal(b"new"))
        assert [pair.read(), pair.read(), pair.read()] == [b"old", b"", b"new"]
    pair.write(b"one answer for three")
    assert pair.peer_reads(20) == b"one answer for three"
    assert pair.near.rekeys == 4


def test_an_answer_that_finds_no_room_stays_due(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS)
    kernel = pair.take_over()
    pair.near.is_full = True
    pair.write(b"taken")
    pair.say(ContentType.HANDSHAKE, UPDATE_REQUESTED)
    assert pair.read() == b""
    with pytest.raises(BlockingIOError):
        kernel.send(memoryview(b"more"), FLAGS)
    assert pair.near.rekeys == 1
    pair.near.is_full = False
    assert pair.peer_reads(5) == b"taken"
    pair.write(b"more")
    assert pair.peer_reads(4) == b"more"
    assert pair.near.rekeys == 2


def test_data_that_does_not_fit_comes_with_the_next_call(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS)
    pair.take_over()
    pair.far.send(pair.peer.seal(b"hello world"))
    assert [pair.read(6), pair.read(6)] == [b"hello ", b"world"]
    with pytest.raises(BlockingIOError):
        pair.read()
    pair.far.close()
    assert pair.read() == b""
    assert pair.kernel is not None
    assert pair.kernel.ended


def test_a_fatal_alert(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS)
    kernel = pair.take_over()
    pair.say(ContentType.ALERT, bytes((2, Alert.INTERNAL_ERROR)))
    with pytest.raises(AlertReceived, match="internal_error") as caught:
        pair.read()
    kernel.end(caught.value)
    assert received(pair.far) is None


def test_a_damaged_record_is_refused_and_the_peer_told(make: Callable[..., Pair]) -> None:
    pair = make(peer=OPENSSL)
    kernel = pair.take_over()
    sealed = bytearray(pair.peer.seal(b"hello"))
    sealed[-1] ^= 1
    pair.far.send(sealed)
    with pytest.raises(RecordError, match="does not open") as caught:
        pair.read()
    kernel.end(caught.value)
    alert = received(pair.far)
    assert alert
    with pytest.raises(AlertReceived, match="bad_record_mac"):
        pair.peer.receive(alert)


@pytest.mark.parametrize(
    ("wire", "alert"),
    [(b"\x17\x03\x03\x41\x00", Alert.RECORD_OVERFLOW), (b"\x17\x03\x02\x00\x20" + bytes(32), Alert.DECODE_ERROR)],
    ids=["too long", "another version"],
)
def test_a_record_that_cannot_be_one(make: Callable[..., Pair], wire: bytes, alert: Alert) -> None:
    pair = make(peer=OURS)
    pair.take_over()
    pair.far.send(wire)
    with pytest.raises(RecordError) as caught:
        pair.read()
    assert caught.value.alert == alert


def test_a_key_update_in_pieces_stops_the_kernel_and_ends_the_connection(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS)
    pair.take_over()
    pair.say(ContentType.HANDSHAKE, UPDATE[:2])
    pair.say(ContentType.HANDSHAKE, UPDATE[2:])
    assert pair.read() == b""
    with pytest.raises(RecordError, match="not whole"):
        pair.read()


def test_a_flood_of_records_without_data_ends(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS, server=True)
    pair.take_over()
    for _ in range(IDLE_ALLOWANCE // IDLE_COST):
        pair.say(ContentType.HANDSHAKE, UPDATE)
        assert pair.read() == b""
    pair.say(ContentType.HANDSHAKE, UPDATE)
    with pytest.raises(RecordError, match="too many"):
        pair.read()


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.ETIMEDOUT])
def test_other_errors_are_the_sockets(make: Callable[..., Pair], number: int) -> None:
    pair = make(peer=OURS, rules=KernelRules(rekey_tx=number))
    pair.take_over(rekey_records=0)
    with pytest.raises(OSError, match="does not take our next TLS key") as caught:
        pair.write(b"x")
    assert caught.value.errno == number


# What a kernel may refuse


@pytest.mark.parametrize(
    ("rules", "reason"),
    [(KernelRules(ulp=errno.ENOENT), "no TLS ULP"), (KernelRules(tx=errno.ENOPROTOOPT), "does not take a connection's TLS")],
)
def test_a_kernel_that_takes_nothing_leaves_the_connection_as_it_was(make: Callable[..., Pair], rules: KernelRules, reason: str) -> None:
    pair = make(peer=OPENSSL, rules=rules)
    with pytest.raises(KernelRefused, match=reason):
        take_over(pair.near, pair.state)
    end = End(OwnRecords(pair.state))
    pair.near.send(end.seal(b"still ours"), FLAGS)
    assert pair.peer_reads(10) == b"still ours"


def test_a_kernel_that_only_seals_ends_the_connection(make: Callable[..., Pair]) -> None:
    pair = make(peer=OPENSSL, rules=KernelRules(rx=errno.ENOMEM))
    with pytest.raises(KernelHalfway, match="does not open them"):
        take_over(pair.near, pair.state)


def test_a_kernel_that_takes_no_second_key_to_open_with(make: Callable[..., Pair]) -> None:
    pair = make(peer=OURS, rules=KernelRules(rekey_rx=errno.EBUSY))
    kernel = pair.take_over()
    pair.say(ContentType.HANDSHAKE, UPDATE)
    with pytest.raises(KernelHalfway, match="the peer's next TLS key"):
        pair.read()
    with pytest.raises(LocalError):
        kernel.export()


def test_the_first_refusal_turns_it_off_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    switch = KernelSwitch(True)
    for _ in range(3):
        switch.turn_off(KernelRefused("no"))
    assert not switch.is_on
    assert len(caplog.records) == 1


# The rehearsal


def rehearsed(rules: KernelRules, cipher: str = CIPHERS[0]) -> KernelSocket:
    near, far = tcp_pair()
    with far, KernelSocket(near, rules) as sock:
        kernel_tls.rehearse_on(sock, far, cipher)
    return sock


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_good_kernel_passes_through_three_keys_each_way(cipher: str) -> None:
    assert rehearsed(KernelRules(), cipher).rekeys == 4


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (KernelRules(ulp=errno.ENOENT), "no TLS ULP"),
        (KernelRules(rx=errno.ENOMEM), "does not open them"),
        (KernelRules(rekey_rx=errno.EBUSY), "the peer's next TLS key"),
        (KernelRules(flaw=1), "does not open"),
    ],
)
def test_one_that_cannot_do_everything_is_not_used(rules: KernelRules, reason: str) -> None:
    with pytest.raises(KernelRefused, match=reason):
        rehearsed(rules)


def test_one_that_takes_no_second_key_to_seal_with() -> None:
    """Linux before 6.14. `rehearse` makes KernelRefused of it, as of every error of a socket."""
    with pytest.raises(OSError, match="our next TLS key"):
        rehearsed(KernelRules(rekey_tx=errno.EBUSY))


def test_this_machines_kernel() -> None:
    """The one test here that no fake answers: the kernel's TLS against our own records, with KeyUpdates in both directions."""
    near, far = tcp_pair()
    with near, far:
        try:
            near.setsockopt(socket.IPPROTO_TCP, kernel_tls.TCP_ULP, b"tls")
        except FileNotFoundError:
            with pytest.raises(KernelRefused, match="no TLS ULP"):
                kernel_tls.rehearse()
            pytest.skip("this kernel has no TLS ULP: kernel TLS is tested against the kit's fake of its system calls only")
    try:
        kernel_tls.rehearse()
    except KernelRefused as refused:
        # Anything else than missing KeyUpdates is ours to mend.
        if "next TLS key" not in str(refused):
            raise
        pytest.skip("this kernel's TLS takes no second key (Linux before 6.14): it is not used")
