"""Without a setting, each combination of weights, code and device has a profile of its own."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from huggingface_hub import constants

from serve_app.config.models import EngineConfig
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup import profile_folder as profiles
from serve_app.engine.startup import warmup
from serve_app.engine.startup.profile_folder import profile_folder, profile_name
from tests.engine.startup.starts import NEW, start, tiny

SMALL = EngineConfig(scheduling="fifo", max_batch_size=2)
REUSED = "certification reused, and caps of 0 of 0 sizes"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of profiles, which does not exist yet."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(warmup, "profile_folder", profile_folder)
    return tmp_path / "cache" / "diffusion-serve"


@pytest.mark.slow
def test_the_next_start_with_the_same_settings_reuses_the_first(folder: Path) -> None:
    assert start(tiny(), SMALL).reuse == NEW
    assert folder.stat().st_mode & 0o777 == 0o700
    assert start(tiny(), SMALL).reuse == REUSED
    [first] = folder.iterdir()
    other = SMALL.model_copy(update={"max_batch_size": 1})
    assert start(tiny(), other).reuse == NEW
    assert len(list(folder.iterdir())) == 2
    assert start(tiny(), SMALL).reuse == REUSED, "another setting replaced the profile"
    first.write_text("{")  # nobody chose this file, so nobody must repair it
    assert start(tiny(), SMALL).reuse == NEW
    assert start(tiny(), SMALL).reuse == REUSED


@pytest.mark.slow
def test_a_profile_can_be_switched_off(folder: Path) -> None:
    off = SMALL.model_copy(update={"profile_path": "none"})
    assert start(tiny(), off).reuse == "nothing reused and nothing stored"
    assert not folder.exists()


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o770])
def test_a_folder_that_others_may_write_is_not_used(
    mode: int, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    if os.getuid() == 0:  # the files of root belong to its group, which is trusted
        os.chown(folder, 0, 1000)
    folder.chmod(mode)
    assert profile_folder() is None
    assert "can be written by others: make it with mode 0700" in log.text


def test_the_group_of_root_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes gives volumes to the group of a pod, which is root's in cluster/."""
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    found = folder.lstat()
    owned = SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid, st_gid=0)
    monkeypatch.setattr(Path, "lstat", lambda _: owned)
    assert profile_folder() == folder


def test_a_folder_of_someone_else_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    found = folder.lstat()
    strange = SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid + 1, st_gid=0)
    monkeypatch.setattr(Path, "lstat", lambda _: strange)
    assert profile_folder() is None
    assert "is not a folder of this user" in log.text


def test_a_link_to_another_folder_is_not_followed(
    folder: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir()
    folder.symlink_to(tmp_path, target_is_directory=True)
    assert profile_folder() is None
    assert "is not a folder of this user" in log.text


def test_a_cache_that_cannot_be_written_is_only_logged(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("")  # no folder can be made in a file
    assert profile_folder() is None
    [record] = log.records
    assert record.levelname == "INFO"
    assert "this start is not stored for the next one" in record.message


def test_only_the_newest_profiles_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MOST_PROFILES", 2)
    folder.mkdir(parents=True)
    for age, name in enumerate("abcd"):
        file = folder / f"{name}.json"
        file.touch()
        os.utime(file, (1_000 - age, 1_000 - age))
    profiles.remove_old_profiles(folder)
    assert sorted(file.stem for file in folder.iterdir()) == ["a", "b"]


def test_the_name_depends_on_every_part_of_the_fingerprint() -> None:
    one = profile_name({"device": "one", "weights": "1"})
    assert one == profile_name({"weights": "1", "device": "one"})
    assert one != profile_name({"device": "one", "weights": "2"})


@pytest.mark.parametrize(
    ("device", "changes", "sizes"),
    [
        ("cuda", {}, ((64, 32),)),
        ("cpu", {}, ()),
        ("cuda", {"warmup_sizes_px": ()}, ()),
        ("cuda", {"max_running": 1}, ()),  # one after another needs no cap
        ("cpu", {"warmup_sizes_px": ((32, 32),)}, ((32, 32),)),
    ],
)
def test_the_models_own_size_is_measured_on_a_gpu(
    device: str, changes: dict[str, Any], sizes: tuple[tuple[int, int], ...]
) -> None:
    pipeline = SimpleNamespace(
        device=torch.device(device), default_size_px=(64, 32), size_multiple=2
    )
    config = EngineConfig(**changes)
    assert warmup.sizes_to_measure(cast(LoadedPipeline, pipeline), config) == sizes
