"""Which root signs, which comes next, and which are still trusted: what the replicas of an authority agree on. Pure.

A root is replaced in three steps, each of them safe on its own. *Announced*: the next root is in the trust bundle, the present one goes on
signing. *Signing*: once every peer has had time to learn of it, the next root signs. *Former*: the one before stays in the bundle for as
long as a certificate of its can live. A step is taken when somebody wishes for it (a new word in an annotation; the same word twice is one
wish), or when four fifths of a root's life are over.

The state is one JSON document, kept where replicas can change it only if nobody else just did.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ztunnel.ca.files import RootError
from ztunnel.ca.root import Root, key_pem_of, new_root

LIFE_USED = 0.8
"""Part of a root's life after which its successor is announced unasked."""
RETIRE_MARGIN_SECONDS = 3600.0
"""A former root is trusted for this long after its last certificate has expired: clocks differ, bundles take their time."""
MAX_FORMER = 16

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Next:
    """A root that is announced and does not sign yet."""

    root: Root
    announced: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Former:
    """A certificate that does not sign any more. Its key is gone."""

    certificate_pem: bytes
    until: float
    """Trusted until then; seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Succession:
    """The state."""

    signing: Root
    following: Next | None = None
    former: tuple[Former, ...] = ()
    obeyed: str = ""
    """The last wish that was taken up."""

    @property
    def bundle_pem(self) -> bytes:
        """Every root that peers are to trust, the signing one first."""
        roots = [self.signing.pem]
        if self.following is not None:
            roots.append(self.following.root.pem)
        return b"".join([*roots, *(former.certificate_pem for former in self.former)])

    @property
    def authority(self) -> Root:
        """What signs now, with the whole bundle as its roots."""
        return replace(self.signing, anchors_pem=self.bundle_pem)

    def dump(self) -> bytes:
        """The document."""
        document: dict[str, object] = {
            "version": _VERSION,
            "trustDomain": self.signing.trust_domain,
            "obeyed": self.obeyed,
            "signing": _dump_root(self.signing),
            "former": [{"certificate": former.certificate_pem.decode(), "until": former.until} for former in self.former],
        }
        if self.following is not None:
            document["following"] = {**_dump_root(self.following.root), "announced": self.following.announced}
        return json.dumps(document, indent=1).encode()

    @classmethod
    def parse(cls, document: bytes, trust_domain: str) -> Self:
        """The state that a document holds.

        Raises:
            RootError: it does not; a person decides what becomes of it, since a root that is made anew cuts off everybody.
        """
        try:
            found = json.loads(document)
            if found["version"] != _VERSION:
                raise RootError(f"the state's version is {found['version']!r}; this program knows {_VERSION}")
            if found["trustDomain"] != trust_domain:
                raise RootError(f"the state is of trust domain {found['trustDomain']!r}, but trust_domain is {trust_domain}")
            following = found.get("following")
            return cls(
                signing=_parse_root(found["signing"], trust_domain),
                following=Next(_parse_root(following, trust_domain), float(following["announced"])) if following else None,
                former=tuple(Former(_checked_pem(each["certificate"]), float(each["until"])) for each in found["former"]),
                obeyed=str(found["obeyed"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RootError(f"the state of the authority cannot be read: {type(error).__name__} {error}") from error


@dataclass(frozen=True, slots=True)
class Periods:
    """Times that a succession keeps, in seconds."""

    spread: float
    """From announcement to signing: how long the slowest peer may take to learn of a root."""
    leaf: float
    """Longest life of a certificate."""


def begin(trust_domain: str, now: float, wish: str) -> Succession:
    """The first root. A wish that is already there is fulfilled by it."""
    return Succession(new_root(trust_domain, now), obeyed=wish)


def advance(state: Succession, wish: str, now: float, periods: Periods) -> Succession:
    """The state as it should be now; the very same object if nothing is to be done."""
    former = tuple(each for each in state.former if each.until > now)
    if len(former) != len(state.former):
        state = replace(state, former=former)
    following = state.following
    if following is not None and now - following.announced >= periods.spread:
        retired = Former(state.signing.pem, now + periods.leaf + RETIRE_MARGIN_SECONDS)
        return replace(state, signing=following.root, following=None, former=(retired, *state.former)[:MAX_FORMER])
    if following is None and (_is_new(wish, state) or _is_old(state.signing, now)):
        return replace(state, following=Next(new_root(state.signing.trust_domain, now), now), obeyed=wish or state.obeyed)
    return state


def _is_new(wish: str, state: Succession) -> bool:
    return bool(wish) and wish != state.obeyed


def _is_old(root: Root, now: float) -> bool:
    start, end = (moment.timestamp() for moment in (root.certificate.not_valid_before_utc, root.certificate.not_valid_after_utc))
    return now >= start + (end - start) * LIFE_USED


def _dump_root(root: Root) -> dict[str, object]:
    return {"certificate": root.pem.decode(), "key": key_pem_of(root).decode()}


def _parse_root(found: dict[str, str], trust_domain: str) -> Root:
    certificate = x509.load_pem_x509_certificate(found["certificate"].encode())
    key = load_pem_private_key(found["key"].encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) or key.public_key() != certificate.public_key():
        raise RootError("a root of the state does not belong to its key")
    return Root(certificate, key, trust_domain)


def _checked_pem(text: str) -> bytes:
    x509.load_pem_x509_certificate(text.encode())
    return text.encode()
