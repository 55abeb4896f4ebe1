"""Copies of networks: the same weights, modules of their own."""

import gc
import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.config.models import ModelConfig
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.model.module_copies import ModuleCopies
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import with_input
from serve_app.engine.startup.runs import Runs
from serve_app.protocol.params import GenerationParams
from tests.tiny_pipelines import sdxl


class Remembering(nn.Module):
    """A layer that keeps its last input, as some video decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.last: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        self.last = values
        return cast(Tensor, self.inner(values))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_keeps_what_a_call_writes_and_shares_the_weights(compiled: bool) -> None:
    shared = Remembering()
    network = nn.Sequential(shared, shared)
    if compiled:
        shared.compile(backend="eager")
    copied = ModuleCopies(network).new()
    values = torch.ones(1, 2)
    with torch.no_grad():
        assert torch.equal(copied(values), network[1](network[0](values)))
        shared.last = None
        copied(values)
    assert shared.last is None
    first, second = cast(nn.Sequential, copied)
    assert first is second, "a module at two places became two"
    assert cast(Remembering, first).last is not None
    assert list(copied.parameters()) == list(network.parameters())


def half_precision() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))).half()


def test_a_conversion_of_a_copy_changes_no_other_one() -> None:
    network = half_precision()
    copies = ModuleCopies(network)
    one, two, other = copies.new(), copies.new(), copies.new()
    one.to(torch.float32)
    two.float()
    for converted in (one, two):
        for old, new in zip(network.parameters(), converted.parameters(), strict=True):
            assert new.dtype == torch.float32
            assert torch.equal(old.float(), new)
        assert all(
            buffer.dtype == torch.float32
            for buffer in converted.buffers()
            if buffer.is_floating_point()
        )
    assert all(map(same, one.parameters(), two.parameters())), "converted twice"
    for untouched in (network, other):
        assert {weights.dtype for weights in untouched.parameters()} == {torch.float16}
    one.half()
    assert all(map(same, one.parameters(), network.parameters()))
    assert {weights.dtype for weights in two.parameters()} == {torch.float32}


def test_a_part_of_a_copy_can_be_converted() -> None:
    network = half_precision()
    copied = cast(nn.Sequential, ModuleCopies(network).new())
    copied.float()
    copied[1].half()
    assert copied[0].weight.dtype == torch.float32
    assert {weights.dtype for weights in copied[1].parameters()} == {torch.float16}
    assert {weights.dtype for weights in network.parameters()} == {torch.float16}


def test_layers_that_are_kept_in_float32_are_converted_as_stock() -> None:
    """A copy forgets, as a stock module does, what it was before. The original does not."""
    network = half_precision()
    network[1].float()
    copied = cast(nn.Sequential, ModuleCopies(network).new())
    copied.half()
    assert {weights.dtype for weights in copied.parameters()} == {torch.float16}
    assert {weights.dtype for weights in network[1].parameters()} == {torch.float32}


def test_converted_weights_go_with_the_last_copy_that_uses_them() -> None:
    copies = ModuleCopies(half_precision())
    one, two = copies.new().float(), copies.new().float()
    converted = weakref.ref(next(one.parameters()))
    gc.disable()  # memory must be free without a collection
    try:
        one.half()
        assert converted() is not None
        copies.release(two)  # its request was cancelled
        assert converted() is None
    finally:
        gc.enable()


def same(one: Tensor, two: Tensor) -> bool:
    return one is two


class Conversions(TorchDispatchMode):
    """Counts how often these tensors are converted to another dtype."""

    def __init__(self, tensors: list[nn.Parameter]) -> None:
        super().__init__()
        self._places = {tensor.data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._places:
            self.count += kwargs.get("dtype", args[0].dtype) != args[0].dtype
        return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_a_vae_is_widened_once_while_any_request_uses_it() -> None:
    """SDXL in float16 decodes, and encodes input images, in float32."""
    model = ModelConfig(id="sdxl", default_size_px=(32, 32))
    pipeline = LoadedPipeline(sdxl().to(torch.float16), model)
    weights = list(pipeline.stock.vae.parameters())
    text = GenerationParams("a red star", 1, width=32, height=32, num_inference_steps=2)
    requests = [
        text,
        with_input(text, "image-to-image", 0.9),
        GenerationParams("a blue star", 2, width=32, height=32, num_inference_steps=2),
    ]
    rendezvous = Rendezvous(pipeline.sites)
    runs = Runs(pipeline, rendezvous)
    try:
        with torch.no_grad():
            with Conversions(weights) as alone:
                recordings = [runs.alone(request) for request in requests]
            with Conversions(weights) as shared:
                images = runs.in_turns(requests, recordings)
    finally:
        rendezvous.close()
    # Each of the three decodes, and one encodes. At the most they do so one after another.
    assert alone.count == 4 * len(weights)
    assert len(weights) <= shared.count <= alone.count
    for recording, image in zip(recordings, images, strict=True):
        assert torch.equal(recording.image, image)
    assert {tensor.dtype for tensor in weights} == {torch.float16}
