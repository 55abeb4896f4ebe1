"""Adapters that are loaded when a request names them, beside the generation of others."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.loras import loader
from serve_app.engine.loras.loader import LoraLoader
from serve_app.engine.loras.source import new_source
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.adapters import load_adapter
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference
from serve_app.errors import (
    Cancelled,
    InvalidLora,
    InvalidRequest,
    LoraNotFound,
    LoraSourceAway,
)
from serve_app.protocol.events import Completed, Failed, Queued
from serve_app.protocol.events import Event as EngineEvent
from serve_app.protocol.params import AdapterSet, GenerationParams
from tests.conftest import DEMO
from tests.lora import ADAPTER_FILE, save_adapter
from tests.s3 import S3Server
from tests.waiting import wait_until

NAMES = ("ink", "oil", "styles/pen", "styles/chalk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters, some of which change the text encoder, and files that cannot be used."""
    root = tmp_path_factory.mktemp("adapters")
    folder = root / "source"
    for seed, name in enumerate(NAMES):
        save_adapter(root / "new", seed, text_encoder=seed % 2 == 0, rank=2 + seed)
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        (root / "new" / ADAPTER_FILE).rename(path)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    weights = load_file(folder / "ink.safetensors")
    foreign = {f"another.{key}": value for key, value in weights.items()}
    save_file(foreign, folder / "foreign.safetensors")
    wide = {
        key: torch.cat([value, value], 1) if "lora_A" in key else value
        for key, value in weights.items()
    }
    save_file(wide, folder / "wide.safetensors")
    missing = next(key for key in weights if "lora_B" in key)
    half = {key: value for key, value in weights.items() if key != missing}
    save_file(half, folder / "incomplete.safetensors")
    return folder


def config(**options: Any) -> ModelConfig:
    return ModelConfig.model_validate(DEMO.model_dump(exclude_unset=True) | options)


def engine_config(**options: Any) -> EngineConfig:
    return EngineConfig(warmup_sizes_px=(), profile_path="none", **options)


@pytest.fixture(scope="module")
def at_start(folder: Path) -> LoadedPipeline:
    """The model with the same adapters, loaded at the start."""
    loras = {name: str(folder / f"{name}.safetensors") for name in NAMES}
    return LoadedPipeline.load(config(loras=loras))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """An engine with room for two adapters."""
    options = engine_config(max_loaded_loras=2, limits={"max_loras": 2})
    with Engine.load(config(lora_source=str(folder)), options) as engine:
        yield engine


def params(lora: AdapterSet = (), **options: Any) -> GenerationParams:
    defaults = GenerationParams("a red star", 1, width=64, height=64, num_inference_steps=3)
    return replace(defaults, lora=lora, **options)


def pixels_of(events: list[EngineEvent]) -> Tensor:
    last = events[-1]
    assert isinstance(last, Completed), last
    return last.result.pixels


SETS: tuple[AdapterSet, ...] = (
    (("ink", 0.5),),
    (("oil", 0.4),),
    (),
    (("styles/pen", 0.5),),
    (("styles/chalk", -0.3),),
    (("ink", 0.2), ("styles/pen", 0.3)),
    (("ink", 0.7),),
)


def test_more_adapters_than_there_is_room_for_give_the_right_images(
    engine: Engine, at_start: LoadedPipeline
) -> None:
    assert engine.info.loras_on_demand
    assert engine.info.loras == ()
    requests = [params(lora) for lora in SETS]
    expected = [at_start.generate(one.resolved(at_info(at_start, engine)))[0] for one in requests]
    for index in (0, 1, 3, 4, 5, 6):
        assert float((expected[index] - expected[2]).abs().max()) > 1e-2
    streams = [engine.stream(one) for one in requests]
    together = [pixels_of(list(stream)) for stream in streams]
    assert largest_difference(expected, together) <= 5e-5
    again = [engine.generate(one).pixels for one in requests]
    assert largest_difference(expected, again) <= 5e-5
    assert engine.loras is not None
    assert len(engine.loras.cache.loaded) == 2


def at_info(pipeline: LoadedPipeline, engine: Engine) -> Any:
    return replace(engine.info, loras=pipeline.adapters.names)


def test_the_list_says_what_is_in_memory(engine: Engine) -> None:
    engine.generate(params((("oil", 1.0),)))
    assert engine.loras is not None
    listed = {one.name: one for one in engine.loras.list()}
    assert listed.keys() >= set(NAMES)
    assert listed["oil"].loaded
    assert all(one.on_demand for one in listed.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "has no weights"),
        ("foreign", "would change nothing"),
        ("wide", "was trained for another model"),
        ("incomplete", "is incomplete"),
    ],
)
def test_a_wrong_file_fails_only_its_requests(engine: Engine, name: str, reason: str) -> None:
    wrong = engine.stream(params(((name, 1.0),)))
    right = engine.stream(params((("ink", 0.5),)))
    failed, done = list(wrong)[-1], list(right)[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InvalidLora)
    assert reason in str(failed.error)
    assert repr(name) in str(failed.error)
    assert "/" not in str(failed.error)  # no path of the server
    assert isinstance(done, Completed)
    with pytest.raises(InvalidLora, match=reason):  # remembered, before anything is queued
        engine.submit(params(((name, 1.0),)), lambda _: None)


