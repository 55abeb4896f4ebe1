"""Failures: one request, the memory, the device or the engine itself. None strands a request."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.policies import Fifo
from serve_app.errors import (
    GenerationFailed,
    Unavailable,
)
from serve_app.protocol.events import Completed, Event, Failed
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO, FIFO
from tests.engine.engines import TOLERANCE, has_stopped, largest_difference, params, result_of
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")


def break_rows_of(
    pipeline: LoadedPipeline, is_bad: Callable[[torch.Tensor], bool]
) -> Callable[[], None]:
    """Make the network raise for batches with a bad row; return a handle that undoes it."""
    first = pipeline.denoisers["unet"].conv_in

    def check(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if is_bad(args[0]):
            raise RuntimeError("a bad row")

    return first.register_forward_pre_hook(check).remove


def test_an_error_in_one_request_fails_no_other(demo_pipeline: LoadedPipeline) -> None:
    good = [params("a red star on white", seed, num_inference_steps=8) for seed in range(4)]
    alone = [demo_pipeline.generate(request) for request in good]
    bad = params("a blue ring on white", 666, num_inference_steps=8)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(666))
    with Engine(demo_pipeline, DEMO) as engine:
        mend = break_rows_of(
            demo_pipeline, lambda rows: any(torch.equal(row, latents[0]) for row in rows)
        )
        try:
            streams = [engine.stream(request) for request in [*good[:2], bad, *good[2:]]]
            ends = [list(stream)[-1] for stream in streams]
        finally:
            mend()
    failed = ends.pop(2)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GenerationFailed)
    assert "a bad row" in str(failed.error)
    assert largest_difference([result_of([end]) for end in ends], alone) <= TOLERANCE


def check_stopped_by(
    lost: Callable[[torch.nn.Module, object], None], engine: Engine, pipeline: LoadedPipeline
) -> None:
    """Check that an error before a denoiser call ends the engine, and its request as lost."""
    handle = pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(lost)
    try:
        event = list(engine.stream(params()))[-1]
        wait_until(lambda: has_stopped(engine))
    finally:
        handle.remove()
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unavailable)


def test_a_lost_device_stops_the_engine(demo_pipeline: LoadedPipeline) -> None:
    """Every later call would fail as well: another process must take over."""

    def lost(_: torch.nn.Module, args: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine = Engine(demo_pipeline, DEMO)
    check_stopped_by(lost, engine, demo_pipeline)
    with pytest.raises(Unavailable, match="illegal memory access"):
        engine.check()


def test_a_failed_request_leaves_nothing_in_memory(demo_pipeline: LoadedPipeline) -> None:
    """A request that ran out of memory must not keep its tensors."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        held.append(weakref.ref(args[0]))
        raise torch.OutOfMemoryError("out of memory")

    with Engine(demo_pipeline, DEMO) as engine:
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(fail)
        gc.disable()  # memory must be free without a collection
        try:
            streams = [engine.stream(params(seed=seed)) for seed in range(3)]
            events = [list(stream)[-1] for stream in streams]
            wait_until(lambda: not any(ref() is not None for ref in held), what="release")
        finally:
            gc.enable()
            handle.remove()
        assert all(isinstance(event, Failed) for event in events)
        assert len(held) >= 3
        assert engine.generate(params(num_inference_steps=2)).image.size == (64, 64)


