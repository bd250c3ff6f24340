"""`ztunnel lab` commands about objects: apply, delete, get, describe, label, scale, rollout. Options and words are kubectl's."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from ztunnel.cli.lab_common import LabCommand, client_of, files_option, kind_and_name, name_option, namespace_option

if TYPE_CHECKING:
    from ztunnel.lab.client import Client
    from ztunnel.mesh.manifests.tree import Tree


@click.command("apply", cls=LabCommand)
@files_option
@click.option("-n", "--namespace", default="default", show_default=True, metavar="NS", help="For objects that do not name theirs.")
@name_option
def apply_command(files: tuple[str, ...], namespace: str, lab_name: str) -> None:
    """Create or change objects. All of them or, if one is refused, none.

    \b
    Examples:
      ztunnel lab apply -f policy.yaml
      cat policy.yaml | ztunnel lab apply -f -
    """
    from ztunnel.lab import documents
    from ztunnel.mesh.manifests.tree import branches, text

    done = client_of(lab_name).call("apply", objects=documents.read(files), namespace=namespace)
    for each in branches({"done": done}, "done"):
        click.echo(f"{text(each, 'object')} {text(each, 'verb')}")


@click.command("delete", cls=LabCommand)
@click.argument("what", nargs=-1, metavar="[KIND NAME...]")
@click.option("-f", "--filename", "files", multiple=True, metavar="FILE_OR_DIR", help="Delete what these manifests name.")
@click.option("-l", "--selector", default="", metavar="SELECTOR", help="Delete the objects of KIND with these labels.")
@click.option("--all", "every", is_flag=True, help="Delete every object of KIND in the namespace.")
@click.option("--ignore-not-found", is_flag=True, help="Objects that are not there are no error.")
@click.option("--wait/--no-wait", default=True, help="Wait until they are gone (default).")
@namespace_option
@name_option
def delete_command(
    what: tuple[str, ...], files: tuple[str, ...], selector: str, every: bool, ignore_not_found: bool, wait: bool, **place: str
) -> None:
    """Delete objects and what belongs to them.

    \b
    Examples:
      ztunnel lab delete pod web -n shop
      ztunnel lab delete deploy/web service/web
      ztunnel lab delete -f policy.yaml
      ztunnel lab delete pods -l app=web
    """
    from ztunnel.mesh.manifests.tree import at, texts

    client, namespace = client_of(place["lab_name"]), place["namespace"]
    if files:
        keys = _keys_of_files(files, namespace)
    elif selector or every:
        keys = _keys_selected(client, what, selector, namespace)
    else:
        keys = _keys_named(what, namespace)
    done = client.call("delete", keys=keys, wait=wait)
    for name in texts(done, "deleted"):
        kind, _, bare = name.partition("/")
        click.echo(f'{kind} "{bare}" deleted')
    missing = at(done, "missing")
    if isinstance(missing, list) and missing and not ignore_not_found:
        for resource, bare in missing:
            click.echo(f'Error from server (NotFound): {resource} "{bare}" not found', err=True)
        raise SystemExit(1)


def _keys_named(what: tuple[str, ...], namespace: str) -> list[Tree]:
    from ztunnel.lab.objects import kind_named

    if not what or (len(what) == 1 and "/" not in what[0]):
        raise click.UsageError("give KIND NAME..., KIND/NAME..., -f FILE, or KIND with -l or --all")
    if "/" in what[0]:
        pairs = [kind_and_name((word,)) for word in what]
    else:
        pairs = [(kind_named(what[0]).kind, name) for name in what[1:]]
    return [{"kind": kind, "namespace": namespace, "name": name} for kind, name in pairs]


def _keys_of_files(files: tuple[str, ...], namespace: str) -> list[Tree]:
    from ztunnel.lab import documents
    from ztunnel.lab.objects import kind_of
    from ztunnel.mesh.manifests.tree import branch, text

    bodies = [branch(entry, "body") for entry in documents.read(files)]
    return [
        {"kind": kind_of(body), "namespace": text(body, "metadata", "namespace") or namespace, "name": text(body, "metadata", "name")}
        for body in reversed(bodies)
    ]


def _keys_selected(client: Client, what: tuple[str, ...], selector: str, namespace: str) -> list[Tree]:
    from ztunnel.lab.objects import key_of, kind_named
    from ztunnel.mesh.manifests.tree import branches

    if len(what) != 1:
        raise click.UsageError("give one KIND with -l or --all")
    kind = kind_named(what[0]).kind
    found = client.call("get", kind=kind, namespace=namespace, selector=selector)
    return [dict(key_of(body)._asdict()) for body in branches({"items": found}, "items")]


@click.command("get", cls=LabCommand)
@click.argument("what")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("-A", "--all-namespaces", is_flag=True, help="In every namespace.")
@click.option("-l", "--selector", default="", metavar="SELECTOR", help="Labels, such as app=web,tier!=db.")
@click.option("-o", "--output", type=click.Choice(["wide", "json", "yaml", "name"]), help="Form of the answer.")
@click.option("--show-labels", is_flag=True, help="A column with labels.")
@click.option("--no-headers", is_flag=True, help="Without headings.")
@click.option("-w", "--watch", is_flag=True, help="Go on with changes until interrupted.")
@namespace_option
@name_option
def get_command(what: str, names: tuple[str, ...], selector: str, output: str | None, watch: bool, **rest: str | bool) -> None:
    """List objects: pods|po, services|svc, deployments|deploy, namespaces|ns, serviceaccounts|sa, nodes|no,
    authorizationpolicies|ap, peerauthentications|pa, gateways|gtw, httproutes and the other kinds of a mesh, or all.

    \b
    Examples:
      ztunnel lab get pods -A -o wide
      ztunnel lab get svc orders -n shop -o yaml
      ztunnel lab get pods -n shop -l app=orders -w
    """
    from ztunnel.lab.objects import ALL_KINDS, kind_named
    from ztunnel.lab.printers import Look

    kinds = list(ALL_KINDS) if what == "all" else [kind_named(word).kind for word in what.split("/", 1)[0].split(",")]
    wanted = [*names, *([what.split("/", 1)[1]] if "/" in what else [])]
    namespace = "" if rest["all_namespaces"] else str(rest["namespace"])
    look = Look(output == "wide", bool(rest["all_namespaces"]), bool(rest["show_labels"]), not rest["no_headers"])
    client = client_of(str(rest["lab_name"]))
    if watch:
        _follow(client, kinds[0], wanted[0] if wanted else "", namespace, selector, look)
        return
    found = {kind: _fetch(client, kind, wanted, namespace, selector) for kind in kinds}
    _show(found, output, look, namespace, is_single=len(wanted) == 1 and len(kinds) == 1)


def _fetch(client: Client, kind: str, names: list[str], namespace: str, selector: str) -> list[Tree]:
    from ztunnel.mesh.manifests.tree import branches

    found: list[Tree] = []
    for name in names or [""]:
        found += branches({"items": client.call("get", kind=kind, namespace=namespace, name=name, selector=selector)}, "items")
    return found


def _show(found: dict[str, list[Tree]], output: str | None, look: object, namespace: str, is_single: bool) -> None:
    from ztunnel.lab import printers
    from ztunnel.lab.objects import display, key_of

    assert isinstance(look, printers.Look)
    items = [item for each in found.values() for item in each]
    if output in ("json", "yaml"):
        document = items[0] if is_single else printers.as_list(items)
        click.echo(json.dumps(document, indent=4) if output == "json" else _yaml(document), nl=output == "json")
    elif output == "name":
        click.echo(printers.names(items), nl=bool(items))
    elif not items:
        click.echo(printers.nothing_found(next(iter(found)), namespace), err=True)
    else:
        tables = []
        for kind, each in found.items():
            rows = printers.table(kind, each, look, datetime.now(UTC))
            if len(found) > 1:
                first = int(look.namespaces)
                for row, item in zip(rows[int(look.headings) :], each, strict=True):
                    row[first] = display(key_of(item))
            tables += [printers.aligned(rows)] if each else []
        click.echo("\n\n".join(tables))


def _yaml(document: Tree) -> str:
    import yaml

    return str(yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False, default_flow_style=False))


def _follow(client: Client, kind: str, name: str, namespace: str, selector: str, look: object) -> None:
    from ztunnel.lab import printers

    assert isinstance(look, printers.Look)
    widths: list[int] = []
    seen: dict[str, str] = {}
    for event, body in client.watch(kind=kind, name=name, namespace=namespace, selector=selector):
        rows = printers.table(kind, [body], look, datetime.now(UTC))
        text = "\t".join(cell for cell in rows[-1])
        key = json.dumps([body["kind"], rows[-1][:2]])
        if event != "DELETED" and seen.get(key) == text:
            continue
        seen[key] = text
        widths = [
            max(pair)
            for pair in zip(
                [*widths, *[0] * len(rows[-1])], [max(len(row[i]) for row in rows) + 4 for i in range(len(rows[-1]))], strict=False
            )
        ]
        click.echo(printers.aligned(rows, widths))
        look = printers.Look(look.wide, look.namespaces, look.labels, headings=False)


@click.command("describe", cls=LabCommand)
@click.argument("what", nargs=-1, required=True, metavar="KIND NAME")
@namespace_option
@name_option
def describe_command(what: tuple[str, ...], namespace: str, lab_name: str) -> None:
    """Show a pod with its containers and events; any other object as YAML.

    \b
    Examples:
      ztunnel lab describe pod web -n shop
    """
    from ztunnel.lab.objects import uid_of
    from ztunnel.lab.printers import description
    from ztunnel.mesh.manifests.tree import branches

    kind, name = kind_and_name(what)
    client = client_of(lab_name)
    item = _fetch(client, kind, [name], namespace, "")[0]
    if kind != "Pod":
        click.echo(_yaml(item), nl=False)
        return
    happenings = branches({"items": client.call("events", uid=uid_of(item))}, "items")
    click.echo(description(item, happenings, datetime.now(UTC)))


@click.command("label", cls=LabCommand)
@click.argument("what", nargs=-1, required=True, metavar="KIND NAME KEY=VALUE|KEY-...")
@click.option("--overwrite", is_flag=True, help="Change labels that have another value.")
@namespace_option
@name_option
def label_command(what: tuple[str, ...], overwrite: bool, namespace: str, lab_name: str) -> None:
    """Set or remove labels.

    \b
    Examples:
      ztunnel lab label ns outside istio.io/dataplane-mode=ambient
      ztunnel lab label ns outside istio.io/dataplane-mode-
      ztunnel lab label pod web -n shop istio.io/dataplane-mode=none --overwrite
    """
    from ztunnel.lab.objects import KINDS

    count = 1 if "/" in what[0] else 2
    kind, name = kind_and_name(what[:count])
    changes: dict[str, str | None] = {}
    for word in what[count:]:
        key, equals, value = word.partition("=")
        if not equals and not word.endswith("-"):
            raise click.UsageError(f"{word!r} is neither KEY=VALUE nor KEY-")
        changes[key if equals else word[:-1]] = value if equals else None
    if not changes:
        raise click.UsageError("at least one label update is required: KEY=VALUE or KEY-")
    changed = client_of(lab_name).call("label", kind=kind, name=name, namespace=namespace, changes=changes, overwrite=overwrite)
    words = "unlabeled" if None in changes.values() else "labeled"
    click.echo(f"{KINDS[kind].qualified}/{name} {words if changed else 'not labeled'}")


@click.command("scale", cls=LabCommand)
@click.argument("what", nargs=-1, required=True, metavar="deploy NAME")
@click.option("--replicas", type=click.IntRange(min=0), required=True, help="How many pods.")
@namespace_option
@name_option
def scale_command(what: tuple[str, ...], replicas: int, namespace: str, lab_name: str) -> None:
    """Set how many pods a deployment has.

    \b
    Examples:
      ztunnel lab scale deploy orders -n shop --replicas 3
    """
    name = _deployment(what)
    client_of(lab_name).call("scale", name=name, namespace=namespace, replicas=replicas)
    click.echo(f"deployment.apps/{name} scaled")


@click.command("rollout", cls=LabCommand)
@click.argument("action", type=click.Choice(["restart", "status"]))
@click.argument("what", nargs=-1, required=True, metavar="deploy NAME")
@click.option("--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="How long `status` waits.")
@namespace_option
@name_option
def rollout_command(action: str, what: tuple[str, ...], timeout: float, namespace: str, lab_name: str) -> None:
    """Replace a deployment's pods by new ones, or wait until that is done.

    \b
    Examples:
      ztunnel lab rollout restart deploy/orders -n shop
      ztunnel lab rollout status deploy/orders -n shop
    """
    from ztunnel.lab.objects import LabError
    from ztunnel.lab.placement import is_rolled_out

    name, client = _deployment(what), client_of(lab_name)
    if action == "restart":
        client.call("restart", name=name, namespace=namespace)
        click.echo(f"deployment.apps/{name} restarted")
        return
    deadline = time.monotonic() + timeout
    while not is_rolled_out(_fetch(client, "Deployment", [name], namespace, "")[0]):
        if time.monotonic() > deadline:
            raise LabError("", f"deployment {name!r} was not rolled out within {timeout:g} s")
        time.sleep(0.05)
    click.echo(f'deployment "{name}" successfully rolled out')


def _deployment(what: tuple[str, ...]) -> str:
    kind, name = kind_and_name(what)
    if kind != "Deployment":
        raise click.UsageError("only deployments can be scaled or rolled out")
    return name
