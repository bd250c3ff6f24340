"""DestinationRule: how a host's endpoints are balanced, limited, judged and spoken to.

What cannot be done is not dropped: where leaving it out would weaken something (TLS with files of the proxy's disk, a revocation list, a
tunnel through another proxy) it makes the host refused; elsewhere it is a note for the object's status.
Source: Istio API reference of DestinationRule.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ztunnel.mesh.l7.clusters import (
    Balancer,
    HashKey,
    HashSource,
    LoadBalancing,
    LocalitySettings,
    Outlier,
    PoolLimits,
    RetryBudget,
    Warmup,
)
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import boolean, choice, duration, header_name, integer, number, positive_duration
from ztunnel.mesh.manifests.virtual_hosts import read_export_to, read_host

_SIMPLE = {
    "UNSPECIFIED": Balancer.LEAST_REQUEST,
    "LEAST_REQUEST": Balancer.LEAST_REQUEST,
    "LEAST_CONN": Balancer.LEAST_REQUEST,
    "RANDOM": Balancer.RANDOM,
    "ROUND_ROBIN": Balancer.ROUND_ROBIN,
    "PASSTHROUGH": Balancer.PASSTHROUGH,
}
_MAX_RING = 8 * 1024 * 1024
_MAX_TABLE = 5_000_011
_COUNT = 2**31 - 1
_BLOCKS = ("loadBalancer", "connectionPool", "outlierDetection", "tls", "proxyProtocol", "tunnel", "retryBudget")
_UPGRADES = ("DEFAULT", "DO_NOT_UPGRADE", "UPGRADE")
_FILES = ("clientCertificate", "privateKey", "caCertificates", "caCrl")
SYSTEM_ROOTS = "system"
"""As `caCertificates`: the roots of the operating system."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A connection pool's settings. `upgrade` is DEFAULT, DO_NOT_UPGRADE or UPGRADE."""

    limits: PoolLimits = field(default_factory=PoolLimits)
    upgrade: str = "DEFAULT"
    client_protocol: bool = False


@dataclass(frozen=True, slots=True)
class ClientTls:
    """TLS towards endpoints. `mode` is DISABLE, SIMPLE, MUTUAL or ISTIO_MUTUAL; `credential` names a Secret."""

    mode: str
    sni: str = ""
    names: tuple[str, ...] = ()
    credential: str = ""
    verify: bool = True


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """Each block is None where nothing is said. `ports` replaces the whole policy for a port."""

    balancing: LoadBalancing | None = None
    pool: Pool | None = None
    outlier: Outlier | None = None
    tls: ClientTls | None = None
    proxy_protocol: int | None = None
    retry_budget: RetryBudget | None = None
    ports: dict[int, TrafficPolicy] = field(default_factory=dict)
    refused: str = ""
    """Not empty: nothing may go there under this policy, and why."""


@dataclass(frozen=True, slots=True)
class Subset:
    """A named part of a host's endpoints."""

    name: str
    labels: dict[str, str]
    policy: TrafficPolicy | None = None


@dataclass(frozen=True, slots=True)
class DestinationRuleObject:
    """One DestinationRule. `host` as written, lower-case: short names are not expanded."""

    metadata: Metadata
    host: str
    policy: TrafficPolicy | None = None
    subsets: tuple[Subset, ...] = ()
    export_to: tuple[str, ...] = ()
    selective: bool = False
    """It has a workloadSelector: it is for some sidecars and gateways, not for waypoints."""
    notes: tuple[str, ...] = ()
    """What of it is not done, and why."""
    stand_in: bool = False
    """It stands for a refused document: nothing may go to its host."""


def read_destination_rule(document: Field) -> DestinationRuleObject:
    """A DestinationRule."""
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(("host", "trafficPolicy", "subsets", "exportTo", "workloadSelector"))
    notes: list[str] = []
    policy = spec.get("trafficPolicy")
    selective = not spec.get("workloadSelector").absent
    if selective:
        notes.append("spec.workloadSelector: a rule for chosen sidecars and gateways is not for waypoints")
    subsets: dict[str, Subset] = {}
    for item in spec.get("subsets").items():
        subset = _subset(item, notes)
        if subset.name in subsets:
            raise item.get("name").wrong("another subset has that name")
        subsets[subset.name] = subset
    return DestinationRuleObject(
        metadata=metadata,
        host=read_host(spec.get("host")),
        policy=None if policy.absent else _policy(policy, notes),
        subsets=tuple(subsets.values()),
        export_to=read_export_to(spec.get("exportTo")),
        selective=selective,
        notes=tuple(notes),
    )


