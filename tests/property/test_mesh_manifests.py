"""Any value that a YAML or JSON loader can make is an object, or one ManifestError that fits on a line."""

from __future__ import annotations

from copy import deepcopy
from datetime import date, datetime

from hypothesis import example, given
from hypothesis import strategies as st

from tests.kit.builders import authentication, authorization, namespace, pod, selecting, service_manifest
from tests.kit.l7_samples import L7_SAMPLES
from ztunnel.mesh.derive import MeshOptions, derive
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.parse import KubeObject, key, key_of, parse, unpack
from ztunnel.mesh.policy import Connection, decide
from ztunnel.mesh.refused import stand_in

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.sampled_from(["", "*", "Pod", "List", "v1", "10.0.0.0/33", "ALLOW", "DENY", "STRICT", "8080", "../x", "a\nb", 10**4200, -1, 65536])
    | st.sampled_from([date(2026, 1, 1), datetime.max, datetime.min])
)
NAMES = st.sampled_from(
    ["kind", "apiVersion", "metadata", "spec", "name", "items", "rules", "from", "source", "principals", "mtls", "mode"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | SCALARS, inner, max_size=4),
    max_leaves=12,
)
SAMPLES: list[dict[str, object]] = [
    namespace("a"),
    pod(
        "a",
        "10.0.0.1",
        labels={"app": "x"},
        meta={"annotations": {"a": "b"}, "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [{"kind": "Job", "name": "x"}]},
        spec={"containers": [{"ports": [{"name": "http", "containerPort": 80}]}], "initContainers": [{"restartPolicy": "Always"}]},
    ),
    service_manifest("a", "10.1.0.1", selector={"app": "x"}, ports=[{"port": 80, "targetPort": "http", "name": "x"}]),
    authorization(
        "a",
        action="DENY",
        selector=selecting(app="x"),
        rules=[
            {
                "from": [{"source": {"principals": ["a*"], "ipBlocks": ["10.0.0.0/8"], "requestPrincipals": ["x"]}}],
                "to": [{"operation": {"ports": ["80"], "paths": ["/"]}}],
                "when": [{"key": "source.ip", "values": ["10.0.0.0/8"]}],
            }
        ],
    ),
    authorization("a", targetRefs=[{"kind": "Gateway", "name": "x"}]),
    authentication("a", "STRICT", selector=selecting(app="x"), portLevelMtls={"80": {"mode": "DISABLE"}}),
    *L7_SAMPLES,
    {"apiVersion": "v1", "kind": "List", "items": [namespace("a"), {"apiVersion": "v1", "kind": "List", "items": []}]},
]


@st.composite
def damaged(draw: st.DrawFn) -> object:
    """A good document with one place in it replaced, removed or renamed."""
    document: object = deepcopy(draw(st.sampled_from(SAMPLES)))
    place = document
    while True:
        keys: list[object] = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            return document
        chosen = draw(st.sampled_from(keys))
        inner = place[chosen]  # type: ignore[index]  # a key or an index of this very container
        if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
            place = inner
            continue
        value = draw(VALUES)
        if isinstance(place, dict) and draw(st.booleans()):
            del place[chosen]
            place[draw(NAMES | SCALARS)] = value
        else:
            place[chosen] = value  # type: ignore[index]  # as above
        return document


def parsed(body: object) -> KubeObject | None:
    """What becomes of a document; everything on the way may only fail with a ManifestError."""
    try:
        found = parse(body, "f.yaml#1")
    except ManifestError as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 2000
        return stand_in(body, error)
    assert key(found) == key_of(body)
    return found


@given(VALUES)
@example({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "x", "creationTimestamp": datetime.min}})
@example({"kind": "Pod", "apiVersion": "v1", "metadata": {10**4200: "x", "labels": {(): 1}}})
def test_any_value_parses_or_is_refused(body: object) -> None:
    parsed(body)


@given(VALUES)
def test_any_value_unpacks_or_is_refused(body: object) -> None:
    try:
        unpack(body)
    except ManifestError:
        return


@given(damaged())
def test_a_damaged_document_parses_or_is_refused_and_then_derives(body: object) -> None:
    found = parsed(body)
    if found is not None:
        state = derive({key(found): found}, MeshOptions())
        for policy in state.policies.values():
            decide([policy], Connection("10.0.0.1", None, "10.0.0.2", 80))


@given(damaged())
def test_a_damaged_policy_is_never_simply_gone(body: object) -> None:
    object_key = key_of(body)
    if object_key is not None and object_key.kind == "PeerAuthentication":
        assert parsed(body) is not None
