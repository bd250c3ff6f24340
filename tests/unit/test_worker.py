"""A worker at the end of its channel, turned by the test: what each message does, and what it tells."""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest

from tests.kit.builders import ANYBODY, deny, principals, workload
from tests.kit.kernel_tls import KernelRules
from tests.kit.pki import FakePki
from tests.kit.polling import eventually
from tests.kit.proxies import SETTINGS, Redirected
from tests.kit.wire import Wire, received, tcp_pair
from ztunnel import worker
from ztunnel.dataplane.channel import (
    Activity,
    AddPod,
    Answer,
    Certificate,
    Configure,
    Decoder,
    Drain,
    Drained,
    Flows,
    Message,
    NeedSockets,
    PodAdded,
    PodRemoved,
    Query,
    RemovePod,
    Sockets,
    Update,
    Withdraw,
    encode,
)
from ztunnel.dataplane.flow import Direction
from ztunnel.dataplane.sockets import Farewell
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.rules import Match
from ztunnel.node.sockets import IP_BIND_ADDRESS_NO_PORT
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.passthrough import Passthrough
from ztunnel.worker import Worker, _tunnel_state

PKI = FakePki()
SERVER = PKI.identity("server")


class Supervisor:
    """The other end of a worker's channel. The worker runs whenever something is awaited here."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        self.decoder = Decoder(to_worker=False)
        self.worker = Worker(theirs)
        self.loop = self.worker._loop
        self.stopped = False
        self.loop.stop = self._stop  # type: ignore[method-assign]  # to see that it leaves, without its blocking `run`
        self.theirs = theirs
        self.heard: list[Message] = []
        self.apps: list[socket.socket] = []
        self.ip = f"127.{os.getpid() % 200 + 20}.{time.monotonic_ns() % 250 + 1}.1"
        self.workload = replace(workload("server", self.ip, account="server"), uid="u")

    def _stop(self) -> None:
        self.stopped = True

    def tell(self, message: Message, descriptors: list[int] | None = None) -> None:
        """Sends one message; the descriptors stay ours."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.channel.sendmsg([encode(message, len(descriptors or []))], rights)

    def turn(self, condition: Callable[[], object]) -> None:
        """Lets the worker go on until the condition holds."""

        def once() -> object:
            if not self.stopped:
                self.loop.run_once(0.005)
            try:
                while data := self.channel.recv(1 << 18):
                    for each in self.decoder.feed(data, []):
                        assert isinstance(each.message, Message)
                        self.heard.append(each.message)
            except (BlockingIOError, ConnectionResetError):
                pass
            return condition()

        eventually(once, within=5)

    def hear(self, kind: type[Message]) -> Message:
        """The next message of that kind, those before it set aside."""
        self.turn(lambda: any(isinstance(each, kind) for each in self.heard))
        index = next(index for index, each in enumerate(self.heard) if isinstance(each, kind))
        return self.heard.pop(index)

    def configure(self, **changes: object) -> None:
        """What every worker hears first."""
        values = {name: getattr(SETTINGS, name) for name in Configure.__struct_fields__}
        self.tell(Configure(**{**values, "report_seconds": 0.05, **changes}))
        self.tell(Update(Delta((self.workload,))))
        self.certify()

    def certify(self) -> None:
        credentials = PKI.credentials(SERVER)
        self.tell(Certificate(SERVER, credentials.chain_pem, credentials.key_pem, credentials.roots_pem))

    def add_pod(self, uid: str = "u") -> list[tuple[str, int]]:
        """Serves a pod on three free ports; their addresses."""
        listeners = [socket.create_server((self.ip, 0)) for _ in range(3)]
        addresses = [listener.getsockname() for listener in listeners]
        self.tell(AddPod(uid, SERVER), [listener.fileno() for listener in listeners])
        assert self.hear(PodAdded) == PodAdded(uid)
        for listener in listeners:
            listener.close()
        return addresses

    def give(self, uid: str = "u", count: int = 4) -> None:
        made = [socket.socket() for _ in range(count)]
        for sock in made:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.tell(Sockets(uid, ipv6=False), [sock.fileno() for sock in made])
        for sock in made:
            sock.close()

    def ask(self) -> Answer:
        self.tell(Query(1))
        answer = self.hear(Answer)
        assert isinstance(answer, Answer)
        return answer

    def close(self) -> None:
        node = self.worker._node
        if node is not None:
            for pod in list(node.pods.values()):
                self.worker._close_pod(pod)
        self.turn(lambda: True)
        for handler in list(self.loop._handlers.values()):
            handler.on_bug()
        self.loop.close()
        for sock in self.apps:
            sock.close()
        self.channel.close()
        self.theirs.close()


@pytest.fixture(name="supervisor")
def fixture_supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()


@pytest.fixture(name="serving")
def fixture_serving(supervisor: Supervisor) -> Supervisor:
    supervisor.configure()
    return supervisor


def is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


