"""The enroller on real pods: into the mesh, out of it, and everything that can go wrong between."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.kit.netns import Pod, Topology
from tests.kit.polling import eventually_async
from tests.kit.traffic import accept, nobody_waits, talk
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.ports import INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND
from ztunnel.node import netns
from ztunnel.node.enrolment import EnrolmentSettings, PodSpec, PodStatus, State
from ztunnel.node.find import DirectoryFinder
from ztunnel.node.foothold import TCP_LOOSE
from ztunnel.node.nft import Ownership, probe_ownership
from ztunnel.node.pods import Enroller, NotEnrolledError
from ztunnel.node.redirect import PROXY_MARK, Stage
from ztunnel.node.sockets import IPV6_TRANSPARENT, KEEPALIVE_SECONDS, Listeners, make_listeners

APP = 8080
FAST = EnrolmentSettings(grace_seconds=0.2, drain_seconds=30, drain_poll_seconds=0.02, drift_seconds=0.1, retry_seconds=0.05)


class Plane:
    """A data plane that only keeps what it is given, and can be told what to answer."""

    def __init__(self) -> None:
        self.serving: dict[str, Listeners] = {}
        self.calls: list[tuple[str, str]] = []
        self.live: dict[str, int] = {}
        self.refuses = False

    async def add(self, uid: str, listeners: Listeners) -> None:
        self.calls.append(("add", uid))
        if self.refuses:
            raise LocalError("the data plane has no certificate")
        self.serving[uid] = listeners

    async def remove(self, uid: str, drain: bool) -> None:
        self.calls.append(("drain" if drain else "remove", uid))
        if not drain:
            self.serving.pop(uid, None)

    def active(self, uid: str) -> int:
        return self.live.get(uid, 0)


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
def directory(tmp_path: Path, client: Pod) -> Path:
    publish(tmp_path, client)
    return tmp_path


def publish(directory: Path, pod: Pod, uid: str = "") -> None:
    (directory / (uid or pod.uid)).symlink_to(pod.path)


def spec(pod: Pod, *, strict: bool = False, fresh: bool = False) -> PodSpec:
    return PodSpec(pod.uid, pod.name, "test", pod.addresses, strict=strict, fresh=fresh)


@asynccontextmanager
async def running(directory: Path, plane: Plane, settings: EnrolmentSettings = FAST) -> AsyncIterator[Enroller]:
    enroller = Enroller(DirectoryFinder(str(directory)), plane, settings)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(enroller.run)
            yield enroller
            nursery.cancel_scope.cancel()
    finally:
        await enroller.close(remove=False)


def only(enroller: Enroller) -> PodStatus:
    (status,) = enroller.status()
    return status


async def until(enroller: Enroller, state: State) -> None:
    await eventually_async(lambda: only(enroller).state is state, saying=f"state {state}, not {enroller.status()}")


def stage_of(pod: Pod) -> Stage | None:
    listed = pod.command("nft", "--stateless", "list", "ruleset")
    if "ztunnel" not in listed:
        return Stage.REMOVED
    if "redirect" not in listed:
        return Stage.DRAIN
    return Stage.GUARDED if "tcp flags" in listed else Stage.FULL


async def test_a_pod_is_captured_in_two_phases(directory: Path, plane: Plane, client: Pod, server: Pod) -> None:
    slow_grace = EnrolmentSettings(grace_seconds=1.0, drift_seconds=0.1)
    async with running(directory, plane, slow_grace) as enroller:
        await enroller.reconcile([spec(client)])
        status = only(enroller)
        assert (status.state, status.labelled, status.enrolled, status.captured, status.problem) == (State.GUARDED, True, True, True, "")
        assert stage_of(client) is Stage.GUARDED
        with client.connect((server.v4, APP)), accept(plane.serving[client.uid].outbound):
            pass
        await until(enroller, State.ENROLLED)
        assert stage_of(client) is Stage.FULL
        assert enroller.counters().enrolled == 1


@pytest.mark.parametrize("why", ["strict", "fresh"])
async def test_strict_and_fresh_pods_are_captured_whole_at_once(directory: Path, plane: Plane, client: Pod, why: str) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=why == "strict", fresh=why == "fresh")])
        assert only(enroller).state is State.ENROLLED
        assert stage_of(client) is Stage.FULL


async def test_becoming_strict_ends_the_grace(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane, EnrolmentSettings(grace_seconds=60)) as enroller:
        await enroller.reconcile([spec(client)])
        assert only(enroller).state is State.GUARDED
        await enroller.reconcile([spec(client, strict=True)])
        assert only(enroller).state is State.ENROLLED


async def test_asking_again_changes_nothing(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        for _ in range(3):
            await enroller.reconcile([spec(client)])
        assert plane.calls == [("add", client.uid)]


async def test_leaving_the_mesh_waits_for_live_connections(directory: Path, plane: Plane, client: Pod, server: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, fresh=True)])
        with server.listener(APP) as app, client.connect((server.v4, APP)) as older:
            with accept(plane.serving[client.uid].outbound) as taken:
                plane.live[client.uid] = 1
                await enroller.reconcile([])
                status = only(enroller)
                assert (status.state, status.labelled, status.enrolled, status.captured) == (State.DRAINING, False, False, False)
                assert stage_of(client) is Stage.DRAIN
                talk(older, taken)
                with client.connect((server.v4, APP)) as newer, accept(app) as served:
                    talk(newer, served)
            plane.live.clear()
            await eventually_async(lambda: not enroller.status())
        assert stage_of(client) is Stage.REMOVED
        assert plane.calls == [("add", client.uid), ("drain", client.uid), ("remove", client.uid)]
        make_listeners(client.fd, "the ports are free").close()


async def test_draining_has_a_deadline(directory: Path, plane: Plane, client: Pod) -> None:
    settings = EnrolmentSettings(drain_seconds=0.2, drain_poll_seconds=0.02)
    async with running(directory, plane, settings) as enroller:
        await enroller.reconcile([spec(client)])
        plane.live[client.uid] = 7
        await enroller.reconcile([])
        await eventually_async(lambda: not enroller.status())
        assert stage_of(client) is Stage.REMOVED


async def test_a_draining_pod_can_be_wanted_again(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client)])
        plane.live[client.uid] = 1
        await enroller.reconcile([])
        await enroller.reconcile([spec(client)])
        assert only(enroller).enrolled
        assert plane.calls == [("add", client.uid), ("drain", client.uid), ("add", client.uid)]
        await until(enroller, State.ENROLLED)
        assert stage_of(client) is Stage.FULL


async def test_an_application_on_one_of_our_ports_is_named_and_waited_for(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        with client.listener(INBOUND_HBONE):
            await enroller.reconcile([spec(client)])
            status = only(enroller)
            assert status.state is State.FAILED
            assert status.problem.startswith("pod test/client: port 15008 is in use by the application")
            assert status.retry_in_seconds is not None
            assert stage_of(client) is Stage.REMOVED
        await eventually_async(lambda: only(enroller).enrolled)
        assert only(enroller).problem == ""


async def test_a_data_plane_that_refuses_leaves_the_pod_alone(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        plane.refuses = True
        await enroller.reconcile([spec(client)])
        assert only(enroller).problem == "the data plane has no certificate"
        assert stage_of(client) is Stage.REMOVED
        with pytest.raises(NotEnrolledError):
            enroller.make_sockets(client.uid, socket.AF_INET, 1)
        plane.refuses = False
        await eventually_async(lambda: only(enroller).enrolled)
        assert enroller.counters().failed >= 1


async def test_sockets_are_made_for_a_captured_pod(directory: Path, plane: Plane, client: Pod, server: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, fresh=True)])
        with ExitStack() as stack:
            made = [stack.enter_context(each) for each in enroller.make_sockets(client.uid, socket.AF_INET6, 3)]
            for each in made:
                assert not each.getblocking()
                assert each.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == PROXY_MARK
                assert each.getsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT) == 1
                assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)
                assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == KEEPALIVE_SECONDS
                assert struct.unpack("ii", each.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 0)
            app = stack.enter_context(server.listener(APP))
            made[0].settimeout(5)
            made[0].connect((server.v6, APP))
            talk(made[0], stack.enter_context(accept(app)))
            assert nobody_waits(plane.serving[client.uid].outbound)


async def test_a_foreign_namespace_is_refused(tmp_path: Path, plane: Plane, client: Pod, server: Pod) -> None:
    publish(tmp_path, server, uid=client.uid)
    async with running(tmp_path, plane) as enroller:
        await enroller.reconcile([spec(client)])
        assert "holds none of its addresses (10.101.0.1, fd99:1::1)" in only(enroller).problem
        assert plane.calls == []
        assert stage_of(server) is Stage.REMOVED


async def test_the_hosts_namespace_is_refused(tmp_path: Path, plane: Plane, client: Pod) -> None:
    (tmp_path / client.uid).symlink_to(netns.CURRENT)
    async with running(tmp_path, plane) as enroller:
        await enroller.reconcile([PodSpec(client.uid, client.name, "test", ("127.0.0.1",))])
        assert "is the host's own" in only(enroller).problem


async def test_a_pod_whose_namespace_is_not_there_yet_is_waited_for(tmp_path: Path, plane: Plane, client: Pod) -> None:
    async with running(tmp_path, plane) as enroller:
        await enroller.reconcile([spec(client)])
        assert "No such file" in only(enroller).problem
        publish(tmp_path, client)
        await eventually_async(lambda: only(enroller).enrolled)


async def test_a_wanted_pod_that_never_was_captured_is_forgotten(tmp_path: Path, plane: Plane, client: Pod) -> None:
    async with running(tmp_path, plane) as enroller:
        await enroller.reconcile([spec(client)])
        await enroller.reconcile([])
        assert enroller.status() == []


@pytest.mark.parametrize("told", [True, False], ids=["told", "noticed"])
async def test_a_deleted_pod_is_dropped_and_its_namespace_freed(net: Topology, tmp_path: Path, plane: Plane, told: bool) -> None:
    node = net.node()
    pod = node.pod("mortal")
    publish(tmp_path, pod)
    async with running(tmp_path, plane) as enroller:
        await enroller.reconcile([spec(pod)])
        plane.live[pod.uid] = 5
        (tmp_path / pod.uid).unlink()
        net.forget(node, pod)
        assert "p1" in node.command("ip", "link", "show", "type", "veth")
        await enroller.reconcile([], deleted={pod.uid} if told else ())
        assert enroller.status() == []
        assert plane.calls == [("add", pod.uid), ("remove", pod.uid)]
        await eventually_async(lambda: "p1" not in node.command("ip", "link", "show", "type", "veth"), saying="namespace freed")


async def test_another_namespace_under_the_same_uid_replaces_the_first(net: Topology, tmp_path: Path, plane: Plane) -> None:
    node = net.node()
    first = node.pod("reborn")
    publish(tmp_path, first)
    async with running(tmp_path, plane) as enroller:
        await enroller.reconcile([spec(first)])
        second = node.pod("reborn")
        wanted = PodSpec(first.uid, first.name, "test", second.addresses)
        (tmp_path / first.uid).unlink()
        publish(tmp_path, second, uid=first.uid)
        await enroller.reconcile([wanted])
        assert only(enroller).enrolled
        assert stage_of(second) is not Stage.REMOVED
        assert enroller.counters().replaced == 1
        assert plane.calls == [("add", first.uid), ("remove", first.uid), ("add", first.uid)]


async def test_another_identity_under_the_same_uid_is_served_anew(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([replace(spec(client), identity="one")])
        await enroller.reconcile([replace(spec(client), identity="other")])
        assert only(enroller).enrolled
        assert enroller.counters().replaced == 1
        assert plane.calls == [("add", client.uid), ("remove", client.uid), ("add", client.uid)]
        await enroller.reconcile([])
        await eventually_async(lambda: enroller.status() == [])
        assert stage_of(client) is Stage.REMOVED


async def test_a_namespace_that_vanishes_is_let_go_and_looked_for_again(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=True)])
        (directory / client.uid).unlink()
        await eventually_async(lambda: only(enroller).state is State.FAILED)
        assert stage_of(client) is Stage.FULL  # fail closed: nobody listens, nothing leaves
        publish(directory, client)
        await eventually_async(lambda: only(enroller).state is State.ENROLLED)


async def test_drift_is_healed_and_counted(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=True)])
        client.command("ip", "rule", "del", "priority", "32764")
        await eventually_async(lambda: enroller.counters().healed == 1)
        assert "fwmark 0x111/0xfff" in client.command("ip", "rule")
        client.command("nft", "flush", "ruleset")
        checked = enroller.counters().checked
        await eventually_async(lambda: enroller.counters().checked > checked + 1)
        assert stage_of(client) is Stage.FULL
        assert only(enroller).captured


async def test_listeners_that_somebody_shut_down_listen_again(directory: Path, plane: Plane, client: Pod) -> None:
    """A worker has duplicates, and what it does to them it does to all that come after it."""
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=True)])
        for listener in plane.serving[client.uid]:
            listener.shutdown(socket.SHUT_RD)
        await eventually_async(lambda: enroller.counters().healed == 1)
        for port in (OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE):
            with client.connect(("127.0.0.1", port)):
                pass


async def test_drift_that_cannot_be_healed_is_a_problem(directory: Path, plane: Plane, client: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=True)])
        client.command("ip", "rule", "add", "priority", "7", "blackhole")
        await eventually_async(lambda: "cannot be healed" in only(enroller).problem)
        assert (only(enroller).enrolled, only(enroller).captured) == (True, False)
        client.command("ip", "rule", "del", "priority", "7")
        await eventually_async(lambda: only(enroller).captured)
        assert only(enroller).problem == ""


async def test_ending_the_agent_fails_closed_and_the_next_one_takes_over(directory: Path, plane: Plane, client: Pod, server: Pod) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=True)])
    assert stage_of(client) is Stage.FULL
    with server.listener(APP), pytest.raises(ConnectionRefusedError), client.connect((server.v4, APP)):
        pass
    async with running(directory, plane) as successor:
        await successor.reconcile([spec(client)])
        assert only(successor).state is State.ENROLLED  # no second grace: it would be a gap
        assert successor.counters().adopted == 1
        with client.connect((server.v4, APP)), accept(plane.serving[client.uid].outbound):
            pass


async def test_the_mesh_can_leave_the_node(directory: Path, plane: Plane, client: Pod) -> None:
    enroller = Enroller(DirectoryFinder(str(directory)), plane, FAST)
    await enroller.reconcile([spec(client)])
    await enroller.close(remove=True)
    assert stage_of(client) is Stage.REMOVED
    assert enroller.status() == []
    assert plane.calls == [("add", client.uid), ("remove", client.uid)]


async def test_what_a_dead_agent_left_in_a_pod_that_is_not_wanted_is_removed(
    directory: Path, plane: Plane, client: Pod, server: Pod
) -> None:
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client)])
    publish(directory, server)
    successor = Enroller(DirectoryFinder(str(directory)), plane, FAST)
    await successor.release_leftovers([spec(client), spec(server), PodSpec("absent", "absent", "test", ("10.0.0.1",))])
    assert stage_of(client) is Stage.REMOVED
    assert client.command("ip", "route", "show", "table", "100") == ""


OWNER = """
import sys
from ztunnel.node.foothold import Foothold
from ztunnel.node.nft import probe_ownership
from ztunnel.node.redirect import Stage
foothold = Foothold.open(int(sys.argv[1]), "test/client", probe_ownership())
foothold.load(Stage.FULL)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_agent(pod: Pod) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OWNER, str(pod.fd)]
    with subprocess.Popen(command, pass_fds=[pod.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "ready\n"
        yield agent


async def test_a_killed_agent_leaves_the_rules_and_the_next_one_adopts_them(
    directory: Path, plane: Plane, client: Pod, server: Pod
) -> None:
    with another_agent(client) as agent:
        async with running(directory, plane) as early:
            await early.reconcile([spec(client)])
            assert "port 15001 is in use" in only(early).problem
        with server.listener(APP), client.connect((server.v4, APP)) as connection:
            os.kill(agent.pid, signal.SIGKILL)
            agent.wait()
            with pytest.raises(ConnectionResetError):  # not an end of stream: the application must not take half for whole
                connection.recv(1)
            with pytest.raises(ConnectionRefusedError), client.connect((server.v4, APP)):
                pass
    assert stage_of(client) is Stage.FULL
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client)])
        assert only(enroller).state is State.ENROLLED
        assert enroller.counters().adopted == 1
        if probe_ownership() is Ownership.OWNED:
            client.command("nft", "flush", "ruleset")
            assert stage_of(client) is Stage.FULL


