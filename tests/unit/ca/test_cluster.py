"""What an API server says of tokens and pods, and what is believed of it."""

from __future__ import annotations

import pytest

from ztunnel.ca.cluster import NamespaceStore, PodStore, _caller
from ztunnel.ca.issuance import Caller, Reason, Refusal
from ztunnel.ca.pods import PodPlace, PodTable
from ztunnel.kube.reflector import Name
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.fields import Field

Json = dict[str, object]
BOUND: Json = {"authentication.kubernetes.io/pod-name": ["agent-x"], "authentication.kubernetes.io/pod-uid": ["uid-x"]}
GOOD: Json = {
    "authenticated": True,
    "audiences": ["istio-ca"],
    "user": {"username": "system:serviceaccount:mesh:agent", "extra": BOUND},
}


def caller(status: object) -> Caller:
    return _caller(Field("TokenReview", "status", status), "istio-ca")


def test_a_token_of_a_service_account_bound_to_a_pod() -> None:
    assert caller(GOOD) == Caller("mesh", "agent", "agent-x", "uid-x")
    assert caller({**GOOD, "user": {"username": "system:serviceaccount:mesh:agent"}}) == Caller("mesh", "agent")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"authenticated": False, "error": "expired"}, "expired"),
        ({"authenticated": None}, "no reason given"),
        ({"audiences": ["api"]}, "not meant for istio-ca"),
        ({"audiences": None}, "not meant for istio-ca"),
        ({"user": {"username": "kubernetes-admin"}}, "is no service account"),
        ({"user": {"username": "system:serviceaccount:mesh"}}, "is no service account"),
        ({"user": {"username": "system:serviceaccount::agent"}}, "is no service account"),
        ({"user": {"username": "system:node:x"}}, "is no service account"),
    ],
)
def test_other_tokens_are_refused(change: Json, reason: str) -> None:
    with pytest.raises(Refusal, match=reason) as caught:
        caller({**GOOD, **change})
    assert caught.value.reason is Reason.TOKEN_REFUSED


@pytest.mark.parametrize(
    "status", [[], {"authenticated": "yes"}, {**GOOD, "audiences": "istio-ca"}, {**GOOD, "user": {"username": 5}}, {**GOOD, "user": []}]
)
def test_answers_that_make_no_sense_vouch_for_nobody(status: object) -> None:
    with pytest.raises(ManifestError):
        caller(status)


def pod(**change: object) -> Json:
    metadata: Json = {"namespace": "shop", "name": "cart-0", "uid": "u"}
    return {"metadata": metadata, "spec": {"nodeName": "n", "serviceAccountName": "cart"}, "status": {"phase": "Running"}, **change}


@pytest.mark.parametrize(
    "body",
    [
        pod(status={"phase": "Succeeded"}),
        pod(status={"phase": "Failed"}),
        pod(metadata={"namespace": "shop", "name": "cart-0"}),
        pod(spec={"nodeName": ["n"]}),
        pod(spec=None, metadata=None),
        pod(status=5),
        {},
    ],
)
def test_pods_that_ended_or_make_no_sense_are_not_there(body: Json) -> None:
    assert PodStore(PodTable()).read(body) is None


def test_a_table_follows_what_the_reflector_tells() -> None:
    table = PodTable()
    store = PodStore(table)
    place = store.read(pod())
    assert place == PodPlace("shop", "cart-0", "u", "n", "cart")
    synced_before = table.synced
    store.replaced({Name("shop", "cart-0"): place, Name("shop", "ended"): None})
    assert (synced_before, table.synced) == (False, True)
    assert table.runs_on("n", "shop", "cart")
    store.changed(Name("shop", "cart-0"), None)
    assert not table.runs_on("n", "shop", "cart")
    store.changed(Name("shop", "cart-0"), place)
    assert table.node_of("shop", "cart-0", "u") == "n"


def test_a_mirror_pod_has_no_service_account() -> None:
    table = PodTable()
    store = PodStore(table)
    mirror = pod(spec={"nodeName": "n"})
    assert store.read(mirror) == PodPlace("shop", "cart-0", "u", "n", "")
    store.replaced({Name("shop", "cart-0"): store.read(mirror)})
    assert table.node_of("shop", "cart-0", "u") == "n"
    assert not table.runs_on("n", "shop", "default")
    assert not table.runs_on("n", "shop", "")


def test_namespaces_that_end_are_left_out() -> None:
    store = NamespaceStore()
    assert store.read({"metadata": {"name": "a"}}) is True
    assert store.read({"metadata": {"name": "a", "deletionTimestamp": "now"}}) is None
    store.replaced({Name("", "a"): True, Name("", "b"): None})
    store.changed(Name("", "c"), True)
    store.changed(Name("", "a"), None)
    assert store.names == {"c"}
