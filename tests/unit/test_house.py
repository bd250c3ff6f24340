"""The house keeps its word: documents name only what exists, modules say what they own, the lock covers what is asked for."""

from __future__ import annotations

import ast
import re
import shlex
import stat
import textwrap
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement

from ztunnel.settings import parse as parse_settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "ztunnel" / "README.md",
    *sorted((ROOT / "ztunnel" / "decisions").glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
]
SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*")) if path.is_file() and not path.suffix] + [ROOT / ".ci" / "run"]
MODULES = sorted(
    [
        *(ROOT / "ztunnel").rglob("*.py"),
        *(ROOT / "waypoint").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
    ]
)
SOURCES = sorted([*(ROOT / "ztunnel").rglob("*.py"), *(ROOT / "waypoint").rglob("*.py")])

PATH = re.compile(r"(?<![\w/.-])(?:scripts|ztunnel|waypoint|tests|deploy|\.ci)/[\w./*-]*\w")
"""A path of this repository as prose writes it."""
COMMAND = re.compile(r"(?:^ {4,}|`|\$ )((?:\.?/?\.venv/bin/)?ztunnel [a-z][^`\n]*)", re.MULTILINE)
"""A call of our command: quoted in prose, or in an indented example."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_documents_name_files_that_exist(document: Path) -> None:
    named = {match.rstrip("/.") for match in PATH.findall(document.read_text())}
    missing = sorted(path for path in named if not list(ROOT.glob(path)))
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_documents_name_commands_and_options_that_exist(document: Path) -> None:
    from ztunnel.cli.main import main  # noqa: PLC0415 - a broken command line must fail these tests, not the collection of all

    for line in COMMAND.findall(document.read_text()):
        unknown = unknown_words(main, line)
        assert not unknown, f"{line!r}: {unknown}"


def unknown_words(command: click.Command, line: str) -> list[str]:
    """Words of a command line that name no sub-command or option of ours; what follows `--` or `#` is not ours."""
    words = shlex.split(line.split(" #", maxsplit=1)[0].rstrip(" .,:;\\"), posix=True)[1:]
    context = click.Context(command, info_name="ztunnel")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        following = command.get_command(context, words[0])
        if following is None:
            # `ztunnel workloads|services`: alternatives in a table
            alternatives = words[0].split("|")
            return [word for word in alternatives if command.get_command(context, word) is None]
        command, words = following, words[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    known = {option for parameter in command.get_params(context) for option in (*parameter.opts, *parameter.secondary_opts)}
    ours = words[: words.index("--")] if "--" in words else words
    return [word for word in ours if word.startswith("-") and word.split("=")[0] not in known]


@pytest.mark.parametrize("line", ["ztunnel frobnicate", "ztunnel status --frobnicate", "ztunnel lab frobnicate -n x"])
def test_the_test_of_commands_sees_what_is_wrong(line: str) -> None:
    from ztunnel.cli.main import main  # noqa: PLC0415 - as above

    assert unknown_words(main, line)


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_can_be_run_and_say_what_they_do(script: Path) -> None:
    first, second = script.read_text().splitlines()[:2]
    assert script.stat().st_mode & stat.S_IXUSR
    assert first.startswith("#!/usr/bin/env ")
    assert second.startswith("# ")


def test_modules_say_what_they_own() -> None:
    assert [name(module) for module in MODULES if not re.match(r'r?"""\S', module.read_text())] == []


def test_packages_hold_a_docstring_and_nothing_else() -> None:
    for package in sorted({path.parent for path in SOURCES}):
        body = ast.parse((package / "__init__.py").read_text()).body
        if package == ROOT / "ztunnel":
            assert ast.unparse(body.pop()).startswith("__version__ = ")
        assert len(body) == 1, name(package)
        assert isinstance(body[0], ast.Expr), name(package)


def test_modules_are_of_a_size_to_read_or_say_why_not() -> None:
    for module in SOURCES:
        text = module.read_text()
        lines = text.count("\n")
        assert lines <= 700, name(module)
        assert lines <= 500 or "Length:" in (ast.get_docstring(ast.parse(text)) or ""), (
            f"{name(module)}: over 500 lines wants its reason, after 'Length:' in the docstring"
        )


def test_names_that_make_drawers_are_refused() -> None:
    drawers = {"base", "common", "helpers", "manager", "misc", "util", "utils"}
    assert [name(module) for module in SOURCES if module.stem in drawers] == []


def locked(lock: str) -> dict[str, str]:
    """Version by normalised name."""
    pins = re.findall(r"^([a-z0-9-]+)==(\S+) ", (ROOT / "scripts" / "lock" / lock).read_text(), re.MULTILINE)
    return dict(pins)


def test_the_lock_holds_every_dependency_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = locked("runtime.txt")
    for line in project["project"]["dependencies"] + project["build-system"]["requires"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), line


def test_the_lock_of_tools_agrees_with_the_product() -> None:
    runtime, dev = locked("runtime.txt"), locked("dev.txt")
    assert {package: version for package, version in dev.items() if package in runtime} == {
        package: version for package, version in runtime.items() if package in dev
    }
    wanted = {Requirement(line.split("#")[0]).name.lower() for line in (ROOT / "scripts" / "lock" / "dev.in").read_text().splitlines()[2:]}
    assert wanted <= set(dev)


def test_the_settings_that_documents_show_are_accepted() -> None:
    text = (ROOT / "README.md").read_text()
    examples = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE) if "    sources:" in block]
    assert examples
    for example in examples:
        parse_settings(yaml.load(example, Loader=yaml.CSafeLoader), {})  # noqa: TID251 - a document of ours, not a manifest


def test_locks_name_no_place_but_the_registry() -> None:
    for lock in ("runtime.txt", "dev.txt"):
        text = (ROOT / "scripts" / "lock" / lock).read_text()
        assert "://" not in text
        assert "--find-links" not in text
