"""Labs for end-to-end tests: brought up under a random name from manifests, spoken to directly, taken down whatever happens.

    with labs.up(labs.SAMPLES) as lab:
        answer = lab.exec("client", "curl", "-s", "http://orders/", namespace="shop")
        assert answer.json()["remote_address"] == lab.address("client", "shop")
        lab.label("namespace", "outside", {"istio.io/dataplane-mode": "ambient"})
        lab.settle()

No command line in between: these are the calls that it makes itself. `run` speaks through the command line, for tests of that.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ztunnel.lab import documents, lifecycle
from ztunnel.lab.client import Client
from ztunnel.lab.isolation import ProcessId, start_time
from ztunnel.lab.objects import kind_named
from ztunnel.lab.paths import LAB_DIR_VARIABLE, lab_state_dir
from ztunnel.mesh.manifests.tree import Tree, at, branches, integer, strings, text

REPOSITORY = Path(__file__).parents[2]
SAMPLES = REPOSITORY / "deploy" / "samples"
SETTLE_SECONDS = 120.0
Manifests = str | Path | Sequence[str | Path | Tree]
"""YAML text, a file or directory, objects, or several of these."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command in a pod did."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Tree:
        """Its output as an object; fails with what it said when it is none."""
        try:
            found = json.loads(self.stdout)
        except ValueError as error:
            raise AssertionError(f"no JSON in the answer: {self}") from error
        assert isinstance(found, dict), self
        return found


