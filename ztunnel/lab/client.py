"""The command line's and the tests' side of a lab's socket. Synchronous, standard library only: it is imported at every start."""

from __future__ import annotations

import array
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ztunnel.lab.objects import LabError
from ztunnel.lab.paths import name_option_of
from ztunnel.lab.wire import MAX_ANSWER, MAX_REQUEST, MAX_SOCKET_PATH, decode, encode, socket_path
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.manifests.tree import Tree, at, integer, text

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 660.0


class NoLab(LocalError):
    """There is no lab of that name, or its controller is dead."""


class Client:
    """A lab's verbs. One connection per call."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def call(self, verb: str, **arguments: object) -> object:
        """The answer to one request.

        Raises:
            NoLab: nobody answers.
            LabError: refused; the text is for the user.
        """
        with self._connection() as sock, sock.makefile("rb") as lines:
            _send(sock, _request(verb, arguments))
            return _answer(_line(lines.readline))

    def watch(self, **arguments: object) -> Iterator[tuple[str, Tree]]:
        """The selected objects as ADDED, then every change, for as long as the caller asks for more."""
        with self._connection() as sock, sock.makefile("rb") as lines:
            sock.settimeout(None)
            _send(sock, _request("watch", arguments))
            while line := lines.readline(MAX_ANSWER):
                message = decode(line)
                if "error" in message:
                    raise Refused(text(message, "reason"), text(message, "error"))
                body = message.get("object")
                if isinstance(body, dict):
                    yield text(message, "event"), body

    def exec(self, fds: Sequence[int], on_start: Callable[[Callable[[int], None]], None] | None = None, **arguments: object) -> int:
        """Run a command in a pod with three file descriptors of the caller; its exit code.

        Args:
            fds: standard input, output and error for it.
            on_start: is given a function that sends a signal to the command.
        """
        with self._connection() as sock, sock.makefile("rb") as lines:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            request = _request("exec", arguments)
            _send(sock, request, rights)
            first = decode(_line(lines.readline))
            if "error" in first:
                raise Refused(text(first, "reason"), text(first, "error"))
            sock.settimeout(None)
            if on_start is not None:
                on_start(lambda number: sock.sendall(encode({"signal": number})))
            last = lines.readline(MAX_ANSWER)
            if not last:
                raise NoLab("the lab ended while the command ran")
            return integer(decode(last), "exit", default=1)

    @contextmanager
    def _connection(self) -> Iterator[socket.socket]:
        path = socket_path(self.state)
        if len(str(path).encode()) > MAX_SOCKET_PATH:
            raise NoLab(f"the path of the lab's socket is longer than {MAX_SOCKET_PATH} bytes: {path}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_SECONDS)
            try:
                sock.connect(str(path))
            except FileNotFoundError as error:
                raise NoLab(
                    f"no lab named {self.state.name!r} is up (ztunnel lab up -f …; ztunnel lab list shows those that are)"
                ) from error
            except PermissionError as error:
                raise NoLab(f"the lab {self.state.name!r} belongs to another user: {path}") from error
            except OSError as error:
                raise NoLab(
                    f"the lab {self.state.name!r} does not answer ({error.strerror or error}); "
                    f"`ztunnel lab down{name_option_of(self.state.name)}` cleans up after it"
                ) from error
            sock.settimeout(ANSWER_SECONDS)
            yield sock


def _request(verb: str, arguments: dict[str, object]) -> bytes:
    data = encode({"verb": verb, **arguments})
    if len(data) > MAX_REQUEST:
        raise LabError("", f"the request is {len(data)} bytes; at most {MAX_REQUEST} are accepted")
    return data


def _send(sock: socket.socket, data: bytes, *rights: tuple[int, int, array.array[int]]) -> None:
    """Send a request. A controller that refuses before it has read all of it hangs up, and its answer says why."""
    try:
        sent = sock.sendmsg([data], rights)
        if sent < len(data):
            sock.sendall(data[sent:])
    except (BrokenPipeError, ConnectionResetError):
        return


def _line(readline: Callable[[int], bytes]) -> bytes:
    try:
        line = readline(MAX_ANSWER)
    except TimeoutError as error:
        raise NoLab("the lab did not answer in time") from error
    except ConnectionResetError:
        line = b""
    if not line:
        raise NoLab("the lab ended without an answer")
    return line


def _answer(line: bytes) -> object:
    message = decode(line)
    if "error" in message:
        reason = text(message, "reason")
        full = text(message, "error")
        raise Refused(reason, full)
    return at(message, "ok")


class Refused(LabError):
    """The controller's refusal, already worded."""

    def __init__(self, reason: str, full: str) -> None:
        super().__init__(reason, full)
        self.args = (full,)
