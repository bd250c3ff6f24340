"""Every setting of the node agent: its name, unit, default and why, in one place.

`parse` is pure: mappings in, `Settings` out, all problems at once. A YAML file gives nested keys (`admin.metrics_port`), the
environment overrides each (`ZTUNNEL_ADMIN_METRICS_PORT`). Add a setting by adding a field with a docstring to one of the
classes below: its type and its metadata are what the parser checks, nothing else needs to know.

Invariant: a `Settings` that exists can be used; nothing later in the program checks a range again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from ztunnel.configuration import Reader, between, matching
from ztunnel.mesh.ports import ILLEGAL_TARGETS

_DNS_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_ADDRESS = r"(\[[0-9a-f:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):[1-9][0-9]{0,4}"
_TRUST_DOMAIN = r"[a-z0-9._-]{1,255}"


class LogFormat(Enum):
    """Shape of a log line."""

    TEXT = "text"
    JSON = "json"


class LogLevel(Enum):
    """Least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class RecordLayer(Enum):
    """Which implementation carries TLS records after the handshake (decision D2)."""

    OWN = "own"
    OPENSSL = "openssl"
    KERNEL = "kernel"


class SameNode(Enum):
    """How two meshed pods of one node reach each other."""

    ENCRYPT = "encrypt"
    PLAINTEXT = "plaintext"


class RedirectionStatus(Enum):
    """How the agent learns that another node's pod is really captured, not merely labelled."""

    LABELS = "labels"
    ANNOTATION = "annotation"


class WaypointFallback(Enum):
    """What becomes of connections whose waypoint is missing or not ready."""

    REFUSE = "refuse"
    L4 = "l4"


