"""Who gets in, who does not, and what the operator and the peer are told: both ends are ours, joined in memory."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from OpenSSL import SSL

from tests.kit.pki import DAY, FakePki
from tests.kit.tls import CIPHERS, End, contexts, greet
from ztunnel.hbone import handshake
from ztunnel.hbone.handshake import MAX_HANDSHAKE_BYTES, BadCredentials, Credentials, Handshake, HandshakeError, TlsContexts
from ztunnel.hbone.records_openssl import OpensslRecords
from ztunnel.hbone.records_own import OwnRecords
from ztunnel.mesh.errors import Flag, UntrustedPeer
from ztunnel.mesh.identity import SpiffeId

PKI = FakePki()
OTHER = FakePki("other.example")
CLIENT, SERVER = PKI.identity("client"), PKI.identity("server")
GOOD_CLIENT, GOOD_SERVER = TlsContexts(PKI.credentials(CLIENT)), TlsContexts(PKI.credentials(SERVER))


def pair(
    client: Credentials | TlsContexts = GOOD_CLIENT,
    server: Credentials | TlsContexts = GOOD_SERVER,
    expected: frozenset[SpiffeId] = frozenset({SERVER}),
) -> tuple[Handshake, Handshake]:
    client = client if isinstance(client, TlsContexts) else TlsContexts(client)
    server = server if isinstance(server, TlsContexts) else TlsContexts(server)
    return (
        Handshake(client, server=False, expected=expected, own_records=True),
        Handshake(server, server=True, expected=None, own_records=True),
    )


def raw(credentials: Credentials, method: int) -> SSL.Context:
    """A context without the checks and the ALPN of `TlsContexts`: what another, perhaps hostile, implementation has."""
    chain = x509.load_pem_x509_certificates(credentials.chain_pem)
    key = load_pem_private_key(credentials.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return handshake._context(method, chain, key, x509.load_pem_x509_certificates(credentials.roots_pem))


def forged(credentials: Credentials) -> TlsContexts:
    """Contexts of credentials that `TlsContexts` itself would refuse to hold, with the ALPN that everybody expects."""
    made = TlsContexts(PKI.credentials(credentials.identity))
    made.client, made.server = raw(credentials, SSL.TLS_CLIENT_METHOD), raw(credentials, SSL.TLS_SERVER_METHOD)
    made.client.set_alpn_protos([b"h2"])
    made.server.set_alpn_select_callback(lambda _tls, _offered: b"h2")
    return made


# Acceptance


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_two_workloads_of_one_mesh_meet(cipher: str, chunk: int) -> None:
    pki = FakePki()
    client = contexts(pki.credentials(CLIENT), cipher)
    server = contexts(pki.credentials(SERVER))
    ours, theirs = pair(client, server)
    greet(ours, theirs, chunk=chunk)
    assert (ours.done, theirs.done) == (True, True)
    assert (ours.peer, theirs.peer) == (SERVER, CLIENT)
    assert ours.not_after == theirs.not_after == min(client.not_after, server.not_after)
    records, leftover = theirs.finish()
    assert records.export().cipher == cipher
    assert leftover == b""


def test_128_bits_are_preferred_by_both() -> None:
    ours, theirs = pair()
    greet(ours, theirs)
    assert ours.finish()[0].export().cipher == theirs.finish()[0].export().cipher == CIPHERS[0]


def test_a_client_accepts_any_name_of_the_certificate_that_is_expected() -> None:
    uris = ("https://elsewhere", "spiffe://cluster.local/ns/x/sa/first", SERVER.uri)
    ours, theirs = pair(server=PKI.credentials(SERVER, uris=uris), expected=frozenset({PKI.identity("another"), SERVER}))
    greet(ours, theirs)
    assert ours.peer == SERVER


def test_a_server_takes_the_first_name_that_is_a_spiffe_identity() -> None:
    uris = ("spiffe://cluster.local/short", CLIENT.uri, "spiffe://other.example/ns/a/sa/b")
    ours, theirs = pair(client=PKI.credentials(CLIENT, uris=uris))
    greet(ours, theirs)
    assert theirs.peer == CLIENT


def test_a_certificate_without_extended_key_usage_serves_both_sides() -> None:
    ours, theirs = pair(client=PKI.credentials(CLIENT, usages=()), server=PKI.credentials(SERVER, usages=()))
    greet(ours, theirs)
    assert (ours.done, theirs.done) == (True, True)


def test_a_certificate_without_basic_constraints_is_no_authority() -> None:
    ours, theirs = pair(client=PKI.credentials(CLIENT, authority=None))
    greet(ours, theirs)
    assert theirs.done


def test_every_root_of_the_root_set_is_an_anchor() -> None:
    old, new = FakePki(), FakePki()
    both = old.root_pem + new.root_pem
    for client, server in ((old, new), (new, old)):
        ours, theirs = pair(client.credentials(CLIENT, roots_pem=both), server.credentials(SERVER, roots_pem=both))
        greet(ours, theirs)
        assert (ours.done, theirs.done) == (True, True)


def test_the_client_that_offers_no_alpn_is_accepted() -> None:
    client = TlsContexts(PKI.credentials(CLIENT))
    client.client = raw(PKI.credentials(CLIENT), SSL.TLS_CLIENT_METHOD)
    ours, theirs = pair(client)
    greet(ours, theirs)
    assert theirs.done


def test_a_server_that_selects_no_alpn_is_accepted() -> None:
    server = TlsContexts(PKI.credentials(SERVER))
    server.server = raw(PKI.credentials(SERVER), SSL.TLS_SERVER_METHOD)
    ours, theirs = pair(server=server)
    greet(ours, theirs)
    assert ours.done


# What comes out


@pytest.mark.parametrize("own", [True, False])
def test_bytes_after_the_last_flight_are_kept(own: bool) -> None:
    ours, theirs = (Handshake(GOOD_CLIENT, server=False, expected=frozenset({SERVER}), own_records=own), pair()[1])
    theirs.receive(ours.outgoing())
    ours.receive(theirs.outgoing())
    last = ours.outgoing()
    records, leftover = ours.finish()
    client = End(records, leftover)
    early = client.seal(b"GET out")
    theirs.receive(last + early)
    tickets = theirs.outgoing()
    layer, leftover = theirs.finish()
    assert leftover == early
    server = End(layer, leftover)
    assert server.plain == b"GET out"
    client.receive(tickets + server.seal(b"tickets are counted"))
    assert client.plain == b"tickets are counted"
    assert isinstance(records, OwnRecords if own else OpensslRecords)


def test_parsed_certificates_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "MAX_REMEMBERED_LEAVES", 2)
    server = TlsContexts(PKI.credentials(SERVER))
    for name in ("a", "b", "a", "c", "d"):
        ours, theirs = pair(PKI.credentials(PKI.identity(name)), server)
        greet(ours, theirs)
        assert theirs.peer == PKI.identity(name)
    assert len(server.leaves._read) == 2


def test_a_remembered_certificate_is_judged_anew() -> None:
    client = TlsContexts(PKI.credentials(CLIENT))
    greet(*pair(client))
    ours, theirs = pair(client, expected=frozenset({PKI.identity("another")}))
    with pytest.raises(UntrustedPeer):
        greet(ours, theirs)


# Refusals: by the client


@pytest.mark.parametrize(
    ("server", "error", "text"),
    [
        (PKI.expired(SERVER), HandshakeError, "has expired"),
        (PKI.credentials(SERVER, valid=(DAY / 2, DAY)), HandshakeError, "not valid yet"),
        (PKI.wrong_usage(server=True, identity=SERVER), HandshakeError, "extended key usage"),
        (PKI.foreign_root(SERVER), HandshakeError, "our roots"),
        (OTHER.credentials(OTHER.identity("server"), roots_pem=PKI.root_pem), HandshakeError, "not among our roots"),
        (PKI.credentials(PKI.identity("imposter")), UntrustedPeer, f"expected SAN ({SERVER}), got {PKI.identity('imposter')}"),
        (PKI.credentials(OTHER.identity("server")), UntrustedPeer, "got spiffe://other.example"),
        (PKI.without_san(SERVER), UntrustedPeer, "got no SPIFFE name"),
        (PKI.credentials(SERVER, uris=("spiffe://cluster.local/ns/default/sa/SERVER",)), UntrustedPeer, "got no SPIFFE name"),
        (PKI.credentials(SERVER, authority=True), UntrustedPeer, "a CA's"),
    ],
    ids=["expired", "early", "usage", "foreign", "other-mesh", "imposter", "trust-domain", "no-san", "bad-san", "authority"],
)
def test_a_client_refuses_the_server_before_it_shows_itself(server: Credentials, error: type[Exception], text: str) -> None:
    ours, theirs = pair(server=forged(server))
    theirs.receive(ours.outgoing())
    with pytest.raises(error) as caught:
        ours.receive(theirs.outgoing())
    assert text in str(caught.value)
    alert = ours.outgoing()
    assert len(alert) < 60, "neither certificate nor Finished"
    with pytest.raises(HandshakeError, match="alert"):
        theirs.receive(alert)
    assert not theirs.done
    assert not ours.done
    with pytest.raises(HandshakeError):
        ours.receive(b"more")


def test_an_empty_set_of_expected_identities_accepts_nobody() -> None:
    ours, theirs = pair(expected=frozenset())
    with pytest.raises(UntrustedPeer, match="expected SAN"):
        greet(ours, theirs)


# Refusals: by the server


@pytest.mark.parametrize(
    ("client", "error", "text"),
    [
        (PKI.expired(CLIENT), HandshakeError, "has expired"),
        (PKI.wrong_usage(server=False, identity=CLIENT), HandshakeError, "extended key usage"),
        (PKI.foreign_root(CLIENT), HandshakeError, "our roots"),
        (PKI.credentials(OTHER.identity("client")), UntrustedPeer, "expected trust domain cluster.local, got spiffe://other.example"),
        (
            PKI.credentials(CLIENT, uris=("spiffe://other.example/ns/a/sa/b", CLIENT.uri)),
            UntrustedPeer,
            "expected trust domain cluster.local",
        ),
        (PKI.without_san(CLIENT), UntrustedPeer, "got no SPIFFE name"),
        (PKI.credentials(CLIENT, authority=True), UntrustedPeer, "a CA's"),
        # registeredID, a name of a kind that nobody reads (x400Address), and what is not even a sequence
        (PKI.credentials(CLIENT, san_der=bytes.fromhex("300488022a03")), UntrustedPeer, "got no SPIFFE name"),
        (PKI.credentials(CLIENT, san_der=bytes.fromhex("3004a3023000")), (UntrustedPeer, HandshakeError), ""),
        (PKI.credentials(CLIENT, san_der=b"\x02\x01\x00"), (UntrustedPeer, HandshakeError), ""),
        (PKI.credentials(CLIENT, san_der=b"\x30\x03\x86\x01\xff"), (UntrustedPeer, HandshakeError), ""),
    ],
    ids=["expired", "usage", "foreign", "trust-domain", "second-name", "no-san", "authority", "odd", "x400", "broken", "not-ascii"],
)
def test_a_server_refuses_the_client(client: Credentials, error: type[Exception] | tuple[type[Exception], ...], text: str) -> None:
    ours, theirs = pair(client=forged(client))
    with pytest.raises(error) as caught:
        greet(ours, theirs)
    assert text in str(caught.value)
    assert isinstance(caught.value, HandshakeError | UntrustedPeer)
    assert caught.value.flag in (Flag.TLS_FAILURE, Flag.IDENTITY_ERROR)
    assert not theirs.done
    assert theirs.outgoing(), "the alert"


def test_other_application_protocols_are_refused() -> None:
    client = TlsContexts(PKI.credentials(CLIENT))
    client.client.set_alpn_protos([b"http/1.1"])
    ours, theirs = pair(client)
    with pytest.raises(HandshakeError, match="ALPN h2"):
        theirs.receive(ours.outgoing())
    with pytest.raises(HandshakeError, match="no_application_protocol"):
        ours.receive(theirs.outgoing())


def test_a_server_that_selects_what_was_not_offered_is_refused() -> None:
    server = TlsContexts(PKI.credentials(SERVER))
    server.server.set_alpn_select_callback(lambda _tls, _offered: b"http/1.1")
    ours, theirs = pair(server=server)
    with pytest.raises(HandshakeError):
        greet(ours, theirs)


# Hostile bytes


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (b"\x16\x03\x01\xff\xff" + bytes(100), "."),
        (b"\x17\x03\x03\x00\x20" + bytes(32), "."),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", "."),
        (bytes(200), "."),
    ],
)
def test_what_is_no_client_hello_is_refused(data: bytes, text: str) -> None:
    theirs = pair()[1]
    with pytest.raises(HandshakeError, match=text):
        theirs.receive(data)


def test_a_handshake_that_does_not_end_is_cut_off() -> None:
    endless = PKI.credentials(SERVER)
    ours, theirs = pair(server=replace(endless, chain_pem=endless.chain_pem + PKI.root_pem * 200))
    theirs.receive(ours.outgoing())
    flight = theirs.outgoing()
    assert len(flight) > MAX_HANDSHAKE_BYTES
    with pytest.raises(HandshakeError, match=f"more than {MAX_HANDSHAKE_BYTES} bytes"):
        ours.receive(flight)
    with pytest.raises(HandshakeError, match="after the end"):
        ours.receive(b"more")


def test_trickled_change_cipher_specs_do_not_go_on_for_ever() -> None:
    ours, theirs = pair()
    theirs.receive(ours.outgoing())
    ours.receive(theirs.outgoing()[:-1])
    with pytest.raises(HandshakeError):
        ours.receive(b"\x14\x03\x03\x00\x01\x01" * MAX_HANDSHAKE_BYTES)


# Our own mistakes


def test_expectations_belong_to_clients() -> None:
    with pytest.raises(ValueError, match="expects"):
        Handshake(GOOD_SERVER, server=True, expected=frozenset({CLIENT}), own_records=True)
    with pytest.raises(ValueError, match="expects"):
        Handshake(GOOD_CLIENT, server=False, expected=None, own_records=True)


def _ed25519_pem() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    "credentials",
    [
        replace(PKI.credentials(SERVER), key_pem=PKI.credentials(SERVER).key_pem),
        replace(PKI.credentials(SERVER), key_pem=b"nonsense"),
        replace(PKI.credentials(SERVER), key_pem=_ed25519_pem()),
        replace(PKI.credentials(SERVER), chain_pem=b""),
        replace(PKI.credentials(SERVER), roots_pem=b""),
        replace(PKI.credentials(SERVER), identity=CLIENT),
        PKI.without_san(SERVER),
    ],
    ids=["other-key", "no-key", "odd-key", "no-chain", "no-roots", "other-name", "no-name"],
)
def test_credentials_that_do_not_fit_together_are_refused(credentials: Credentials) -> None:
    with pytest.raises(BadCredentials):
        TlsContexts(credentials)


def test_keys_stay_out_of_texts() -> None:
    credentials = PKI.credentials(SERVER, valid=(-DAY, timedelta(hours=1)))
    assert "KEY" not in repr(credentials)
    assert str(SERVER) in repr(credentials)
