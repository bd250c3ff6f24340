"""A real Kubernetes API: etcd and kube-apiserver as processes of the test's, with RBAC, on loopback or any address of its namespace.

No controller, scheduler or kubelet runs: pods' status, endpoints and service accounts' secrets are what the test writes. What the
server itself does is all there: validation, defaulting, RBAC, CRDs, watches, tokens and TokenReview, priority and fairness.

    with ApiServer.started() as api:
        api.kubectl("apply", "-f", "deploy/...")
        api.request("POST", "/api/v1/namespaces", {...})
        kubeconfig = api.kubeconfig(api.user("agent"))

The programs come from scripts/kube-tools, which needs the network and is therefore run before the tests, never by them.
"""

from __future__ import annotations

import base64
import datetime
import http.client
import ipaddress
import json
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.kit.polling import eventually

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
STOP_SECONDS = 20.0
ISSUER = "https://kubernetes.default.svc.cluster.local"
SERVICE_RANGE = "10.96.0.0/16"

Json = dict[str, object]

_DAY = datetime.timedelta(days=1)


class ApiError(AssertionError):
    """The API server refused what the test asked for."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


@cache
def tools() -> tuple[Path | None, str]:
    """The directory of the programs, and why there is none."""
    done = subprocess.run([ROOT / "scripts" / "kube-tools", "--cached"], capture_output=True, text=True, check=False)
    return (Path(done.stdout.strip()), "") if done.returncode == 0 else (None, done.stderr.strip())


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on now, below those that the kernel gives to outgoing connections: a server that is started again, or a
    moment later, must not find one of them there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        with socket.socket(family) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no free port at {address}")


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who may ask the API server: by client certificate, or by token if there is one."""

    name: str
    certificate_pem: bytes = b""
    key_pem: bytes = b""
    token: str = ""


@dataclass(slots=True)
class _Authority:
    """Signs the server's certificate and its users'."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    certificate: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        name = _name("test-kubernetes-ca")
        builder = _builder(name, name, self.key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
        self.certificate = builder.add_extension(_signing(), critical=True).sign(self.key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(self, common: str, groups: Sequence[str] = (), addresses: Sequence[str] = ()) -> tuple[bytes, bytes]:
        """Certificate and key, PEM. With addresses it is a server's, else a client's."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(common, groups), self.certificate.subject, key.public_key())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if addresses else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        if addresses:
            names = [x509.DNSName("localhost"), x509.DNSName("kubernetes.default.svc")]
            ips = [x509.IPAddress(ipaddress.ip_address(each)) for each in dict.fromkeys(addresses)]
            builder = builder.add_extension(x509.SubjectAlternativeName([*names, *ips]), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM), _private(key)