@dataclass(slots=True)
class Lab:
    """A lab that is up."""

    name: str
    client: Client
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        """Its state directory."""
        return self.client.state

    # Commands

    def exec(
        self, pod: str, *command: str, namespace: str = "default", stdin: bytes = b"", container: str = "", within: float = 30.0
    ) -> Answer:
        """Run a command in a pod (NAME, deploy/NAME), a node (node/NAME) or on the fabric, to its end."""
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(stdin)
            files[0].seek(0)
            fds = [each.fileno() for each in files]
            codes: list[int | BaseException] = []

            def run() -> None:
                try:
                    codes.append(self.client.exec(fds, name=pod, namespace=namespace, container=container, argv=list(command)))
                except BaseException as error:  # noqa: BLE001 - handed over to the test's own thread
                    codes.append(error)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(within)
            outputs = [os.pread(fd, 64 << 20, 0).decode(errors="replace") for fd in fds[1:]]
            if not codes:
                raise AssertionError(f"{' '.join(command)} in {pod} did not end within {within:g} s; so far: {outputs}")
            (outcome,) = codes
            if isinstance(outcome, BaseException):
                raise outcome
            return Answer(outcome, *outputs)

    def start(self, pod: str, *command: str, namespace: str = "default") -> subprocess.Popen[bytes]:
        """Begin a command in a pod, with pipes for its standard streams; it ends with the lab at the latest."""
        words = [sys.executable, "-m", "ztunnel", "lab", "exec", "--name", self.name, "-i", "-n", namespace, pod, "--", *command]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, env=_environment(self.state)
        )
        self._running.append(process)
        return process

    def run(self, *words: str, stdin: str = "", within: float = 60.0) -> Answer:
        """`ztunnel lab WORDS --name …` through the real command line."""
        return run(self.state, words[0], "--name", self.name, *words[1:], stdin=stdin, within=within)

    def curl(self, pod: str, url: str, *options: str, namespace: str = "default", seconds: float = 5.0) -> Answer:
        """curl from a pod; code 0 means an answer with any status below 400."""
        return self.exec(pod, "curl", "-sSf", "--max-time", f"{seconds:g}", *options, url, namespace=namespace)

    # Objects

    def apply(self, manifests: Manifests, namespace: str = "default") -> list[str]:
        """Apply manifests; the lines that the command line would print."""
        done = self.client.call("apply", objects=objects_of(manifests), namespace=namespace)
        return [f"{text(each, 'object')} {text(each, 'verb')}" for each in branches({"done": done}, "done")]

    def delete(self, kind: str, name: str, namespace: str = "default", wait: bool = True) -> None:
        """Delete one object that is there, and wait until it is gone."""
        key = {"kind": kind_named(kind).kind, "namespace": namespace, "name": name}
        done = self.client.call("delete", keys=[key], wait=wait)
        assert not at(done, "missing"), done

    def label(self, kind: str, name: str, changes: Mapping[str, str | None], namespace: str = "default") -> None:
        """Set labels; None removes."""
        self.client.call("label", kind=kind_named(kind).kind, name=name, namespace=namespace, changes=dict(changes), overwrite=True)

    def scale(self, name: str, replicas: int, namespace: str = "default") -> None:
        """Set a deployment's number of pods."""
        self.client.call("scale", name=name, namespace=namespace, replicas=replicas)

    def get(self, kind: str, name: str, namespace: str = "default") -> Tree:
        """One object."""
        (found,) = self._get(kind, namespace, name, "")
        return found

    def list(self, kind: str, namespace: str = "default", selector: str = "") -> Sequence[Tree]:
        """Objects of a kind; namespace empty means all."""
        return self._get(kind, namespace, "", selector)

    def _get(self, kind: str, namespace: str, name: str, selector: str) -> Sequence[Tree]:
        found = self.client.call("get", kind=kind_named(kind).kind, namespace=namespace, name=name, selector=selector)
        return branches({"items": found}, "items")

    def address(self, pod: str, namespace: str = "default", version: int = 4) -> str:
        """A pod's address of one family."""
        addresses = [text(entry, "ip") for entry in branches(self.get("pod", pod, namespace), "status", "podIPs")]
        return next(address for address in addresses if (":" in address) == (version == 6))

    def annotation(self, pod: str, name: str, namespace: str = "default") -> str:
        """A pod's annotation; empty where it is absent."""
        return strings(self.get("pod", pod, namespace), "metadata", "annotations").get(name, "")

    # The lab itself

    def settle(self, within: float = SETTLE_SECONDS) -> None:
        """Wait until pods, rollouts, services, agents and capture are as asked for; fails with what is not."""
        missing = self.client.call("settle", timeout=within)
        assert not missing, f"not settled within {within:g} s: {missing}\n{self.everything_logged()}"

    def status(self) -> Tree:
        """What `lab status -o json` says."""
        found = self.client.call("status")
        assert isinstance(found, dict)
        return found

    def agent(self, action: str, node: str) -> None:
        """`start`, `stop` (SIGTERM) or `kill` (SIGKILL) a node's agent; a stopped one stays so until it is started."""
        self.client.call("agent", action=action, node=node)

    def agent_pid(self, node: str) -> int:
        """The agent's process as the test sees it."""
        return next(integer(agent, "pid") for agent in branches(self.status(), "agents") if text(agent, "node") == node)

    def logs(self, name: str, namespace: str = "default") -> str:
        """All that a pod, or a node's agent, has written."""
        path = Path(text(self.client.call("logs", name=name, namespace=namespace), "path"))
        return path.read_text(errors="replace") if path.exists() else ""

    def everything_logged(self, lines: int = 20) -> str:
        """The ends of the controller's and the agents' logs, for a failure's text."""
        logs = sorted(self.state.glob("nodes/*/agent.log"))
        ends = [f"--- {path.parent.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) for path in logs]
        return "\n".join([lifecycle.log_tail(self.state, lines), *ends])

    def close(self) -> None:
        """End the commands that `start` began."""
        for process in self._running:
            process.kill()
            process.communicate()


@contextmanager
def up(
    manifests: Manifests,
    *,
    nodes: int = 2,
    ip_family: str = "ipv4",
    mesh: bool = True,
    images: Sequence[str] = (),
    settle: float = SETTLE_SECONDS,
) -> Iterator[Lab]:
    """A lab that runs these manifests, settled; gone afterwards.

    Args:
        settle: how long it may take; 0 does not wait.
    """
    name = f"t-{secrets.token_hex(4)}"
    with _labs_directory():
        client = lifecycle.start(name, lifecycle.Options(nodes, ip_family, images, mesh))
        lab = Lab(name, client)
        try:
            lab.apply(manifests)
            if settle:
                lab.settle(settle)
            yield lab
        finally:
            lab.close()
            lifecycle.stop(name)


def run(state: Path, *words: str, stdin: str = "", within: float = 60.0) -> Answer:
    """`ztunnel lab WORDS` through the real command line, with the labs of `state`'s directory."""
    command = [sys.executable, "-m", "ztunnel", "lab", *words]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=within, check=False, cwd=REPOSITORY, env=_environment(state)
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def objects_of(manifests: Manifests) -> list[Tree]:
    """What the controller is sent."""
    if isinstance(manifests, Path):
        return documents.read([str(manifests)])
    if isinstance(manifests, str):
        return documents.parse_text("the test", manifests)
    found: list[Tree] = []
    for each in manifests:
        found += [{"source": "the test", "body": each}] if isinstance(each, dict) else objects_of(each)
    return found


def processes_of(lab: Lab) -> list[ProcessId]:
    """Every process in the lab's process namespace, as this process sees them."""
    inside = os.stat(f"/proc/{integer(lab.status(), 'pid')}/ns/pid").st_ino
    return [ProcessId(pid, started) for pid in _pids_in(inside) if (started := start_time(pid)) is not None]


def _pids_in(namespace: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "ns" / "pid").stat().st_ino == namespace:
                yield int(entry.name)
        except OSError:
            continue  # ended, or not ours to ask


@contextmanager
def _labs_directory() -> Iterator[None]:
    """Labs of tests live in a directory of their own, short enough for the paths of Unix sockets."""
    if os.environ.get(LAB_DIR_VARIABLE):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="labs-") as directory:
        os.environ[LAB_DIR_VARIABLE] = directory
        try:
            yield
        finally:
            del os.environ[LAB_DIR_VARIABLE]


def _environment(state: Path) -> dict[str, str]:
    return {**os.environ, LAB_DIR_VARIABLE: str(state.parent), "PYTHONPATH": str(REPOSITORY)}


def state_of(name: str) -> Path:
    """Where a lab of that name keeps its state."""
    return lab_state_dir(name)
