"""What is wrong with an agent, from its status answer. Pure: the same answer gives the same sentences."""

from __future__ import annotations

from ztunnel.cli.output import Column, Row, age, duration, items, number, rows_of, shown, text


def problems(answer: Row) -> list[str]:
    """Sentences, in the order in which to look at them."""
    found: list[str] = []
    if not answer.get("ready"):
        found.append(f"not ready: waiting for {shown(answer.get('pending'))}")
    for problem in rows_of(answer.get("problems")):
        kind, place = (
            shown(problem.get("kind")),
            ": ".join(shown(problem[name]) for name in ("file", "object", "field") if problem.get(name)),
        )
        subject = place if place.lower().startswith(f"{kind} ") else f"{kind} {place}".rstrip()
        found.append(f"{subject}: {shown(problem.get('reason'))}")
    said = " ".join(found)
    for row in rows_of(answer.get("certificates")):
        wrong = certificate_problem(row)
        if wrong and str(row.get("identity")) not in said:
            found.append(f"certificate {shown(row.get('identity'))}: {wrong}")
    for row in items(answer):
        name = f"{row.get('namespace')}/{row.get('name')}"
        wrong = str(row.get("problem") or "") or _disagreement(row)
        if wrong and name not in said:
            found.append(f"pod {name}: {wrong}")
    return found


def _disagreement(row: Row) -> str:
    """What is wrong with a pod whose agent has not said."""
    if row.get("labelled") and not row.get("enrolled"):
        return "it is labelled but not enrolled yet"
    if row.get("enrolled") and not row.get("captured"):
        return "it is enrolled but its redirection rules are not there"
    return ""


def certificate_problem(row: Row) -> str:
    """Empty for a certificate that is valid and was renewed when it should have been."""
    state = row.get("state")
    if state == "Valid":
        return ""
    return f"{str(state).lower()}{': ' if row.get('error') else ''}{row.get('error') or ''}"


def _certificates_cell(row: Row) -> str:
    known = rows_of(row.get("certificates"))
    valid = [each for each in known if each.get("not_after")]
    if not known:
        return "<none>"
    left = f", {duration(min(number(each, 'seconds_left') for each in valid))} left" if valid else ""
    return f"{len(valid)}/{len(known)} valid{left}"


def _pods_cell(row: Row) -> str:
    wanted = [pod for pod in items(row) if pod.get("labelled")]
    return f"{sum(bool(pod.get('captured')) for pod in wanted)}/{len(wanted)}"


AGENT_COLUMNS = (
    Column("NODE", text("node")),
    Column("READY", text("ready")),
    Column("PODS", _pods_cell),
    Column("CONNECTIONS", text("connections")),
    Column("TUNNELS", text("tunnels")),
    Column("CERTIFICATES", _certificates_cell),
    Column("WORKER", text("worker")),
    Column("RESTARTS", text("worker_restarts")),
    Column("AGE", age()),
)
