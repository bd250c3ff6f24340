"""How an API server is reached and who we are there: from the pod that we run in, or from a kubeconfig.

A kubeconfig is read as kubectl reads it: `KUBECONFIG` may list files, of which the first that names something wins, and paths in a
file are relative to it. What a daemon cannot do (ask a person) or should not silently do without is refused.
"""

from __future__ import annotations

import os
import ssl
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # it is there; typeshed leaves it out

from ztunnel.kube.credentials import Credentials, Files, Login, Plugin, basic, bearer, decoded
from ztunnel.kube.errors import KubeError
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.fields import Field
from ztunnel.runtime.documents import DocumentError, read_yaml

ACCOUNT_DIRECTORY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet puts a pod's token, its namespace and the cluster's CA."""
CONFIG_BYTES = 4 << 20
EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class BadConfig(KubeError):
    """No API server can be reached with this configuration; the text names the file and the field."""


@dataclass(frozen=True, slots=True)
class Access:
    """One API server and who we are there.

    Attributes:
        server: its URL without a trailing slash; it may have a path.
        authority_file: with the certificates that sign the server's; read again when it changes.
        authority_pem: the same, given inline. Neither: those that this machine trusts.
        server_name: the name in the server's certificate where it is not the URL's host.
        proxy: URL of an HTTP proxy.
        headers: of every request.
    """

    server: str
    credentials: Credentials
    namespace: str = "default"
    authority_file: Path | None = None
    authority_pem: bytes = b""
    verify: bool = True
    server_name: str = ""
    proxy: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def tls(self, login: Login) -> ssl.SSLContext:
        """A TLS configuration that trusts the server and presents the login's certificate.

        Raises:
            BadConfig: a certificate or key that cannot be used.
        """
        context = ssl.create_default_context() if self.trusts_machine else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if not self.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            elif not self.trusts_machine:
                context.load_verify_locations(cadata=self.authority().decode("ascii", "replace"))
            if login.certificate_pem:
                with NamedTemporaryFile() as file:  # mode 0600; OpenSSL reads certificates from files only
                    file.write(login.certificate_pem + b"\n" + login.key_pem)
                    file.flush()
                    context.load_cert_chain(file.name, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise BadConfig(f"{self.server}: a certificate or key of ours or its authority's cannot be used: {error}") from error
        return context

    @property
    def trusts_machine(self) -> bool:
        """No authority was given: any that this machine knows will do."""
        return self.verify and self.authority_file is None and not self.authority_pem

    def authority(self) -> bytes:
        """The present certificates of the authority, PEM; empty when there are none of its own.

        Raises:
            BadConfig: the file cannot be read.
        """
        return self.authority_pem if self.authority_file is None else _content(self.authority_file)


def _no_password() -> bytes:
    # Else OpenSSL would ask at the terminal.
    return b""


def in_cluster(environ: Mapping[str, str], directory: Path = ACCOUNT_DIRECTORY) -> Access:
    """The API server of the cluster that we run in, as our pod's service account.

    Raises:
        BadConfig: we are not in a pod, or its token is not mounted.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise BadConfig("KUBERNETES_SERVICE_HOST is not set: not in a pod; name a kubeconfig")
    if not (directory / "token").exists():
        raise BadConfig(f"{directory}/token is not there: the pod's spec says automountServiceAccountToken: false")
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Access(
        server=server,
        credentials=Files(token=directory / "token"),
        namespace=_text(directory / "namespace") or "default",
        authority_file=directory / "ca.crt",
        proxy=_proxy(server, environ),
    )


def load(environ: Mapping[str, str], kubeconfig: Path | None = None, context: str = "") -> Access:
    """The access that a program of ours has: the given kubeconfig, else `KUBECONFIG`, else the pod that it runs in, else ~/.kube/config.

    Args:
        context: of the kubeconfig; its current one if empty.
    Raises:
        BadConfig: nothing usable.
    """
    if kubeconfig is not None:
        return from_files([kubeconfig], context, environ)
    listed = [Path(each) for each in environ.get("KUBECONFIG", "").split(os.pathsep) if each]
    if listed:
        return from_files(listed, context, environ)
    if environ.get("KUBERNETES_SERVICE_HOST") and not context:
        return in_cluster(environ)
    home = Path(environ.get("HOME", "/")) / ".kube" / "config"
    if not home.exists():
        raise BadConfig(f"no API server: no kubeconfig is named, {home} is not there, and this is no pod")
    return from_files([home], context, environ)


