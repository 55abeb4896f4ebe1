"""What a start finds out, what it takes over from an earlier one, and when it must not."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.config.models import EngineConfig, ModelConfig, SpeedConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model import fingerprint
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.startup.certification import Certificate, largest_difference
from serve_app.engine.startup.profile import Profile
from serve_app.engine.startup.warmup import _found_with
from serve_app.errors import ConfigError
from serve_app.metrics.registry import ENGINE
from serve_app.protocol.events import Completed, Preview
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.lora import ADAPTER_FILE, save_adapter
from tests.tiny_pipelines import FAMILIES

pytestmark = pytest.mark.slow

TINY = DEMO.model_copy(update={"default_size_px": (32, 32)})
SIZES = ((64, 32), (32, 64))
REUSED = "certification reused, and caps of 2 of 2 sizes"
ANEW = "certification and caps found anew"


def tiny(model: ModelConfig = TINY) -> LoadedPipeline:
    return LoadedPipeline(FAMILIES["stable-diffusion"](), model)


def config(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(
        scheduling="fifo",
        profile_path=str(path),
        **{"max_batch_size": 4, "warmup_sizes_px": SIZES} | changes,
    )


@contextmanager
def called(network: nn.Module) -> Iterator[list[torch.Size]]:
    """The shapes of its first layer's inputs. Not by a hook of its own, which is found out."""
    shapes: list[torch.Size] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is network.conv_in:
            shapes.append(args[0].shape)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, every_batch_pays: None) -> Path:
    """The file of a start of the tiny pipeline; not to be changed."""
    path = tmp_path_factory.mktemp("kept") / "profile.json"
    with Engine(tiny(), TINY, config(path)):
        pass
    return path


@pytest.fixture
def profile(kept: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copy(kept, tmp_path / "profile.json"))


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def reuse_of(engine: Engine) -> str:
    return engine._start.reuse


def requests() -> list[GenerationParams]:
    return [
        GenerationParams(f"a {color} circle", seed, width=32, height=32, num_inference_steps=4)
        for seed, color in enumerate(("red", "green", "blue"))
    ]