def test_out_of_memory_halves_the_batch_and_fails_no_request(demo_pipeline: LoadedPipeline) -> None:
    requests = [params(seed=seed, num_inference_steps=6) for seed in range(9)]
    alone = [demo_pipeline.generate(request) for request in requests]
    sizes: list[int] = []

    def only_three_fit(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(args[0].shape[0] // 2)  # with guidance, two rows a request
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(only_three_fit)
        try:
            streams = [engine.stream(request) for request in requests]
            results = [result_of(list(stream)) for stream in streams]
        finally:
            handle.remove()
    assert largest_difference(results, alone) <= TOLERANCE
    assert sum(size > 3 for size in sizes) <= 3  # the cap is learned, not tried again and again
    assert max(sizes[-6:]) <= 3


def wrapped() -> None:
    """Raise a library's own error in the handling of one of torch."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    except torch.OutOfMemoryError as error:
        raise ValueError("the attention backend failed") from error


def raises(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


LACKS_OF_MEMORY = {
    "torch": raises(torch.OutOfMemoryError("Allocation on device 0 would exceed the limit")),
    "cpu": lambda: torch.empty(2**60),  # a real one
    "windows": raises(
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 1073741824 bytes."
        )
    ),
    "python": raises(MemoryError()),
    "cublas": raises(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    ),
    "cudnn 8": raises(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
    "cudnn 9": raises(
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")
    ),
    "cudnn engines": raises(
        RuntimeError("GET was unable to find an engine to execute this computation")
    ),
    "runtime": raises(
        torch.AcceleratorError(
            "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in "
            "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more "
            "information.\nCUDA kernel errors might be asynchronously reported at some other API "
            "call, so the stacktrace below might be incorrect."
        )
    ),
    "expandable segments": raises(RuntimeError("CUDA driver error: out of memory")),
    "nvml": raises(
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/'
            'CUDACachingAllocator.cpp":1016, please report a bug to PyTorch.'
        )
    ),
    "wrapped": wrapped,
}
"""The ways in which libraries report a lack of memory, with their texts."""


@pytest.mark.parametrize("run_out", LACKS_OF_MEMORY.values(), ids=LACKS_OF_MEMORY)
def test_every_lack_of_memory_lowers_the_cap_and_fails_no_request(
    run_out: Callable[[], object], demo_pipeline: LoadedPipeline
) -> None:
    requests = [params(seed=seed, num_inference_steps=3) for seed in range(4)]
    sizes: list[int] = []
    submitted = threading.Event()

    def only_two_fit(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        submitted.wait()
        sizes.append(args[0].shape[0] // 2)  # with guidance, two rows a request
        if sizes[-1] > 2:
            run_out()

    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(only_two_fit)
        try:
            streams = [engine.stream(request) for request in requests]
            submitted.set()
            ends = [list(stream)[-1] for stream in streams]
        finally:
            submitted.set()
            handle.remove()
        assert engine.cost.cap((64, 64), 2) <= 2
    assert all(isinstance(end, Completed) for end in ends), ends
    assert max(sizes) > 2
    assert sum(size > 2 for size in sizes) == 1  # the cap is learned


def test_an_error_after_a_lack_of_memory_may_still_be_a_lost_device(
    demo_pipeline: LoadedPipeline,
) -> None:
    def lost(_: torch.nn.Module, args: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")  # noqa: B904

    engine = Engine(demo_pipeline, DEMO)
    check_stopped_by(lost, engine, demo_pipeline)


def test_a_receiver_that_raises_fails_no_request(
    demo_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("receiver")

    demo_engine.submit(params(), broken)
    assert demo_engine.generate(params()).image.size == (64, 64)
    assert "the receiver of its events failed" in caplog.text


def test_no_request_hangs_when_the_engine_thread_dies(
    demo_pipeline: LoadedPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Fifo):
        def choose(self, now: float, cap: Any) -> Any:
            raise KeyError("policy")

    engine = Engine(demo_pipeline, DEMO, policy=Broken())
    event = list(engine.stream(params()))[-1]
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unavailable)
    wait_until(lambda: has_stopped(engine))
    with pytest.raises(Unavailable, match="policy"):
        engine.check()


def test_a_tokenizer_error_fails_only_its_own_request(
    demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_prompt = demo_pipeline.read_prompt

    def fail(request: GenerationParams) -> tuple[int, tuple[str, ...]]:
        if request.seed == 13:
            raise TypeError("no such text")
        return read_prompt(request)

    monkeypatch.setattr(demo_pipeline, "read_prompt", fail)
    with Engine(demo_pipeline, DEMO) as engine:
        with pytest.raises(GenerationFailed, match="no such text"):
            engine.generate(params(seed=13))
        engine.generate(params(num_inference_steps=1))


def test_an_error_while_admitting_ends_the_engine_and_every_request(
    demo_pipeline: LoadedPipeline,
) -> None:
    """Such an error is a bug of the engine: no request may hang because of it."""

    class Broken(Fifo):
        def order(self, now: float) -> Any:
            raise KeyError("policy")

    engine = Engine(demo_pipeline, DEMO, policy=Broken())
    [event] = engine.stream(params())
    assert isinstance(event, Failed)
    assert isinstance(event.error, GenerationFailed)
    wait_until(lambda: has_stopped(engine))
    with pytest.raises(Unavailable):
        engine.submit(params(), lambda _: None)
    # The pipeline has its own modules back.
    assert torch.isfinite(demo_pipeline.generate(params(num_inference_steps=1))).all()


def test_waiting_for_memory_teaches_no_costs(
    demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is queued again has taken no time since the last denoiser call."""
    learned: list[float] = []
    observe = CostModel.observe_between
    calls = failed_alone = 0

    def spy(cost: CostModel, size: tuple[int, int], seconds: float) -> None:
        learned.append(seconds)
        observe(cost, size, seconds)

    def scarce(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls, failed_alone
        calls += 1
        alone = args[0].shape[0] == 2  # with guidance, two rows a request
        if calls > 4 and not (alone and failed_alone):
            failed_alone += alone
            raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr(CostModel, "observe_between", spy)
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(scarce)
        try:
            streams = [engine.stream(params(num_inference_steps=8)) for _ in range(2)]
            assert all(isinstance(list(stream)[-1], Completed) for stream in streams)
        finally:
            handle.remove()
    assert failed_alone == 1
    assert learned
    assert min(learned) > 0


def test_a_call_that_cannot_be_compared_runs_alone(
    demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the comparison is a bug, but no reason to fail a request."""

    def broken(spec: BatchSpec, call: Any) -> Any:
        raise ValueError("an argument of a new kind")

    requests = [params(seed=seed, num_inference_steps=3) for seed in (1, 2)]
    alone = [demo_pipeline.generate(request) for request in requests]
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        monkeypatch.setattr(BatchSpec, "prepare", broken)
        streams = [engine.stream(request) for request in requests]
        results = [result_of(list(stream)) for stream in streams]
        assert engine.stats().mean_batch_size == 1
    assert largest_difference(results, alone) <= TOLERANCE
    assert "cannot be merged with others" in caplog.text
