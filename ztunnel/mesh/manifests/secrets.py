"""Secret and ConfigMap: certificates, keys and roots that TLS names.

Only entries with these are kept of a Secret, and none is ever shown.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, field

from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata

CERTIFICATE, KEY, ROOTS = "tls.crt", "tls.key", "ca.crt"
_NAMES = {CERTIFICATE: CERTIFICATE, "cert": CERTIFICATE, KEY: KEY, "key": KEY, ROOTS: ROOTS, "cacert": ROOTS}
"""Istio's generic secrets have other names for the same."""
_MOST_BYTES = 1024 * 1024
_PEM = b"-----BEGIN "


@dataclass(frozen=True, slots=True)
class SecretObject:
    """A Secret's certificates: PEM by `tls.crt`, `tls.key`, `ca.crt`."""

    metadata: Metadata
    entries: dict[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class ConfigMapObject:
    """A ConfigMap's roots (`ca.crt`), and its texts, which mean something to those who know its name."""

    metadata: Metadata
    texts: dict[str, str] = field(default_factory=dict, repr=False)


def read_secret(document: Field) -> SecretObject:
    """A Secret.

    Raises:
        ManifestError: entries of the wrong type; the text never shows one.
    """
    entries: dict[str, bytes] = {}
    readers: tuple[tuple[str, Callable[[Field], bytes]], ...] = (("data", _decoded), ("stringData", _plain))
    for member, read in readers:
        for name, place in document.get(member).texts():
            if name in _NAMES:
                entries[_NAMES[name]] = read(place)
    return SecretObject(read_metadata(document), entries)


def read_config_map(document: Field) -> ConfigMapObject:
    """A ConfigMap."""
    texts = {name: place.value for name, place in document.get("data").texts() if isinstance(place.value, str)}
    return ConfigMapObject(read_metadata(document), texts)


def is_pem(content: bytes) -> bool:
    """Whether it looks like PEM."""
    return _PEM in content


def _decoded(place: Field) -> bytes:
    if not isinstance(place.value, str) or len(place.value) > 2 * _MOST_BYTES:
        raise place.error("not base64 text of at most a megabyte")
    try:
        return base64.b64decode(place.value, validate=True)
    except (binascii.Error, ValueError):
        raise place.error("not base64") from None


def _plain(place: Field) -> bytes:
    if not isinstance(place.value, str) or len(place.value) > _MOST_BYTES or not place.value.isascii():
        raise place.error("not text of at most a megabyte")
    return place.value.encode()
