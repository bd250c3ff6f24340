"""The API server's state and verbs: apply, delete, label, scale, and the writes of the lab's own controllers. No I/O.

Bodies in the store are never changed in place: each write stores a new body with a new resourceVersion and tells the listeners.
A batch is applied whole or not at all. Not here: what makes an object acceptable (admission), what follows from it (controller).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace

from ztunnel.lab.addresses import service_addresses
from ztunnel.lab.admission import Offered, Rules, admit
from ztunnel.lab.objects import KINDS, Key, LabError, Requirement, is_deleting, key_of, kind_of, labels_of, not_found, uid_of
from ztunnel.lab.placement import cluster_addresses, owner_name
from ztunnel.mesh.manifests.tree import Tree, branch, drop, integer, merge, put, text, texts

MAX_OBJECTS = 5000
SYSTEM_NAMESPACES = ("default", "kube-system", "istio-system")
_SERVER_FIELDS = ("uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "generation", "managedFields")

Listener = Callable[[str, Tree], None]
"""Called with ADDED, MODIFIED or DELETED and the body."""


@dataclass(frozen=True, slots=True)
class Mint:
    """Where the cluster gets what it cannot compute."""

    uid: Callable[[], str]
    timestamp: Callable[[], str]
    """Now, as RFC 3339 in UTC."""


@dataclass(slots=True)
class Cluster:
    """Every object, by key."""

    rules: Rules
    versions: tuple[int, ...]
    mint: Mint
    listeners: list[Listener] = field(default_factory=list)
    _objects: dict[Key, Tree] = field(default_factory=dict)
    _applied: dict[Key, Tree] = field(default_factory=dict)
    _version: int = 0

    def bootstrap(self) -> None:
        """Make what a new cluster has: its first namespaces."""
        for name in SYSTEM_NAMESPACES:
            self.apply([Offered("the lab itself", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})])

    # Questions

    def find(self, key: Key) -> Tree | None:
        """The object, if it is there."""
        return self._objects.get(key)

    def get(self, key: Key) -> Tree:
        """The object.

        Raises:
            LabError: NotFound.
        """
        body = self._objects.get(key)
        if body is None:
            raise not_found(key)
        return body

    def select(self, kind: str, namespace: str | None = None, terms: Iterable[Requirement] = ()) -> list[Tree]:
        """The objects of a kind, by namespace and name; `namespace` None means all."""
        wanted = tuple(terms)
        found = [
            (key, body)
            for key, body in self._objects.items()
            if key.kind == kind and namespace in (None, key.namespace) and all(term.holds(labels_of(body)) for term in wanted)
        ]
        return [body for _, body in sorted(found, key=lambda pair: pair[0])]

    def pods(self) -> list[Tree]:
        """Every pod."""
        return self.select("Pod")

    # Verbs of users

    def apply(self, offers: Iterable[Offered], default_namespace: str = "default") -> list[tuple[Key, str]]:
        """Store a batch; for each object its key and `created`, `configured` or `unchanged`, in the order given.

        Raises:
            ManifestError, LabError: an object is refused; nothing of the batch is stored.
        """
        given = [replace(offered, body=_cleaned(offered.body, default_namespace)) for offered in offers]
        scratch, results = dict(self._objects), []
        for offered in sorted(given, key=lambda offered: _rank(offered.body)):
            body, verb = self._merged(offered, scratch)
            key = key_of(body)
            if verb == "created" and len(scratch) >= MAX_OBJECTS:
                raise LabError("", f"a lab holds at most {MAX_OBJECTS} objects")
            scratch[key] = body
            results.append((offered, key, verb))
        for offered, key, verb in results:
            self._applied[key] = offered.body
            if verb != "unchanged":
                self._commit(key, scratch[key])
        order = {id(offered): position for position, offered in enumerate(given)}
        return [(key, verb) for _, key, verb in sorted(results, key=lambda result: order[id(result[0])])]

    def delete(self, key: Key) -> None:
        """Delete an object and what it owns. Pods, and namespaces with pods, stay until they have ended.

        Raises:
            LabError: NotFound, or it is one of the lab's own.
        """
        body = self.get(key)
        if key.kind == "Node" or (key.kind == "Namespace" and key.name in SYSTEM_NAMESPACES):
            raise LabError("Forbidden", f'{KINDS[key.kind].resource} "{key.name}" is forbidden: it belongs to the lab itself')
        if key.kind == "Pod":
            self._mark_deleting(key, body)
        elif key.kind == "Namespace":
            put(body := deepcopy(body), "Terminating", "status", "phase")
            self._mark_deleting(key, body)
            for owned in [other for other in self._objects if other.namespace == key.name and other.kind != "ServiceAccount"]:
                if owned in self._objects:
                    self.delete(owned)
            self._finish_namespace(key.name)
        else:
            self._remove(key)
            if key.kind == "Deployment":
                for pod in self.select("Pod", key.namespace):
                    if owner_name(pod) == key.name:
                        self.delete(key_of(pod))

    def label(self, key: Key, changes: dict[str, str | None], overwrite: bool) -> bool:
        """Set labels (None removes); whether anything changed.

        Raises:
            LabError: NotFound, or a label has another value and `overwrite` is false.
            ManifestError: no label, as it would be in a manifest.
        """
        body = deepcopy(self.get(key))
        labels = labels_of(body)
        for name, value in changes.items():
            if value is not None and not overwrite and labels.get(name, value) != value:
                raise LabError("", f"'{name}' already has a value ({labels[name]}), and --overwrite is false")
        merged = {name: value for name, value in (labels | changes).items() if value is not None}
        put(body, merged, "metadata", "labels")
        return self._store_if_changed(key, admit(Offered("label", body), self.rules) if key.kind != "Node" else body)

    def scale(self, name: str, namespace: str, replicas: int) -> None:
        """Set a deployment's number of pods.

        Raises:
            LabError, ManifestError: NotFound, or not a possible number.
        """
        key = Key("Deployment", namespace, name)
        body = deepcopy(self.get(key))
        put(body, replicas, "spec", "replicas")
        self._store_if_changed(key, admit(Offered("scale", body), self.rules))

    def restart(self, name: str, namespace: str) -> None:
        """Replace a deployment's pods, as `kubectl rollout restart`.

        Raises:
            LabError: NotFound.
        """
        key = Key("Deployment", namespace, name)
        body = deepcopy(self.get(key))
        put(body, self.mint.timestamp(), "spec", "template", "metadata", "annotations", "kubectl.kubernetes.io/restartedAt")
        self._store_if_changed(key, body)

    # Writes of the lab's own controllers

    def create(self, body: Tree) -> Tree:
        """Store an object of the lab's own making (a deployment's pod, a node)."""
        key = key_of(body)
        self._commit(key, self._minted(body))
        return self._objects[key]

    def update(self, key: Key, uid: str, change: Callable[[Tree], None]) -> bool:
        """Apply `change` to a copy of the object and store it if that made a difference; nothing for one that is gone or another's."""
        live = self._objects.get(key)
        if live is None or uid_of(live) != uid:
            return False
        body = deepcopy(live)
        change(body)
        return self._store_if_changed(key, body)

    def finalize(self, key: Key, uid: str) -> None:
        """Remove a pod that has ended after its deletion."""
        live = self._objects.get(key)
        if live is not None and uid_of(live) == uid:
            self._remove(key)
            self._finish_namespace(key.namespace)

    # Inside

    def _merged(self, offered: Offered, scratch: dict[Key, Tree]) -> tuple[Tree, str]:
        guess = Key(kind_of(offered.body), text(offered.body, "metadata", "namespace"), text(offered.body, "metadata", "name"))
        live = scratch.get(guess)
        if live is None:
            body = self._minted(admit(offered, self.rules))
            self._check_references(offered, body, scratch)
            return self._with_addresses(offered, body, scratch), "created"
        wanted = merge(self._applied.get(guess), offered.body, live)
        assert isinstance(wanted, dict)
        body = admit(replace(offered, body=wanted), self.rules)
        if guess.kind == "Pod" and body["spec"] != live["spec"]:
            reason = "Forbidden: pod updates may not change the spec; delete the pod first, or use a Deployment"
            raise offered.refuse("spec", reason)
        if guess.kind == "Service" and (
            cluster_addresses(body) != cluster_addresses(live) or text(body, "spec", "clusterIP") != text(live, "spec", "clusterIP")
        ):
            raise offered.refuse("spec.clusterIP", "may not change once set")
        self._check_references(offered, body, scratch)
        return body, "unchanged" if body == live else "configured"

    def _minted(self, body: Tree) -> Tree:
        body = deepcopy(body)
        put(body, self.mint.uid(), "metadata", "uid")
        put(body, self.mint.timestamp(), "metadata", "creationTimestamp")
        return body

    def _check_references(self, offered: Offered, body: Tree, scratch: dict[Key, Tree]) -> None:
        key = key_of(body)
        if key.namespace:
            namespace = scratch.get(Key("Namespace", "", key.namespace))
            if namespace is None:
                raise LabError("NotFound", f'{offered.subject}: namespaces "{key.namespace}" not found')
            if is_deleting(namespace):
                raise LabError("Forbidden", f'{offered.subject}: namespace "{key.namespace}" is being terminated')
        spec = {"Pod": branch(body, "spec"), "Deployment": branch(body, "spec", "template", "spec")}.get(key.kind)
        account = text(spec, "serviceAccountName", default="default")
        if spec is not None and account != "default" and Key("ServiceAccount", key.namespace, account) not in scratch:
            where = "spec.serviceAccountName" if key.kind == "Pod" else "spec.template.spec.serviceAccountName"
            raise offered.refuse(where, f'serviceaccount "{account}" not found in namespace {key.namespace}')
        node = text(spec, "nodeName")
        if node and Key("Node", "", node) not in scratch:
            known = ", ".join(other.name for other in scratch if other.kind == "Node")
            raise offered.refuse(
                "spec.nodeName" if key.kind == "Pod" else "spec.template.spec.nodeName", f"no node {node!r}; there are {known}"
            )

    def _with_addresses(self, offered: Offered, body: Tree, scratch: dict[Key, Tree]) -> Tree:
        if key_of(body).kind != "Service" or text(body, "spec", "clusterIP") == "None":
            return body
        wanted = texts(body, "spec", "clusterIPs") or texts({"ips": [text(body, "spec", "clusterIP")]}, "ips")
        used = [address for other in scratch.values() if text(other, "kind") == "Service" for address in cluster_addresses(other)]
        try:
            addresses = service_addresses([address for address in wanted if address], self.versions, used)
        except LabError as error:
            raise LabError(error.reason, f"{offered.subject}: {error.message}") from error
        put(body, addresses[0], "spec", "clusterIP")
        put(body, addresses, "spec", "clusterIPs")
        families = ["IPv6" if ":" in address else "IPv4" for address in addresses]
        put(body, families, "spec", "ipFamilies")
        put(body, "SingleStack" if len(families) == 1 else "RequireDualStack", "spec", "ipFamilyPolicy")
        return body

    def _mark_deleting(self, key: Key, body: Tree) -> None:
        if not is_deleting(body):
            body = deepcopy(body)
            put(body, self.mint.timestamp(), "metadata", "deletionTimestamp")
            put(body, integer(body, "spec", "terminationGracePeriodSeconds"), "metadata", "deletionGracePeriodSeconds")
            self._commit(key, body)

    def _finish_namespace(self, name: str) -> None:
        namespace = self._objects.get(Key("Namespace", "", name))
        if namespace is None or not is_deleting(namespace):
            return
        inside = [key for key in self._objects if key.namespace == name]
        if all(key.kind == "ServiceAccount" for key in inside):
            for key in (*inside, Key("Namespace", "", name)):
                self._remove(key)

    def _store_if_changed(self, key: Key, body: Tree) -> bool:
        if body == self._objects[key]:
            return False
        self._commit(key, body)
        return True

    def _commit(self, key: Key, body: Tree) -> None:
        self._version += 1
        put(body, str(self._version), "metadata", "resourceVersion")
        before = self._objects.get(key)
        event = "ADDED" if before is None else "MODIFIED"
        if before is None or before.get("spec") != body.get("spec"):
            put(body, integer(before, "metadata", "generation") + 1, "metadata", "generation")
        self._objects[key] = body
        self._tell(event, body)
        if key.kind == "Namespace" and event == "ADDED":
            account: Tree = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": key.name}}
            if Key("ServiceAccount", key.name, "default") not in self._objects:
                self.create(account)

    def _remove(self, key: Key) -> None:
        body = self._objects.pop(key)
        self._applied.pop(key, None)
        self._tell("DELETED", body)

    def _tell(self, event: str, body: Tree) -> None:
        for listener in self.listeners:
            listener(event, body)

    def __iter__(self) -> Iterator[Tree]:
        return iter(list(self._objects.values()))


def _cleaned(body: Tree, default_namespace: str) -> Tree:
    """Without what only the server sets (manifests that came out of `get -o yaml`), and with its namespace spelled out."""
    body = deepcopy(body)
    drop(body, "status")
    for name in _SERVER_FIELDS:
        drop(body, "metadata", name)
    kind = KINDS.get(kind_of(body))
    if kind is not None and kind.namespaced and not text(body, "metadata", "namespace"):
        put(body, default_namespace, "metadata", "namespace")
    return body


def _rank(body: Tree) -> int:
    order = list(KINDS)
    kind = kind_of(body)
    return order.index(kind) if kind in order else 0
