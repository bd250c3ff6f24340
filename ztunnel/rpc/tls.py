"""TLS contexts of gRPC ends: a server that shows a certificate, a client that checks it. TLS 1.3 and ALPN h2, nothing else.

The standard library loads keys from files only; ours lie in memory, and pass through an anonymous file that no path leads to.
"""

from __future__ import annotations

import os
import ssl

from ztunnel.mesh.errors import LocalError


class TlsError(LocalError):
    """A key, a certificate or a root that cannot be used."""


def server_context(chain_pem: bytes, key_pem: bytes) -> ssl.SSLContext:
    """Shows this certificate; asks for none, because callers prove themselves with tokens.

    Raises:
        TlsError: they cannot be read or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(key_pem + b"\n" + chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"the server's certificate and key cannot be used: {error}") from error
    finally:
        os.close(descriptor)
    return context


def client_context(roots_pem: bytes) -> ssl.SSLContext:
    """Trusts these roots and no other, and checks the server's name.

    Raises:
        TlsError: there is no certificate in them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    try:
        context.load_verify_locations(cadata=roots_pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"the roots cannot be used: {error}") from error
    return context


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