def _subset(place: Field, notes: list[str]) -> Subset:
    place.only(("name", "labels", "trafficPolicy"))
    policy = place.get("trafficPolicy")
    return Subset(place.get("name").name(), place.get("labels").labels(), None if policy.absent else _policy(policy, notes))


def _policy(place: Field, notes: list[str], *, port_level: bool = False) -> TrafficPolicy:
    place.only((*_BLOCKS, "port" if port_level else "portLevelSettings"))
    tls, tunnel = place.get("tls"), place.get("tunnel")
    refused = "" if tunnel.absent else f"{tunnel.path}: tunnels through other proxies are not supported"
    client: ClientTls | None = None
    if not tls.absent:
        client, problem = _tls(tls)
        refused = refused or problem
    pool, budget, version = place.get("connectionPool"), place.get("retryBudget"), place.get("proxyProtocol")
    if not version.absent:
        version.only(("version",))
    ports: dict[int, TrafficPolicy] = {}
    for item in () if port_level else place.get("portLevelSettings").items():
        item.get("port").only(("number",))
        number = item.get("port").get("number").port()
        if number in ports:
            raise item.get("port").wrong("settings of this port stand there already")
        ports[number] = _policy(item, notes, port_level=True)
    if refused:
        notes.append(refused)
    return TrafficPolicy(
        balancing=None if place.get("loadBalancer").absent else _balancing(place.get("loadBalancer"), notes),
        pool=None if pool.absent else _pool(pool, notes),
        outlier=None if place.get("outlierDetection").absent else _outlier(place.get("outlierDetection")),
        tls=client,
        proxy_protocol=None if version.absent else int(choice(version.get("version"), ("V1", "V2"), "V1")[1]),
        retry_budget=None if budget.absent else _retry_budget(budget, notes),
        ports=ports,
        refused=refused,
    )


# ----------------------------------------------------------------------------------------------------------- balancing


def _balancing(place: Field, notes: list[str]) -> LoadBalancing:
    place.only(("simple", "consistentHash", "localityLbSetting", "warmup", "warmupDurationSecs", "zoneAwareLbSetting"))
    simple, hashing = place.get("simple"), place.get("consistentHash")
    if not simple.absent and not hashing.absent:
        raise place.error("simple or consistentHash, not both")
    found = LoadBalancing(balancer=_SIMPLE[choice(simple, _SIMPLE, "UNSPECIFIED")])
    if not hashing.absent:
        found = _hashing(hashing)
    zones = place.get("zoneAwareLbSetting")
    if not zones.absent:
        notes.append(f"{zones.path}: zone-aware balancing is not done; localities are preferred as localityLbSetting says")
    return replace(found, warmup=_warmup(place), locality=_locality(place.get("localityLbSetting")))


def _hashing(place: Field) -> LoadBalancing:
    keys = ("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName")
    place.only((*keys, "ringHash", "maglev", "minimumRingSize"))
    chosen = [name for name in keys if not place.get(name).absent and place.get(name).value is not False]
    if len(chosen) != 1:
        raise place.error(f"exactly one of {', '.join(keys)}")
    value = place.get(chosen[0])
    if chosen[0] == "httpHeaderName":
        key = HashKey(HashSource.HEADER, header_name(value))
    elif chosen[0] == "httpQueryParameterName":
        key = HashKey(HashSource.QUERY, value.text())
    elif chosen[0] == "useSourceIp":
        value.boolean()
        key = HashKey(HashSource.SOURCE_IP)
    else:
        key = _cookie(value)
    ring, table = place.get("ringHash"), place.get("maglev")
    if not ring.absent and not table.absent:
        raise place.error("ringHash or maglev, not both")
    if not table.absent:
        table.only(("tableSize",))
        size = integer(table.get("tableSize"), 1, _MAX_TABLE, 65537)
        if size < 2 or any(size % divisor == 0 for divisor in range(2, int(size**0.5) + 1)):
            raise table.get("tableSize").wrong("not a prime number")
        return LoadBalancing(Balancer.MAGLEV, (key,), table_size=size)
    ring.only(("minimumRingSize",))
    size = integer(ring.get("minimumRingSize"), 0, _MAX_RING, integer(place.get("minimumRingSize"), 0, _MAX_RING, 1024))
    return LoadBalancing(Balancer.RING_HASH, (key,), ring_minimum=size or 1024)


