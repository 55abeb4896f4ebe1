"""Speed options: their effect on a model, their errors, and the graphs that they compile."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from serve_app.config.models import EngineConfig, ModelConfig, parse_app_config
from serve_app.config.speed import SpeedConfig
from serve_app.engine.batching.batch import MergeableCall
from serve_app.engine.batching.rendezvous import Call, Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.model import speed
from serve_app.engine.model.networks import denoisers_of
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.speed import (
    bucket,
    check_compiler,
    compiled,
    compiling,
    largest_bucket,
    padded,
    speed_up,
    take_turns,
)
from serve_app.engine.startup.certification import certify
from serve_app.engine.startup.comparison import largest_difference, psnr_db
from serve_app.errors import ConfigError
from serve_app.protocol.events import Completed
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.speed import weight_bytes
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX, animatediff, pag

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROUNDING = 1e-4
"""Largest difference of a pixel in [0, 1] that another order of additions explains."""

DEMO = ModelConfig(id="demo", device="cpu")
PARAMS = GenerationParams(
    "a red circle on a blue background", 1, width=64, height=64, num_inference_steps=10
)

TINY_SIZE = WIDTH_PX, HEIGHT_PX
TINY = GenerationParams("a cat", 1, width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=2)


def _demo(speed: SpeedConfig) -> LoadedPipeline:
    return LoadedPipeline.load(DEMO.model_copy(update={"speed": speed}))


def _tiny(family: str) -> tuple[DiffusionPipeline, dict[str, nn.Module]]:
    pipeline = FAMILIES[family]()
    return pipeline, denoisers_of(pipeline)


@pytest.fixture(scope="module")
def plain_image() -> Tensor:
    """The image of the demo model without any option."""
    return LoadedPipeline.load(DEMO).generate(PARAMS)


def test_channels_last_generates_the_same(plain_image: Tensor) -> None:
    pipeline = _demo(SpeedConfig(channels_last=True))
    for network in (pipeline.denoisers["unet"], pipeline.stock.vae):
        convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
        assert convolutions
        for convolution in convolutions:
            assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert (pipeline.generate(PARAMS) - plain_image).abs().max() < ROUNDING


def test_channels_last_does_not_change_the_convolutions_of_videos() -> None:
    pipeline, denoisers = _tiny("qwen-image")
    speed_up(pipeline, denoisers, SpeedConfig(channels_last=True), CPU)


@pytest.mark.parametrize(("kind", "least_db"), [("int8", 50.0), ("fp8", 35.0)])
def test_eight_bits_generate_nearly_the_same_with_smaller_weights(
    kind: str, least_db: float, plain_image: Tensor, report: Callable[[str], None]
) -> None:
    before = weight_bytes([LoadedPipeline.load(DEMO).denoisers["unet"]])
    pipeline = _demo(SpeedConfig.model_validate({"quantize": kind}))
    unet = pipeline.denoisers["unet"]
    after = weight_bytes([unet])
    linear = sum(layer.in_features * layer.out_features * 4 for layer in _linears(unet))
    assert after < before - 0.7 * linear  # one byte instead of four, and a scale per row
    assert pipeline.dtype == torch.float32
    image = pipeline.generate(PARAMS)
    report(
        f"{kind}: denoiser {before / 2**20:.1f} -> {after / 2**20:.1f} MiB, largest difference "
        f"{float((image - plain_image).abs().max()):.2g}, PSNR {psnr_db(image, plain_image):.1f} dB"
    )
    assert psnr_db(image, plain_image) > least_db


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [part for part in network.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_keep_the_dtype_of_a_transformer(kind: str) -> None:
    pipeline, denoisers = _tiny("flux")
    speed_up(pipeline, denoisers, SpeedConfig.model_validate({"quantize": kind}), CPU)
    loaded = LoadedPipeline(
        pipeline, ModelConfig(id="flux", call_kwargs={"max_sequence_length": 16})
    )
    assert denoisers["transformer"].dtype == torch.float32
    kinds = {type(layer.weight) for layer in _linears(denoisers["transformer"])}
    loaded.restore_networks()
    assert {type(layer.weight) for layer in _linears(denoisers["transformer"])} == kinds
    assert loaded.generate(TINY).isfinite().all()


def test_quantizing_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"diffusion-serve\[quantize\]"):
        speed_up(*_tiny("flux"), SpeedConfig(quantize="int8"), CPU)


def test_another_attention_kernel_generates_the_same() -> None:
    pipeline, denoisers = _tiny("flux")
    loaded = LoadedPipeline(
        pipeline, ModelConfig(id="flux", call_kwargs={"max_sequence_length": 16})
    )
    before = loaded.generate(TINY)
    speed_up(pipeline, denoisers, SpeedConfig(attention_backend="native"), CPU)
    backends = {
        part.processor._attention_backend
        for part in denoisers["transformer"].modules()
        if hasattr(part, "processor")
    }
    assert backends == {"native"}
    assert (loaded.generate(TINY) - before).abs().max() < ROUNDING


def test_an_unknown_attention_kernel_is_rejected_with_a_list_of_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend.*'quick'.*native"):
        speed_up(*_tiny("flux"), SpeedConfig(attention_backend="quick"), CPU)


def test_an_attention_kernel_that_is_not_installed_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend.*sageattention"):
        speed_up(*_tiny("flux"), SpeedConfig(attention_backend="sage"), CPU)


def test_an_attention_that_cannot_be_exchanged_is_rejected() -> None:
    with pytest.raises(ConfigError, match="UNet2DConditionModel cannot be exchanged"):
        speed_up(*_tiny("stable-diffusion"), SpeedConfig(attention_backend="native"), CPU)


def test_offloading_is_rejected_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"model\.speed\.offload.*'cpu'"):
        parse_app_config({"model": {"device": "cpu", "speed": {"offload": "model"}}})
    with pytest.raises(ConfigError, match=r"model\.speed\.offload"):
        speed_up(*_tiny("stable-diffusion"), SpeedConfig(offload="model"), CPU)


def test_cuda_graphs_are_rejected_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"model\.speed\.cuda_graphs needs a GPU"):
        speed_up(*_tiny("stable-diffusion"), SpeedConfig(cuda_graphs=True), CPU)


class _Movable(nn.Module):
    """A network that records its device and checks it when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.at = "cpu"

    def to(self, device: object) -> "_Movable":  # type: ignore[override]
        self.at = str(device)
        return self

    def forward(self, number: int) -> int:
        assert self.at == "cuda"
        return number + 1


