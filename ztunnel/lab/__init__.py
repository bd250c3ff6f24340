"""A cluster in network namespaces, without Kubernetes or Docker: for newcomers, tests and benchmarks.

Belongs here: the controller that plays API server, scheduler, kubelet and kube-proxy, the little programs that run in its pods
(launcher, echo server, resolver), and the client side of its socket. Does not belong here: anything that a real cluster would
need; the node agents that run in the lab are the ordinary `ztunnel run`. Start reading at `controller.py`.
"""