def from_files(paths: Sequence[Path], context: str, environ: Mapping[str, str]) -> Access:
    """The access that kubeconfig files describe; the first that has a name wins, and those that are not there are passed over.

    Raises:
        BadConfig: naming file and field.
    """
    there = [path for path in paths if path.exists()] or list(paths[:1])
    merged = _Merged()
    for path in there:
        try:
            merged.add(path, _document(path))
        except ManifestError as error:
            raise BadConfig(str(error)) from error
    try:
        return _access(merged, context, environ)
    except ManifestError as error:
        raise BadConfig(str(error)) from error


@dataclass(slots=True)
class _Merged:
    """Named entries of several files, each with the directory that its paths are relative to."""

    clusters: dict[str, tuple[Field, Path]] = field(default_factory=dict)
    users: dict[str, tuple[Field, Path]] = field(default_factory=dict)
    contexts: dict[str, tuple[Field, Path]] = field(default_factory=dict)
    current: str = ""
    files: list[Path] = field(default_factory=list)

    def add(self, path: Path, document: Field) -> None:
        self.files.append(path)
        self.current = self.current or _optional(document.get("current-context"))
        for named, inner, into in (
            ("clusters", "cluster", self.clusters),
            ("users", "user", self.users),
            ("contexts", "context", self.contexts),
        ):
            for item in document.get(named).items():
                into.setdefault(item.get("name").text(), (item.get(inner), path.parent))

    def one(self, among: dict[str, tuple[Field, Path]], what: str, name: str) -> tuple[Field, Path]:
        if name not in among:
            known = ", ".join(sorted(among)[:10]) or "none"
            raise BadConfig(f"{', '.join(map(str, self.files))}: no {what} is called {name!r}; there are: {known}")
        return among[name]


def _access(merged: _Merged, context: str, environ: Mapping[str, str]) -> Access:
    wanted = context or merged.current
    if not wanted:
        raise BadConfig(f"{', '.join(map(str, merged.files))}: no current-context, and none is asked for")
    chosen, _ = merged.one(merged.contexts, "context", wanted)
    cluster, beside = merged.one(merged.clusters, "cluster", chosen.get("cluster").text())
    name = _optional(chosen.get("user"))
    user, user_beside = merged.one(merged.users, "user", name) if name else (Field("", "user", {}), beside)
    server = cluster.get("server").text().rstrip("/")
    parts = urlsplit(server)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise cluster.get("server").wrong("not a URL that begins with https://")
    if parts.scheme == "http" and user.value:
        raise cluster.get("server").error("credentials are not sent over plain http")
    insecure = cluster.get("insecure-skip-tls-verify").boolean()
    file = _path(cluster.get("certificate-authority"), beside)
    data = cluster.get("certificate-authority-data")
    if insecure and (file is not None or not data.absent):
        raise cluster.get("insecure-skip-tls-verify").error("it cannot be true beside a certificate authority: leave one of them out")
    proxy = _optional(cluster.get("proxy-url"))
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        raise cluster.get("proxy-url").error("only http and https proxies are spoken to")
    access = Access(
        server=server,
        credentials=Files(),
        namespace=_optional(chosen.get("namespace")) or "default",
        authority_file=None if not data.absent else file,
        authority_pem=b"" if data.absent else _decoded(data),
        verify=not insecure,
        server_name=_optional(cluster.get("tls-server-name")),
        proxy=proxy or _proxy(server, environ),
        headers=tuple(_impersonation(user)),
    )
    return _with_credentials(access, user, user_beside, cluster)


def _with_credentials(access: Access, user: Field, beside: Path, cluster: Field) -> Access:
    if not user.get("auth-provider").absent:
        raise user.get("auth-provider").error("Kubernetes has no auth providers any more; use exec")
    fixed = Login(
        _authorization(user),
        b"" if user.get("client-certificate-data").absent else _decoded(user.get("client-certificate-data")),
        b"" if user.get("client-key-data").absent else _decoded(user.get("client-key-data")),
    )
    files = Files(fixed, _path(user.get("tokenFile"), beside))
    files.certificate = None if fixed.certificate_pem else _path(user.get("client-certificate"), beside)
    files.key = None if fixed.key_pem else _path(user.get("client-key"), beside)
    has_certificate, has_key = bool(fixed.certificate_pem or files.certificate), bool(fixed.key_pem or files.key)
    if has_certificate != has_key:
        missing = "client-key" if has_certificate else "client-certificate"
        raise user.get(missing).error("a client certificate and its key go together")
    credentials: Credentials = files
    if not user.get("exec").absent:
        credentials = _plugin(user.get("exec"), beside, cluster, access)
    return replace(access, credentials=credentials)


