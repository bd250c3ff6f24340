"""Becomes a program in a pod: `python -I -S launcher.py`, stand-alone, standard library only, because every start pays for it.

File descriptor 3 is a JSON order, 4 the pod's network namespace. The launcher enters it, takes mount and UTS namespaces of its own,
puts the pod's resolv.conf over the machine's, sets the host name, and executes the command. Whatever it cannot do it says on
standard error and exits 125 (set-up), 126 (not executable) or 127 (not found), as container runtimes do.
Nothing of it touches the machine: mounts are private, and the process lives in the lab's own process namespace, whose death it shares.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import termios

ORDER_FD, NETNS_FD = 3, 4
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
MS_RDONLY, MS_BIND, MS_REC_PRIVATE = 0x1, 0x1000, 0x44000
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 23, 24, 38
LAST_CAPABILITY = 63
RESOLV_CONF = "/etc/resolv.conf"


def main() -> None:
    """Follow the order; never returns."""
    with os.fdopen(ORDER_FD, "rb") as source:
        order = json.load(source)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        os.setsid()
        if order["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        enter(libc, order)
        os.chdir(order["cwd"])
        if order["capabilities"] is not None:
            keep_only(libc, order["capabilities"])
    except OSError as error:
        refuse(125, f"cannot set the container up: {error.strerror}{f' ({error.filename})' if error.filename else ''}")
    execute(order["argv"], order["env"])


def enter(libc: ctypes.CDLL, order: dict[str, str]) -> None:
    """Take the pod's namespaces and make its view of names.

    Raises:
        OSError: the kernel refuses a step.
    """
    check(libc.setns(NETNS_FD, CLONE_NEWNET), "network namespace")
    os.close(NETNS_FD)
    if order["hostname"]:
        check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS), "mount and UTS namespace")
        check(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None), "private mounts")
        resolve_with(libc, order["resolv_conf"])
        name = order["hostname"].encode()[:63]
        check(libc.sethostname(name, ctypes.c_size_t(len(name))), "host name")


def keep_only(libc: ctypes.CDLL, capabilities: list[int]) -> None:
    """Let the program have these capabilities at most, whatever it executes.

    Raises:
        OSError: the kernel refuses.
    """
    for number in range(LAST_CAPABILITY + 1):
        if number not in capabilities and libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(number)) == 1:
            check(libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number)), "capabilities")
    none = ctypes.c_ulong(0)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), none, none, none), "no new privileges")


def resolve_with(libc: ctypes.CDLL, path: str) -> None:
    """Make /etc/resolv.conf show the file at `path`, which stands alone in its directory.

    A bind mount needs a file to stand on. Where the machine has none (or a dangling link), /etc is overlaid with the directory.
    """
    place = os.path.realpath(RESOLV_CONF)
    if os.path.isfile(place):
        check(libc.mount(path.encode(), place.encode(), None, ctypes.c_ulong(MS_BIND), None), f"resolv.conf over {place}")
        return
    layers = f"lowerdir={os.path.dirname(path)}:/etc".encode()
    check(libc.mount(b"overlay", b"/etc", b"overlay", ctypes.c_ulong(MS_RDONLY), layers), "overlay of /etc for resolv.conf")


def execute(argv: list[str], env: dict[str, str]) -> None:
    """Replace this process; returns only by ending it."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, env)  # noqa: S606 - running what the manifest says is the point
    except (FileNotFoundError, NotADirectoryError):
        refuse(127, f'exec: "{argv[0]}": executable file not found in $PATH')
    except OSError as error:
        refuse(126, f'exec: "{argv[0]}": {error.strerror}')


def refuse(code: int, reason: str) -> None:
    """End with a container runtime's exit code."""
    sys.stderr.write(f"error: {reason}\n")
    sys.stderr.flush()
    os._exit(code)


def check(result: int, what: str) -> None:
    """Of a libc call.

    Raises:
        OSError: it failed; `what` is the file name of the error.
    """
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


if __name__ == "__main__":
    main()
