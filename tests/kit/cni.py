"""Calling CNI plugins as a container runtime does: environment, standard input, and what comes out."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.kit.mesh import Json
from tests.kit.netns import Place
from ztunnel.node import netns

REPOSITORY = Path(__file__).parents[2]
DEBIANS = Path("/usr/lib/cni")
"""Where containernetworking-plugins puts its programs."""
CALL_SECONDS = 180


@cache
def plugin() -> Path:
    """Our plugin, compiled once for each test run."""
    made = subprocess.run([REPOSITORY / "scripts" / "cni-plugin"], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert made.returncode == 0, made.stderr
    return REPOSITORY / made.stdout.strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to."""

    status: int
    output: bytes

    @property
    def body(self) -> Json:
        """What it printed."""
        found: Json = json.loads(self.output)
        return found

    @property
    def error(self) -> tuple[object, str]:
        """The code and the words of its failure."""
        assert self.status != 0, self.output
        return self.body["code"], f"{self.body['msg']}: {self.body['details']}"

    @property
    def accepted(self) -> bytes:
        """What it printed, when it succeeded."""
        assert self.status == 0, self.output
        return self.output


def arguments(name: str, namespace: str = "default", uid: str = "", container: str = "c1") -> str:
    """CNI_ARGS as containerd makes them."""
    named = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={container}"
    return f"{named};K8S_POD_UID={uid}" if uid else named


def call(
    command: str,
    configuration: bytes | Mapping[str, object],
    *,
    args: str = "",
    path: str = "/run/netns/none",
    container: str = "c1",
    program: Path | None = None,
    environment: Mapping[str, str] = {},
    before: Sequence[str] = (),
) -> Outcome:
    """One call, of our plugin unless told; `before`: what starts it, e.g. in a namespace."""
    given = configuration if isinstance(configuration, bytes) else json.dumps(configuration).encode()
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": path,
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": args,
        "CNI_PATH": str(DEBIANS),
        "PATH": os.environ["PATH"],
        **environment,
    }
    done = subprocess.run(
        [*before, program or plugin()], input=given, capture_output=True, check=False, env=variables, timeout=CALL_SECONDS
    )
    return Outcome(done.returncode, done.stdout)


class Refused(AssertionError):
    """A plugin of a chain failed; the text is what kubelet would show."""


@dataclass(slots=True, eq=False)
class Sandbox:
    """What a container runtime makes first of a pod: a network namespace, pinned where runtimes pin them. A context manager."""

    container: str
    place: Place
    directory: Path = Path("/run/netns")

    @classmethod
    def make(cls, container: str) -> Sandbox:
        """An empty one; `/run` is the tests' own (tests/kit/isolation.py)."""
        made = cls(container, Place(container, netns.new()))
        made.directory.mkdir(exist_ok=True)
        netns.pin(made.place.fd, made.path)
        return made

    @property
    def path(self) -> str:
        return str(self.directory / f"cni-{self.container}")

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """As runtimes do after DEL. The place stays open for tests that look into it."""
        netns.unpin(self.path)
        if self.place.fd >= 0:
            os.close(self.place.fd)
            self.place.fd = -1


@dataclass(frozen=True, slots=True)
class Chain:
    """A network configuration list, carried out on a node as libcni does it: results handed on from plugin to plugin."""

    node: Place
    plugins: tuple[Json, ...]
    version: str = "1.0.0"
    ours: Path | None = None
    """Our plugin, if not the one of this repository."""

    def add(self, sandbox: Sandbox, args: str) -> Json:
        """The chain's result. Raises: Refused, with everything undone."""
        result: Json | None = None
        for each in self.plugins:
            outcome = self._call("ADD", each, sandbox, args, {"prevResult": result} if result else {})
            if outcome.status != 0:
                self.delete(sandbox, args)
                raise Refused(f"{outcome.error[0]} {outcome.error[1]}")
            result = outcome.body
        assert result is not None
        sandbox.place.v4 = next(str(each["address"]).partition("/")[0] for each in _objects(result["ips"]))
        return result

    def delete(self, sandbox: Sandbox, args: str) -> None:
        """Undoes it, from the last to the first."""
        for each in reversed(self.plugins):
            outcome = self._call("DEL", each, sandbox, args, {})
            assert outcome.status == 0, outcome

    def check(self, sandbox: Sandbox, args: str, result: Json) -> None:
        """Raises: Refused."""
        for each in self.plugins:
            outcome = self._call("CHECK", each, sandbox, args, {"prevResult": result})
            if outcome.status != 0:
                raise Refused(f"{outcome.error[0]} {outcome.error[1]}")

    def _call(self, command: str, configuration: Json, sandbox: Sandbox, args: str, more: Json) -> Outcome:
        given = {**configuration, "cniVersion": self.version, "name": "test", **more}
        program = (self.ours or plugin()) if configuration["type"] == "ztunnel-cni" else DEBIANS / str(configuration["type"])
        inside = ["nsenter", f"--net={self.node.path}"]
        return call(command, given, args=args, path=sandbox.path, container=sandbox.container, program=program, before=inside)


def _objects(listed: object) -> list[Json]:
    assert isinstance(listed, list)
    return listed
