"""Kubernetes manifests as typed objects: one module per family, `fields` for reading with errors that name the place, `parse` as
the way in. Belongs here: which fields mean what, and what is refused. Does not belong here: YAML and files (`sources`), and what
the objects add up to (`mesh.derive`).
"""
