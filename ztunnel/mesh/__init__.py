"""What the mesh is and what it decides, as pure code: no I/O, no clock, no logging, no trio.

Belongs here: identities, workloads, services, policies, their translation from Kubernetes manifests, and every decision
(capture, route, endpoint, authorization) as a function that returns its reasons. Does not belong here: how any of it is read
from files or an API server (`sources`), or carried out (`proxy`, `node`).
"""
