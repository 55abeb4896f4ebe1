"""A repeated prompt skips the text encoder and gives the same image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.prompt_cache import NotCacheable, PromptCache, content_key
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX

pytestmark = pytest.mark.usefixtures("reused_starts")


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
    images = [Image.new(mode, size) for mode in ("RGB", "L") for size in ((2, 3), (3, 2))]
    images.append(Image.new("RGB", (2, 3), "red"))
    assert len({content_key(image) for image in images}) == len(images)
    assert content_key([images[0]]) == content_key([images[0].copy()])
    for wrong in (torch.ones(1), object(), [torch.ones(1)]):
        with pytest.raises(NotCacheable):
            content_key(wrong)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60))
def test_the_cache_stays_within_its_limit(requested: list[tuple[int, int]]) -> None:
    cache = PromptCache(max_bytes=50)
    sizes = {}
    for key, size in requested:
        size = sizes.setdefault(key, size)
        value = cache.get(key, lambda size=size: [torch.zeros(size, dtype=torch.uint8), None])
        assert value[0].numel() == size
        assert cache.held_bytes <= 50
    assert cache.hits + cache.misses == len(requested)


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    cache = PromptCache(max_bytes=8)
    encoded: list[str] = []

    def get(key: str, size: int = 4) -> None:
        def encode() -> torch.Tensor:
            encoded.append(key)
            return torch.zeros(size, dtype=torch.uint8)

        cache.get(key, encode)

    for key in "abac":
        get(key)
    get("huge", size=9)  # too large to keep, so it evicts no entry
    assert cache.held_bytes == 8
    encoded.clear()
    for key in "cab":
        get(key)
    assert encoded == ["b"]


def test_what_a_request_writes_into_a_prompt_stays_its_own() -> None:
    cache = PromptCache(1000)
    for _ in range(3):
        [embeds] = cache.get("key", lambda: [torch.ones(4)])
        assert torch.equal(embeds, torch.ones(4))
        embeds *= 2


def test_two_requests_may_encode_the_same_prompt_at_once() -> None:
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
    separate = pipeline.generate(request)[0]
    encoded: list[str] = []
    with Engine(pipeline, model) as engine:
        handle = pipeline.stock.text_encoder.register_forward_pre_hook(
            lambda *_: encoded.append("")
        )
        try:
            first = engine.generate(request).pixels
            once = len(encoded)
            second = engine.generate(request).pixels
        finally:
            handle.remove()
        assert len(encoded) == once > 0
    for pixels in (first, second):
        assert float((pixels - separate).abs().max()) <= 1e-5


@pytest.mark.parametrize(("mib", "calls"), [(0, 2), (1, 1)])
def test_the_cache_can_be_turned_off(demo_pipeline: LoadedPipeline, mib: int, calls: int) -> None:
    request = GenerationParams("a", 1, width=32, height=32, num_inference_steps=1)
    encoded: list[str] = []
    with Engine(demo_pipeline, DEMO, EngineConfig(prompt_cache_mib=mib)) as engine:
        handle = demo_pipeline.stock.text_encoder.register_forward_pre_hook(
            lambda *_: encoded.append("")
        )
        try:
            engine.generate(request)
            once = len(encoded)
            engine.generate(request)
        finally:
            handle.remove()
    assert len(encoded) == calls * once > 0
