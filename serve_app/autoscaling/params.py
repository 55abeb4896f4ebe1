"""Validates the scaling parameters under ``policy_kwargs``. Standard library only."""

import math
from collections.abc import Mapping
from dataclasses import fields

from serve_app.autoscaling.policy import ScalingParams
from serve_app.errors import ConfigError

BOUNDS = ("min_replicas", "max_replicas")
"""Parameters that stand in ``autoscaling_config`` itself, not under ``policy_kwargs``."""


def read_scaling_params(given: Mapping[str, object]) -> ScalingParams:
    """Build the parameters, without the bounds: Serve passes these to the policy at each call.

    Raises:
        ConfigError: for an unknown name, a value that is not a number, or one out of its range.
    """
    known = {field.name: field.type for field in fields(ScalingParams) if field.name not in BOUNDS}
    numbers: dict[str, float] = {}
    for name, value in given.items():
        if name in BOUNDS:
            raise ConfigError(f"policy_kwargs.{name}: set autoscaling_config.{name} instead.")
        if name not in known:
            raise ConfigError(f"policy_kwargs.{name}: unknown key; known are {', '.join(known)}.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"policy_kwargs.{name} must be a number; it is {value!r}.")
        if not math.isfinite(value):
            raise ConfigError(f"policy_kwargs.{name} must be finite; it is {value!r}.")
        if known[name] is int and value != int(value):
            raise ConfigError(f"policy_kwargs.{name} must be a whole number; it is {value!r}.")
        numbers[name] = int(value) if known[name] is int else float(value)
    try:
        return ScalingParams(**numbers)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"policy_kwargs: {error}.") from None