class NetnsSearch(Enum):
    """How pods' network namespaces are found."""

    DIRECTORY = "directory"
    NODE = "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcesSettings:
    """What the mesh is read from: `files` or `kubernetes`, one of them."""

    files: Path | None = None
    """Directory of Kubernetes manifests (.yaml, .yml, .json), watched for change."""
    kubernetes: bool = False
    """Follow the API server of the cluster that we run in, as our pod's service account, or the one that `kubeconfig` names."""
    kubeconfig: Path | None = None
    """Default none: KUBECONFIG, else the pod's own service account, else ~/.kube/config."""
    context: str | None = field(default=None, metadata=matching(r"[^\x00-\x1f]{1,253}", "a context's name"))
    """Of the kubeconfig; default its current one."""
    redirection_status: RedirectionStatus | None = None
    """`annotation`: a pod is reached by HBONE only once it carries ambient.istio.io/redirection=enabled, as in Istio; default with
    `kubernetes`, where the agents write it. `labels`: as soon as it is labelled; default with `files`, where often nobody writes it."""
    poll_seconds: float = field(default=0.25, metadata=between(0.02, 60))
    """Seconds between two looks at the directory; 0.25: a change is in force in under a second, a look costs microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodsSettings:
    """Where pods' network namespaces are found and what is said about them."""

    find: NetnsSearch = NetnsSearch.DIRECTORY
    """`directory` (default): somebody keeps `netns_directory`. `node`, for Kubernetes: told by CNI (see `cni`), else pinned by the
    container runtime in `runtime_directory`, else by the pods' processes in `proc_directory`."""
    netns_directory: Path = Path("/run/ztunnel/netns")
    """One entry per pod, named by its UID: a bind-mounted network namespace or a symbolic link to one."""
    runtime_directory: Path = Path("/var/run/netns")
    """Where containerd and CRI-O pin network namespaces; in a container, the host's, with mount propagation HostToContainer."""
    proc_directory: Path = Path("/proc")
    """The host's processes; in a container, its own /proc with hostPID, or the host's mounted elsewhere."""
    status_directory: Path | None = None
    """One file `<uid>` per pod with `enabled` or `pending` is kept here (renamed into place), for whoever plays the API server
    to set ambient.istio.io/redirection. Default none: nobody reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaSettings:
    """Where certificates come from: an authority that is asked, or without `address` the embedded one."""

    address: str | None = field(default=None, metadata=matching(_ADDRESS, "host:port"))
    """`host:port` of an authority that speaks Istio's protocol: `ztunnel ca`, or istiod (port 15012). Default none: the embedded one."""
    server_name: str | None = field(default=None, metadata=matching(_DNS_NAME, "a DNS name"))
    """What the authority's certificate must be for. Default: the host of `address`."""
    roots_file: Path = Path("/var/run/secrets/ztunnel/roots/root-cert.pem")
    """Whom to believe that it is the authority, in PEM: the ConfigMap that it keeps, mounted. Looked at for changes every ten seconds."""
    token_file: Path = Path("/var/run/secrets/tokens/istio-token")
    """This agent's projected service account token, audience `istio-ca`, read for each request. Default as Istio."""
    directory: Path = Path("/var/lib/ztunnel/ca")
    """Of the embedded authority: holds the root's key (mode 0600) and certificate; made on first start, shared by agents that must trust
    each other."""
    leaf_hours: float = field(default=24.0, metadata=between(0.001, 24 * 90))
    """Life of a workload certificate in hours; 24 as Istio: short enough to need no revocation, renewed at half of it. An authority that
    is asked may give less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    """Ports and socket for operators."""

    socket: Path = field(default=Path("/run/ztunnel/agent.sock"), metadata={"max_bytes": 107})
    """Unix socket (mode 0600) of the control API that the command line talks to; the kernel allows 107 bytes of path."""
    address: str = "*"
    """Where the metrics and readiness ports listen: an IP literal, or `*` (default) for every IPv4 and IPv6 address, because
    kubelet and Prometheus come from elsewhere."""
    metrics_port: int = field(default=15020, metadata=between(0, 65535))
    """Prometheus; 15020 as Istio, so existing scrape configurations fit. 0 picks a free port."""
    readiness_port: int = field(default=15021, metadata=between(0, 65535))
    """/healthz/ready; 15021 as Istio. 0 picks a free port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelSettings:
    """HBONE tunnels between nodes."""

    records: RecordLayer = RecordLayer.OWN
    """`own` (default: fewer copies, KeyUpdate before the AES-GCM limit), `openssl` (the reference and the fallback) or `kernel`: the kernel
    seals and opens where it can (Linux 6.14 with CONFIG_TLS; `modprobe tls`). It is tried when the agent starts; where it cannot, the log
    says why, and it is `own`. `ztunnel tunnels` tells what each tunnel has."""
    optimistic_data: bool = True
    """Send DATA behind the CONNECT request before its answer, to peers that say they take it (ours do); saves a round trip."""
    same_node: SameNode = SameNode.ENCRYPT
    """`encrypt` (default): a tunnel like any other. `plaintext`: bytes between two meshed pods of this node never leave the kernel,
    so they may go without TLS; identities, policies and accounting stay the same."""
    idle_seconds: float = field(default=300.0, metadata=between(1, 86400))
    """A tunnel without streams is closed after this; 300 as Istio: a burst later finds it, an idle peer costs nothing for long."""
    max_streams: int = field(default=100, metadata=between(1, 1000))
    """Streams on one outbound tunnel before another is opened; 100 as Istio, and what most peers allow."""
    ping_seconds: float = field(default=10.0, metadata=between(0.1, 3600))
    """A tunnel that has been silent for this long is asked for a sign of life; 10 as Istio."""
    ping_timeout_seconds: float = field(default=20.0, metadata=between(0.1, 3600))
    """A peer that owes such a sign for this long is gone, and with it every stream of its tunnel; 20 as Istio."""
    report_seconds: float = field(default=5.0, metadata=between(0.1, 3600))
    """Between two reports of the bytes of a live connection; 5: under any scrape interval, a long connection shows while it lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinesSettings:
    """How long a peer may keep us waiting, in seconds."""

    handshake_seconds: float = field(default=10.0, metadata=between(0.1, 300))
    """TLS and HTTP/2 preface, both directions; 10: a healthy one takes milliseconds, a lost SYN-ACK is retried at 1, 3 and 7 s."""
    connect_seconds: float = field(default=10.0, metadata=between(0.1, 300))
    """TCP connect to an application or a peer; 10 for the same retries."""
    connect_response_seconds: float = field(default=15.0, metadata=between(0.1, 300))
    """CONNECT to its answer; 15: the peer's own connect deadline of 10 plus a slow handshake behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentSettings:
    """How pods come into the mesh and stay in it."""

    grace_seconds: float = field(default=5.0, metadata=between(0, 600))
    """How long connections older than the enrolment have to show themselves where the kernel cannot list them, before everything
    else is captured; 5: more than TCP's first retransmissions. They are kept then, all others are tunnelled at once."""
    linger_seconds: float = field(default=2.0, metadata=between(0, 60))
    """How long a pod that leaves the mesh is still served on 15008 even when it has no connections; 2: peers on other nodes hear of it
    a little later, and until then they tunnel."""
    drift_seconds: float = field(default=10.0, metadata=between(1, 3600))
    """Between two checks that a pod's rules are still there; 10: while they are flushed, plaintext may leave; a check costs a few ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaypointSettings:
    """L7 proxies in front of services and workloads (`istio.io/use-waypoint`)."""

    fallback: WaypointFallback = WaypointFallback.REFUSE
    """`refuse` (default): while the waypoint that a label asks for is missing or not ready, connections are refused, because its policies
    would not be enforced. `l4`: they go straight to the pod, as in Istio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbesSettings:
    """Kubelet's probes (HTTP, TCP, gRPC) of pods that take no plaintext."""

    enabled: bool = False
    """Let kubelet, and no other process of the node, reach captured pods past the mesh. Wants the host's processes in
    `pods.proc_directory`."""
    cgroup_directory: Path = Path("/sys/fs/cgroup")
    """The host's control groups; in a container, the host's mounted somewhere. Without them every process of kubelet's user counts
    as kubelet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CniSettings:
    """New pods wait, in the container runtime's CNI chain, until they are captured. Paths are on the host and, where the agent is in a
    container, mounted at the same place, but for the two directories."""

    enabled: bool = False
    """Serve the plugin. Wants `pods: {find: node}`."""
    socket: Path = field(default=Path("/run/ztunnel/cni.sock"), metadata={"max_bytes": 107})
    """Where the plugin reaches the agent (mode 0600)."""
    plugin: Path | None = None
    """The program to install on the host (made by `scripts/cni-plugin`). Default none: somebody else puts it and its entry there."""
    bin_directory: Path = Path("/opt/cni/bin")
    """Where the host's CNI plugins are, as mounted for the agent."""
    conf_directory: Path = Path("/etc/cni/net.d")
    """Where the host's network configuration is, as mounted for the agent; our entry goes to the end of its first list."""
    remove_at_exit: bool = False
    """Take program and entry away at every SIGTERM. While one agent follows another, new pods should wait: see `daemon_set`."""
    known_file: Path = Path("/var/lib/ztunnel/cni/known")
    """The list of pods and namespaces outside of the mesh: whose pods start while the agent is away. It should outlive a reboot."""
    add_seconds: float = field(default=15.0, metadata=between(0.1, 120))
    """How long a new pod may wait for its capture before it is refused, for kubelet to try again; capturing takes some tens of
    milliseconds, the rest is for news of the API server and certificates that are late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """Logs go to stderr, one line each."""

    format: LogFormat = LogFormat.TEXT
    """`text` (default, for people and for Istio's parsers) or `json` (for log stores)."""
    level: LogLevel = LogLevel.INFO
    """`info` (default) has one line per connection, at its end; `debug` the steps of pods' enrolment too. Can be changed at run time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSettings:
    """Bounds on what others can make us hold. One that is hit shows in ztunnel_limit_hits_total, or as a refused manifest."""

    manifest_bytes: int = field(default=16 << 20, metadata=between(1024, 1 << 30))
    """Largest manifest file; 16 MiB holds about ten thousand pods."""
    manifest_files: int = field(default=10_000, metadata=between(1, 1_000_000))
    """Files in the manifest directory; more is a directory that was given by mistake."""
    manifest_documents: int = field(default=100_000, metadata=between(1, 10_000_000))
    """Objects in one file; bounds memory that small documents can take."""
    connections: int = field(default=50_000, metadata=between(1, 10_000_000))
    """Live connections of the node; each takes one descriptor (two without a tunnel) and under two kilobytes. Further ones are reset."""
    tunnels_per_peer: int = field(default=64, metadata=between(1, 10_000))
    """Outbound tunnels from one pod to one peer pod: 64 times tunnel.max_streams connections."""
    handshakes_per_pod: int = field(default=512, metadata=between(1, 100_000))
    """TLS handshakes under way on one pod's 15008; each may hold 64 KiB until its deadline."""
    metric_series: int = field(default=20_000, metadata=between(100, 1_000_000))
    """Label combinations of one metric; further ones are summed in a series labelled `overflow`. 20 000: a scrape stays under 15 MB."""
    admin_connections: int = field(default=64, metadata=between(1, 10_000))
    """Open connections on each of the metrics, readiness and control listeners; scrapers need two or three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that `ztunnel run` can be told."""

    node: str = field(metadata=matching(_DNS_NAME, "a node name: lower-case letters, digits, '-' and '.'"))
    """This node's name, as in pods' spec.nodeName. Required; the command line takes it from NODE_NAME, too."""
    trust_domain: str = field(default="cluster.local", metadata=matching(_TRUST_DOMAIN, "a trust domain in lower case"))
    """First part of every SPIFFE identity; peers of another trust domain are refused. Default as Istio."""
    cluster: str = field(default="Kubernetes", metadata=matching(r"[A-Za-z0-9._-]{1,253}", "a cluster name"))
    """Cluster name in metrics and logs. Default as Istio."""
    cluster_domain: str = field(default="cluster.local", metadata=matching(_DNS_NAME, "a DNS domain"))
    """DNS suffix of services. Default as Kubernetes."""
    root_namespace: str = field(default="istio-system", metadata=matching(_DNS_NAME, "a namespace"))
    """Policies without a selector in this namespace apply to the whole mesh. Default as Istio."""
    drain_seconds: float = field(default=5.0, metadata=between(0, 3600))
    """After SIGTERM, how long live connections may finish; 5 as Istio's default, keep it under the pod's termination grace."""
    daemon_set: str | None = field(default=None, metadata=matching(rf"{_DNS_NAME}/{_DNS_NAME}", "namespace/name"))
    """The DaemonSet that this agent is of. When that is deleted, an agent that is told to end leaves nothing behind: plugin and rules go,
    and pods' traffic is no longer the mesh's. Default none: everything stays, and traffic is refused until the next agent."""
    workers: int = field(default=1, metadata=between(0, 64))
    """Data-plane processes: 1 (default), one per core at most for a busy node, or 0 to run the same loop inside the daemon, for
    debugging. Each has a pool of tunnels of its own."""
    sources: SourcesSettings
    pods: PodsSettings = PodsSettings()
    ca: CaSettings = CaSettings()
    admin: AdminSettings = AdminSettings()
    tunnel: TunnelSettings = TunnelSettings()
    deadlines: DeadlinesSettings = DeadlinesSettings()
    enrolment: EnrolmentSettings = EnrolmentSettings()
    waypoint: WaypointSettings = WaypointSettings()
    probes: ProbesSettings = ProbesSettings()
    cni: CniSettings = CniSettings()
    log: LogSettings = LogSettings()
    limits: LimitsSettings = LimitsSettings()


class OneSource(Protocol):
    """Settings of where the mesh is read from, this program's or another's."""

    @property
    def files(self) -> Path | None: ...

    @property
    def kubernetes(self) -> bool: ...

    @property
    def kubeconfig(self) -> Path | None: ...

    @property
    def context(self) -> str | None: ...


def source_contradictions(sources: OneSource) -> Iterator[str]:
    """What of `sources` cannot be."""
    if (sources.files is not None) == sources.kubernetes:
        yield "sources: files or kubernetes: true is required" + (", not both" if sources.kubernetes else "")
    if not sources.kubernetes:
        for key, value in (("kubeconfig", sources.kubeconfig), ("context", sources.context)):
            if value is not None:
                yield f"sources.{key}: wants sources.kubernetes: true"


def _contradictions(settings: Settings) -> Iterator[str]:
    admin = settings.admin
    yield from source_contradictions(settings.sources)
    ports = {"admin.metrics_port": admin.metrics_port, "admin.readiness_port": admin.readiness_port}
    for key, port in ports.items():
        if port in ILLEGAL_TARGETS:
            yield f"{key}: {port} belongs to the data plane"
    if admin.metrics_port and admin.metrics_port == admin.readiness_port:
        yield f"admin.readiness_port: {admin.readiness_port} is admin.metrics_port as well"
    if settings.ca.address is not None and int(settings.ca.address.rpartition(":")[2]) > 65535:
        yield f"ca.address: {settings.ca.address} has no port"
    if settings.daemon_set is not None and not settings.sources.kubernetes:
        yield "daemon_set: wants sources.kubernetes"
    if settings.cni.enabled and settings.pods.find is not NetnsSearch.NODE:
        yield "cni.enabled: wants pods.find: node"
    if admin.address != "*":
        try:
            ip_address(admin.address)
        except ValueError:
            yield f"admin.address: an IP address or * is expected, found {admin.address[:100]!r}"


_READER = Reader(Settings, "ZTUNNEL_", _contradictions)


def parse(config: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """The agent's settings; see `configuration.Reader.parse`."""
    return _READER.parse(config, environ)


def variable(key: str) -> str:
    """The environment variable that overrides a setting."""
    return _READER.variable(key)