def _cookie(place: Field) -> HashKey:
    place.only(("name", "path", "ttl", "attributes"))
    attributes = []
    for item in place.get("attributes").items():
        item.only(("name", "value"))
        attributes.append((item.get("name").text(), "" if item.get("value").value == "" else item.get("value").text("")))
    ttl = place.get("ttl")
    return HashKey(
        HashSource.COOKIE,
        place.get("name").text(),
        "" if place.get("path").value == "" else place.get("path").text(""),
        None if ttl.absent else duration(ttl),
        tuple(attributes),
    )


def _warmup(place: Field) -> Warmup | None:
    old, new = place.get("warmupDurationSecs"), place.get("warmup")
    if new.absent:
        return None if old.absent else Warmup(positive_duration(old))
    new.only(("duration", "minimumPercent", "aggression"))
    return Warmup(
        seconds=positive_duration(new.get("duration")),
        minimum=number(new.get("minimumPercent"), 0, 100, 10) / 100,
        aggression=number(new.get("aggression"), 1, 1000, 1),
    )


def _locality(place: Field) -> LocalitySettings:
    place.only(("enabled", "distribute", "failover", "failoverPriority"))
    distribute, failover = [], []
    for item in place.get("distribute").items():
        item.only(("from", "to"))
        shares = tuple((key, integer(member, 0, 100)) for key, member in item.get("to").texts())
        if sum(share for _, share in shares) != 100:
            raise item.get("to").error("the shares must add up to 100")
        distribute.append((item.get("from").text(), shares))
    for item in place.get("failover").items():
        item.only(("from", "to"))
        failover.append((item.get("from").text(), item.get("to").text()))
    priority = tuple(item.text() for item in place.get("failoverPriority").items())
    if distribute and (failover or priority):
        raise place.error("distribute, or failover and failoverPriority, not both")
    return LocalitySettings(
        enabled=boolean(place.get("enabled"), True),
        distribute=tuple(distribute),
        failover=tuple(failover),
        failover_priority=priority,
    )


# -------------------------------------------------------------------------------------------------- pools and outliers


def _pool(place: Field, notes: list[str]) -> Pool:
    place.only(("tcp", "http"))
    tcp, http = place.get("tcp"), place.get("http")
    tcp.only(("maxConnections", "connectTimeout", "tcpKeepalive", "maxConnectionDuration", "idleTimeout"))
    http.only(
        (
            *("http1MaxPendingRequests", "http2MaxRequests", "maxRequestsPerConnection", "maxRetries", "idleTimeout"),
            *("h2UpgradePolicy", "useClientProtocol", "maxConcurrentStreams", "http2KeepAlive"),
        )
    )
    plain = PoolLimits()
    keepalive = tcp.get("tcpKeepalive")
    keepalive.only(("probes", "time", "interval"))
    ping = http.get("http2KeepAlive")
    if not ping.absent:
        notes.append(f"{ping.path}: PINGs on upstream connections are not sent; tcpKeepalive is done")
    # A connection that is a stream of a tunnel has one idle time; HTTP's is the more particular one.
    idle = http.get("idleTimeout") if not http.get("idleTimeout").absent else tcp.get("idleTimeout")
    limits = PoolLimits(
        max_connections=_count(tcp, "maxConnections", plain.max_connections),
        connect_timeout=duration(tcp.get("connectTimeout"), 0.0) or plain.connect_timeout,
        idle_timeout=duration(idle, plain.idle_timeout),
        max_connection_duration=duration(tcp.get("maxConnectionDuration"), 0.0),
        keepalive=None
        if keepalive.absent
        else (
            duration(keepalive.get("time"), 7200.0),
            duration(keepalive.get("interval"), 75.0),
            integer(keepalive.get("probes"), 0, 1000, 0) or 9,
        ),
        max_pending=_count(http, "http1MaxPendingRequests", plain.max_pending),
        max_requests=_count(http, "http2MaxRequests", plain.max_requests),
        max_retries=_count(http, "maxRetries", plain.max_retries),
        max_requests_per_connection=_count(http, "maxRequestsPerConnection", 0),
        max_concurrent_streams=_count(http, "maxConcurrentStreams", plain.max_concurrent_streams),
    )
    upgrade = choice(http.get("h2UpgradePolicy"), _UPGRADES, "DEFAULT")
    client = http.get("useClientProtocol").boolean()
    if client and upgrade == "UPGRADE":
        raise http.get("useClientProtocol").error("not with h2UpgradePolicy UPGRADE")
    return Pool(limits, upgrade, client)


