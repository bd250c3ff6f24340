"""HBONE on the wire, without I/O: TLS 1.3 handshake and records, the CONNECT-only HTTP/2 machine, and CONNECT's headers.

Everything here takes bytes and values and gives bytes, events or errors; clocks, sockets, logs and the choice of whom to trust with
what belong above. What a destination or a policy means belongs in `ztunnel.mesh`.
"""
