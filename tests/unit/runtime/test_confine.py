"""What a confined process can still do: tried in a child, because there is no way back."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ztunnel.runtime.confine import confine, seccomp_program

NOT_HERE = platform.machine() not in ("x86_64", "aarch64")


def confined(attempt: Callable[[], object]) -> tuple[str, dict[str, str]]:
    """How an attempt ends in a confined child (`done` or the error's name), and the child's /proc/self/status from outside."""
    reading, writing = os.pipe()
    held, release = os.pipe()
    child = os.fork()
    if not child:
        answer = "done"
        try:
            confine()
            attempt()
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        except RuntimeError:
            answer = "RuntimeError"
        os.write(writing, json.dumps(answer).encode() + b"\n")
        os.read(held, 1)
        os._exit(0)
    answer = json.loads(os.read(reading, 4096))
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines() if ":\t" in line)
    os.write(release, b"x")
    os.waitpid(child, 0)
    for descriptor in (reading, writing, held, release):
        os.close(descriptor)
    return answer, status


def test_no_capability_is_left() -> None:
    _, status = confined(lambda: None)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
        assert int(status["CapBnd"], 16) == 0
        assert set(status["Uid"].split()) == {"65534"}


@pytest.mark.skipif(NOT_HERE, reason="system-call numbers of this machine are not in the table")
@pytest.mark.parametrize(
    ("attempt", "outcome"),
    [
        (lambda: open("/etc/hostname"), "EPERM"),  # noqa: SIM115 - it must not open
        (socket.socket, "EPERM"),
        (os.fork, "EPERM"),
        (lambda: os.execv("/bin/true", ["true"]), "EPERM"),
        (lambda: os.kill(os.getppid(), 0), "EPERM"),
        (lambda: signal.pthread_kill(threading.get_ident(), 0), "EPERM"),
        (lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE), "EPERM"),
        (lambda: os.pidfd_open(os.getppid()), "EPERM"),
        (lambda: os.memfd_create("x"), "EPERM"),
        (lambda: os.ftruncate(0, 0), "EPERM"),
        (socket.socketpair, "EPERM"),
        (lambda: os.unlink("/tmp/there-is-no-such-file"), "EPERM"),
        (lambda: threading.Thread(target=print).start(), "RuntimeError"),
    ],
    ids=["open", "socket", "fork", "exec", "kill", "tgkill", "prlimit", "pidfd", "memfd", "truncate", "socketpair", "unlink", "thread"],
)
def test_what_a_proxy_never_does_is_refused(attempt: Callable[[], object], outcome: str) -> None:
    assert confined(attempt)[0] == outcome


def test_what_a_proxy_does_goes_on() -> None:
    near, far = socket.socketpair()
    unconnected = socket.socket()
    with near, far, unconnected:

        def work() -> None:
            near.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", near.fileno()))])
            far.recvmsg(10, 100)
            unconnected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            unconnected.bind(("127.0.0.1", 0))
            os.urandom(16)

        assert confined(work)[0] == "done"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_lands_inside_the_program(machine: str) -> None:
    program = seccomp_program(machine)
    instructions = list(struct.iter_unpack("=HBBI", program))
    assert len(instructions) < 256
    for index, (code, yes, no, _value) in enumerate(instructions):
        if code in (0x15, 0x35):
            assert index + 1 + max(yes, no) < len(instructions)
    verdicts = [value for code, _, _, value in instructions if code == 0x06]
    assert verdicts == [0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM]


def test_an_unknown_machine_has_no_filter() -> None:
    assert seccomp_program("riscv64") == b""
