"""Standing in the container runtime's way until a new pod is captured: the CNI plugin, its endpoint in the agent, its installation.

Belongs here: `plugin.c`, which runs on the host; what it says and is told; the list that stands in for an agent that is away; the files
of CNI on the host. Does not belong here: whether a pod is in the mesh (mesh), and capturing it (node).
"""