def is_reset(supervisor: Supervisor, sock: socket.socket) -> bool:
    sock.setblocking(False)
    with pytest.raises(ConnectionResetError):
        supervisor.turn(lambda: received(sock) == b"never")
    return True


# The channel


def test_a_message_before_its_configuration_is_the_end(supervisor: Supervisor) -> None:
    supervisor.tell(Query(1))
    supervisor.turn(lambda: supervisor.stopped)


def test_a_supervisor_that_goes_away_takes_the_worker_with_it(supervisor: Supervisor) -> None:
    supervisor.channel.shutdown(socket.SHUT_RDWR)
    supervisor.turn(lambda: supervisor.stopped)


def test_nonsense_is_the_end(supervisor: Supervisor) -> None:
    supervisor.channel.send(b"\xff" * 20)
    supervisor.turn(lambda: supervisor.stopped)


def test_a_bug_over_a_message_is_the_end(supervisor: Supervisor) -> None:
    supervisor.worker.on_bug()
    assert supervisor.stopped


def test_an_empty_worker_answers(serving: Supervisor) -> None:
    assert serving.ask() == Answer(1, (), ())


def test_news_that_nobody_reads_wait_and_are_whole_afterwards(serving: Supervisor) -> None:
    serving.channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(2000):
        serving.worker._send(PodAdded("x" * 1000))
    assert serving.worker._unsent_bytes > 0
    serving.turn(lambda: len(serving.heard) == 2000)
    assert serving.worker._unsent_bytes == 0


def test_records_that_a_supervisor_does_not_read_are_lost_and_counted(serving: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.ask()
    table = serving.worker._require_node().connections
    with monkeypatch.context() as patched:
        patched.setattr(worker, "_MAX_UNSENT", -1)
        for port in range(2):
            table.register(Facts(Direction.INBOUND, "u", ("10.0.0.1", port), ("10.0.0.2", 2))).end(None)
        serving.worker._tell_flows()
    table.register(Facts(Direction.INBOUND, "u", ("10.0.0.1", 2), ("10.0.0.2", 2))).end(None)
    flows = serving.hear(Flows)
    assert isinstance(flows, Flows)
    assert (flows.lost, [end.port for news in flows.news for end in news.ends]) == (2, [2])


# Pods


def test_a_pod_is_served_and_let_go(serving: Supervisor) -> None:
    addresses = serving.add_pod()
    # Nothing redirected this connection, so nobody knows where it was going: reset, counted, told.
    with socket.create_connection(addresses[0]) as near:
        assert is_reset(serving, near)
    assert serving.hear(Activity) == Activity({}, {"original_destination_unknown": 1})
    serving.tell(RemovePod("u", drain=True))
    assert serving.hear(PodRemoved) == PodRemoved("u")
    assert [is_refused(address) for address in addresses] == [True, True, False], "peers that have not heard may still come"
    serving.tell(RemovePod("u", drain=False))
    serving.hear(PodRemoved)
    assert is_refused(addresses[2])
    serving.tell(RemovePod("nobody", drain=False))
    assert serving.hear(PodRemoved) == PodRemoved("nobody")


def test_a_pod_that_comes_again_is_served_on_its_new_listeners(serving: Supervisor) -> None:
    old = serving.add_pod()
    new = serving.add_pod()
    assert all(is_refused(address) for address in old)
    with socket.create_connection(new[1]) as near:
        assert is_reset(serving, near)


def test_sockets_for_a_pod_that_is_gone_are_closed(serving: Supervisor) -> None:
    before = len(os.listdir("/proc/self/fd"))
    serving.give("nobody")
    serving.ask()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_certificate_that_cannot_be_used_is_logged_and_the_former_one_stays(
    serving: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    serving.ask()
    node = serving.worker._node
    assert node is not None
    former = node.contexts[SERVER]
    serving.tell(Certificate(SERVER, b"nonsense", b"nonsense", b"nonsense"))
    serving.ask()
    assert "certificate cannot be used" in caplog.text
    assert node.contexts[SERVER] is former
    serving.tell(Withdraw(SERVER))
    serving.ask()
    assert not node.contexts


# Short of descriptors


class Short:
    """This process may open so many further descriptors inside, and no more."""

    def __init__(self, room: int) -> None:
        probe = os.dup(0)
        os.close(probe)
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe + room, self.limits[1]))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


def test_sockets_for_which_there_is_no_room_cost_nobody_a_connection(serving: Supervisor) -> None:
    serving.add_pod()
    made = [socket.socket() for _ in range(8)]
    with Short(3):
        serving.tell(Sockets("u", ipv6=False), [sock.fileno() for sock in made])
        serving.tell(Query(7))
        assert serving.hear(Answer) == Answer(7, (), ())
    for sock in made:
        sock.close()
    assert not serving.stopped
    node = serving.worker._node
    assert node is not None
    assert len(node.pods["u"].ipv4._sockets) == 3
    assert node.limits["descriptors"] == 1


