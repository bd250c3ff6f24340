"""Short words for the mesh's values and for manifests, so that a test shows only what it is about.

Values: `workload`, `service`, `policy`, `allow`, `deny`, `principals`. Manifests are plain dictionaries as a YAML loader makes them:
`pod`, `service_manifest`, `namespace`, `authorization`, `authentication`; `mesh` derives a state from some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ztunnel.mesh.delta import Delta
from ztunnel.mesh.derive import MeshOptions, MeshState, derive, diff
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.mesh.manifests.parse import key, parse
from ztunnel.mesh.rules import Action, Clause, Match, Policy, Rule, Scope, StringKind, StringMatch
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload

Json = dict[str, object]

# Values


def identity(namespace: str = "default", account: str = "default") -> SpiffeId:
    """An identity in the trust domain `cluster.local`."""
    return SpiffeId("cluster.local", namespace, account)


def workload(
    name: str, *addresses: str, namespace: str = "default", account: str = "default", hbone: bool = True, ready: bool = True
) -> Workload:
    """A workload with UID `uid-NAME` on node `node`."""
    return Workload(
        uid=f"uid-{name}",
        name=name,
        namespace=namespace,
        identity=identity(namespace, account),
        node="node",
        addresses=addresses,
        protocol=Protocol.HBONE if hbone else Protocol.TCP,
        ready=ready,
    )


def service(
    name: str, *vips: str, namespace: str = "default", ports: Mapping[int, int] | None = None, behind: Iterable[Workload] = ()
) -> Service:
    """A service whose endpoints are `behind`, each with the target ports of `ports` (80 to 8080 unless told)."""
    pairs = tuple((ports if ports is not None else {80: 8080}).items())
    return Service(
        name=name,
        namespace=namespace,
        hostname=f"{name}.{namespace}.svc.cluster.local",
        vips=vips,
        ports=tuple(ServicePort(port, target) for port, target in pairs),
        endpoints=tuple(Endpoint(each.uid, pairs, each.ready) for each in behind),
    )


def policy(
    name: str,
    action: Action,
    *rules: Rule,
    namespace: str = "default",
    scope: Scope = Scope.NAMESPACE,
    dry_run: bool = False,
    reason: str = "",
) -> Policy:
    """An AuthorizationPolicy's policy."""
    return Policy(name, namespace, scope, action, rules, dry_run=dry_run, reason=reason)


def allow(name: str, *matches: Match, dry_run: bool = False) -> Policy:
    """An ALLOW policy with one rule for each match; a match without fields never matches."""
    return policy(name, Action.ALLOW, *(when(match) for match in matches), dry_run=dry_run)


def deny(name: str, *matches: Match, dry_run: bool = False) -> Policy:
    """A DENY policy with one rule for each match."""
    return policy(name, Action.DENY, *(when(match) for match in matches), dry_run=dry_run)


def when(*matches: Match) -> Rule:
    """A rule with one clause: any of these matches."""
    return Rule((Clause(matches),))


def exactly(*values: str) -> tuple[StringMatch, ...]:
    """Exact string matches."""
    return tuple(StringMatch(StringKind.EXACT, value) for value in values)


def principals(*identities: SpiffeId) -> Match:
    """Matches these identities."""
    return Match(principals=exactly(*(each.principal for each in identities)))


ANYBODY = (StringMatch(StringKind.PRESENCE),)
"""Whoever has an identity."""


def index(*values: Workload | Service | Policy) -> Index:
    """An index that holds these values."""
    built = Index()
    built.apply(
        Delta(
            workloads=tuple(each for each in values if isinstance(each, Workload)),
            services=tuple(each for each in values if isinstance(each, Service)),
            policies=tuple(each for each in values if isinstance(each, Policy)),
        )
    )
    return built


# Manifests


def metadata(name: str, namespace: str | None, **more: object) -> Json:
    """The metadata of a manifest; `more` by the names of the fields."""
    return {"name": name, **({} if namespace is None else {"namespace": namespace}), **more}


