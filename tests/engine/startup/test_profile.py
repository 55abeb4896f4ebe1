"""A profile applies only if nothing has changed, and a damaged one is reported."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine.engine import Engine
from serve_app.engine.startup.profile import FORMAT, Profile
from serve_app.errors import ConfigError
from tests.engine.startup.starts import NEW, TINY, config, reported_reuse, requests, tiny

pytestmark = pytest.mark.slow


def test_a_profile_of_an_older_version_is_replaced(
    profile: Path, log: pytest.LogCaptureFixture
) -> None:
    profile.write_text('{"subject": "a model", "sizes": [{"size": [32, 32], "cap": 4}]}')
    with Engine(tiny(), TINY, config(profile)):
        assert reported_reuse(log.messages) == NEW
    assert "changed: the version of this program" in log.text
    assert json.loads(profile.read_text())["format"] == FORMAT


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the results in a profile."""
    content = json.loads(path.read_text())
    change(content["found"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["arguments"]["branch"].pop(),  # one argument less
        lambda spec: spec["arguments"]["branch"].reverse(),
        lambda spec: spec.update(output={"branch": [[0, {"shared": "Tensor"}]]}),
    ],
)
def test_specs_that_do_not_fit_are_replaced(
    change: Callable[[dict[str, Any]], None], profile: Path, log: pytest.LogCaptureFixture
) -> None:
    edit(profile, lambda found: change(found["certificate"]["specs"]["unet"]))
    with Engine(tiny(), TINY, config(profile)) as engine:
        assert reported_reuse(log.messages) == NEW
        assert engine.info.sharing == "batched"
    assert f"{profile} does not fit and will be replaced" in log.text


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\x00",
        f'{{"format": {FORMAT}}}',
        f'{{"format": {FORMAT}, "found_with": [], "found": {{}}}}',
    ],
)
def test_a_damaged_profile_is_rejected(content: str, profile: Path) -> None:
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
        lambda found: found.pop("noise_schedulers"),
        lambda found: found["noise_schedulers"].update(fast={}),
        lambda found: found["noise_schedulers"].update(ddim={"sculpting": "no"}),
        lambda found: found["noise_schedulers"].update(ddim={"inpainting": 1}),
        lambda found: found["certificate"].update(tasks=["sculpting"]),
        lambda found: found["certificate"]["specs"].update(nothing={}),
        lambda found: found["certificate"]["specs"]["unet"].update(output={"shared": "os.system"}),
        lambda found: found["certificate"]["specs"]["unet"].update(output={"rows": 0}),
        lambda found: found.update(previews=[[1.0]]),
    ],
)
def test_damaged_results_are_found(change: Callable[[dict[str, Any]], None], profile: Path) -> None:
    edit(profile, change)
    with pytest.raises(ConfigError, match="delete it"):
        Engine(tiny(), TINY, config(profile))


def test_replicas_write_the_profile_at_the_same_time(tmp_path: Path) -> None:
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


def test_an_engine_serves_if_the_profile_cannot_be_written(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    small = config(tmp_path / "file" / "p", max_batch_size=1, warmup_sizes_px=())
    with Engine(tiny(), TINY, small) as engine:
        engine.generate(requests()[0])
    assert "the next start will certify and measure again" in log.text
    full = tmp_path / "folder"
    (full / "profile.json").mkdir(parents=True)  # a folder blocks the file
    Profile(full / "profile.json", {}).write({})
    assert [file.name for file in full.iterdir()] == ["profile.json"]