@pytest.mark.slow
async def test_fifty_times_in_and_out_leak_nothing(net: Topology, directory: Path, plane: Plane, client: Pod) -> None:
    pods = [client, *(net.nodes[0].pod(f"more-{i}") for i in range(3))]
    for pod in pods[1:]:
        publish(directory, pod)
    async with AsyncExitStack() as stack:
        enroller = await stack.enter_async_context(running(directory, plane))
        before = 0
        for cycle in range(50):
            await enroller.reconcile([spec(pod) for pod in pods])
            assert all(status.enrolled for status in enroller.status())
            await enroller.reconcile([])
            assert enroller.status() == []
            before = before or len(os.listdir("/proc/self/fd"))
            assert len(os.listdir("/proc/self/fd")) == before, f"cycle {cycle}"
        assert enroller.counters().removed == 50 * len(pods)


async def test_a_cancelled_enrolment_is_picked_up(directory: Path, client: Pod) -> None:
    class Stalling(Plane):
        stalls = True

        async def add(self, uid: str, listeners: Listeners) -> None:
            if self.stalls:
                await trio.sleep_forever()
            await super().add(uid, listeners)

    plane = Stalling()
    async with running(directory, plane) as enroller:
        with trio.move_on_after(0.2):
            await enroller.reconcile([spec(client)])
        plane.stalls = False
        await eventually_async(lambda: only(enroller).enrolled)


