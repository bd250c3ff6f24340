"""Workload certificates: the embedded authority that issues them and the rotation that keeps them fresh.

Belongs here: making keys and requests, issuing, deciding when to renew, and the clients of other authorities that may follow.
Does not belong here: what a handshake does with a certificate (`hbone`), and which identities a node needs (`app`).
"""
