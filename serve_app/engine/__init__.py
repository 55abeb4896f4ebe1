"""The step-batching engine: any stock diffusers pipeline, many requests, one device.

Needs no server::

    from serve_app.config.models import EngineConfig, ModelConfig
    from serve_app.engine.engine import Engine
    from serve_app.protocol.params import GenerationParams

    with Engine.load(ModelConfig(id="demo"), EngineConfig()) as engine:
        image = engine.generate(GenerationParams(prompt="a green ring on white", seed=7)).image

Nothing is imported here: the gateway needs `params` and `encoding` and must not pay for torch.
"""
