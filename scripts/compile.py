"""Compiles with mypyc what runs for every byte and every connection, from the very sources that also run as they are;
and what reads manifests, which a cluster changes by the thousand.

The result is a tree that can be imported in the place of `ztunnel/` and `waypoint/`: the same modules, those of the hot path beside their
compiled form, which Python prefers. Nothing is compiled twice: a stamp names the sources, the interpreter and the compiler that a tree was
made from.
See ztunnel/decisions/0010-compiled-data-plane.md.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "build" / "compiled"
PACKAGES = ("ztunnel", "waypoint")
COMPILED = (
    "ztunnel/hbone/budget", "ztunnel/hbone/connect", "ztunnel/hbone/events", "ztunnel/hbone/exchange", "ztunnel/hbone/frames",
    "ztunnel/hbone/headers", "ztunnel/hbone/messages", "ztunnel/hbone/mux", "ztunnel/hbone/posthandshake", "ztunnel/hbone/receiver",
    "ztunnel/hbone/records_own", "ztunnel/hbone/streams", "ztunnel/dataplane/addresses", "ztunnel/dataplane/buffers",
    "ztunnel/dataplane/bytestream", "ztunnel/dataplane/loop", "ztunnel/dataplane/outlet", "ztunnel/dataplane/relay",
    "ztunnel/dataplane/sockets", "ztunnel/dataplane/splice", "ztunnel/dataplane/streams", "ztunnel/dataplane/tunnel",
    "ztunnel/mesh/addresses", "ztunnel/mesh/attached", "ztunnel/mesh/authentication", "ztunnel/mesh/balance", "ztunnel/mesh/derive",
    "ztunnel/mesh/enrolment", "ztunnel/mesh/inbound", "ztunnel/mesh/index", "ztunnel/mesh/manifests/core", "ztunnel/mesh/manifests/fields",
    "ztunnel/mesh/manifests/metadata", "ztunnel/mesh/manifests/parse", "ztunnel/mesh/policy", "ztunnel/mesh/routing",
    "ztunnel/mesh/waypoints", "ztunnel/proxy/connections", "ztunnel/proxy/facts", "ztunnel/proxy/inbound", "ztunnel/proxy/labels",
    "ztunnel/proxy/ledger", "ztunnel/proxy/outbound", "ztunnel/proxy/passthrough", "ztunnel/proxy/pods", "ztunnel/proxy/pool",
    "ztunnel/proxy/stock", "ztunnel/runtime/documents", "ztunnel/sources/objects",
    "waypoint/data/answers", "waypoint/data/asking", "waypoint/data/client_hello", "waypoint/data/clusters", "waypoint/data/connections",
    "waypoint/data/dialler", "waypoint/data/ends", "waypoint/data/engine", "waypoint/data/errands", "waypoint/data/exchange",
    "waypoint/data/gateway", "waypoint/data/heads", "waypoint/data/http1_client", "waypoint/data/http1_requests",
    "waypoint/data/http1_server", "waypoint/data/http2", "waypoint/data/http2_client", "waypoint/data/http2_server",
    "waypoint/data/inbound", "waypoint/data/mirrors", "waypoint/data/pools", "waypoint/data/served", "waypoint/data/sniff",
    "waypoint/data/sockets", "waypoint/data/tcp", "waypoint/data/tls", "waypoint/data/tunnels", "waypoint/http/arrival",
    "waypoint/http/authority", "waypoint/http/authorization", "waypoint/http/conditions", "waypoint/http/cors", "waypoint/http/editing",
    "waypoint/http/ext_authz", "waypoint/http/fault", "waypoint/http/filing", "waypoint/http/hashing", "waypoint/http/matching",
    "waypoint/http/messages", "waypoint/http/path_tests", "waypoint/http/paths", "waypoint/http/rate_limit", "waypoint/http/redirects",
    "waypoint/http/replies", "waypoint/http/retry", "waypoint/http/rules", "waypoint/http/texts", "waypoint/http/variables",
    "waypoint/telemetry/access_log", "waypoint/telemetry/attributes", "waypoint/telemetry/recorder", "waypoint/telemetry/series",
    "waypoint/telemetry/service", "waypoint/telemetry/summary", "waypoint/telemetry/tracing", "waypoint/upstream/balancers",
    "waypoint/upstream/breakers", "waypoint/upstream/cluster", "waypoint/upstream/endpoints", "waypoint/upstream/localities",
    "waypoint/upstream/outcome", "waypoint/upstream/outlier", "waypoint/upstream/priorities", "waypoint/upstream/rings",
)  # fmt: skip
"""Left out is what runs once per process or per tunnel, and what msgspec decodes: a compiled dataclass has no
annotations that it could read."""

_BUILD = """
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from mypyc.build import mypycify
from setuptools import setup

from distutils.ccompiler import CCompiler  # behind setuptools, whose own it is then

one_by_one = CCompiler.compile


def side_by_side(self, sources, *arguments, **options):
    # setuptools runs the C compiler for one file after the other, and there are a hundred of them.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        made = threads.map(lambda source: one_by_one(self, [source], *arguments, **options), sources)
        return [object for objects in made for object in objects]


CCompiler.compile = side_by_side
modules = mypycify(["--namespace-packages", "--explicit-package-bases", *sys.argv[2:]], opt_level="2", debug_level="0", multi_file=True)
setup(name="ztunnel", packages=[], ext_modules=modules, script_args=["-q", "build_ext", "--inplace"])
"""


class CompileError(Exception):
    """The compiler, or what it needs, says no."""


def compiled(target: Path = DEFAULT) -> Path:
    """A tree that is up to date, made now if there is none: the directory to import `ztunnel` from.

    Raises:
        CompileError: there is no C compiler, or it refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two may start at once
        _compile(target)
    return target


def _compile(target: Path) -> None:
    stamp = target / "stamp"
    made_from = _made_from()
    if stamp.exists() and stamp.read_text() == made_from:
        return
    print("compiling our hot modules with mypyc: a minute or two, once for these sources", file=sys.stderr, flush=True)
    shutil.rmtree(target, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    shutil.copyfile(ROOT / "pyproject.toml", target / "pyproject.toml")
    (target / "build_modules.py").write_text(_BUILD)
    sources = [f"{module}.py" for module in COMPILED]
    done = subprocess.run([sys.executable, "build_modules.py", "--", *sources], cwd=target, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"mypyc: {(done.stdout + done.stderr)[-4000:]}")
    shutil.rmtree(target / "build")
    stamp.write_text(made_from)


def _made_from() -> str:
    digest = hashlib.sha256()
    for path in (
        Path(__file__),
        ROOT / "pyproject.toml",
        *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
    ):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"{digest.hexdigest()} Python {sys.version} mypy {version('mypy')}\n"


def main() -> int:
    """Exit code: 0 the tree is there, 2 it cannot be made."""
    parser = argparse.ArgumentParser(prog="scripts/compile", description=__doc__)
    parser.add_argument("target", nargs="?", type=Path, default=DEFAULT, help="where the tree is made; default: build/compiled")
    given = parser.parse_args()
    try:
        print(compiled(given.target))
    except CompileError as error:
        print(f"scripts/compile: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
