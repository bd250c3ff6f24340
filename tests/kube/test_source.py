"""The mesh as a real API server has it: rights, nonsense, outages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from tests.kit import kube_crds
from tests.kit.kube_api import ApiServer, User
from tests.kit.polling import eventually_async
from tests.kit.reflected import QUICK, access
from ztunnel.kube.client import KubeClient
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.sources.kubernetes import KubernetesSource
from ztunnel.sources.objects import Refusal

RULES = [
    {"apiGroups": [""], "resources": ["namespaces", "pods", "services", "serviceaccounts"], "verbs": ["list", "watch"]},
    {"apiGroups": ["security.istio.io"], "resources": ["authorizationpolicies", "peerauthentications"], "verbs": ["list", "watch"]},
    {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["gateways", "gatewayclasses"], "verbs": ["list", "watch"]},
]
POLICIES = "/apis/security.istio.io/v1/namespaces/{}/authorizationpolicies"


@dataclass
class Told:
    states: list[MeshState] = field(default_factory=list)
    refusals: tuple[Refusal, ...] = ()

    async def __call__(self, state: MeshState, refusals: tuple[Refusal, ...]) -> None:
        self.states.append(state)
        self.refusals = refusals

    @property
    def state(self) -> MeshState:
        return self.states[-1] if self.states else MeshState()

    def pods(self, namespace: str) -> list[str]:
        return sorted(each.name for each in self.state.workloads.values() if each.namespace == namespace)

    def policies(self, namespace: str) -> list[str]:
        return sorted(f"{each.kind}/{each.name}" for each in self.state.policies.values() if each.namespace == namespace)


@pytest.fixture(scope="module")
def api(kube_api: ApiServer) -> ApiServer:
    """With the mesh's kinds."""
    kube_crds.define(kube_api)
    return kube_api


@asynccontextmanager
async def reading(api: ApiServer, user: User | None = None, *, waits: bool = True) -> AsyncIterator[tuple[KubernetesSource, Told]]:
    told = Told()
    async with KubeClient(access(api, user)) as client, trio.open_nursery() as nursery:
        source = KubernetesSource(client, MeshOptions(), pace=QUICK)
        if waits:
            await nursery.start(source.run, told)
        else:
            nursery.start_soon(source.run, told)
        yield source, told
        nursery.cancel_scope.cancel()


async def until(question: Callable[[], object]) -> None:
    await eventually_async(lambda: question() or None, within=120)


def policy(namespace: str, name: str, spec: object) -> dict[str, object]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


async def test_everything_is_known_before_anything_is_told_and_then_every_change(api: ApiServer) -> None:
    api.namespace("shop", {"istio.io/dataplane-mode": "ambient"})
    api.pod("shop", "a", node="node-1", address="10.2.0.1", labels={"app": "a"})
    api.apply(policy("shop", "first", {"rules": [{}]}))
    spec = {"clusterIP": "10.96.7.7", "selector": {"app": "a"}, "ports": [{"port": 80}]}
    api.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "svc", "namespace": "shop"}, "spec": spec})
    agent = api.account("ztunnel-system", "agent")
    api.allow(agent, RULES)
    async with reading(api, agent) as (source, told):
        resources = [each._resource for each in source.reflectors]
        assert {(each.group, each.plural) for each in resources if each} == {
            (rule["apiGroups"][0], resource) for rule in RULES for resource in rule["resources"]
        }
        assert told.pods("shop") == ["a"]
        assert told.policies("shop") == ["AuthorizationPolicy/first"]
        (service,) = (each for each in told.state.services.values() if each.name == "svc")
        assert len(service.endpoints) == 1
        assert not told.refusals
        api.pod("shop", "b", node="node-2", address="10.2.0.2", labels={"app": "a"})
        await until(lambda: told.pods("shop") == ["a", "b"])
        api.delete("/api/v1/namespaces/shop/pods/a")
        api.delete(POLICIES.format("shop") + "/first")
        await until(lambda: told.pods("shop") == ["b"] and not told.policies("shop"))


async def test_an_outage_changes_nothing(api: ApiServer) -> None:
    api.namespace("steady", {"istio.io/dataplane-mode": "ambient"})
    api.pod("steady", "a", node="node-1", address="10.3.0.1")
    async with reading(api) as (_source, told):
        before = told.state
        api.stop()
        await until(lambda: any("what was known before stays in force" in each.reason for each in told.refusals))
        assert told.state is before
        api.start()
        await until(lambda: not told.refusals)
        api.pod("steady", "b", node="node-1", address="10.3.0.2")
        await until(lambda: told.pods("steady") == ["a", "b"])


@pytest.mark.parametrize("lacking", [(rule["apiGroups"][0], resource) for rule in RULES for resource in rule["resources"]], ids="/".join)
async def test_each_right_that_is_missing_is_named_and_waited_for(api: ApiServer, lacking: tuple[str, str]) -> None:
    group, resource = lacking
    user = api.user(f"lacks-{resource}")
    api.allow(user, [{**rule, "resources": [each for each in rule["resources"] if each != resource]} for rule in RULES])
    words = f"list {resource}.{group}" if group else f"list {resource}"
    async with reading(api, user, waits=False) as (source, told):
        # With the stream of initial events it is the right to watch that is asked for first.
        expected = (f"the right to {words} is missing", f"the right to {words.replace('list', 'watch')} is missing")
        await until(lambda: any(each in text for text in source.missing for each in expected))
        assert not told.states
        api.allow(user, RULES)
        await until(lambda: told.states and not source.missing)


HOSTILE = [
    {"rules": "nonsense"},
    {"rules": [{"from": [{"source": {"principals": [1, None, {"a": []}]}}]}]},
    {"action": {"deep": [[[[]]]]}},
    {"rules": [{"to": [{"operation": {"ports": ["99999999999"]}}]}]},
    [],
    "text",
    17,
    {"selector": {"matchLabels": {"a": {"b": "c"}}}},
    {"action": "\u0000\u202e"},
    {"rules": [{"from": [{"source": {"ipBlocks": ["::/999"]}}]}] * 500},
]


async def test_nonsense_is_refused_denies_and_never_stops_anything(api: ApiServer) -> None:
    api.namespace("hostile", {"istio.io/dataplane-mode": "ambient"})
    api.apply(policy("hostile", "good", {"rules": [{}]}))
    async with reading(api) as (_source, told):
        for number, spec in enumerate(HOSTILE):
            api.request("POST", POLICIES.format("hostile"), policy("hostile", f"bad-{number}", spec))
        await until(lambda: len(told.policies("hostile")) == len(HOSTILE) + 1)
        refused = {each.object for each in told.refusals}
        assert {f"AuthorizationPolicy hostile/bad-{number}" for number in range(len(HOSTILE))} <= refused
        # What was good once stays as it was, and one that is mended is in force.
        api.apply(policy("hostile", "good", {"rules": 1}))
        await until(lambda: "AuthorizationPolicy hostile/good" in {each.object for each in told.refusals})
        (kept,) = (each for each in told.state.policies.values() if (each.namespace, each.name) == ("hostile", "good"))
        assert not kept.reason
        api.apply(policy("hostile", "bad-0", {"rules": [{}]}))
        await until(lambda: "AuthorizationPolicy hostile/bad-0" not in {each.object for each in told.refusals})
        api.delete(POLICIES.format("hostile"))
        await until(lambda: not told.policies("hostile") and not told.refusals)