def namespace(name: str, *, ambient: bool = True) -> Json:
    """A Namespace, in the mesh unless told."""
    labels = {"istio.io/dataplane-mode": "ambient"} if ambient else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata(name, None, labels=labels)}


def pod(
    name: str,
    *addresses: str,
    namespace: str = "default",
    labels: Mapping[str, str] | None = None,
    meta: Mapping[str, object] | None = None,
    spec: Mapping[str, object] | None = None,
    status: Mapping[str, object] | None = None,
) -> Json:
    """A running, ready Pod with UID `uid-NAME` on node `node`; the mappings add to or replace what it has."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**metadata(name, namespace, uid=f"uid-{name}", labels=dict(labels or {})), **(meta or {})},
        "spec": {"nodeName": "node", "containers": [{"name": "main"}], **(spec or {})},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": address} for address in addresses],
            "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}],
            **(status or {}),
        },
    }


def service_manifest(name: str, *vips: str, namespace: str = "default", selector: object = None, **spec: object) -> Json:
    """A Service with port 80 unless `ports` says otherwise; without addresses it is headless."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, namespace),
        "spec": {
            "clusterIP": vips[0] if vips else "None",
            "clusterIPs": list(vips) or ["None"],
            "selector": selector,
            "ports": [{"port": 80}],
            **spec,
        },
    }


def authorization(name: str, *, namespace: str = "default", meta: Mapping[str, object] | None = None, **spec: object) -> Json:
    """An AuthorizationPolicy with this `spec`."""
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {**metadata(name, namespace), **(meta or {})},
        "spec": spec,
    }


def authentication(name: str, mode: str | None = None, *, namespace: str = "default", created: str | None = None, **spec: object) -> Json:
    """A PeerAuthentication with this mode; `created` is a time as text."""
    more = {} if created is None else {"creationTimestamp": created}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": metadata(name, namespace, **more),
        "spec": {**({} if mode is None else {"mtls": {"mode": mode}}), **spec},
    }


def selecting(**labels: str) -> Json:
    """A policy's selector."""
    return {"matchLabels": labels}


def mesh(*bodies: object, options: MeshOptions | None = None) -> MeshState:
    """What these manifests add up to."""
    objects = [parse(body, "test") for body in bodies]
    return derive({key(each): each for each in objects}, options or MeshOptions())


def index_of(state: MeshState) -> Index:
    """An index that holds a state."""
    built = Index()
    built.apply(diff(MeshState(), state))
    return built


def labelled(body: Json, **changes: Mapping[str, str]) -> Json:
    """A manifest with further labels and annotations (`labels={…}`, `annotations={…}`)."""
    before = body["metadata"]
    assert isinstance(before, dict)
    return {**body, "metadata": {**before, **{part: {**before.get(part, {}), **values} for part, values in changes.items()}}}


HBONE_LISTENER: Json = {"name": "mesh", "port": 15008, "protocol": "HBONE"}


def gateway(
    name: str,
    *addresses: str,
    namespace: str = "default",
    class_name: str = "istio-waypoint",
    traffic: str | None = None,
    listeners: Iterable[object] = (HBONE_LISTENER,),
    meta: Mapping[str, object] | None = None,
    **spec: object,
) -> Json:
    """A waypoint's Gateway that can be reached at these addresses or host names."""
    kinds = [{"type": "IPAddress" if each[0].isdigit() or ":" in each else "Hostname", "value": each} for each in addresses]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {**metadata(name, namespace, labels={"istio.io/waypoint-for": traffic} if traffic else {}), **(meta or {})},
        "spec": {"gatewayClassName": class_name, "listeners": list(listeners), **spec},
        **({"status": {"addresses": kinds}} if kinds else {}),
    }


def service_account(name: str, namespace: str = "default") -> Json:
    """A ServiceAccount."""
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(name, namespace)}
