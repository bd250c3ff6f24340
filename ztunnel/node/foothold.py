"""What the agent holds in one pod's namespace: the open namespace, the listeners, and the socket that owns its tables.

The steps of capturing and releasing a pod as plain synchronous calls; when to take which step is `enrolment`'s and `pods`' affair.
Each call may block for tens of milliseconds in the kernel and enters the namespace on a throw-away thread.
Invariant: closing a foothold closes everything that keeps the namespace alive, and leaves the rules as they are.
"""

from __future__ import annotations

import os

from ztunnel.mesh.errors import NetlinkError
from ztunnel.node import conntrack, established, netns, routes
from ztunnel.node.established import Established
from ztunnel.node.nft import Ownership, PodTables
from ztunnel.node.redirect import Stage, ruleset
from ztunnel.node.sockets import Listeners, make_listeners

# Mid-stream packets of a redirected connection whose conntrack entry is lost must be picked up and redirected again. With 0
# they would be passed on as they are: plaintext on the wire.
TCP_LOOSE = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose"


class Foothold:
    """One pod's namespace in our hands. Used by one thread at a time."""

    def __init__(self, netns_fd: int, tables: PodTables, listeners: Listeners) -> None:
        self.netns_fd = netns_fd
        self.netns_id = netns.identity(netns_fd)
        self.listeners = listeners
        self._tables = tables
        self._wanted = Stage.REMOVED

    @classmethod
    def open(cls, netns_fd: int, pod: str, ownership: Ownership) -> Foothold:
        """A foothold in the namespace, with listeners that listen and no rules loaded.

        Args:
            netns_fd: becomes the foothold's; closed when this fails.
            pod: `namespace/name`, for error texts.
        Raises: LocalError; PortTaken when the application holds one of our ports.
        """
        tables: PodTables | None = None
        try:
            tables = netns.run_inside(netns_fd, PodTables, ownership)
            return cls(netns_fd, tables, make_listeners(netns_fd, pod))
        except BaseException:
            if tables is not None:
                tables.close()
            os.close(netns_fd)
            raise

    def found_stage(self) -> Stage | None:
        """What is loaded now, e.g. by an agent before this one; None for rules of ours that are no stage's."""
        return self._tables.stage()

    def load(self, stage: Stage) -> None:
        """Routes, then rules: the namespace redirects as `stage` says. Idempotent, atomic in the rules.

        Raises: NetlinkError; the rules are as before then.
        """
        self._wanted = stage
        netns.run_inside(self.netns_fd, self._load)

    def check(self) -> str | None:
        """What is not as the last `load` wanted it, in words; None when all is well."""
        return netns.run_inside(self.netns_fd, self._check)

    def heal(self) -> None:
        """Make it again as the last `load` wanted it, whatever it is now.

        Raises: NetlinkError.
        """
        netns.run_inside(self.netns_fd, self._load)

    def cut_uncaptured(self) -> int:
        """Connections that are older than the capture, and pass it by, end with their next packet; how many.

        Raises: NetlinkError.
        """
        return netns.run_inside(self.netns_fd, conntrack.cut_uncaptured)

    def unload(self) -> None:
        """Rules, then routes are gone. Idempotent.

        Raises: NetlinkError.
        """
        netns.run_inside(self.netns_fd, self._unload)

    def close(self) -> None:
        """Give everything up; rules and routes stay as they are."""
        self.listeners.close()
        self._tables.close()
        os.close(self.netns_fd)

    def _load(self) -> None:
        # First, so that nothing is redirected where this fails; and again, because where conntrack is a module that nobody has
        # used yet, only the rules bring it into the namespace.
        if os.path.exists(TCP_LOOSE):
            _pin_tcp_loose()
        self.listeners.listen()
        routes.ensure()
        older = _older_connections() if self._wanted is Stage.GUARDED and self._tables.stage() is Stage.REMOVED else []
        self._tables.apply(ruleset(self._wanted))
        _pin_tcp_loose()
        if older:
            established.keep(older)

    def _check(self) -> str | None:
        if _tcp_loose() != "1":
            return "nf_conntrack_tcp_loose is not 1"
        if not self.listeners.listening:
            return "a listener was shut down"
        return routes.difference() or self._tables.check(ruleset(self._wanted))

    def _unload(self) -> None:
        self._tables.apply(ruleset(Stage.REMOVED))
        routes.remove()


def _older_connections() -> list[Established]:
    """Those that the pod has while nothing is redirected yet. A kernel that cannot list them leaves them to the grace period."""
    try:
        return established.list_established()
    except NetlinkError:
        return []


def sweep(netns_fd: int, ownership: Ownership) -> bool:
    """Remove what an agent that is gone left in a namespace; whether there was anything.

    Raises: NetlinkError, also when a live agent owns the rules.
    """
    return netns.run_inside(netns_fd, _sweep, ownership)


def _sweep(ownership: Ownership) -> bool:
    tables = PodTables(ownership)
    try:
        if tables.stage() is Stage.REMOVED:
            return False
        tables.apply(ruleset(Stage.REMOVED))
        routes.remove()
        return True
    finally:
        tables.close()


def _tcp_loose() -> str:
    try:
        with open(TCP_LOOSE) as file:
            return file.read().strip()
    except OSError as error:
        raise NetlinkError(f"cannot read {TCP_LOOSE}: {error.strerror}") from error


def _pin_tcp_loose() -> None:
    if _tcp_loose() == "1":
        return
    try:
        with open(TCP_LOOSE, "w") as file:
            file.write("1")
    except OSError as error:
        raise NetlinkError(f"nf_conntrack_tcp_loose is not 1 and cannot be set: {error.strerror}") from error
