from pathlib import Path

import pytest

from serve_app.autoscaling.params import read_scaling_params
from serve_app.autoscaling.policy import ScalingParams
from serve_app.config.serve_file import policy_kwargs, read_generators
from serve_app.errors import ConfigError


def test_omitted_parameters_have_the_defaults() -> None:
    assert read_scaling_params({}) == ScalingParams()
    assert read_scaling_params({"hold_s": 5}) == ScalingParams(hold_s=5.0)
    assert isinstance(read_scaling_params({"spare_replicas": 1.0}).spare_replicas, int)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target_drain": 5}, "target_drain: unknown key; known are target_utilization"),
        ({"max_replicas": 5}, r"set autoscaling_config\.max_replicas instead"),
        ({"hold_s": "60"}, "hold_s must be a number; it is '60'"),
        ({"hold_s": True}, "hold_s must be a number"),
        ({"hold_s": None}, "hold_s must be a number"),
        ({"hold_s": float("nan")}, "hold_s must be finite"),
        ({"spare_replicas": float("inf")}, "spare_replicas must be finite"),
        ({"spare_replicas": 0.5}, "spare_replicas must be a whole number; it is 0.5"),
        ({"target_utilization": 1.5}, "target_utilization must be over 0 and at most 1"),
        ({"smoothing_s": 0}, "smoothing_s must be over 0"),
    ],
)
def test_an_error_names_the_parameter(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=f"policy_kwargs.*{words}"):
        read_scaling_params(given)


def test_the_shipped_config_repeats_the_defaults() -> None:
    path = Path(__file__).parents[2] / "configs" / "sdxl.yaml"
    [generator] = read_generators(path)
    given = policy_kwargs(generator.autoscaling)
    assert given
    assert read_scaling_params(given) == ScalingParams()
