"""Hosts as Istio's networking kinds name them, and how far they are visible."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

from ztunnel.mesh.manifests.fields import Field

_Value = TypeVar("_Value")
_HOST = re.compile(r"\*|(?:\*\.|\*-)?[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_])?")


def read_host(place: Field) -> str:
    """A host: a DNS name, a short name of a Service, or one with a wildcard in front; lower-case."""
    text = place.text().lower()
    if not _HOST.fullmatch(text):
        raise place.wrong("not a host")
    return text


def read_export_to(place: Field) -> tuple[str, ...]:
    """`exportTo`: `*`, `.`, `~` or namespaces; empty for everybody."""
    return tuple(item.text() if item.value in ("*", ".", "~") else item.namespace() for item in place.items())


def is_visible(export_to: Iterable[str], own: str, namespace: str) -> bool:
    """Whether an object of the namespace `own` is visible in `namespace`."""
    listed = tuple(export_to)
    return not listed or "*" in listed or namespace in listed or ("." in listed and own == namespace)


def expand(host: str, namespace: str, domain: str) -> str:
    """The full name of a short one, which means a Service of the object's own namespace."""
    return host if "." in host or host.startswith("*") else f"{host}.{namespace}.svc.{domain}"


def covers(pattern: str, host: str) -> bool:
    """Whether a host with or without a wildcard in front is, or includes, another."""
    return pattern == host or (pattern.startswith("*") and host.removeprefix("*").endswith(pattern[1:]) and len(host) >= len(pattern))


def specificity(pattern: str) -> tuple[bool, int]:
    """Sorts the more specific first: a name before wildcards, longer wildcards before shorter ones."""
    return pattern.startswith("*"), -len(pattern)


class ByHost(Generic[_Value]):
    """Values by the hosts that they are for, wildcards included; finding costs what it finds, and as much as there are wildcards."""

    def __init__(self) -> None:
        self._exact: dict[str, list[tuple[str, int, _Value]]] = {}
        self._wild: list[tuple[str, int, _Value]] = []
        self._count = 0

    def add(self, host: str, value: _Value) -> None:
        """One value for one host."""
        place = self._wild if host.startswith("*") else self._exact.setdefault(host, [])
        place.append((host, self._count, value))
        self._count += 1

    def covering(self, hostname: str) -> list[tuple[str, _Value]]:
        """(host, value) of what covers a name, in the order in which it was added."""
        wild = [each for each in self._wild if covers(each[0], hostname)]
        found = sorted((*self._exact.get(hostname, ()), *wild), key=lambda each: each[1])
        return [(host, value) for host, _, value in found]
