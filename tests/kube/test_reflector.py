"""Lists and watches against the real API server."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.kit.kube_api import ApiServer
from tests.kit.polling import eventually_async
from tests.kit.reflected import PODS, Kept, access, following
from ztunnel.kube.discovery import Kind
from ztunnel.kube.reflector import Body, Name, Phase

WIDGETS = Kind("ztunnel.test", "Widget", ("v1", "v1beta1"))
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


async def until(question: Callable[[], object]) -> None:
    await eventually_async(lambda: question() or None, within=120)


def make_pods(api: ApiServer, namespace: str, *names: str) -> None:
    api.namespace(namespace)
    for number, name in enumerate(names, 1):
        api.pod(namespace, name, node="node-1", address=f"10.1.0.{number}")


def define_widgets(api: ApiServer, *versions: str) -> None:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    spec = {
        "group": "ztunnel.test",
        "scope": "Namespaced",
        "names": {"plural": "widgets", "kind": "Widget", "singular": "widget", "listKind": "WidgetList"},
        "versions": [{"name": each, "served": True, "storage": each == versions[0], "schema": schema} for each in versions],
    }
    kind = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
    api.apply({**kind, "metadata": {"name": "widgets.ztunnel.test"}, "spec": spec})
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/widgets.ztunnel.test")


def widget(version: str, name: str) -> Body:
    return {"apiVersion": f"ztunnel.test/{version}", "kind": "Widget", "metadata": {"name": name, "namespace": "default"}}


@pytest.mark.parametrize("streams", [True, False], ids=["as a stream", "in pages"])
async def test_what_is_there_is_listed_and_followed(kube_api: ApiServer, streams: bool) -> None:
    namespace = f"followed-{'stream' if streams else 'pages'}"
    make_pods(kube_api, namespace, *"abcdefgh")
    async with following(access(kube_api), streams=streams) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        assert kept.names(namespace) == list("abcdefgh")
        assert kept.wholes == 1
        assert kept.items[Name(namespace, "a")]["kind"] == "Pod"
        make_pods(kube_api, namespace, "i")
        kube_api.status(namespace, "a", address="10.1.0.99")
        kube_api.delete(f"/api/v1/namespaces/{namespace}/pods/b")
        await until(lambda: kept.names(namespace) == list("acdefghi"))
        await until(lambda: "10.1.0.99" in json.dumps(kept.items[Name(namespace, "a")]))
        assert (kept.wholes, reflector.counts.lists) == (1, 0 if streams else 1)


async def test_a_watch_goes_on_where_it_was_when_the_server_is_back(kube_api: ApiServer) -> None:
    make_pods(kube_api, "restarted", "a", "b")
    async with following(access(kube_api)) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        kube_api.stop()
        await until(lambda: "cannot watch pods" in reflector.problem)
        assert kept.names("restarted") == ["a", "b"]
        kube_api.start()
        kube_api.delete("/api/v1/namespaces/restarted/pods/b")
        await until(lambda: kept.names("restarted") == ["a"])
        await until(lambda: not reflector.problem)


async def test_a_version_that_is_forgotten_means_the_whole_set_anew(kube_api: ApiServer) -> None:
    make_pods(kube_api, "forgotten", "a", "b")
    async with following(access(kube_api)) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        kube_api.stop()
        kube_api.start()
        reflector._version = "1"
        kube_api.compact()
        kube_api.delete("/api/v1/namespaces/forgotten/pods/b")
        await until(lambda: kept.wholes >= 2 or reflector._version != "1")
        await until(lambda: kept.names("forgotten") == ["a"])


async def test_a_kind_comes_changes_its_version_and_goes(kube_api: ApiServer) -> None:
    kube_api.delete(f"{CRD_PATH}/widgets.ztunnel.test")
    async with following(access(kube_api), WIDGETS) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.ABSENT)
        define_widgets(kube_api, "v1beta1")
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        kube_api.apply(widget("v1beta1", "a"))
        await until(lambda: kept.names() == ["a"])
        define_widgets(kube_api, "v1beta1", "v1")
        kube_api.apply(widget("v1", "b"))
        await until(lambda: kept.names() == ["a", "b"])
        kube_api.delete(f"{CRD_PATH}/widgets.ztunnel.test")
        await until(lambda: kept.names() == [])
        await until(lambda: reflector.phase is Phase.ABSENT)
        define_widgets(kube_api, "v1")
        kube_api.apply(widget("v1", "c"))
        await until(lambda: kept.names() == ["c"])
    kube_api.delete(f"{CRD_PATH}/widgets.ztunnel.test")


@pytest.mark.parametrize("missing", ["list", "watch"])
async def test_a_missing_right_is_named_and_used_once_it_is_there(kube_api: ApiServer, missing: str) -> None:
    user = kube_api.user(f"without-{missing}")
    verbs = [verb for verb in ("list", "watch") if verb != missing]
    kube_api.allow(user, [{"apiGroups": [""], "resources": ["pods"], "verbs": verbs}])
    async with following(access(kube_api, user), streams=False) as (reflector, kept):
        await until(lambda: f"the right to {missing} pods is missing" in reflector.problem)
        assert kept.wholes == (missing == "watch")
        kube_api.allow(user, [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}])
        await until(lambda: reflector.phase is Phase.FOLLOWING and not reflector.problem)


async def test_a_token_that_the_server_does_not_take_is_said(kube_api: ApiServer) -> None:
    stranger = kube_api.account("default", "stranger")
    kube_api.delete("/api/v1/namespaces/default/serviceaccounts/stranger")
    async with following(access(kube_api, stranger)) as (reflector, _kept):
        await until(lambda: "does not take our credentials" in reflector.problem)


def test_the_store_of_these_tests_counts() -> None:
    kept = Kept()
    kept.changed(Name("", "a"), {"metadata": {"resourceVersion": "1"}})
    kept.changed(Name("", "a"), None)
    assert kept.seen == [("a", "1"), ("a", None)]
    assert PODS.versions == ("v1",)