def test_a_start_measures_what_pays_and_the_next_one_knows(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "model.json"
    pipeline = tiny()
    with called(pipeline.denoisers["unet"]) as first, Engine(pipeline, TINY, config(path)) as one:
        assert reuse_of(one) == ANEW
        assert one._cost.caps.keys() == set(SIZES)
        assert all(1 <= cap <= 4 for cap in one._cost.caps.values())
    again = tiny()
    with called(again.denoisers["unet"]) as second, Engine(again, TINY, config(path)) as two:
        assert reuse_of(two) == REUSED
        assert two._cost.caps == one._cost.caps
        assert two._cost.call_s == one._cost.call_s
        assert two.info == one.info
    assert len(second) == 4 < len(first)  # one picture, three calls with its PNDM, and a pair
    assert list(path.parent.iterdir()) == [path]


def test_only_the_sizes_of_the_config_are_warmed_up() -> None:
    pipeline = tiny()
    small = EngineConfig(max_batch_size=2, warmup_sizes_px=((64, 32),))
    with called(pipeline.denoisers["unet"]) as shapes, Engine(pipeline, TINY, small):
        pass
    # Two pixels to a cell; the certification takes the model's own size.
    assert {tuple(shape[2:]) for shape in shapes} == {(16, 16), (16, 32)}


def test_what_was_taken_over_generates_the_same_in_the_same_batches(profile: Path) -> None:
    def generate(pipeline: LoadedPipeline, file: Path) -> tuple[Engine, list[Any]]:
        with Engine(pipeline, TINY, config(file)) as engine:
            streams = [engine.stream(request) for request in requests()]
            ends = [list(stream)[-1] for stream in streams]
        return engine, [end.result.pixels for end in ends if isinstance(end, Completed)]

    pipeline = tiny()
    alone = [pipeline.generate(request)[0] for request in requests()]
    new, newly = generate(pipeline, profile.with_name("none"))
    reused, again = generate(pipeline, profile)
    assert reuse_of(new) == ANEW
    assert reuse_of(reused) == REUSED
    assert reused._certificate.specs == new._certificate.specs
    assert reused.stats().mean_batch_size == new.stats().mean_batch_size > 1
    assert largest_difference(newly, again) <= 1e-5
    assert largest_difference(alone, again) <= 1e-5


def test_previews_are_taken_over(profile: Path) -> None:
    params = GenerationParams("a", 1, num_inference_steps=3, preview_steps=(2,))

    def preview(file: Path) -> Any:
        with Engine(tiny(), TINY, config(file)) as engine:
            [found] = [e for e in engine.stream(params) if isinstance(e, Preview)]
        return torch.as_tensor(found.pixels)

    assert torch.allclose(preview(profile), preview(profile.with_name("none")), atol=1e-5)


def test_another_process_takes_over(profile: Path) -> None:
    """The same digests there; and a folder of the same weights is loaded as well."""
    folder = profile.with_name("model")
    FAMILIES["stable-diffusion"]().save_pretrained(folder)
    program = (
        "import json, sys\n"
        "from serve_app.config.models import EngineConfig, ModelConfig\n"
        "from serve_app.engine.engine import Engine\n"
        "model = ModelConfig.model_validate_json(sys.argv[1])\n"
        "with Engine.load(model, EngineConfig.model_validate_json(sys.argv[2])) as engine:\n"
        "    print(engine._start.reuse)\n"
    )
    model = TINY.model_copy(update={"path": str(folder)})
    arguments = [model.model_dump_json(), config(profile.with_name("p")).model_dump_json()]
    said = [
        subprocess.run(
            [sys.executable, "-c", program, *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout.strip()
        for _ in range(2)
    ]
    assert said == [ANEW, REUSED]


# ---- what must not be taken over ---------------------------------------------------------------


def change_unet(pipeline: LoadedPipeline) -> None:
    with torch.no_grad():
        pipeline.denoisers["unet"].mid_block.resnets[0].conv1.weight[3, 2, 1, 0] += 1e-6


def change_vae(pipeline: LoadedPipeline) -> None:
    with torch.no_grad():
        pipeline._pipeline.vae.decoder.conv_out.bias[0] += 1e-6


def change_dtype(pipeline: LoadedPipeline) -> None:
    pipeline._pipeline.text_encoder.to(torch.bfloat16)


def change_noise_scheduler(pipeline: LoadedPipeline) -> None:
    pipeline._pipeline.scheduler.register_to_config(steps_offset=0)


def change_tokenizer(pipeline: LoadedPipeline) -> None:
    pipeline._pipeline.tokenizer.add_tokens(["whatever"])


def change_layer(pipeline: LoadedPipeline) -> None:
    pipeline.denoisers["unet"].conv_act = nn.GELU()


def change_by_hook(pipeline: LoadedPipeline) -> None:
    pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(lambda _, args: None)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_unet, "component unet"),
        (change_vae, "component vae"),
        (change_dtype, "component text_encoder"),
        (change_noise_scheduler, "component scheduler"),
        (change_tokenizer, "component tokenizer"),
        (change_layer, "component unet"),
        (change_by_hook, "component unet"),
    ],
)
def test_another_pipeline_is_certified_anew(
    change: Callable[[LoadedPipeline], None],
    name: str,
    profile: Path,
    lines: pytest.LogCaptureFixture,
) -> None:
    pipeline = tiny()
    assert Profile(profile, _found_with(pipeline, config(profile))).read() is not None
    change(pipeline)
    assert Profile(profile, _found_with(pipeline, config(profile))).read() is None
    assert lines.messages[-1].endswith(f"changed: {name}")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"call_kwargs": {"clip_skip": 1}}, "model.call_kwargs"),
        ({"speed": SpeedConfig(channels_last=True)}, "model.speed"),
        ({"dtype": "float32"}, "model.dtype"),
        ({"default_guidance_scale": 1.0}, "model.default_guidance_scale"),
        ({"revision": "main"}, "model.revision"),
    ],
)
def test_another_model_config_is_certified_anew(
    change: dict[str, Any], name: str, profile: Path, lines: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny(TINY.model_copy(update=change))
    assert Profile(profile, _found_with(pipeline, config(profile))).read() is None
    assert lines.messages[-1].endswith(f"changed: {name}")


@pytest.mark.parametrize("name", ["max_batch_size", "max_running"])
def test_another_sharing_is_certified_anew(
    name: str, profile: Path, lines: pytest.LogCaptureFixture
) -> None:
    other = config(profile, **{name: 1})
    assert Profile(profile, _found_with(tiny(), other)).read() is None
    assert lines.messages[-1].endswith(f"changed: engine.{name}")


def test_what_has_no_fingerprint_is_never_the_same(lines: pytest.LogCaptureFixture) -> None:
    class Odd:
        config = 7

    assert fingerprint.of_component(Odd()) != fingerprint.of_component(Odd())
    assert "Odd has no fingerprint" in lines.text


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 3, 3, 3), (0, 2)])
def test_every_number_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """With each kind of number, as the CPU adds them and as `torch.hash_tensor` does."""
    zeros = torch.zeros(shape).to(dtype)

    def digest(tensor: torch.Tensor) -> bytes:
        return b"".join(fingerprint._content(tensor))

    assert digest(zeros) == digest(zeros.clone())
    for index in range(zeros.numel()):
        other = torch.zeros(zeros.numel())
        other[index] = 1
        changed = other.to(dtype).reshape(shape)
        assert digest(changed) != digest(zeros)
    if zeros.ndim == 2 and zeros.numel() and not dtype.is_complex:
        rows = zeros.view(torch.int8)
        rows[0, 0] = 5
        assert torch.equal(
            fingerprint._sums(rows), torch.hash_tensor(rows, dim=1).view(torch.int64)
        )


