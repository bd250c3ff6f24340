"""Workload certificates: authorities that issue them, the client that asks one, the rotation that keeps them fresh.

Belongs here: making keys and requests, issuing, who may have what, roots and their succession, when to renew.
Does not belong here: what a handshake does with a certificate (`hbone`), and which identities a node needs (`app`).
"""
