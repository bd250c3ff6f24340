"""Our data plane against a real Envoy: Envoy tunnels into an enrolled pod, and an enrolled pod tunnels to Envoy.

Real agents, real redirection; the pod that belongs to Envoy is on a node without an agent, and has a certificate of the mesh's own CA.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.kit import envoy
from tests.kit.apps import connected
from tests.kit.mesh import Mesh
from tests.kit.netns import Pod
from tests.kit.pki import FakePki
from tests.kit.polling import eventually
from ztunnel.ca.authority import Authority
from ztunnel.ca.root import open_root
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId

APP = 8080
TUNNEL_IN = 9000
"""Port of Envoy's plain listener in its own pod: what connects there comes out at our pod's application."""
RESET = struct.pack("ii", 1, 0)
MEGABYTE = 1 << 20


@pytest.fixture(scope="module", name="mesh", params=["own", "openssl"])
def fixture_mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """Ours is `ours` on the first node; `theirs` on the second, where no agent runs, and which the mesh believes to be captured."""
    settings = f"tunnel: {{records: {request.param}}}\nenrolment: {{grace_seconds: 0.1}}\n"
    with Mesh(nodes=2, settings=settings, start=False) as mesh:
        ours, theirs = mesh.agents
        ours.start()
        eventually(lambda: ours.is_ready, within=20)
        mesh.pod("ours", node=0, ambient=True)
        pod = mesh.pod("theirs", node=1, ambient=True)
        # What an agent over there would say of its pod.
        (theirs.directory / "status").mkdir()
        (theirs.directory / "status" / pod.uid).write_text("enabled")
        mesh.settle()
        mesh.agents.remove(theirs)
        yield mesh


def credentials(mesh: Mesh, account: str) -> Credentials:
    """Of the mesh's own CA."""
    root = open_root(mesh.root / "ca", "cluster.local", time.time())
    return Authority(root).issue(SpiffeId("cluster.local", "default", account), time.time())


def identity(account: str) -> SpiffeId:
    return SpiffeId("cluster.local", "default", account)


@contextmanager
def inbound(mesh: Mesh, *, credentials_: Credentials | None = None, server: SpiffeId | None = None) -> Iterator[envoy.Envoy]:
    """Envoy in its pod as the client of ours."""
    ours, theirs = mesh.pods["ours"], mesh.pods["theirs"]
    config = envoy.hbone_client(
        credentials_ or credentials(mesh, "theirs"),
        peer=(ours.v4, 15008),
        authority=f"{ours.v4}:{APP}",
        server=server or identity("ours"),
        listen=("0.0.0.0", TUNNEL_IN),
    )
    with envoy.running(config, prefix=("nsenter", f"--net={theirs.path}")) as running:
        yield running


@contextmanager
def outbound(mesh: Mesh, *, account: str = "theirs", client: SpiffeId | None = None) -> Iterator[envoy.Envoy]:
    """Envoy in its pod as the server of ours."""
    theirs = mesh.pods["theirs"]
    config = envoy.hbone_server(
        credentials(mesh, account), app=(theirs.v4, APP), client=client or identity("ours"), listen=(theirs.v4, 15008)
    )
    with envoy.running(config, prefix=("nsenter", f"--net={theirs.path}")) as running:
        yield running


class Path:
    """One way through: where to connect from, what to dial, where the application listens."""

    def __init__(self, mesh: Mesh, *, into_ours: bool) -> None:
        ours, theirs = mesh.pods["ours"], mesh.pods["theirs"]
        self.client: Pod = theirs if into_ours else ours
        self.server: Pod = ours if into_ours else theirs
        self.dial = ("127.0.0.1", TUNNEL_IN) if into_ours else (theirs.v4, APP)


@pytest.fixture(name="path", params=["envoy-to-us", "us-to-envoy"])
def fixture_path(request: pytest.FixtureRequest, mesh: Mesh) -> Iterator[Path]:
    into_ours = request.param == "envoy-to-us"
    with inbound(mesh) if into_ours else outbound(mesh):
        yield Path(mesh, into_ours=into_ours)