def test_one_network_at_a_time_is_on_the_device() -> None:
    networks = [_Movable(), _Movable(), _Movable()]
    take_turns(networks, torch.device("cuda"))
    assert [network.at for network in networks] == ["cuda", "cpu", "cpu"]
    for turn in (0, 1, 1, 2, 0):
        assert networks[turn](1) == 2
        assert [network.at == "cuda" for network in networks].index(True) == turn
        assert sum(network.at == "cuda" for network in networks) == 1


def test_requests_share_networks_that_take_turns() -> None:
    pipeline, denoisers = _tiny("stable-diffusion")
    take_turns([denoisers["unet"], pipeline.text_encoder], CPU)
    loaded = LoadedPipeline(pipeline, ModelConfig(id="tiny"))
    rendezvous = Rendezvous(loaded.sites)
    try:
        assert certify(loaded, rendezvous).sharing == "batched"
    finally:
        rendezvous.close()


@given(st.integers(1, 10_000))
def test_a_bucket_is_the_next_power_of_two(count: int) -> None:
    assert count <= bucket(count) < 2 * count
    assert bucket(bucket(count)) == bucket(count)
    assert largest_bucket(count) <= count < 2 * largest_bucket(count)
    assert bucket(largest_bucket(count)) == largest_bucket(count)


def _call(length: Fraction) -> MergeableCall:
    return MergeableCall(Call("unet", (), {}), "key", {}, length)


@given(st.lists(st.sampled_from([Fraction(1), Fraction(1, 2)]), min_size=1, max_size=16))
def test_padding_leads_to_compiled_numbers_of_rows(lengths: list[Fraction]) -> None:
    calls = [_call(length) for length in lengths]
    batch = padded(calls)
    assert batch[: len(calls)] == calls
    rows = sum(call.length for call in batch) * 2
    assert rows in {1, 2, 4, 8, 16, 32}
    assert rows < 4 * sum(lengths)
    assert rows <= 2 * bucket(len(calls))  # so it fits wherever that many requests fit


def test_calls_without_a_common_unit_are_not_padded() -> None:
    calls = [_call(Fraction(1)), _call(Fraction(2, 3))]
    assert padded(calls) == calls


def test_a_denoiser_without_repeated_blocks_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, denoisers = _tiny("flux")
    monkeypatch.setattr(speed, "check_compiler", lambda _: None)
    monkeypatch.setattr(type(denoisers["transformer"]), "_repeated_blocks", [])
    monkeypatch.setattr(type(denoisers["transformer"]), "_no_split_modules", None)
    with pytest.raises(ConfigError, match="names no repeated blocks"):
        speed_up(pipeline, denoisers, SpeedConfig(compile=True), CPU)


