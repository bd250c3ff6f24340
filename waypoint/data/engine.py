"""What all exchanges of a worker share."""

from __future__ import annotations

import os
import random
import time
from typing import Final

from waypoint.data.clusters import Clusters
from waypoint.data.names import Names
from waypoint.data.served import Served
from waypoint.http.ext_authz import Authorizer
from waypoint.telemetry.recorder import Recorder
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.l7.security import ExtensionProvider

SERVER: Final = b"istio-envoy"
_RANDOM_BYTES: Final = 4096


class Engine:
    """Configuration, clusters, dice and the few values that requests take turns with."""

    __slots__ = (
        "_authorizers",
        "_date",
        "_date_at",
        "_random",
        "_random_at",
        "clusters",
        "dice",
        "hostname",
        "is_draining",
        "loop",
        "names",
        "randrange",
        "recorder",
        "served",
    )

    def __init__(self, loop: Loop, served: Served, clusters: Clusters, dice: random.Random, hostname: str = "") -> None:
        self.loop = loop
        self.served = served
        self.clusters = clusters
        self.dice = dice.random
        self.randrange = dice.randrange
        self.hostname = hostname
        self.recorder = Recorder(hostname=hostname)
        self.names = Names(loop)
        self.is_draining = False
        self._random = ""
        self._random_at = 0
        self._date = b""
        self._date_at = -1
        self._authorizers: dict[str, Authorizer] = {}

    def request_id(self) -> bytes:
        """A random UUID (version 4)."""
        at = self._random_at
        if at + 32 > len(self._random):
            self._random = os.urandom(_RANDOM_BYTES).hex()
            at = 0
        text = self._random[at : at + 32]
        self._random_at = at + 32
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}".encode()

    def authorizer(self, provider: ExtensionProvider) -> Authorizer:
        """An external authorizer, compiled."""
        known = self._authorizers.get(provider.name)
        if known is None or known.provider != provider:
            known = self._authorizers[provider.name] = Authorizer(provider)
        return known

    def date(self) -> bytes:
        """The value of a `date` header."""
        now = int(self.loop.now)
        if now != self._date_at:
            self._date_at = now
            self._date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
        return self._date
