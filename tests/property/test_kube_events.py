"""Whatever stands in the lines of a watch: it is taken, or refused as the API server's mistake; nothing else comes of it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Self

import trio
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kit.reflected import PODS, Kept
from ztunnel.kube.client import KubeClient
from ztunnel.kube.config import Access
from ztunnel.kube.credentials import Files
from ztunnel.kube.discovery import Discovery
from ztunnel.kube.errors import KubeError
from ztunnel.kube.reflector import Reflector
from ztunnel.kube.resources import PODS as RESOURCE
from ztunnel.mesh.derive import Derivation, MeshOptions
from ztunnel.sources.kubernetes import _Objects, _Store

NAMES = st.sampled_from(["a", "b", "c"])
VERSIONS = st.integers(1, 99).map(str)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["10.0.0.1", "ambient"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
METADATA = st.fixed_dictionaries(
    {"name": NAMES | ODD, "resourceVersion": VERSIONS | ODD}, optional={"namespace": NAMES | ODD, "labels": ODD}
)
OBJECTS = st.fixed_dictionaries(
    {"metadata": METADATA | ODD},
    optional={"spec": ODD, "status": ODD, "kind": st.just("Pod") | ODD, "apiVersion": st.just("v1") | ODD, "code": ODD, "message": ODD},
)
KINDS = st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"])
EVENTS = st.fixed_dictionaries({"type": KINDS | ODD, "object": OBJECTS | ODD})
LINES = st.lists(EVENTS.map(lambda event: json.dumps(event).encode()) | st.binary(max_size=40), max_size=8)


class Given:
    """An async iterator that needs no closing."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = iter(lines)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            return next(self._lines)
        except StopIteration:
            raise StopAsyncIteration from None


@given(LINES, st.booleans())
@example([b'{"type":"ERROR","object":{"code":' + b"9" * 5000 + b',"message":' + b"9" * 5000 + b"}}"], False)
@example([b'{"type":"ADDED","object":{"metadata":{"name":"\\ud800","resourceVersion":"1"}}}'], False)
def test_any_lines(lines: list[bytes], whole: bool) -> None:
    kept = Kept()
    client = KubeClient(Access("http://nowhere", Files()))
    reflector = Reflector(client, Discovery(client), PODS, kept)

    async def take() -> None:
        step = reflector._take_whole if whole else reflector._take
        with suppress(KubeError):
            await step(RESOURCE, Given(lines))

    trio.run(take)


@given(st.lists(OBJECTS, max_size=6))
def test_any_objects_in_a_mesh(bodies: list[dict[str, object]]) -> None:
    objects = _Objects()
    store = _Store(PODS, objects)
    client = KubeClient(Access("http://nowhere", Files()))
    reflector = Reflector(client, Discovery(client), PODS, store)
    lines = [json.dumps({"type": "ADDED", "object": body}).encode() for body in bodies]

    async def take() -> None:
        for line in lines:
            with suppress(KubeError):
                await reflector._take(RESOURCE, Given([line]))

    trio.run(take)
    Derivation(MeshOptions()).update(objects.take())
    assert set(store.keys.values()) >= objects.in_force.keys()