def test_a_pod_for_whose_listeners_there_is_no_room_is_not_served(serving: Supervisor, caplog: pytest.LogCaptureFixture) -> None:
    listeners = [socket.create_server((serving.ip, 0)) for _ in range(3)]
    with Short(2):
        serving.tell(AddPod("u", SERVER), [listener.fileno() for listener in listeners])
        serving.ask()
    for listener in listeners:
        listener.close()
    assert "without all of its listeners" in caplog.text
    assert not any(isinstance(each, PodAdded) for each in serving.heard)
    serving.add_pod()


# Connections


def inbound_stream(supervisor: Supervisor) -> tuple[socket.socket, socket.socket]:
    """A plaintext connection into the pod as it would be after redirection: the client's end and the application's."""
    worker = supervisor.worker
    node = worker._node
    assert node is not None
    near, far = tcp_pair()
    accepted = Redirected(fileno=far.detach())
    accepted.setblocking(False)
    listener = socket.create_server((supervisor.ip, 0))
    accepted.destination = listener.getsockname()
    Passthrough(node).accept(node.pods["u"], accepted, ("127.0.0.1", 1))
    assert supervisor.hear(NeedSockets) == NeedSockets("u", ipv6=False, count=16)
    supervisor.give()
    listener.setblocking(False)
    found: list[socket.socket] = []

    def came() -> bool:
        try:
            found.append(listener.accept()[0])
        except BlockingIOError:
            return False
        return True

    supervisor.turn(came)
    listener.close()
    found[0].setblocking(False)
    supervisor.apps += [near, found[0]]
    return near, found[0]


def test_connections_are_told_listed_and_judged_again(serving: Supervisor) -> None:
    serving.add_pod()
    near, far = inbound_stream(serving)
    near.send(b"hello")
    serving.turn(lambda: received(far) == b"hello")
    flows = serving.hear(Flows)
    assert isinstance(flows, Flows)
    assert (flows.news[0].opened, flows.news[0].ends, flows.news[0].failures) == (1, (), ())
    assert [each.id for each in serving.ask().connections] == ["c1"]
    # A policy that lets it live, and one that does not.
    serving.tell(Update(Delta(policies=(deny("others", principals(PKI.identity("other"))),))))
    serving.ask()
    near.send(b"still")
    serving.turn(lambda: received(far) == b"still")
    serving.heard.clear()
    serving.tell(Update(Delta(policies=(deny("plaintext", Match(not_principals=ANYBODY)),))))
    serving.turn(lambda: any(isinstance(each, Flows) and each.news[-1].failures for each in serving.heard))
    news = [each for message in serving.heard if isinstance(message, Flows) for each in message.news]
    flags = {each.path.policy: failure.flag for each in news for failure in each.failures}
    assert flags == {"AuthorizationPolicy default/plaintext": Flag.DENY}
    assert is_reset(serving, near)
    assert is_reset(serving, far)


def test_a_drain_without_connections_ends_at_once(serving: Supervisor) -> None:
    addresses = serving.add_pod()
    serving.tell(Drain(60))
    serving.tell(Drain(60))
    assert serving.hear(Drained) == Drained(0)
    serving.turn(lambda: serving.stopped)
    assert all(is_refused(address) for address in addresses)


def test_a_drain_waits_for_connections_and_cuts_them_at_its_end(serving: Supervisor) -> None:
    serving.add_pod()
    near, far = inbound_stream(serving)
    serving.tell(Drain(0.2))
    near.send(b"in time")
    serving.turn(lambda: received(far) == b"in time")
    assert serving.hear(Drained) == Drained(1)
    assert is_reset(serving, near)
    far.close()


def test_a_drain_waits_for_what_was_said_last(serving: Supervisor) -> None:
    near, far = tcp_pair()
    serving.ask()
    Farewell(serving.loop, near)
    serving.tell(Drain(60))
    serving.ask()
    assert not any(isinstance(each, Drained) for each in serving.heard)
    far.close()
    assert serving.hear(Drained) == Drained(0)


def test_a_drain_ends_with_the_last_connection(serving: Supervisor) -> None:
    serving.add_pod()
    near, far = inbound_stream(serving)
    serving.tell(Drain(60))
    near.close()
    far.close()
    assert serving.hear(Drained) == Drained(0)


@pytest.mark.parametrize(
    ("own", "kernel", "name"),
    [(True, None, "own"), (False, None, "openssl"), (True, KernelRules(), "kernel"), (True, KernelRules(ulp=errno.ENOENT), "own")],
    ids=["own", "openssl", "kernel", "refused"],
)
def test_a_tunnel_is_listed_with_the_records_that_it_really_has(own: bool, kernel: KernelRules | None, name: str) -> None:
    wire = Wire(own=(own, True), kernel=(kernel, None))
    tunnel = wire.client.tunnel
    wire.run_until(lambda: tunnel._settled)
    settings = msgspec.structs.replace(SETTINGS, own_records=own, kernel_records=kernel is not None)
    assert _tunnel_state(Direction.OUTBOUND, "u", tunnel, wire.loop.now, settings).records == name
    wire.close()