def _count(place: Field, name: str, default: int) -> int:
    """0 is "not said", as in Istio."""
    return integer(place.get(name), 0, _COUNT, 0) or default


def _retry_budget(place: Field, notes: list[str]) -> RetryBudget:
    place.only(("percent", "minRetryConcurrency", "budgetInterval"))
    if duration(place.get("budgetInterval"), 0.0):
        notes.append(f"{place.path}.budgetInterval: budgets are of the requests of the moment")
    return RetryBudget(number(place.get("percent"), 0, 100, 20) / 100, integer(place.get("minRetryConcurrency"), 0, _COUNT, 3))


def _outlier(place: Field) -> Outlier:
    place.only(
        (
            *("consecutiveErrors", "consecutive5xxErrors", "consecutiveGatewayErrors", "splitExternalLocalOriginErrors"),
            *("consecutiveLocalOriginFailures", "interval", "baseEjectionTime", "maxEjectionPercent", "minHealthPercent"),
            "outlierDetectionHttpErrorCodes",
        )
    )
    plain = Outlier()
    return Outlier(
        consecutive_5xx=integer(place.get("consecutive5xxErrors"), 0, _COUNT, plain.consecutive_5xx),
        # The older name counted gateway errors.
        consecutive_gateway=integer(
            place.get("consecutiveGatewayErrors"), 0, _COUNT, integer(place.get("consecutiveErrors"), 0, _COUNT, 0)
        ),
        split_local=place.get("splitExternalLocalOriginErrors").boolean(),
        consecutive_local=integer(place.get("consecutiveLocalOriginFailures"), 0, _COUNT, plain.consecutive_local),
        interval=positive_duration(place.get("interval"), plain.interval),
        base_ejection=positive_duration(place.get("baseEjectionTime"), plain.base_ejection),
        max_ejection_percent=integer(place.get("maxEjectionPercent"), 0, 100, plain.max_ejection_percent),
        min_health_percent=integer(place.get("minHealthPercent"), 0, 100, plain.min_health_percent),
        http_errors=tuple(integer(item, 100, 599) for item in place.get("outlierDetectionHttpErrorCodes").items()),
    )


# ----------------------------------------------------------------------------------------------------------------- TLS


def _tls(place: Field) -> tuple[ClientTls, str]:
    """The settings, and why they cannot be carried out."""
    place.only(("mode", "credentialName", "subjectAltNames", "sni", "insecureSkipVerify", *_FILES))
    mode = choice(place.get("mode"), ("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"), "DISABLE")
    client = ClientTls(
        mode=mode,
        sni=place.get("sni").text(""),
        names=tuple(item.text() for item in place.get("subjectAltNames").items()),
        credential=place.get("credentialName").text(""),
        verify=not place.get("insecureSkipVerify").boolean(),
    )
    if mode not in ("SIMPLE", "MUTUAL"):
        return client, ""
    for name in _FILES:
        if not place.get(name).absent and (name, place.get(name).value) != ("caCertificates", SYSTEM_ROOTS):
            return client, f"{place.path}.{name}: files of the proxy's own disk are not read; use credentialName"
    if mode == "MUTUAL" and not client.credential:
        raise place.get("credentialName").error("required with MUTUAL")
    return client, ""