@contextmanager
def pair(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one connection: the client's and the application's."""
    with path.server.listener(APP) as listener, path.client.connect(path.dial) as near:
        # A proxy accepts at once; only bytes make sure that the other end is there.
        near.sendall(b"!")
        listener.settimeout(10)
        far, _ = listener.accept()
        with far:
            for each in (near, far):
                each.settimeout(20)
            assert far.recv(1) == b"!"
            yield near, far


def pour(source: socket.socket, total: int) -> bytes:
    """Sends random bytes and half-closes; returns their digest."""
    block = os.urandom(MEGABYTE)
    digest = hashlib.sha256()
    for _ in range(total // MEGABYTE):
        source.sendall(block)
        digest.update(block)
    source.shutdown(socket.SHUT_WR)
    return digest.digest()


def drain(sink: socket.socket) -> tuple[int, bytes]:
    """Everything until the end of the stream: how much, and its digest."""
    digest, count = hashlib.sha256(), 0
    while data := sink.recv(MEGABYTE):
        digest.update(data)
        count += len(data)
    return count, digest.digest()


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Starts `work`; the returned function waits for its result."""
    box: list[object] = []
    thread = threading.Thread(target=lambda: box.append(work()))
    thread.start()

    def result() -> object:
        thread.join(60)
        assert box, "it did not end"
        return box[0]

    return result


@pytest.mark.parametrize("upload", [True, False], ids=["up", "down"])
def test_a_hundred_megabytes_arrive_whole(path: Path, upload: bool) -> None:
    with pair(path) as (near, far):
        source, sink = (near, far) if upload else (far, near)
        if not upload:
            # As the server of a stream, Envoy throws away what it has buffered when the application ends before the client does.
            near.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
        poured = in_thread(lambda: pour(source, 100 * MEGABYTE))
        assert drain(sink) == (100 * MEGABYTE, poured())


def test_half_close_client_first(path: Path) -> None:
    with pair(path) as (near, far):
        near.sendall(b"done")
        near.shutdown(socket.SHUT_WR)
        assert far.recv(100) == b"done"
        assert far.recv(100) == b""
        far.sendall(b"still talking")
        assert near.recv(100) == b"still talking"
        far.shutdown(socket.SHUT_WR)
        assert near.recv(100) == b""


def test_half_close_server_first(path: Path, mesh: Mesh) -> None:
    with pair(path) as (near, far):
        far.sendall(b"done")
        far.shutdown(socket.SHUT_WR)
        assert near.recv(100) == b"done"
        assert near.recv(100) == b""
        if path.server is mesh.pods["theirs"]:
            # Envoy cannot hold a connection whose server has half-closed: it resets the stream behind END_STREAM. What the
            # server said is whole all the same, and must not arrive as a reset.
            return
        near.sendall(b"still talking")
        assert far.recv(100) == b"still talking"
        near.shutdown(socket.SHUT_WR)
        assert far.recv(100) == b""


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_ends_the_other_side_and_ours_never_cleanly(path: Path, mesh: Mesh, who: str) -> None:
    with pair(path) as (near, far):
        breaker, victim = (near, far) if who == "client" else (far, near)
        breaker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        breaker.close()
        held_by_envoy = (path.server if who == "client" else path.client) is mesh.pods["theirs"]
        try:
            ended = victim.recv(100)
        except ConnectionResetError:
            return
        # Envoy's TCP side ends with FIN whatever the stream's reset said.
        assert held_by_envoy
        assert ended == b""


def test_two_hundred_streams_at_once(path: Path) -> None:
    with ExitStack() as open_, path.server.listener(APP) as listener:
        listener.listen(512)
        listener.settimeout(20)
        clients = [open_.enter_context(path.client.tcp_socket(socket.AF_INET)) for _ in range(200)]
        for number, client in enumerate(clients):
            client.connect(path.dial)
            client.sendall(b"%03d" % number)
        # All stay open to the end: 200 streams live at the same time.
        for _ in clients:
            far = open_.enter_context(listener.accept()[0])
            far.settimeout(20)
            far.sendall(b"you are " + far.recv(3))
        for number, client in enumerate(clients):
            client.settimeout(20)
            assert client.recv(100) == b"you are %03d" % number


def refused(client: socket.socket) -> bool:
    """Whether the connection ends without a byte."""
    client.settimeout(20)
    try:
        client.sendall(b"hello")
        return client.recv(100) == b""
    except (ConnectionResetError, BrokenPipeError):
        return True


def test_envoy_refuses_an_identity_of_ours_that_it_does_not_expect(mesh: Mesh) -> None:
    with outbound(mesh, client=identity("somebody-else")), connected(mesh.pods["ours"], (mesh.pods["theirs"].v4, APP)) as client:
        assert refused(client)


def test_we_refuse_an_envoy_that_is_not_who_we_expect(mesh: Mesh) -> None:
    with (
        outbound(mesh, account="an-impostor") as there,
        connected(mesh.pods["ours"], (mesh.pods["theirs"].v4, APP)) as client,
    ):
        assert refused(client)
        assert there.counter("http.hbone.downstream_rq_total") == 0
    eventually(lambda: "an-impostor" in mesh.agents[0].log)


def test_envoy_refuses_our_pod_under_another_name(mesh: Mesh) -> None:
    with inbound(mesh, server=identity("somebody-else")) as here, connected(mesh.pods["theirs"], ("127.0.0.1", TUNNEL_IN)) as client:
        assert refused(client)
        assert here.counter("cluster.tunnel.ssl.fail_verify_san") >= 1


@pytest.mark.parametrize("stranger", ["foreign root", "other trust domain"])
def test_we_refuse_an_envoy_of_another_mesh(mesh: Mesh, stranger: str) -> None:
    if stranger == "foreign root":
        presented = FakePki().credentials(identity("theirs"), roots_pem=credentials(mesh, "theirs").roots_pem)
    else:
        root = open_root(mesh.root / "ca", "cluster.local", time.time())
        pki = FakePki("elsewhere.example")
        assert isinstance(root.key, ec.EllipticCurvePrivateKey)
        pki._key, pki._root = root.key, root.certificate
        presented = pki.credentials(roots_pem=root.pem)
    with inbound(mesh, credentials_=presented), connected(mesh.pods["theirs"], ("127.0.0.1", TUNNEL_IN)) as client:
        assert refused(client)


@pytest.mark.parametrize("change", ["no certificate", "TLS 1.2"])
def test_we_refuse_what_is_not_mutual_tls_1_3(mesh: Mesh, change: str) -> None:
    ours, theirs = mesh.pods["ours"], mesh.pods["theirs"]
    config = envoy.hbone_client(
        credentials(mesh, "theirs"), peer=(ours.v4, 15008), authority=f"{ours.v4}:{APP}", listen=("0.0.0.0", TUNNEL_IN)
    )
    common = config["static_resources"]["clusters"][0]["transport_socket"]["typed_config"]["common_tls_context"]  # type: ignore[index]  # plain JSON
    if change == "no certificate":
        del common["tls_certificates"]
    else:
        common["tls_params"] = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_2"}
    with (
        envoy.running(config, prefix=("nsenter", f"--net={theirs.path}")) as here,
        connected(theirs, ("127.0.0.1", TUNNEL_IN)) as client,
    ):
        assert refused(client)
        assert here.counter("cluster.tunnel.upstream_rq_200") == 0