def test_another_environment_is_certified_anew(
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: pytest.LogCaptureFixture,
) -> None:
    pipeline = tiny()

    def changed() -> str:
        assert Profile(profile, _found_with(pipeline, config(profile))).read() is None
        return lines.messages[-1].partition("changed: ")[2]

    with monkeypatch.context() as patch:
        patch.setenv("DIFFUSERS_ATTN_BACKEND", "native")
        assert changed() == "environment"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert changed() == "threads"
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert changed() == "processor"
    try:
        torch.set_float32_matmul_precision("high")
        assert changed() == "precision"
    finally:
        torch.set_float32_matmul_precision("highest")
    with monkeypatch.context() as patch:
        info = tmp_path / "diffusers-0.42.1.dist-info"  # the same version with other files
        info.mkdir()
        (info / "RECORD").write_text("diffusers/__init__.py,sha256=0,1\n")
        patch.syspath_prepend(tmp_path)
        assert changed() == "package diffusers"
        once = fingerprint.of_code()
        (info / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///"}')
        assert fingerprint.of_code()["package diffusers"] != once["package diffusers"]
        # Installed in place, it may change from one start to the next.
        assert fingerprint.of_code() != fingerprint.of_code()
    with monkeypatch.context() as patch:
        package = Path(fingerprint.__file__).parents[2]
        for folder in ("engine", "protocol"):
            shutil.copytree(package / folder, tmp_path / folder)
        with (tmp_path / "engine/batching/batch.py").open("a") as file:
            file.write("\n")
        patch.setattr(fingerprint, "__file__", str(tmp_path / "engine/model/fingerprint.py"))
        assert changed() == "diffusion-serve"
    assert Profile(profile, _found_with(pipeline, config(profile))).read() is not None


def test_other_adapters_are_certified_anew(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    """Another file under the same name, too."""

    def load() -> LoadedPipeline:
        return LoadedPipeline.load(DEMO.model_copy(update={"lora_folder": str(tmp_path)}))

    def read(pipeline: LoadedPipeline) -> dict[str, Any] | None:
        return Profile(path, _found_with(pipeline, config(path))).read()

    path = tmp_path / "profile.json"
    save_adapter(tmp_path, seed=1)
    Profile(path, _found_with(load(), config(path))).write({"certificate": 1})
    assert read(load()) == {"certificate": 1}
    save_adapter(tmp_path, seed=2)
    assert read(load()) is None
    assert lines.messages[-1].endswith("changed: component unet")
    (tmp_path / ADAPTER_FILE).rename(tmp_path / "other.safetensors")
    assert read(load()) is None
    assert lines.messages[-1].endswith("changed: component unet, adapters")


def test_a_start_with_other_weights_replaces_the_file(
    profile: Path, lines: pytest.LogCaptureFixture
) -> None:
    before = json.loads(profile.read_text())
    pipeline = tiny()
    change_unet(pipeline)
    with Engine(pipeline, TINY, config(profile)) as engine:
        assert reuse_of(engine) == ANEW
    assert f"{profile} is not used and will be replaced, changed: component unet" in lines.text
    after = json.loads(profile.read_text())
    changed = {
        name
        for name in before["found_with"]
        if before["found_with"][name] != after["found_with"][name]
    }
    assert changed == {"component unet"}
    with Engine(pipeline, TINY, config(profile)) as engine:
        assert reuse_of(engine) == REUSED


def test_a_file_of_an_older_version_is_replaced(
    profile: Path, lines: pytest.LogCaptureFixture
) -> None:
    profile.write_text('{"subject": "a model", "sizes": [{"size": [32, 32], "cap": 4}]}')
    with Engine(tiny(), TINY, config(profile)) as engine:
        assert reuse_of(engine) == ANEW
    assert "changed: the version of this program" in lines.text
    assert json.loads(profile.read_text())["format"] == 2


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content["found"])
    path.write_text(json.dumps(content))


def test_a_size_more_is_measured_and_the_rest_taken_over(profile: Path) -> None:
    larger = config(profile, warmup_sizes_px=(*SIZES, (64, 64)))
    with Engine(tiny(), TINY, larger) as engine:
        assert reuse_of(engine) == "certification reused, and caps of 2 of 3 sizes"
    with Engine(tiny(), TINY, larger) as engine:
        assert reuse_of(engine) == "certification reused, and caps of 3 of 3 sizes"


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["arguments"]["branch"].pop(),  # an argument less
        lambda spec: spec["arguments"]["branch"].reverse(),
        lambda spec: spec.update(output={"branch": [[0, {"shared": "Tensor"}]]}),
    ],
)
def test_specs_that_do_not_fit_are_found_out(
    change: Callable[[dict[str, Any]], None], profile: Path, lines: pytest.LogCaptureFixture
) -> None:
    edit(profile, lambda found: change(found["certificate"]["specs"]["unet"]))
    with Engine(tiny(), TINY, config(profile)) as engine:
        assert reuse_of(engine) == ANEW
        assert engine.info.sharing == "batched"
    assert f"{profile} does not fit and will be replaced" in lines.text


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "\x00", '{"format": 2}', '{"format": 2, "found_with": [], "found": {}}'],
)
def test_a_damaged_file_is_named(content: str, profile: Path) -> None:
    profile.write_text(content)
    with pytest.raises(ConfigError, match=r"profile\.json is not a profile.*delete it"):
        Engine(tiny(), TINY, config(profile))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("sizes"),
        lambda found: found["sizes"].append({"size": 3}),
        lambda found: found.update(certificate=[]),
        lambda found: found["certificate"].update(sharing="often"),
        lambda found: found["certificate"].update(entries=["painting"]),
        lambda found: found["certificate"]["specs"].update(nothing={}),
        lambda found: found["certificate"]["specs"]["unet"].update(output={"shared": "os.system"}),
        lambda found: found["certificate"]["specs"]["unet"].update(output={"rows": 0}),
        lambda found: found.update(previews=[[1.0]]),
    ],
)
def test_damage_inside_is_found(change: Callable[[dict[str, Any]], None], profile: Path) -> None:
    edit(profile, change)
    with pytest.raises(ConfigError, match="delete it"):
        Engine(tiny(), TINY, config(profile))


