"""The Kubernetes API as a client sees it: who we are there, requests and their errors, what is served, lists and watches that go on.

Belongs here: what any program of ours that talks to an API server needs. Does not belong here: what an object means
(`mesh.manifests`) and what is done with it (`sources`, `ca`, `node`).
"""
