"""Reads the planner's inputs: options by model, step times, scaling, arrivals and policy names."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve_app.autoscaling.params import BOUNDS, read_scaling_params
from serve_app.autoscaling.policy import ScalingParams
from serve_app.config.serve_file import choose_generator, foreign_policy, policy_kwargs
from serve_app.engine.scheduling.cost import CostModel
from serve_app.errors import ConfigError
from serve_app.planner.trace import Trace, drawn, parse_mix, poisson, read_arrivals

Family = Literal["work", "count", "fixed"]
"""This project's policy, Ray Serve's default one, or a fixed size."""


@dataclass(frozen=True)
class ModelInputs:
    """The values of one model in the options that take ``[NAME=]VALUE``."""

    costs: Path
    trace: Path | None
    rate: float | None
    """Requests per second, where there is no trace."""
    mix: str | None
    mix_at_end: str | None
    calls_per_step: float


def model_inputs(
    model: str, known: Sequence[str], options: Mapping[str, Sequence[str]]
) -> ModelInputs:
    """Choose a model's values from the options ``--costs``, ``--trace``, and so on.

    Raises:
        ConfigError: if a value is missing, given twice, wrong, or for a model that is not known.
    """
    own = {option: _own(option, values, model, known) for option, values in options.items()}
    costs, trace, rate = own["--costs"], own["--trace"], own["--rate"]
    if costs is None:
        raise ConfigError(
            f"model {model!r} has no step times: add --costs {model}=FILE, or --costs FILE for all "
            "models."
        )
    if (trace is None) == (rate is None):
        raise ConfigError(f"model {model!r}: give either --trace or --rate, and not both.")
    return ModelInputs(
        Path(costs),
        None if trace is None else Path(trace),
        None if rate is None else _positive("--rate", rate),
        own["--mix"],
        own["--mix-at-end"],
        _positive("--calls-per-step", own["--calls-per-step"] or "1"),
    )


def _own(option: str, values: Sequence[str], model: str, known: Sequence[str]) -> str | None:
    """Return the value of a model: that of ``NAME=VALUE``, else the one for all models."""
    found: dict[str | None, str] = {}
    for value in values:
        first, equals, rest = value.partition("=")
        name, text = (first, rest) if equals else (None, value)
        if name is not None and name not in known:
            raise ConfigError(
                f"{option} {value} is for a model {name!r}; the config has "
                f"{', '.join(map(repr, known))}."
            )
        if name in found:
            raise ConfigError(f"{option} has two values for {name or 'all models'}: leave one out.")
        found[name] = text
    return found.get(model, found.get(None))


def _positive(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{option} must be over 0; it is {text!r}.")
    return value


def read_costs(path: Path, max_batch_size: int) -> CostModel:
    """Read step times from a file that an engine wrote to ``engine.profile_path``.

    Raises:
        ConfigError: if the file has no such table.
    """
    costs = CostModel(max_batch_size)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        costs.add_json(content.get("found", content)["sizes"])
        for size, call_s in costs.call_s.items():
            rest_s = costs.encode_s[size], costs.decode_s[size]
            if not min(call_s.values()) > 0 or not min(rest_s) >= 0:
                raise ValueError(f"a time of {size[0]}x{size[1]} is not positive")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no table of step times ({error!r}). An engine writes one when it starts "
            "with engine.profile_path and engine.warmup_sizes_px; configs/costs/ has examples."
        ) from None
    if not costs.call_s:
        raise ConfigError(f"{path} has no size.")
    return costs


def read_scaling(path: Path, max_replicas: int | None, model: str | None = None) -> ScalingParams:
    """Read the scaling parameters of a model's deployment; the default is one replica.

    Raises:
        ConfigError: if the file, its bounds or the policy's arguments are wrong.
    """
    autoscaling = choose_generator(path, model).autoscaling
    fewest, most = _bounds(autoscaling)
    if not (isinstance(fewest, int) and isinstance(most, int)):
        raise ConfigError(f"{path}: {' and '.join(BOUNDS)} must be whole numbers.")
    if max_replicas is not None:
        fewest, most = min(fewest, max_replicas), max_replicas
    params = read_scaling_params(policy_kwargs(autoscaling))
    try:
        return replace(params, min_replicas=fewest, max_replicas=most)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}.") from None


def not_simulated(path: Path, model: str | None = None) -> list[str]:
    """List the settings of a model's deployment that `read_scaling` does not cover."""
    generator = choose_generator(path, model)
    autoscaling = generator.autoscaling
    notes = []
    fewest, most = _bounds(autoscaling)
    other = foreign_policy(autoscaling)
    if fewest != most and not (autoscaling.get("policy") or {}).get("policy_function"):
        other = "Ray Serve's default policy"
    if other is not None:
        notes.append(
            f"it scales {generator.deployment} by {other}. The row 'by work, as configured' is "
            "this project's policy with its defaults, within those bounds."
        )
    notes += [
        f"autoscaling_config.{name} is not simulated."
        for name in ("downscale_to_zero_delay_s", "upscaling_factor", "downscaling_factor")
        if name in autoscaling
    ]
    if generator.num_gpus not in (None, 1):
        notes.append(
            f"ray_actor_options.num_gpus of {generator.deployment} is {generator.num_gpus:g}. The "
            "planner counts one GPU for each replica."
        )
    return notes


def _bounds(autoscaling: Mapping[str, Any]) -> tuple[Any, Any]:
    fewest, most = (autoscaling.get(name, 1) for name in BOUNDS)
    return fewest, most


def arrivals(own: ModelInputs, duration_s: float, stretch: float, share: float, seed: int) -> Trace:
    """Read arrivals of a model from its file, or draw them at its rate.

    Raises:
        ConfigError: if the file is wrong, or the kinds of requests are unknown.
    """
    path, rate, mix, mix_at_end = own.trace, own.rate, own.mix, own.mix_at_end
    kinds = None
    if path is not None:
        at_s, kinds = read_arrivals(path, stretch, share, seed)
    else:
        assert rate is not None
        at_s = poisson(rate, duration_s, seed)
    if kinds is not None:
        if mix is not None or mix_at_end is not None:
            raise ConfigError(
                f"{path} has the kinds of requests: leave out --mix and --mix-at-end."
            )
        return Trace(at_s, kinds)
    if mix is None:
        raise ConfigError("give the kinds of requests with --mix, such as 1024x1024/25:1.")
    return drawn(at_s, parse_mix(mix), None if mix_at_end is None else parse_mix(mix_at_end), seed)


def parse_families(names: Sequence[str]) -> list[Family | Literal["configured"]]:
    """Validate policy names. Raises `ConfigError` for an unknown one."""
    known = ("work", "count", "fixed", "configured")
    for name in names:
        if name not in known:
            raise ConfigError(f"--policy is {name!r}; known are {', '.join(known)}.")
    return list(names)  # type: ignore[arg-type]
