"""Runs gateways and writes statuses: what istiod does in a cluster. The loop; what follows from what is in `ztunnel.controller`."""

from __future__ import annotations

import logging
from functools import partial

import trio

from ztunnel.controller import belongings
from ztunnel.controller.statuses import Reader, Statuses, differs
from ztunnel.lab import convergence
from ztunnel.lab.admission import Offered
from ztunnel.lab.objects import Key, LabError, display, is_deleting, is_ready, key_of, uid_of
from ztunnel.lab.site import Site
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.tree import Tree, branch, put, text

log = logging.getLogger(__name__)

CONTROLLER = "the lab's gateway controller"
PAUSE_SECONDS = 0.02
"""After a change, so that a batch of changes is looked at once."""


class GatewayController:
    """Keeps what gateways own, and every status that is not a pod's, a deployment's or a node's."""

    def __init__(self, site: Site, pod_spec: belongings.PodSpec) -> None:
        self._site = site
        self._pod_spec = pod_spec
        self._reader = Reader()
        self._seen = -1
        self._changes = 0
        self._refused: dict[str, str] = {}
        """Errors that were logged, by the gateway's UID: the same one is not logged again and again."""
        site.cluster.listeners.append(self._changed)

    def is_current(self) -> bool:
        """Whether everything that follows from the objects is done."""
        return self._seen == self._changes

    def bootstrap(self) -> None:
        """Make the classes of gateways that a new cluster has."""
        for name in belongings.CLASSES:
            self._site.cluster.create(belongings.gateway_class(name))

    async def run(self) -> None:
        """Follow the cluster for ever."""
        while True:
            changed = self._site.bell.next()
            if not self.is_current():
                seen = self._changes
                self.reconcile()
                self._seen = seen
                if self.is_current():
                    self._site.bell.ring()  # whoever waits for that may look again
            else:
                await changed.wait()
            await trio.sleep(PAUSE_SECONDS)

    def reconcile(self) -> None:
        """One look at everything."""
        cluster = self._site.cluster
        ours = [body for body in cluster.select("Gateway") if belongings.is_ours(body) and not is_deleting(body)]
        for gateway in ours:
            self._keep(gateway)
        uids = {uid_of(body) for body in ours}
        for key in [key_of(body) for body in cluster if belongings.is_owned_by(body, uids) is False]:
            if cluster.find(key) is not None:
                cluster.delete(key)
        self._write_statuses()

    def _keep(self, gateway: Tree) -> None:
        cluster, key, uid = self._site.cluster, key_of(gateway), uid_of(gateway)
        wanted = belongings.belongings(gateway, self._pod_spec)
        try:
            self._refuse_others(wanted, uid)
            cluster.apply(Offered(CONTROLLER, body) for body in wanted)
        except (ManifestError, LabError) as error:
            if self._refused.get(uid) != str(error):
                self._refused[uid] = str(error)
                log.warning("gateway=%s/%s cannot be run: %s", key.namespace, key.name, error)
                self._site.happened(uid, "FailedCreate", str(error))
            return
        service = cluster.find(Key("Service", key.namespace, belongings.name_of(gateway)))
        ready = any(is_ready(pod) for pod in cluster.pods() if belongings.is_pod_of(pod, gateway))
        found = belongings.addresses(gateway, service, ready)
        if found and found != branch(gateway, "status").get("addresses"):
            cluster.update(key, uid, lambda body: put(body, found, "status", "addresses"))

    def _refuse_others(self, wanted: list[Tree], uid: str) -> None:
        """What somebody else has made under these names is not taken over.

        Raises:
            LabError: there is such an object.
        """
        for body in wanted:
            live = self._site.cluster.find(key_of(body))
            if live is not None and not belongings.is_owned_by(live, (uid,)):
                raise LabError("Conflict", f"{display(key_of(body))} is there already and does not belong to the gateway")

    def _write_statuses(self) -> None:
        cluster = self._site.cluster
        now = cluster.mint.timestamp()
        for place, wanted in Statuses(cluster, self._reader, convergence.options(), now).all().items():
            key = Key(*place)
            body = cluster.find(key)
            if body is not None and differs(body, wanted):
                cluster.update(key, uid_of(body), partial(_set_status, wanted=wanted))

    def _changed(self, _event: str, body: Tree) -> None:
        if text(body, "kind") != "Node":
            self._changes += 1


def _set_status(body: Tree, wanted: Tree) -> None:
    put(body, {**branch(body, "status"), **wanted}, "status")
