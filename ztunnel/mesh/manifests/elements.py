"""The elements of which policies' lists consist: texts with `*`, principals, service accounts, address blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from ztunnel.mesh.addresses import parse_block
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.rules import Cidr, ServiceAccountMatch, StringKind, StringMatch

_Value = TypeVar("_Value")


def some(place: Field) -> list[Field]:
    """The items of a list that is there: at least one, for an empty one would mean no limit at all."""
    items = place.items()
    if not items:
        raise place.error("an empty list: name at least one, or leave the field out")
    return items


def each(place: Field, read: Callable[[Field], _Value]) -> tuple[_Value, ...]:
    """What each item of a list is read as, without repetitions; nothing for a list that is absent."""
    return () if place.absent else tuple(_unique(read(item) for item in some(place)))


def _unique(values: Iterator[_Value]) -> dict[_Value, None]:
    return dict.fromkeys(values)


def string(place: Field) -> StringMatch:
    """An exact text, `p*`, `*s` or `*`."""
    text = place.text()
    if text == "*":
        return StringMatch(StringKind.PRESENCE)
    if text.startswith("*") and "*" not in text[1:]:
        return StringMatch(StringKind.SUFFIX, text[1:])
    if text.endswith("*") and "*" not in text[:-1]:
        return StringMatch(StringKind.PREFIX, text[:-1])
    if "*" in text:
        raise place.wrong("* may only be the first or the last character")
    return StringMatch(StringKind.EXACT, text)


def principal(place: Field) -> StringMatch:
    """As `string`, in the form `<trust domain>/ns/<namespace>/sa/<service account>`."""
    if place.text().startswith("spiffe://"):
        raise place.wrong("principals are written without spiffe://")
    return string(place)


def account(place: Field, namespace: str) -> ServiceAccountMatch:
    """`namespace/name`, or a name in the policy's own namespace."""
    text = place.text()
    if "*" in text:
        raise place.wrong("a service account, without *")
    first, slash, rest = text.partition("/")
    if not slash:
        return ServiceAccountMatch(namespace, place.instead(text).name())
    return ServiceAccountMatch(place.instead(first).namespace(), place.instead(rest).name())


def block(place: Field) -> Cidr:
    """An address or a block of addresses."""
    found = parse_block(place.text())
    if found is None:
        raise place.wrong("not an address block")
    return found
