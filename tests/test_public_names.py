"""The names that ``from serve_app import ...`` offers."""

import subprocess
import sys

import pytest

import serve_app
from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.protocol.params import GenerationParams

CHEAP_IMPORT = """
import sys, serve_app
heavy = {"torch", "ray", "diffusers", "transformers", "pydantic", "fastapi"} & sys.modules.keys()
assert not heavy, heavy
from serve_app import ModelConfig
assert "torch" not in sys.modules and "ray" not in sys.modules
print(ModelConfig().id)
"""


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHEAP_IMPORT],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "demo\n"


def test_public_names_are_those_of_the_modules() -> None:
    assert serve_app.Engine is Engine
    assert serve_app.EngineConfig is EngineConfig
    assert serve_app.ModelConfig is ModelConfig
    assert serve_app.GenerationParams is GenerationParams
    assert callable(serve_app.build)
    for name in serve_app.__all__:
        assert getattr(serve_app, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = serve_app.Pipeline  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from serve_app import pipelines  # type: ignore[attr-defined]  # noqa: F401
