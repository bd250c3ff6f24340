"""Makes a cluster as Gateways want it, and tells every object what became of it. The loop; what follows from what is in `belongings`
and `statuses`.

Nothing is written before every kind was read whole, nor by anybody but the leader (`election`). An object that is there already and is
not the Gateway's is never touched, and then nothing is made for that Gateway: a Gateway named like somebody's service account must not
get that account. What fails is tried again, and said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import random

import trio

from ztunnel.controller import belongings
from ztunnel.controller.bodies import Bodies
from ztunnel.controller.statuses import Reader, Statuses, conditions_of, differs
from ztunnel.kube.client import KubeClient
from ztunnel.kube.errors import Conflict, KubeError, NotFound
from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.manifests.tree import Tree, branch, branches, integer, put, text
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

MANAGER = "ztunnel-controller"
QUIET_SECONDS = 0.05
"""Changes are gathered this long."""
_SHARE = 4
"""Times that a look took pass before the next: thousands of changes a second must not cost the whole processor."""
_RETRY_SECONDS = 5.0
_OWNED_KINDS = ("RoleBinding", "ServiceAccount", "Service", "Deployment")
_REMIND_SECONDS = 30.0


@dataclass(slots=True)
class Counts:
    """For metrics."""

    written: int = 0
    failed: int = 0
    looks: int = 0


@dataclass(slots=True)
class Reconciler:
    """The leader's work.

    Args:
        pod_spec: of a Gateway's pods.
    """

    client: KubeClient
    options: MeshOptions
    pod_spec: belongings.PodSpec
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    counts: Counts = field(default_factory=Counts)
    bodies: Bodies = field(init=False)
    _reader: Reader = field(default_factory=Reader, init=False)
    _changed: trio.Event = field(default_factory=trio.Event, init=False)
    _complaints: dict[str, str] = field(default_factory=dict, init=False)
    """What was said, by what it is about."""
    _failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.client, self._wake)

    async def follow(self) -> None:
        """Keeps `bodies` up to date, for ever; also who does not lead does, so as to be ready."""
        async with trio.open_nursery() as nursery:
            for reflector in self.bodies.reflectors:
                nursery.start_soon(reflector.run)

    async def work(self) -> None:
        """Writes what is to be written, for ever."""
        await self._know_all()
        while True:
            self._changed = trio.Event()
            began = trio.current_time()
            self._failed = False
            await self.reconcile()
            self.counts.looks += 1
            await trio.sleep(_SHARE * (trio.current_time() - began))
            with trio.move_on_after(_RETRY_SECONDS * (0.5 + random()) if self._failed else float("inf")):
                await self._changed.wait()
            await trio.sleep(QUIET_SECONDS)

    async def _know_all(self) -> None:
        while missing := self.bodies.missing:
            with trio.move_on_after(_REMIND_SECONDS) as waiting:
                self._changed = trio.Event()
                await self._changed.wait()
            if waiting.cancelled_caught:
                log.warning("waiting for the API server", extra=fields(missing="; ".join(missing)))

    def _wake(self) -> None:
        self._changed.set()

    async def reconcile(self) -> None:
        """One look at everything."""
        for name in belongings.CLASSES:
            await self._keep_class(name)
        gateways = [body for body in self.bodies.of("Gateway") if belongings.is_ours(body)]
        ours = {text(body, "metadata", "uid") for body in gateways if not text(body, "metadata", "deletionTimestamp")}
        problems: dict[str, str] = {}
        for gateway in gateways:
            uid = text(gateway, "metadata", "uid")
            if uid in ours:
                problems[uid] = await self._keep(gateway)
        await self._drop_orphans({uid for uid in ours if not problems[uid]})
        await self._tell(problems)

    # ------------------------------------------------------------------------------------------------------- what it owns

    async def _keep_class(self, name: str) -> None:
        resource = self.bodies.resource("GatewayClass")
        if resource is not None and self.bodies.find("GatewayClass", "", name) is None:
            await self._write(f"GatewayClass {name}", self.client.create, resource, belongings.gateway_class(name))

    async def _keep(self, gateway: Tree) -> str:
        """Makes and mends what a Gateway needs. Returns why that cannot be done; empty when it can."""
        uid = text(gateway, "metadata", "uid")
        wanted = [*belongings.belongings(gateway, self.pod_spec), *belongings.bindings(gateway)]
        for body in wanted:
            live = self._live(body)
            if live is not None and not _is_own(live, gateway, uid):
                return (
                    f"{text(body, 'kind')} {text(body, 'metadata', 'namespace')}/{text(body, 'metadata', 'name')} is there already "
                    "and is not this Gateway's; nothing is made for it: give it another name, or remove that object"
                )
        for body in wanted:
            resource, live = self.bodies.resource(text(body, "kind")), self._live(body)
            if resource is None:
                continue
            namespace, name = text(body, "metadata", "namespace"), text(body, "metadata", "name")
            what = f"{text(body, 'kind')} {namespace}/{name}"
            if live is None:
                await self._write(what, self.client.create, resource, body, namespace)
            elif not covers(live, body) and not text(live, "metadata", "deletionTimestamp"):
                # With the UID: if it was replaced by somebody's own meanwhile, that one is not touched.
                put(body, text(live, "metadata", "uid"), "metadata", "uid")
                await self._write(what, self._apply, resource, body, name, namespace)
        return ""

    async def _apply(self, *arguments: object) -> object:
        return await self.client.apply(*arguments, manager=MANAGER)  # type: ignore[arg-type]  # those of `apply`

    async def _drop_orphans(self, ours: Collection[str]) -> None:
        """What we made for Gateways that are no longer ours. The garbage collector of the cluster takes what belonged to Gateways that
        are gone."""
        gateways = self.bodies.of("Gateway")
        await self._drop_bindings(ours)
        for kind in _OWNED_KINDS:
            for body in self.bodies.of(kind):
                if not belongings.is_left_over(body, gateways, ours) or text(body, "metadata", "deletionTimestamp"):
                    continue
                resource = self.bodies.resource(kind)
                namespace, name = text(body, "metadata", "namespace"), text(body, "metadata", "name")
                if resource is not None:
                    # With the UID: its owner may have replaced it by something of their own meanwhile.
                    uid = text(body, "metadata", "uid")
                    await self._write(f"{kind} {namespace}/{name}", self.client.delete, resource, name, namespace, uid)

    async def _drop_bindings(self, served: Iterable[str]) -> None:
        """Rights in the whole cluster of Gateways that are no more or have nothing here: nobody else would ever take them back."""
        wanted = {
            f"{belongings.ROLE}:{text(body, 'metadata', 'namespace')}:{belongings.name_of(body)}"
            for body in self.bodies.of("Gateway")
            if text(body, "metadata", "uid") in served
        }
        resource = self.bodies.resource("ClusterRoleBinding")
        for body in self.bodies.of("ClusterRoleBinding"):
            name = text(body, "metadata", "name")
            if resource is not None and belongings.NAMESPACE_LABEL in branch(body, "metadata", "labels") and name not in wanted:
                await self._write(f"ClusterRoleBinding {name}", self.client.delete, resource, name, "", text(body, "metadata", "uid"))

    def _live(self, body: Tree) -> Tree | None:
        return self.bodies.find(text(body, "kind"), text(body, "metadata", "namespace"), text(body, "metadata", "name"))

    # ----------------------------------------------------------------------------------------------------- what it says

    async def _tell(self, problems: dict[str, str]) -> None:
        now = self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        bodies = [self._placed(body) for body in self.bodies]
        for place, members in Statuses(bodies, self._reader, self.options, now, sees_secrets=False).all().items():
            body = self.bodies.find(*place)
            resource = self.bodies.resource(place.kind)
            if body is None or resource is None:
                continue
            wanted = dict(members)
            problem = problems.get(text(body, "metadata", "uid"), "")
            if problem:
                told = (Condition("Programmed", False, "Invalid", problem),)
                given = [each for each in branches(wanted, "conditions") if text(each, "type") != "Programmed"]
                before = [each for each in branches(body, "status", "conditions") if text(each, "type") == "Programmed"]
                wanted["conditions"] = [*given, *conditions_of(before, told, integer(body, "metadata", "generation"), now)]
            elif place.kind == "Gateway":
                wanted |= self._addresses(body)
            if differs(body, wanted):
                version = text(body, "metadata", "resourceVersion")
                patch = {"metadata": {"resourceVersion": version}, "status": wanted}
                await self._write(f"status of {place}", self._patch_status, resource, patch, place.name, place.namespace)

    async def _patch_status(self, *arguments: object) -> object:
        return await self.client.patch(*arguments, subresource="status")  # type: ignore[arg-type]  # those of `patch`

    def _placed(self, body: Tree) -> Tree:
        """A Gateway with the addresses that it is about to get: what is said of it now follows from them."""
        if text(body, "kind") != "Gateway" or not (found := self._addresses(body)):
            return body
        return {**body, "status": {**branch(body, "status"), **found}}

    def _addresses(self, gateway: Tree) -> Tree:
        """Its `addresses`, if it has any."""
        if not belongings.is_ours(gateway):
            return {}
        name, namespace = belongings.name_of(gateway), text(gateway, "metadata", "namespace")
        service, deployment = self.bodies.find("Service", namespace, name), self.bodies.find("Deployment", namespace, name)
        uid = (text(gateway, "metadata", "uid"),)
        if service is None or deployment is None or not belongings.is_owned_by(service, uid) or not belongings.is_owned_by(deployment, uid):
            return {}
        is_ready = integer(deployment, "status", "readyReplicas") > 0
        found = belongings.addresses(gateway, service, is_ready, self.options.cluster_domain)
        return {"addresses": found} if found else {}

    async def _write(self, what: str, call: Callable[..., object], *arguments: object) -> None:
        try:
            await call(*arguments)  # type: ignore[misc]  # each is a coroutine function of the client
        except (Conflict, NotFound):
            # Somebody was faster: its change is on its way to us. If it is not, the next look is soon.
            self._failed = True
            return
        except KubeError as error:
            self._failed = True
            self.counts.failed += 1
            if self._complaints.get(what) != str(error):
                self._complaints[what] = str(error)
                log.warning("cannot be written: will try again", extra=fields(object=what, reason=error))
            return
        self.counts.written += 1
        self._complaints.pop(what, None)


def _is_own(live: Tree, gateway: Tree, uid: str) -> bool:
    if text(live, "kind") == "ClusterRoleBinding":
        return branch(live, "metadata", "labels").get(belongings.NAMESPACE_LABEL) == text(gateway, "metadata", "namespace")
    return belongings.is_owned_by(live, (uid,)) is True


def covers(live: object, wanted: object) -> bool:
    """Whether everything that is wanted is there as wanted; what else is there (defaults, others' fields) does not matter."""
    if wanted in ("", {}, []) and live is None:
        return True
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(covers(live.get(name), value) for name, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(live, list) and len(live) == len(wanted) and all(map(covers, live, wanted))
    return live == wanted
