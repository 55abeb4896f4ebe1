"""Checks of a rendered manifest that need no cluster."""

from collections.abc import Iterator, Sequence

from serve_app.doctor import deadlines, operator_rules, selectors
from serve_app.doctor.kube import Object
from serve_app.doctor.report import Finding, failed, ok
from serve_app.errors import ConfigError


def look(objects: Sequence[Object]) -> Iterator[Finding]:
    """Check each RayService by the rules of KubeRay's operator, its deadlines and its labels."""
    for service in objects:
        if service["kind"] == "RayService":
            yield from _check_operator_rules(service)
            yield from _check_deadlines(service)
            yield from _check_replicas(service)


def _check_operator_rules(service: Object) -> Iterator[Finding]:
    name = service["metadata"]["name"]
    found = list(operator_rules.refusals(service))
    for number, refusal in enumerate(found, start=1):
        yield failed(
            f"{name} rejected" + (f" {number}" if len(found) > 1 else ""),
            f"KubeRay's operator rejects it: {refusal.field} {refusal.found}",
            refusal.advice,
        )
    if not found:
        yield ok(
            f"{name} operator", f"passes the {len(operator_rules.RULES)} rules of KubeRay 1.7.0"
        )


def _check_deadlines(service: Object) -> Iterator[Finding]:
    check = f"{service['metadata']['name']} deadlines"
    try:
        found = list(deadlines.misorders(service))
        chains = deadlines.chains(service)
    except ConfigError as error:
        yield failed(
            check, str(error), "Correct it first: the deadlines cannot be read without it."
        )
        return
    for number, misorder in enumerate(found, start=1):
        yield failed(
            check + (f" {number}" if len(found) > 1 else ""),
            f"{misorder.link.field} {misorder.found}: requests may be cut off",
            misorder.link.advice,
        )
    if not found:
        longest = max(chains, key=lambda chain: (len(chain), chain[0].seconds))
        yield ok(check, deadlines.as_text(longest))


def _check_replicas(service: Object) -> Iterator[Finding]:
    check = f"{service['metadata']['name']} replicas"
    try:
        found = list(selectors.placed(service))
    except ConfigError:
        return  # the row of the deadlines has it
    for one in found:
        if not one.groups:
            yield failed(
                f"{check} of {one.deployment}",
                f"no group of pods has {one.wanted}, so its replicas would wait forever",
                f"Correct ray_actor_options of {one.deployment} in the Serve config, or the "
                "`labels` of the worker group for it.",
            )
    if all(one.groups for one in found):
        places = (
            f"{one.deployment} in {', '.join(_group_name(path) for path in one.groups)}"
            for one in found
        )
        yield ok(check, "; ".join(places))


def _group_name(path: str) -> str:
    """Return the name of a worker group, or the head's field."""
    return path.rpartition(".")[2].removeprefix("workerGroupSpecs[").removesuffix("]")