async def test_a_data_plane_that_stalls_is_a_problem_with_a_name(directory: Path, client: Pod) -> None:
    class Stalling(Plane):
        async def add(self, uid: str, listeners: Listeners) -> None:
            await trio.sleep_forever()

    settings = EnrolmentSettings(sink_seconds=0.1, retry_seconds=60, retry_limit_seconds=60)
    async with running(directory, Stalling(), settings) as enroller:
        await enroller.reconcile([spec(client)])
        assert only(enroller).problem == "the data plane did not answer in time"
        assert stage_of(client) is Stage.REMOVED


async def test_a_data_plane_that_stalls_on_leaving_does_not_keep_the_namespace(directory: Path, client: Pod) -> None:
    class Stalling(Plane):
        async def remove(self, uid: str, drain: bool) -> None:
            await trio.sleep_forever()

    settings = EnrolmentSettings(sink_seconds=0.1, retry_seconds=0.05, drain_poll_seconds=0.02)
    before = len(os.listdir("/proc/self/fd"))
    enroller = Enroller(DirectoryFinder(str(directory)), Stalling(), settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(enroller.run)
        await enroller.reconcile([spec(client)])
        await enroller.reconcile([])
        await eventually_async(lambda: not enroller.status())
        nursery.cancel_scope.cancel()
    assert len(os.listdir("/proc/self/fd")) == before
    assert stage_of(client) is Stage.REMOVED


@pytest.fixture
def read_only_sysctls() -> Iterator[None]:
    subprocess.run(["mount", "--bind", "/proc/sys", "/proc/sys"], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", "/proc/sys"], check=True)
    yield
    subprocess.run(["umount", "/proc/sys"], check=True)


async def test_a_hardened_pod_is_refused_rather_than_cut_off(
    directory: Path, plane: Plane, client: Pod, request: pytest.FixtureRequest
) -> None:
    client.command("sh", "-c", f"echo 0 > {TCP_LOOSE}")
    request.getfixturevalue("read_only_sysctls")
    async with running(directory, plane) as enroller:
        await enroller.reconcile([spec(client, strict=True)])
        assert "nf_conntrack_tcp_loose is not 1 and cannot be set" in only(enroller).problem
        assert stage_of(client) is Stage.REMOVED


@pytest.fixture
def unprivileged() -> list[str]:
    command = ["unshare", "-Urnm", "--propagation", "private"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no user namespaces here")
    return command


def test_everything_works_without_privileges_over_the_machine(unprivileged: list[str]) -> None:
    """The same tests in a user namespace, where we are root over nothing but our own namespaces."""
    chosen = "captured or evict or two_phases or drain or drift"
    here = Path(__file__).parent / "test_redirection.py"
    command = [
        *unprivileged,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--require-netns",
        "-p",
        "no:cacheprovider",
        str(here),
        "-k",
        chosen,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
