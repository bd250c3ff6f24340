"""What the node agent does to the kernel on behalf of a pod: its network namespace, nf_tables, routes, listeners, sockets.

Belongs here: every call that enters a namespace or speaks netlink, and the state machine that decides when (`pods.Enroller`).
Does not belong here: who is in the mesh (mesh), what happens to an accepted connection (proxy, dataplane), identities (ca).
"""