UNETS = {"stable-diffusion", "sdxl"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_something_to_compile(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, denoisers = _tiny(family)
    monkeypatch.setattr(speed, "check_compiler", lambda _: None)
    speed_up(pipeline, denoisers, SpeedConfig(compile=True), CPU)
    for denoiser in denoisers.values():
        blocks = [part for part in denoiser.modules() if part._compiled_call_impl is not None]
        assert ("forward" in vars(denoiser)) == (family in UNETS)
        assert bool(blocks) == (family not in UNETS)


@pytest.mark.parametrize(
    "build",
    [
        FAMILIES["stable-diffusion"],
        *(
            pytest.param(build, marks=pytest.mark.nightly)
            for build in (FAMILIES["sdxl"], pag, animatediff)
        ),
    ],
)
def test_a_unet_is_one_graph_and_generates_the_same(
    build: Callable[[], DiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch's C++ compiler, which takes half a minute for each shape."""
    plain = LoadedPipeline(build(), ModelConfig(id="tiny")).generate(TINY)
    monkeypatch.setattr(speed, "check_compiler", lambda _: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    pipeline = build()
    speed_up(pipeline, denoisers_of(pipeline), SpeedConfig(compile=True), CPU)
    loaded = LoadedPipeline(pipeline, ModelConfig(id="tiny"))
    before = _graphs()
    with compiling(SpeedConfig(compile=True)), torch.no_grad():
        image = loaded.generate(TINY)
    assert _graphs() == before + 1
    assert (image - plain).abs().max() < ROUNDING


def test_compiling_without_a_compiler_says_what_to_install() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"g\+\+"),
    ):
        speed_up(*_tiny("stable-diffusion"), SpeedConfig(compile=True), CPU)


def test_compiling_for_a_gpu_without_a_c_compiler_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"triton, a C compiler such as gcc.*ModuleNotFoundError"):
        check_compiler(torch.device("cuda"))

    class Driver:
        @property
        def active(self) -> object:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    runtime = ModuleType("triton.runtime")
    runtime.driver = Driver()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    with pytest.raises(ConfigError, match="Failed to find C compiler"):
        check_compiler(torch.device("cuda"))


class _Double(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        return 2 * numbers


def test_start_up_compiles_every_shape_and_serving_compiles_none() -> None:
    speed = SpeedConfig(compile=True)
    block = _Double()
    block.compile(dynamic=False, backend="eager")
    before = _graphs()
    shapes = range(1, 41)  # torch's own limit is 8
    with compiling(speed):
        for rows in shapes:
            block(torch.ones(rows, 3))
    assert _graphs() - before == len(shapes)
    with compiled(speed):
        for rows in (*shapes, 99):
            assert block(torch.ones(rows, 3)).sum() == 6 * rows
    assert _graphs() - before == len(shapes)


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("every_batch_pays")
@pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ,
    reason="torch compiles for a CPU with g++",
)
def test_an_engine_compiles_nothing_while_requests_wait(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    _tiny("flux")[0].save_pretrained(tmp_path)
    model = ModelConfig.model_validate(
        {
            "id": "tiny",
            "path": str(tmp_path),
            "device": "cpu",
            "default_size_px": TINY_SIZE,
            "default_steps": 3,
            "call_kwargs": CALL_KWARGS["flux"],
            "speed": {"compile": True},
        }
    )
    config = EngineConfig(scheduling="fifo", max_batch_size=4, warmup_sizes_px=(TINY_SIZE,))
    requests = [
        replace(TINY, seed=seed, num_inference_steps=2 + seed, guidance_scale=(1.0, 5.0)[seed % 2])
        for seed in range(5)
    ]
    # A size that is not compiled is generated as well, without compilation.
    requests.append(replace(TINY, width=HEIGHT_PX))
    plain = LoadedPipeline.load(model.model_copy(update={"speed": SpeedConfig()}))
    separate = [plain.generate(request)[0] for request in requests]
    started_at, before = time.perf_counter(), _graphs()
    with Engine.load(model, config) as engine:
        warm = _graphs()
        assert warm > before
        report(
            f"compile: {warm - before} graphs of a tiny model for batches up to 4 in "
            f"{time.perf_counter() - started_at:.0f} s"
        )
        streams = [engine.stream(request) for request in requests]
        ends = [list(stream)[-1] for stream in streams]
        assert engine.stats().mean_batch_size > 1.5
        assert _graphs() == warm
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(separate, together) < ROUNDING
