"""Our records against OpenSSL's, for any data, any cut of the wire, any damage and any nonsense under a good key."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kit.tls import CIPHERS, End, handshakes, joined
from ztunnel.hbone.records import MAX_FRAGMENT, MAX_OPENED, AlertReceived, RecordError, RecordState
from ztunnel.hbone.records_own import OwnRecords, fresh_state

PAIRINGS = [(True, True), (True, False), (False, True), (False, False)]
HANDSHAKE, DATA = 22, 23

sizes = st.one_of(st.integers(0, 300), st.sampled_from([0, 1, 16383, 16384, 16385, 32768, 32769]), st.integers(0, 70_000))
messages = st.lists(st.tuples(st.booleans(), sizes, st.integers(0, 255), st.booleans()), max_size=6)
"""From the client?, size, filler, a key update before it?"""
chunks = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 40_000)), max_size=60)


def plain_of(size: int, filler: int) -> bytes:
    return (bytes((filler + i * 31) & 0xFF for i in range(251)) * (size // 251 + 1))[:size]


def update(end: End, *, ask: bool) -> bytes:
    """A KeyUpdate of our side, as its limit would send it, or one that asks for an answer, as our side never does."""
    layer = end.records
    assert isinstance(layer, OwnRecords)
    if not ask:
        return layer._key_update()
    wire = layer._control(HANDSHAKE, b"\x18\x00\x00\x01\x01")
    layer._tx.update()
    return wire


def move(end: End) -> None:
    """Replace a record layer of ours by one that carries on from its state, as another process would."""
    if isinstance(end.records, OwnRecords):
        state = end.records.export()
        end.records = OwnRecords(replace(state))


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("own", PAIRINGS, ids=lambda own: "/".join("own" if side else "openssl" for side in own))
@given(messages=messages, cuts=chunks, asks=st.booleans(), moves=st.booleans())
@example(messages=[(True, 300, 7, True), (False, 300, 9, True), (True, 1, 0, False)], cuts=[1] * 1000, asks=True, moves=True)
@example(messages=[(True, 16385, 1, True), (True, 0, 1, True), (False, 16384, 2, True)], cuts=[5, 16400], asks=False, moves=True)
def test_any_pair_carries_any_data(
    own: tuple[bool, bool], cipher: str, messages: list[tuple[bool, int, int, bool]], cuts: list[int], asks: bool, moves: bool
) -> None:
    client, server = joined(own, cipher)
    sent = {True: b"", False: b""}
    for from_client, size, filler, updates in messages:
        sender, receiver = (client, server) if from_client else (server, client)
        plain = plain_of(size, filler)
        wire = sender.records.pending()
        if updates and isinstance(sender.records, OwnRecords):
            wire += update(sender, ask=asks)
        wire += sender.seal(plain)
        if moves:
            move(sender)
        at = 0
        for cut in cuts:
            receiver.receive(wire[at : at + cut])
            at += cut
            if moves and cut % 7 == 0:
                move(receiver)
        receiver.receive(wire[at:])
        sent[from_client] += plain
    assert server.plain == sent[True]
    assert client.plain == sent[False]


def wires(own: bool) -> tuple[bytes, bytes, End]:
    """Some plaintext, its records with a KeyUpdate among them, and a fresh receiver that has to open them."""
    client, server = joined((True, own))
    plain = b"abc" + bytes(200) + b"d" * 20_000
    wire = client.seal(plain[:3]) + client.seal(plain[3:203]) + update(client, ask=False) + client.seal(plain[203:])
    return plain, wire, server


@pytest.mark.parametrize("own", [True, False], ids=["own", "openssl"])
@given(data=st.data())
def test_damage_is_noticed_or_leaves_a_prefix(own: bool, data: st.DataObject) -> None:
    plain, wire, server = wires(own)
    at = data.draw(st.integers(0, len(wire) - 1))
    kind = data.draw(st.sampled_from(["flip", "insert", "delete", "cut", "swap"]))
    some = data.draw(st.binary(min_size=1, max_size=20))
    damaged = {
        "flip": wire[:at] + bytes([wire[at] ^ (some[0] or 1)]) + wire[at + 1 :],
        "insert": wire[:at] + some + wire[at:],
        "delete": wire[:at] + wire[at + len(some) :],
        "cut": wire[:at],
        "swap": wire[at:] + wire[:at],
    }[kind]
    try:
        server.feed(damaged, data.draw(chunks))
    except RecordError:
        pass
    assert plain.startswith(bytes(server.plain))
    if kind == "flip":
        assert server.plain != plain


@given(noise=st.binary(max_size=200), header=st.sampled_from([b"", b"\x17\x03\x03\x00\x20", b"\x17\x03\x03", b"\x15\x03\x03\x00\x02"]))
def test_noise_is_refused_or_waits(noise: bytes, header: bytes) -> None:
    for own in (True, False):
        server = joined((True, own))[1]
        alert = b""
        try:
            server.receive(header + noise)
        except RecordError as error:
            alert = server.records.alert(error)
        assert len(alert) < 60
        assert not server.plain


def forge(layer: OwnRecords, content: bytes, kind: int, padding: int) -> bytes:
    """A record of any type, with zeros after the type."""
    return layer._control(0, content + bytes([kind]) + bytes(padding - 1)) if padding else layer._control(kind, content)


inner = st.tuples(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"\x18\x00\x00\x01\x00", b"\x18\x00\x00\x01\x01", b"\x04\x00\x00\x01", b"\x01\x00", b"\x02\x28", b"\x01\x5a"]),
        st.integers(MAX_FRAGMENT - 1, MAX_OPENED).map(bytes),
    ),
    st.one_of(st.sampled_from([DATA, HANDSHAKE, 21]), st.integers(0, 255)),
    st.integers(0, 20),
)


@given(records=st.lists(inner, min_size=1, max_size=5), cut=st.integers(1, 100))
def test_nonsense_under_a_good_key_is_never_more_than_a_record_error(records: list[tuple[bytes, int, int]], cut: int) -> None:
    """A peer that holds the keys and seals anything as anything: one cut and any other give the same outcome."""
    outcomes: set[tuple[int | None, bool]] = set()
    for chunk in (cut, 1 << 20):
        client, server = joined((True, True))
        wire = b""
        assert isinstance(client.records, OwnRecords)
        for content, kind, padding in records:
            wire += forge(client.records, content, kind, padding)
        try:
            server.feed(wire, [chunk] * 50)
            outcomes.add((None, server.records.peer_closed))
        except RecordError as error:
            outcomes.add((error.alert, isinstance(error, AlertReceived)))
    assert len(outcomes) == 1


@given(records=st.lists(inner, min_size=1, max_size=4))
def test_ours_accepts_nothing_that_openssl_refuses(records: list[tuple[bytes, int, int]]) -> None:
    """The same nonsense, under the same keys, for OpenSSL and for a copy of ours."""
    client_side, server_side = handshakes((True, False))
    secrets = server_side._proof.secrets
    state = fresh_state(
        server=True,
        cipher=CIPHERS[0],
        client_secret=secrets[b"CLIENT_TRAFFIC_SECRET_0"],
        server_secret=secrets[b"SERVER_TRAFFIC_SECRET_0"],
        tx_seq=server_side._sealed,
    )
    ours = End(OwnRecords(state))
    theirs = End(*server_side.finish())
    forger = client_side.finish()[0]
    assert isinstance(forger, OwnRecords)
    for content, kind, padding in records:
        wire = forge(forger, content, kind, padding)
        refused = []
        for end in (ours, theirs):
            try:
                end.receive(wire)
                refused.append(False)
            except RecordError:
                refused.append(True)
        assert refused[0] or not refused[1], (content, kind, padding)
        if any(refused) or kind == HANDSHAKE or ours.records.peer_closed:
            break
        assert ours.plain == theirs.plain


@given(data=st.binary(max_size=300), room=st.integers(MAX_OPENED, MAX_OPENED + 50))
def test_a_state_survives_its_fields(data: bytes, room: int) -> None:
    client, server = joined((True, True))
    server.receive(client.seal(data))
    state = server.records.export()
    copy = RecordState(**{name: getattr(state, name) for name in RecordState.__slots__})
    assert OwnRecords(copy).export() == state
    end = End(OwnRecords(copy), room=room)
    end.receive(client.seal(data))
    assert end.plain == data
