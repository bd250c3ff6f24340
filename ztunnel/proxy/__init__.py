"""One connection's way through the node: outbound, inbound, passthrough, and the pool of tunnels.

Runs in a worker, on its copy of the mesh index. Each step asks a pure function (`mesh.routing`, `mesh.policy`) and hands the
sockets to `dataplane`. Does not belong here: bytes and buffers (`dataplane`), rules in the kernel (`node`).
"""
