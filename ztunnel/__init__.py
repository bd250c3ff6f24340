"""The node agent of an ambient-mode service mesh, its data plane and its laboratory.

Holds nothing itself. Rooms, from the bottom up: `mesh` and `hbone` (pure), `dataplane` (the worker's event loop),
`runtime` (trio shells), `proxy`, `node`, `sources`, `ca`, `admin`, `lab`; `app` and `worker` build the object graphs; `cli` calls them.
Imports go down only; the contract in `pyproject.toml` keeps it so.
"""

__version__ = "0.1.0"
