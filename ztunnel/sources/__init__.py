"""Where the mesh's state comes from: each module reads one kind of source and hands on `MeshState` and what it refused.

Belongs here: reading, watching, keeping the last good object. Does not belong here: what an object means (`mesh.manifests`,
`mesh.derive`) and who is told about a change (`app`).
"""