class ApiServer:
    """A running API server.

    Attributes:
        address, port: where it is reached.
        admin: a user in `system:masters`.
    """

    def __init__(self, directory: Path, programs: Path, addresses: Sequence[str]) -> None:
        self.address = addresses[0]
        self.port = free_port(self.address)
        self._directory = directory
        self._programs = programs
        self._addresses = addresses
        self._authority = _Authority()
        self._etcd_port = free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        certificate, key = self._authority.issue("admin", ["system:masters"])
        self.admin = User("admin", certificate, key)
        self._write_files()

    @classmethod
    @contextmanager
    def started(cls, addresses: Sequence[str] = ("127.0.0.1",)) -> Iterator[ApiServer]:
        """A server with an empty cluster, gone at the end with all that it stored.

        Args:
            addresses: the server listens on every address of this process's network namespace; its certificate names these, and
                its clients are told the first one.
        """
        programs, refusal = tools()
        if programs is None:
            raise FileNotFoundError(refusal)
        with tempfile.TemporaryDirectory(prefix="kube-") as directory:
            server = cls(Path(directory), programs, list(addresses))
            try:
                server.start_etcd()
                server.start()
                yield server
            finally:
                server.stop()
                server.stop_etcd()

    # ------------------------------------------------------------------------------------------------------- processes

    def start_etcd(self) -> None:
        """Start the store, with what it stored before."""
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{free_port()}"
        self._spawn(
            "etcd",
            f"--data-dir={self._directory}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=error",
        )

    def start(self, *arguments: str) -> None:
        """Start the API server and wait until it is ready.

        Args:
            arguments: further ones of kube-apiserver.
        """
        files = self._directory
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=0.0.0.0" if self._addresses != ["127.0.0.1"] else "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            # Nobody is told of it, but the server ends where it finds no route to guess it from, as in the tests' namespaces.
            "--advertise-address=192.0.2.1",
            f"--tls-cert-file={files}/server.crt",
            f"--tls-private-key-file={files}/server.key",
            f"--client-ca-file={files}/ca.crt",
            f"--token-auth-file={files}/tokens.csv",
            f"--service-account-issuer={ISSUER}",
            f"--api-audiences={ISSUER},istio-ca",
            f"--service-account-key-file={files}/sa.pub",
            f"--service-account-signing-key-file={files}/sa.key",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=RBAC",
            # No controller makes the service accounts that it would ask for.
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
            "--allow-privileged=true",
            *arguments,
        )
        eventually(self._is_ready, within=START_SECONDS, saying=f"kube-apiserver is ready\n{self.log()}")

    def stop(self) -> None:
        """End the API server as a crash would: nothing is said to its clients."""
        self._end("kube-apiserver")

    def stop_etcd(self) -> None:
        """End the store."""
        self._end("etcd")

    def log(self) -> str:
        """The end of what the API server said."""
        path = self._directory / "kube-apiserver.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def _spawn(self, program: str, *arguments: str) -> None:
        with (self._directory / f"{program}.log").open("ab") as output:
            self._processes[program] = subprocess.Popen(
                [self._programs / program, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self._directory
            )

    def _end(self, program: str) -> None:
        process = self._processes.pop(program, None)
        if process is not None:
            process.kill()
            process.wait(STOP_SECONDS)

    def _is_ready(self) -> bool:
        for program, process in self._processes.items():
            if process.poll() is not None:
                said = (self._directory / f"{program}.log").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{program} ended with status {process.returncode}:\n{said}")
        try:
            self.request("GET", "/readyz")
            # Behind readiness, but needed by every test: RBAC's own roles and the first namespaces are made by the server.
            self.request("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles/cluster-admin")
            self.request("GET", "/api/v1/namespaces/default")
        except (OSError, ApiError, http.client.HTTPException) as error:
            raise AssertionError(str(error)) from error
        return True

    def _write_files(self) -> None:
        files = self._directory
        (files / "ca.crt").write_bytes(self._authority.pem)
        certificate, key = self._authority.issue("kube-apiserver", addresses=["127.0.0.1", "10.96.0.1", *self._addresses])
        (files / "server.crt").write_bytes(certificate)
        (files / "server.key").write_bytes(key)
        account = rsa.generate_private_key(65537, 2048)
        (files / "sa.key").write_bytes(_private(account))
        (files / "sa.pub").write_bytes(account.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        # Read once, at the start: one token that is somebody's name for ever, for tests of tokens that are not service accounts'.
        self.static_token = secrets.token_hex(16)
        (files / "tokens.csv").write_text(f'{self.static_token},static-user,static-uid,"testers"\n')
        (files / "admin.kubeconfig").write_text(self.kubeconfig(self.admin))

    # ----------------------------------------------------------------------------------------------------------- users

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"https://{self.address}:{self.port}"

    @property
    def ca_pem(self) -> bytes:
        """What its certificate is to be verified with."""
        return self._authority.pem

    @property
    def ca_file(self) -> Path:
        """The same, as a file."""
        return self._directory / "ca.crt"

    def user(self, name: str, *groups: str) -> User:
        """A user with a client certificate, and with no rights but those of `system:authenticated`."""
        return User(name, *self._authority.issue(name, groups))

    def token(
        self, namespace: str, account: str, *, seconds: int = 3600, audience: str = ISSUER, pod: tuple[str, str] | None = None
    ) -> str:
        """A token of a service account that exists, as a kubelet gets one.

        Args:
            seconds: at least 600; the server allows no less.
            pod: name and UID of the pod that the token is bound to.
        """
        spec: Json = {"audiences": [audience], "expirationSeconds": seconds}
        if pod is not None:
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod[0], "uid": pod[1]}
        body: Json = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = self.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", body)
        status = answer["status"]
        assert isinstance(status, dict)
        return str(status["token"])

    def account(self, namespace: str, name: str) -> User:
        """A service account that is made if it is not there, with a token."""
        self.namespace(namespace)
        self.ensure(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
        return User(f"system:serviceaccount:{namespace}:{name}", token=self.token(namespace, name))

    def allow(self, user: User, rules: Sequence[Mapping[str, Sequence[str]]], name: str = "") -> str:
        """Give a user rights in the whole cluster, in place of those given under the same name.

        Args:
            rules: RBAC rules, each with apiGroups, resources and verbs.
            name: of the ClusterRole and its binding; made from the user's unless given.
        """
        role = name or "test-" + user.name.replace(":", "-")
        group = "rbac.authorization.k8s.io"
        base = f"/apis/{group}/v1"
        self.delete(f"{base}/clusterroles/{role}")
        self.request("POST", f"{base}/clusterroles", {"metadata": {"name": role}, "rules": [dict(rule) for rule in rules]})
        binding: Json = {
            "metadata": {"name": role},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user.name}],
        }
        self.ensure(f"{base}/clusterrolebindings", binding)
        return role

    def kubeconfig(self, user: User, **extra: object) -> str:
        """A kubeconfig for a user, with everything inline. `extra` is added to the cluster's part."""
        credentials: Json = (
            {"token": user.token}
            if user.token
            else {
                "client-certificate-data": base64.b64encode(user.certificate_pem).decode(),
                "client-key-data": base64.b64encode(user.key_pem).decode(),
            }
        )
        cluster: Json = {"server": self.url, "certificate-authority-data": base64.b64encode(self.ca_pem).decode(), **extra}
        config: Json = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user.name, "user": credentials}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user.name}}],
            "current-context": "test",
        }
        return json.dumps(config)  # JSON is YAML

    @property
    def admin_kubeconfig(self) -> Path:
        """A file for programs that want one."""
        return self._directory / "admin.kubeconfig"

    # -------------------------------------------------------------------------------------------------------- requests

    def crds(self) -> None:
        """Install the CRDs of Gateway API and of Istio, as their authors publish them."""
        self.kubectl("apply", "--server-side", "-f", str((self._programs / "crds").resolve()))
        self.kubectl("wait", "--for=condition=Established", "--timeout=120s", "crd", "--all")

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        """What kubectl prints, as the administrator."""
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self._directory), "KUBECONFIG": str(self.admin_kubeconfig)}
        command = [str(self._programs / "kubectl"), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
        if check and done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr if not check else done.stdout

    def apply(self, *objects: Mapping[str, object]) -> None:
        """Create or change objects, whole."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(_list(objects)))

    def request(self, method: str, path: str, body: object = None, *, patch: str = "merge", user: User | None = None) -> Json:
        """The answer to one request, as the administrator or another user.

        Args:
            patch: kind of patch that a PATCH's body is: merge, strategic-merge or json.
        Raises:
            ApiError: a status of 400 or more.
        """
        user = user or self.admin
        connection = http.client.HTTPSConnection(self.address, self.port, timeout=60, context=self.tls(user))
        headers = {"Content-Type": f"application/{patch}-patch+json" if method == "PATCH" else "application/json"}
        if user.token:
            headers["Authorization"] = f"Bearer {user.token}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status >= 400:
            raise ApiError(response.status, text.decode(errors="replace")[:2000])
        answer = json.loads(text) if text.startswith(b"{") else {"text": text.decode()}
        assert isinstance(answer, dict)
        return answer

    def ensure(self, path: str, body: Mapping[str, object]) -> None:
        """Create an object of a collection unless one of its name is there."""
        try:
            self.request("POST", path, body)
        except ApiError as error:
            if error.status != 409:
                raise

    def delete(self, path: str) -> None:
        """Delete an object at once if it is there."""
        try:
            self.request("DELETE", f"{path}?gracePeriodSeconds=0")
        except ApiError as error:
            if error.status != 404:
                raise

    def namespace(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Create a namespace, or give one that is there more labels."""
        self.ensure("/api/v1/namespaces", {"metadata": {"name": name}})
        if labels:
            self.request("PATCH", f"/api/v1/namespaces/{name}", {"metadata": {"labels": labels}})

    def pod(self, namespace: str, name: str, *, node: str, address: str, account: str = "default", **metadata: object) -> Json:
        """Create a pod that runs on a node and is ready, as its kubelet would report it. Returns it."""
        body: Json = {
            "metadata": {"name": name, **metadata},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 0,
                "serviceAccountName": account,
                "containers": [{"name": "app", "image": "test/app"}],
            },
        }
        self.request("POST", f"/api/v1/namespaces/{namespace}/pods", body)
        return self.status(namespace, name, address=address)

    def status(self, namespace: str, name: str, *, address: str, ready: bool = True, phase: str = "Running") -> Json:
        """Report a pod's status, as its kubelet would. Returns the pod."""
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        status: Json = {"phase": phase, "podIP": address, "podIPs": [{"ip": address}], "conditions": conditions}
        return self.request("PATCH", f"/api/v1/namespaces/{namespace}/pods/{name}/status", {"status": status})

    def compact(self) -> None:
        """Forget all history: what was read before now cannot be read on from (410 Gone), once the server's own cache is gone too."""
        revision = self._etcd("/v3/kv/range", {"key": base64.b64encode(b"/registry/x").decode()})["header"]
        assert isinstance(revision, dict)
        self._etcd("/v3/kv/compaction", {"revision": revision["revision"], "physical": True})

    def _etcd(self, path: str, body: Json) -> Json:
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=60)
        try:
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ApiError(response.status, str(answer))
        assert isinstance(answer, dict)
        return answer

    def tls(self, user: User) -> ssl.SSLContext:
        """How a user connects."""
        context = ssl.create_default_context(cadata=self.ca_pem.decode())
        if user.certificate_pem:
            with tempfile.NamedTemporaryFile(dir=self._directory) as file:
                file.write(user.certificate_pem + user.key_pem)
                file.flush()
                context.load_cert_chain(file.name)
        return context


def program(name: str) -> Path:
    """One of the programs that scripts/kube-tools builds, or a machine's own.

    Raises:
        FileNotFoundError: there is none.
    """
    directory, refusal = tools()
    if directory is not None and (directory / name).exists():
        return directory / name
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(refusal or name)
    return Path(found)


def _list(objects: Sequence[Mapping[str, object]]) -> Json:
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


def _name(common: str, groups: Sequence[str] = ()) -> x509.Name:
    organisations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*organisations, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - _DAY).not_valid_after(now + 10 * _DAY)


def _signing() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