def test_what_only_lack_of_memory_decided_is_not_kept(
    tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    pipeline, path = tiny(), tmp_path / "profile.json"

    def two_rows_fit(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(two_rows_fit)
    with Engine(pipeline, TINY, config(path)) as engine:
        assert engine.info.sharing == "interleaved"
    assert not path.exists()
    assert "another start may find out more" in lines.text


def test_a_pipeline_that_takes_turns_is_taken_over_as_such(tmp_path: Path) -> None:
    certificate = Certificate("interleaved", {}, 0.25, "rows mix", ("text-to-image",))
    pipeline, path = tiny(), tmp_path / "profile.json"
    content = {"certificate": certificate.to_json(), "previews": None, "sizes": []}
    Profile(path, _found_with(pipeline, config(path))).write(content)
    with Engine(pipeline, TINY, config(path)) as engine:
        assert reuse_of(engine) == "certification reused, and caps of 0 of 2 sizes"
        assert engine._certificate == certificate
        assert engine.info.entries == ("text-to-image",)
        for request in requests():
            engine.generate(request)
        assert engine.stats().mean_batch_size == 1


def test_replicas_may_write_at_the_same_time(tmp_path: Path) -> None:
    path, found_with = tmp_path / "profile.json", {"weights": "1"}
    found = {str(n): list(range(2_000)) for n in range(4)}
    Profile(path, found_with).write({"0": found["0"]})

    def write(name: str) -> None:
        for _ in range(20):
            Profile(path, found_with).write({name: found[name]})

    writers = [threading.Thread(target=write, args=(name,)) for name in found]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read = Profile(path, found_with).read()
        assert read is not None
        [(name, value)] = read.items()
        assert value == found[name]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stops_nobody(
    tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    small = config(tmp_path / "file" / "p", max_batch_size=1, warmup_sizes_px=())
    with Engine(tiny(), TINY, small) as engine:
        engine.generate(requests()[0])
    assert "the next start finds out all anew" in lines.text
    full = tmp_path / "folder"
    (full / "profile.json").mkdir(parents=True)  # a folder is in its place
    Profile(full / "profile.json", {}).write({})
    assert [file.name for file in full.iterdir()] == ["profile.json"]


def test_a_size_to_measure_must_be_one_of_the_model(demo_pipeline: LoadedPipeline) -> None:
    with pytest.raises(ConfigError, match="warmup_sizes_px: 33x32"):
        Engine(demo_pipeline, DEMO, EngineConfig(warmup_sizes_px=((33, 32),)))


# ---- how long it took --------------------------------------------------------------------------


def test_a_start_says_how_long_it_took(lines: pytest.LogCaptureFixture) -> None:
    model = DEMO.model_copy(update={"id": "timed", "path": DEMO.source})
    with Engine.load(model, EngineConfig(max_batch_size=1)) as engine:
        pass
    seconds = {
        phase: ENGINE.get_sample_value(
            "diffusion_serve_cold_start_seconds", {"model": "timed", "phase": phase}
        )
        for phase in ("load", "certify", "preview", "measure", "compile")
    }
    assert seconds.pop("compile") == 0
    assert all(value is not None and value > 0 for value in seconds.values())
    assert sum(value for value in seconds.values() if value) == pytest.approx(engine.cold_start_s)
    [line] = [line for line in lines.messages if "ready after" in line]
    assert line.startswith(f"model timed: ready after {engine.cold_start_s:.2f} s: load ")
    assert line.endswith("; nothing reused, for want of engine.profile_path")
