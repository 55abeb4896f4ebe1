import pytest
import torch

from serve_app.errors import ConfigError
from serve_app.generator import Generator, check_assigned_gpus


def test_a_replica_gets_a_gpu_unless_the_config_says_otherwise() -> None:
    assert Generator.ray_actor_options["num_gpus"] == 1


def test_an_assigned_gpu_that_torch_cannot_use_is_explained() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    with pytest.raises(ConfigError, match=r"GPU 0, 3 .*num_gpus of the deployment Generator to 0"):
        check_assigned_gpus(["0", "3"], "auto")


def test_without_an_assigned_gpu_nothing_is_asked_of_torch() -> None:
    check_assigned_gpus([], "auto")


def test_a_gpu_that_the_config_does_not_want_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_assigned_gpus(["0", "3"], "cpu")
    assert "GPU 0, 3" in caplog.text
    assert "not used" in caplog.text
