"""Repeated prompts skip the text encoder, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.model.prompt_cache import NotCacheable, PromptCache, content_key
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX


def test_equal_arguments_have_equal_keys() -> None:
    assert content_key((["a"], {"n": 1})) == content_key((["a"], {"n": 1}))
    different = [
        (("a",), {}),
        (("b",), {}),
        ((["a"],), {}),
        ((None,), {}),
        ((1,), {}),
        ((1.0,), {}),
    ]
    assert len({content_key(value) for value in different}) == len(different)
    for wrong in (torch.ones(1), object(), [torch.ones(1)]):
        with pytest.raises(NotCacheable):
            content_key(wrong)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60))
def test_it_never_holds_more_than_it_may(asked: list[tuple[int, int]]) -> None:
    cache = PromptCache(max_bytes=50)
    sizes = {}
    for key, size in asked:
        size = sizes.setdefault(key, size)
        value = cache.get(key, lambda size=size: [torch.zeros(size, dtype=torch.uint8), None])
        assert value[0].numel() == size
        held = [entry for _, entry in cache._entries.values()]
        assert cache.held_bytes == sum(held) <= 50
    assert cache.hits + cache.misses == len(asked)


def test_the_least_recently_used_goes_first() -> None:
    cache = PromptCache(max_bytes=8)
    for key in "abac":
        cache.get(key, lambda: torch.zeros(4, dtype=torch.uint8))
    assert list(cache._entries) == ["a", "c"]
    cache.get("huge", lambda: torch.zeros(9, dtype=torch.uint8))
    assert list(cache._entries) == ["a", "c"]  # too large to keep, and nobody had to go for it


def test_another_may_encode_the_same_meanwhile() -> None:
    cache = PromptCache(max_bytes=8)
    value = torch.zeros(4, dtype=torch.uint8)
    cache.get("a", lambda: cache.get("a", lambda: value))
    assert cache.held_bytes == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_prompt_skips_the_encoder(family: str) -> None:
    model = ModelConfig.model_validate(
        {
            "id": family,
            "default_size_px": (WIDTH_PX, HEIGHT_PX),
            "default_steps": 3,
            "call_kwargs": CALL_KWARGS.get(family, {}),
        }
    )
    pipeline = LoadedPipeline(FAMILIES[family](), model)
    request = GenerationParams(
        "a red circle", 3, width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=3
    )
    alone = pipeline.generate(request)[0]
    encoded: list[str] = []
    with Engine(pipeline, model) as engine:
        handle = pipeline._pipeline.text_encoder.register_forward_pre_hook(
            lambda *_: encoded.append("")
        )
        try:
            first = engine.generate(request).pixels
            once = len(encoded)
            second = engine.generate(request).pixels
        finally:
            handle.remove()
        assert len(encoded) == once > 0
        assert engine._prompts.hits > 0
    for pixels in (first, second):
        assert float((pixels - alone).abs().max()) <= 1e-5


def test_it_can_be_turned_off(demo_pipeline: LoadedPipeline) -> None:
    request = GenerationParams("a", 1, width=32, height=32, num_inference_steps=1)
    with Engine(demo_pipeline, DEMO, EngineConfig(prompt_cache_mib=0)) as engine:
        engine.generate(request)
        engine.generate(request)
        assert engine._prompts.hits == 0
        assert engine._prompts.held_bytes == 0