def _authorization(user: Field) -> str:
    if not user.get("token").absent:
        return bearer(user.get("token").text(), "token")
    if not user.get("username").absent:
        return basic(user.get("username").text(), _optional(user.get("password")))
    return ""


def _plugin(place: Field, beside: Path, cluster: Field, access: Access) -> Plugin:
    version = place.get("apiVersion")
    if version.text() not in EXEC_VERSIONS:
        raise version.wrong(f"not one of {', '.join(EXEC_VERSIONS)}")
    if place.get("interactiveMode").text("IfAvailable") == "Always":
        raise place.get("interactiveMode").error("a program that wants to ask a person cannot be used here")
    command = place.get("command").text()
    told: dict[str, object] | None = None
    if place.get("provideClusterInfo").boolean():
        told = {"server": access.server, "insecure-skip-tls-verify": not access.verify, "tls-server-name": access.server_name}
        if access.proxy:
            told["proxy-url"] = access.proxy
        if not access.trusts_machine and access.verify:
            told["certificate-authority-data"] = _encoded(access.authority())
        for extension in cluster.get("extensions").items():
            if extension.get("name").text("") == "client.authentication.k8s.io/exec":
                told["config"] = extension.get("extension").value
    return Plugin(
        # As the shell and kubectl do it: a bare name is looked up in PATH, a path is relative to the file.
        command=str(beside / command) if "/" in command else command,
        arguments=[_optional(each) for each in place.get("args").items()],
        environment={each.get("name").text(): _optional(each.get("value")) for each in place.get("env").items()},
        api_version=version.text(),
        cluster=told,
        hint=_optional(place.get("installHint")),
    )


def _impersonation(user: Field) -> list[tuple[str, str]]:
    headers = []
    if not user.get("as").absent:
        headers.append(("Impersonate-User", user.get("as").text()))
        headers += [("Impersonate-Group", group.text()) for group in user.get("as-groups").items()]
        if not user.get("as-uid").absent:
            headers.append(("Impersonate-Uid", user.get("as-uid").text()))
    return headers


def _proxy(server: str, environ: Mapping[str, str]) -> str:
    """The proxy that the environment names for a URL, as kubectl takes it: never for this machine itself."""
    parts = urlsplit(server)
    host = parts.hostname or ""
    proxies = {name.lower().removesuffix("_proxy"): value for name, value in environ.items() if name.lower().endswith("_proxy") and value}
    if _is_loopback(host) or proxy_bypass_environment(f"{host}:{parts.port or 443}", proxies):
        return ""
    return proxies.get(parts.scheme, "")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _document(path: Path) -> Field:
    try:
        documents = [each for each in read_yaml(_content(path)) if each is not None]
    except DocumentError as error:
        raise BadConfig(f"{path}: {error}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise BadConfig(f"{path}: not one mapping, as a kubeconfig is")
    document = Field(str(path), "", documents[0])
    if document.get("kind").text("Config") != "Config":
        raise document.get("kind").wrong("not a kubeconfig")
    return document


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        raise BadConfig(f"{path}: {error.strerror}") from error
    if len(content) > CONFIG_BYTES:
        raise BadConfig(f"{path}: larger than {CONFIG_BYTES} bytes")
    return content


def _text(path: Path) -> str:
    try:
        return _content(path).decode("ascii", "replace").strip()
    except BadConfig:
        return ""


def _optional(place: Field) -> str:
    """Text; absent and empty are the same, as kubectl writes both."""
    return "" if place.value == "" else place.text("")


def _path(place: Field, beside: Path) -> Path | None:
    text = _optional(place)
    return beside / text if text else None


def _decoded(place: Field) -> bytes:
    return decoded(place.text(), f"{place.subject}: {place.path}")


def _encoded(content: bytes) -> str:
    return b64encode(content).decode("ascii")