def test_an_error_of_a_load_keeps_nothing_of_it(folder: Path, at_start: LoadedPipeline) -> None:
    """Frames of the load have the file's tensors and a copy of the networks."""
    source = new_source(config(lora_source=str(folder)))
    assert source is not None
    ends: SimpleQueue[object] = SimpleQueue()
    loading = LoraLoader(
        at_start.stock, source, False, EngineMetrics("loads"), lambda _, outcome: ends.put(outcome)
    )
    for name in ("broken", "wide", "foreign"):
        loading.load(source.find(name))
        error = ends.get(timeout=60)
        assert isinstance(error, InvalidLora)
        assert error.__traceback__ is error.__context__ is error.__cause__ is None
    loading.close()


@pytest.mark.parametrize("name", ["none", "../ink", "", "styles"])
def test_an_unknown_name_is_rejected_at_once(engine: Engine, name: str) -> None:
    with pytest.raises(LoraNotFound, match="GET /v1/loras"):
        engine.submit(params(((name, 1.0),)), lambda _: None)


def test_the_limit_of_a_request_holds(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="at most 2"):
        engine.submit(params(tuple((name, 1.0) for name in NAMES)), lambda _: None)


@pytest.fixture
def waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Event]]:
    """An engine whose loads wait for an event."""
    go = Event()

    def slow(*args: Any) -> Any:
        assert go.wait(60)
        return load_adapter(*args)

    monkeypatch.setattr(loader, "load_adapter", slow)
    with Engine.load(config(lora_source=str(folder)), engine_config()) as engine:
        try:
            yield engine, go
        finally:
            go.set()


def test_others_are_generated_while_an_adapter_is_loaded(waiting: tuple[Engine, Event]) -> None:
    engine, go = waiting
    events: list[EngineEvent] = []
    engine.submit(params((("ink", 1.0),)), events.append)
    assert engine.generate(params()).pixels.isfinite().all()
    assert [type(event) for event in events] == [Queued]
    go.set()
    wait_until(lambda: isinstance(events[-1], Completed), 60, what="the image")


def test_a_request_may_be_cancelled_while_its_adapter_is_loaded(
    waiting: tuple[Engine, Event],
) -> None:
    engine, go = waiting
    events: list[EngineEvent] = []
    engine.cancel(engine.submit(params((("ink", 1.0),)), events.append))
    wait_until(lambda: events and isinstance(events[-1], Failed), what="the end of the request")
    last = events[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, Cancelled)
    go.set()
    assert engine.generate(params((("ink", 1.0),))).pixels.isfinite().all()


def test_an_engine_that_closes_loads_what_its_requests_need(folder: Path) -> None:
    events: list[EngineEvent] = []
    with Engine.load(config(lora_source=str(folder)), engine_config(max_running=1)) as engine:
        engine.submit(params((("ink", 1.0),)), events.append)
    assert isinstance(events[-1], Completed)


def test_a_changed_file_is_read_when_it_is_loaded_again(
    folder: Path, tmp_path: Path, at_start: LoadedPipeline
) -> None:
    """Its prompts are encoded again, too: it changes the text encoder."""
    source = tmp_path / "source"
    source.mkdir()
    for name, other in (("style", "ink"), ("other", "oil")):
        (source / f"{name}.safetensors").write_bytes((folder / f"{other}.safetensors").read_bytes())
    options = engine_config(max_running=1, max_loaded_loras=1, limits={"max_loras": 1})
    with Engine.load(config(lora_source=str(source)), options) as engine:
        info = at_info(at_start, engine)
        for name in ("ink", "styles/pen"):
            content = (folder / f"{name}.safetensors").read_bytes()
            (source / "style.safetensors").write_bytes(content)
            image = engine.generate(params((("style", 0.5),))).pixels
            expected = at_start.generate(params(((name, 0.5),)).resolved(info))[0]
            assert largest_difference([expected], [image]) <= 5e-5
            engine.generate(params((("other", 0.5),)))  # it takes the only place


def test_adapters_of_the_start_stay(folder: Path, at_start: LoadedPipeline) -> None:
    """They and those on demand work together, in one request and in turns."""
    model = config(lora_source=str(folder), loras={"fixed": str(folder / "ink.safetensors")})
    options = engine_config(max_running=1, max_loaded_loras=2, limits={"max_loras": 2})
    with Engine.load(model, options) as engine:
        info = at_info(at_start, engine)
        for wanted, equal in (
            ((("fixed", 0.5), ("oil", 0.4)), (("ink", 0.5), ("oil", 0.4))),
            ((("styles/pen", 0.5),), (("styles/pen", 0.5),)),
            ((("fixed", 0.5),), (("ink", 0.5),)),
        ):
            expected = at_start.generate(params(equal).resolved(info))[0]
            assert largest_difference([expected], [engine.generate(params(wanted)).pixels]) <= 5e-5


def test_adapters_come_from_a_bucket(bucket: str, s3_server: S3Server, folder: Path) -> None:
    place = s3_server.buckets / bucket.removeprefix("s3://")
    place.mkdir(parents=True)
    (place / "ink.safetensors").write_bytes((folder / "ink.safetensors").read_bytes())
    with Engine.load(config(lora_source=bucket), engine_config(max_running=1)) as engine:
        plain = engine.generate(params()).pixels
        image = engine.generate(params((("ink", 0.5),))).pixels
        assert float((image - plain).abs().max()) > 1e-2
        assert engine.loras is not None
        assert [(one.name, one.loaded) for one in engine.loras.list()] == [("ink", True)]


def test_a_source_that_is_away_fails_no_other_request(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with Engine.load(config(lora_source=str(source)), engine_config(max_running=1)) as engine:
        source.rmdir()
        with pytest.raises(LoraSourceAway, match="try again later"):
            engine.submit(params((("ink", 0.5),)), lambda _: None)
        assert engine.generate(params()).pixels.isfinite().all()
