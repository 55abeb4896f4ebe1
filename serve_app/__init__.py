"""diffusion-serve: any diffusers text-to-image pipeline as a step-batched HTTP service.

The engine needs no server::

    from serve_app import Engine, EngineConfig, GenerationParams, ModelConfig

    with Engine.load(ModelConfig(id="demo"), EngineConfig()) as engine:
        image = engine.generate(GenerationParams(prompt="a green ring on white", seed=7)).image

The names below are imported when they are first used: ``import serve_app`` loads no torch and no
Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.app import build, build_openai_app
    from serve_app.config.models import EngineConfig, ModelConfig
    from serve_app.engine.engine import Engine
    from serve_app.protocol.params import GenerationParams

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "EngineConfig",
    "GenerationParams",
    "ModelConfig",
    "__version__",
    "build",
    "build_openai_app",
]

_MODULES = {
    "Engine": "serve_app.engine.engine",
    "EngineConfig": "serve_app.config.models",
    "GenerationParams": "serve_app.protocol.params",
    "ModelConfig": "serve_app.config.models",
    "build": "serve_app.app",
    "build_openai_app": "serve_app.app",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that owns it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
