"""The container image's root file system, read-only and with a container's rights, in namespaces instead of an engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.kit import apps
from tests.kit.authority import authority
from tests.kit.deployed import capabilities
from tests.kit.mesh import Mesh
from tests.kit.polling import eventually

ROOT = Path(__file__).parents[2]
ENTER = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
mount -t tmpfs -o size=16m,mode=1777 tmp "$1/tmp"
[ -z "$2" ] || { mkdir -p "$1$3"; mount --rbind "$2" "$1$3"; }
shift 3
exec "$@"
"""
"""What a container runtime does: a read-only root, its own /proc and /tmp, and a volume."""


@pytest.fixture(scope="module")
def image() -> Path:
    done = subprocess.run([ROOT / "scripts" / "image", "--cached"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(done.stderr.strip())
    return ROOT / done.stdout.strip()


def enter(image: Path, shared: Path | None, place: str, *, host_pid: bool = False) -> list[str]:
    """The beginning of a command that still has to change its root."""
    own = [] if host_pid else ["--pid", "--fork", "--kill-child"]
    return ["unshare", "--mount", *own, "sh", "-c", ENTER, "sh", str(image), str(shared or ""), place]


def inside(image: Path, shared: Path | None = None, *, user: int = 65532) -> list[str]:
    """The beginning of a command in the image, without capabilities and new privileges."""
    # The last step becomes somebody else, and with that loses what it needed to enter.
    become = [f"--userspec={user}:{user}", "--groups="] if _may_be(user) else []
    least = ["--bounding-set=-all,+sys_chroot,+setuid,+setgid", "--inh-caps=-all", "--no-new-privs"]
    return [*enter(image, shared, "/tmp/shared"), "setpriv", *least, "chroot", *become, str(image)]


def _may_be(user: int) -> bool:
    """Whether this namespace has more users than one."""
    rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(int(first) <= user < int(first) + int(count) for first, _, count in rows)


def run(image: Path, *command: str) -> str:
    done = subprocess.run([*inside(image), *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(image: Path) -> str:
    (found,) = (image / "usr" / "bin").glob("python3.?*")
    return f"/usr/bin/{found.name}"


def test_both_programs_start(image: Path) -> None:
    assert run(image, "/opt/ztunnel/bin/ztunnel", "version").startswith("ztunnel ")
    assert "until SIGTERM" in run(image, "/opt/ztunnel/bin/waypoint", "run", "--help")
    assert "fine" in run(image, "/opt/ztunnel/bin/ztunnel", "ca", "--check")


def test_every_dependency_is_there_with_the_libraries_that_it_needs(image: Path) -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    modules = {"pyopenssl": "OpenSSL", "pyyaml": "yaml", "google-re2": "re2"}
    names = [Requirement(line).name for line in wanted]
    run(image, python(image), "-c", "import " + ", ".join(modules.get(name, name.replace("-", "_")) for name in names))


def test_nothing_in_it_can_be_written_and_no_shell_is_there(image: Path) -> None:
    code = (
        "import os, sys\ntry: open('/etc/x', 'w')\nexcept OSError as e: print(e.errno)\nprint(os.getuid(), sys.flags.dont_write_bytecode)"
    )
    assert run(image, python(image), "-c", code).splitlines()[0] == "30"  # EROFS
    assert not [name for name in ("sh", "bash", "dash", "apt-get", "dpkg", "perl") if (image / "usr" / "bin" / name).exists()]
    found = [path for path in image.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o6000]
    assert found == []


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that everybody may enter."""
    directory = Path(f"/tmp/image-{os.getpid()}")
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def test_the_authority_serves_from_a_read_only_root_as_nobody(image: Path, shared: Path, tmp_path: Path) -> None:
    (shared / "pods").mkdir()
    (shared / "pods" / "a.yaml").write_text("kind: Pod\napiVersion: v1\nmetadata: {name: a, namespace: b}\nspec: {nodeName: n}\n")
    (shared / "callers.yaml").write_text(
        f"- {{token_sha256: {sha256(b'x').hexdigest()}, namespace: b, serviceAccount: c, pod: d, uid: e}}\n"
    )
    seen = "/tmp/shared"
    settings = {
        "files": {"callers": f"{seen}/callers.yaml", "pods": f"{seen}/pods", "state": f"{seen}/state", "bundle": f"{seen}/roots.pem"}
    }
    with authority(
        shared / "run", settings, prefix=inside(image, shared), program=["/opt/ztunnel/bin/ztunnel"], config=f"{seen}/run"
    ) as it:
        assert it.port
        eventually((shared / "roots.pem").exists, within=60)
    assert "BEGIN CERTIFICATE" in (shared / "roots.pem").read_text()


def test_an_agent_does_its_work_from_a_read_only_root_with_the_daemon_sets_capabilities(image: Path) -> None:
    with Mesh(nodes=2, start=False) as mesh:
        contained = mesh.agents[1]
        contained.prefix = [
            *enter(image, mesh.root, str(mesh.root), host_pid=True),
            *("setpriv", f"--bounding-set=-all,+sys_chroot,{','.join(f'+{name.lower()}' for name in capabilities())}", "--inh-caps=-all"),
            *("chroot", str(image)),
        ]
        contained.program = ["/opt/ztunnel/bin/ztunnel"]
        mesh.start()
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.settle()
        with apps.Echo(server, 8080):
            assert apps.call(client, (server.v4, 8080)) == b"hello"
            assert contained.rows("tunnels")
        assert not contained.said("Read-only file system")
