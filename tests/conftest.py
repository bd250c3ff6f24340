"""What every test shares: `async def` tests under trio, network namespaces of their own, Hypothesis profiles.

Directories decide what a test needs: everything in tests/netns, tests/interop and tests/soak runs in namespaces that this process
makes for itself (see tests/kit/isolation.py), so that no test can touch the machine's own network. Where that is impossible those
tests are skipped with the reason; `--require-netns` makes it a failure, because a skipped test looks like a pass. So it is with
tests/kube, which needs the programs of scripts/kube-tools, and `--kube`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from inspect import iscoroutinefunction
from pathlib import Path

import hypothesis
import pytest
import trio
import trio.testing

from tests.kit import isolation
from tests.kit.kube_api import ApiServer, tools
from tests.kit.workers import WORKERS_VARIABLE

ASYNC_TEST_SECONDS = 60.0
"""Bound of one `async def` test on the real clock: a test that waits for ever must say where, not hang the run."""
KUBE_TEST_SECONDS = 280.0
"""The same where an API server has to do its work, which takes seconds on a quiet machine; below pytest's own `faulthandler_timeout`."""

ROOMS = {"netns": ("netns",), "interop": ("interop", "netns"), "soak": ("soak", "slow", "netns"), "kube": ("kube", "slow")}
"""Which markers a test gets from its directory under tests/."""

hypothesis.settings.register_profile("fast", max_examples=50, deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("deep", max_examples=20_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


# Debian gives ordinary users no path to the administrators' programs, which they may well run in namespaces of their own.
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--require-netns`, `--kube` and `--workers`."""
    parser.addoption("--kube", action="store_true", help="fail, not skip, where there is no API server to test against")
    parser.addoption("--require-netns", action="store_true", help="fail, not skip, where network namespaces cannot be made")
    parser.addoption("--workers", type=int, help="data-plane processes of each agent in a mesh or a lab; 0: none, in the agent itself")


def pytest_configure(config: pytest.Config) -> None:
    """Agents take the number of workers as they take any setting, from the environment; a test that needs another one overrides it."""
    if config.option.workers is not None:
        os.environ[WORKERS_VARIABLE] = str(config.option.workers)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the directory that they stand in."""
    here = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        for marker in ROOMS.get(room, ()):
            item.add_marker(marker)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Name what failed to whoever runs that once more (`scripts/test --again`)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    path = os.environ.get("FAILURES")
    if path and reporter is not None:
        failed = [report.nodeid for outcome in ("failed", "error") for report in reporter.stats.get(outcome, [])]
        Path(path).write_text("".join(f"{node}\n" for node in dict.fromkeys(failed)))


def _own_directory() -> str:
    # Short: the paths of labs in it end in sockets, which the kernel allows 107 bytes.
    directory = Path(tempfile.gettempdir(), f"zt{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    return str(directory)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Move this process into namespaces of its own before the first test, if any test asks for them."""
    if not session.config.option.collectonly and any(item.get_closest_marker("netns") for item in session.items):
        # Once isolated everybody is root, and pytest's directory for root's files may be the real one's.
        if os.getuid() != 0 and "PYTEST_DEBUG_TEMPROOT" not in os.environ:
            os.environ["PYTEST_DEBUG_TEMPROOT"] = _own_directory()
        refused = isolation.isolate()
        if refused is None and session.config.option.verbose > 0:
            print(f"\nto look inside: {isolation.debugging_line()}")  # noqa: T201 - for the person at the terminal


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail a test of namespaces or of Kubernetes where there are none."""
    refusal = isolation.refusal()
    if refusal is not None and item.get_closest_marker("netns") is not None:
        if item.config.option.require_netns:
            pytest.fail(f"--require-netns: {refusal}", pytrace=False)
        pytest.skip(refusal)
    if item.get_closest_marker("kube") is not None:
        directory, refusal = tools()
        if directory is None and item.config.option.kube:
            pytest.fail(f"--kube: {refusal}", pytrace=False)
        if directory is None:
            pytest.skip(f"LEFT OUT: no API server to test against: {refusal}")


@pytest.fixture(scope="session")
def kube_api() -> Iterator[ApiServer]:
    """A real API server with etcd, one for the whole run: a test makes namespaces and users of its own. Its test is marked `kube`."""
    with ApiServer.started() as api:
        yield api


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests under trio: on the `mock_clock` fixture's clock if the test asks for it, else within ASYNC_TEST_SECONDS."""
    if not iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    clock = next((value for value in arguments.values() if isinstance(value, trio.testing.MockClock)), None)
    test = partial(pyfuncitem.obj, **arguments)

    seconds = ASYNC_TEST_SECONDS if pyfuncitem.get_closest_marker("kube") is None else KUBE_TEST_SECONDS

    async def bounded() -> None:
        with trio.fail_after(seconds):
            await test()

    if clock is None:
        trio.run(bounded)
    else:
        trio.run(test, clock=clock)
    return True


@pytest.fixture
def mock_clock() -> trio.testing.MockClock:
    """A clock that jumps to the next deadline as soon as every task waits."""
    return trio.testing.MockClock(autojump_threshold=0)
