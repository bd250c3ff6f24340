"""Who this proxy is on the wire: its certificate of the moment, for both sides of HBONE."""

from __future__ import annotations

from ztunnel.hbone.connect import Baggage
from ztunnel.hbone.handshake import TlsContexts
from ztunnel.mesh.errors import LocalError


class NoCertificate(LocalError):
    """The authority has not given one yet, or it has expired: nothing is accepted or dialled."""

    def __init__(self) -> None:
        super().__init__("no valid certificate for this proxy")


class OwnIdentity:
    """Set by the worker when a certificate comes or goes."""

    __slots__ = ("_contexts", "baggage")

    def __init__(self) -> None:
        self._contexts: TlsContexts | None = None
        self.baggage = Baggage()

    def renew(self, contexts: TlsContexts | None) -> None:
        """For every handshake from now on."""
        self._contexts = contexts

    @property
    def contexts(self) -> TlsContexts:
        """
        Raises:
            NoCertificate: there is none.
        """
        if self._contexts is None:
            raise NoCertificate
        return self._contexts
