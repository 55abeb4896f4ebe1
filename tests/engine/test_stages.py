"""Stages and steps take turns: text encoding before the steps, decoding between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from serve_app.config.models import ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference
from serve_app.errors import GenerationFailed
from serve_app.protocol.events import Completed, Event, Failed, Progress
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.tiny_pipelines import HEIGHT_PX, WIDTH_PX, sdxl

pytestmark = pytest.mark.usefixtures("reused_starts")


def params(seed: int, steps: int, prompt: str = "a red star on white") -> GenerationParams:
    return GenerationParams(prompt, seed, width=64, height=64, num_inference_steps=steps)


@contextmanager
def noted_calls(pipeline: LoadedPipeline) -> Iterator[list[str]]:
    """Note the sites that run, in order."""
    ran: list[str] = []

    def first_layer(module: nn.Module) -> nn.Module:
        return next(layer for layer in module.modules() if not list(layer.children()))

    handles = [
        first_layer(module).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in pipeline.sites.items()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def test_steps_run_in_the_middle_of_anothers_decoding(demo_pipeline: LoadedPipeline) -> None:
    # Without guidance a step of the demo model takes half as long as decoding.
    requests = [
        replace(params(1, 90), width=32, height=32),
        replace(params(2, 2), width=192, height=128, guidance_scale=1.0),
    ]
    alone = [demo_pipeline.generate(request)[0] for request in requests]
    with Engine(demo_pipeline, DEMO) as engine, noted_calls(demo_pipeline) as calls:
        long = engine.stream(requests[0])
        for event in long:
            if isinstance(event, Progress):
                break
        short = engine.generate(requests[1])
        ends = list(long)
    assert isinstance(ends[-1], Completed)
    assert largest_difference([ends[-1].result.pixels, short.pixels], alone) <= 1e-5
    decoding = [index for index, site in enumerate(calls) if site.startswith("vae.decoder")]
    blocks = len(decoding) // 2
    assert calls[decoding[0] : decoding[blocks - 1]].count("unet") > 0
    assert calls[decoding[blocks] :].count("unet") == 0  # no other request is left


def test_prompts_are_encoded_before_the_next_step(demo_pipeline: LoadedPipeline) -> None:
    """Otherwise each would start a step after the one before it, in batches that are too small."""
    with Engine(demo_pipeline, DEMO) as engine, noted_calls(demo_pipeline) as calls:
        long = engine.stream(params(1, 60))
        for event in long:
            if isinstance(event, Progress):
                break
        calls.clear()
        streams = [engine.stream(params(seed, 5, f"{seed} stars")) for seed in range(2, 8)]
        for stream in streams:
            list(stream)
        list(long)
    encoded = [index for index, site in enumerate(calls) if site == "text_encoder"]
    assert len(encoded) == 12  # the prompt and the empty negative one
    assert calls[encoded[0] : encoded[-1]].count("unet") <= 2


def test_a_decoder_error_fails_only_its_own_request(demo_pipeline: LoadedPipeline) -> None:
    failed = 0

    def fail_once(*_: object) -> None:
        nonlocal failed
        failed += 1
        if failed == 1:
            raise RuntimeError("no kernel")

    with Engine(demo_pipeline, DEMO) as engine:
        block = demo_pipeline.stock.vae.decoder.mid_block.resnets[0]
        handle = block.register_forward_pre_hook(fail_once)
        try:
            streams = [engine.stream(params(seed, 3 + seed)) for seed in range(2)]
            ends = [list(stream)[-1] for stream in streams]
        finally:
            handle.remove()
    assert isinstance(ends[0], Failed)
    assert isinstance(ends[0].error, GenerationFailed)
    assert "no kernel" in str(ends[0].error)
    assert isinstance(ends[1], Completed)


def test_a_decoding_without_memory_waits_for_another_request_to_end(
    demo_pipeline: LoadedPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [params(seed, 4 + seed) for seed in range(3)]
    alone = [demo_pipeline.generate(request)[0] for request in requests]
    tries = 0

    def fail_at_first(*_: object) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise torch.OutOfMemoryError("out of memory")

    with Engine(demo_pipeline, DEMO) as engine:
        block = demo_pipeline.stock.vae.decoder.mid_block.resnets[0]
        handle = block.register_forward_pre_hook(fail_at_first)
        try:
            streams = [engine.stream(request) for request in requests]
            ends = [list(stream)[-1] for stream in streams]
        finally:
            handle.remove()
        order = [entry.request for entry in engine.stats().log if entry.what == "completed"]
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(together, alone) <= 1e-5
    assert "request 1 waits for memory" in caplog.text
    assert order[0] != 1


def test_a_request_that_is_decoded_can_be_cancelled(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO) as engine:
        numbers: list[int] = []
        events: list[Event] = []

        def on_event(event: Event) -> None:
            events.append(event)
            if event == Progress(3, 3):
                engine.cancel(numbers[0])

        other = engine.stream(params(1, 30))
        numbers.append(engine.submit(params(2, 3), on_event))
        assert isinstance(list(other)[-1], Completed)
        assert isinstance(events[-1], Failed)
        assert engine.stats().running == 0


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_a_vae_that_is_widened_for_decoding_keeps_each_request_its_own() -> None:
    """SDXL in float16: each request widens the shared VAE before it decodes and narrows it after.

    What one narrows, another may be in the middle of.
    """
    model = ModelConfig(id="sdxl", default_size_px=(WIDTH_PX, HEIGHT_PX), default_steps=3)
    pipeline = LoadedPipeline(sdxl().to(torch.float16), model)
    assert pipeline.stock.vae.config.force_upcast
    requests = [
        GenerationParams(
            "a red star", seed, width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=2 + seed
        )
        for seed in range(6)
    ]
    alone = [pipeline.generate(request)[0] for request in requests]
    with Engine(pipeline, model) as engine:
        streams = [engine.stream(request) for request in requests]
        ends = [list(stream)[-1] for stream in streams]
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert len(together) == len(requests), ends
    assert largest_difference(together, alone) <= 2e-2
    assert pipeline.stock.vae.dtype == torch.float16
