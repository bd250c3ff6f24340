"""Certificates, keys and roots out of Secrets and ConfigMaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.secrets import CERTIFICATE, KEY, ROOTS, ConfigMapObject, SecretObject, is_pem

CA_SUFFIX = "-cacert"
"""Istio keeps the roots for clients of `NAME` in a Secret `NAME-cacert` where they are not in `NAME` itself."""


@dataclass(frozen=True, slots=True)
class Credential:
    """What a Secret holds, PEM; empty where it has none."""

    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    roots: bytes = b""


class Credentials:
    """The Secrets and ConfigMaps of one namespace."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject], namespace: str) -> None:
        self._objects = objects
        self._namespace = namespace

    def secret(self, name: str) -> Credential | str:
        """A Secret with certificates, or why there is none."""
        found = self._objects.get(ObjectKey("Secret", self._namespace, name))
        if not isinstance(found, SecretObject):
            return f"Secret {self._namespace}/{name} is not there"
        entries = dict(found.entries)
        if ROOTS not in entries:
            beside = self._objects.get(ObjectKey("Secret", self._namespace, name + CA_SUFFIX))
            entries |= {ROOTS: beside.entries[ROOTS]} if isinstance(beside, SecretObject) and ROOTS in beside.entries else {}
        if not entries:
            return f"Secret {self._namespace}/{name} has no certificates"
        for entry, content in entries.items():
            if not is_pem(content):
                return f"Secret {self._namespace}/{name}: {entry} is not PEM"
        return Credential(entries.get(CERTIFICATE, b""), entries.get(KEY, b""), entries.get(ROOTS, b""))

    def roots(self, kind: str, name: str) -> bytes | str:
        """The roots (`ca.crt`) in a ConfigMap or Secret, or why there are none."""
        found = self._objects.get(ObjectKey(kind, self._namespace, name))
        content = b""
        if isinstance(found, ConfigMapObject):
            content = found.texts.get(ROOTS, "").encode()
        elif isinstance(found, SecretObject):
            content = found.entries.get(ROOTS, b"")
        else:
            return f"{kind} {self._namespace}/{name} is not there"
        return content if is_pem(content) else f"{kind} {self._namespace}/{name} has no certificates in {ROOTS}"
