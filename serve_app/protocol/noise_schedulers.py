"""The noise scheduler of a request, checked against those that the model offers for its task."""

from collections.abc import Mapping, Sequence

from serve_app.errors import InvalidRequest

OWN_SCHEDULER = "default"
"""Name of the model's own noise scheduler among the unavailable ones."""


def check_noise_scheduler(
    name: str | None, task: str, pipeline: str, offered: Sequence[str], reasons: Mapping[str, str]
) -> None:
    """Check a name, or ``None`` for the model's own noise scheduler.

    ``reasons`` says by name what is not offered for the task.

    Raises:
        InvalidRequest: the model does not offer it, or not for this task.
    """
    reason = reasons.get(name or OWN_SCHEDULER)
    if reason is None and (name is None or name in offered):
        return
    what = f"{pipeline} does not support the scheduler {(name or OWN_SCHEDULER)[:40]!r}"
    why = "" if reason is None else f" for {task}: {reason}"
    others = [other for other in offered if other not in reasons]
    remedy = "leave it out to use the model's own"
    if others:
        remedy = f"use one of {', '.join(others)}"
    raise InvalidRequest(f"{what}{why}; {remedy}.", "scheduler")
