"""Adapters in a folder, in a bucket and on the hub."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.config.loras import LoraConfig
from serve_app.engine.loras.source import LoraSource, new_source
from serve_app.errors import LoraNotFound, LoraSourceAway
from tests.s3 import S3Server

Fill = Callable[[str, bytes], None]
"""Writes the file of a name."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    return folder


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest) -> tuple[LoraSource, Path]:
    """A source of each kind that can be listed, and the folder behind it."""
    url = str(request.getfixturevalue(request.param))
    source = new_source(LoraConfig(lora_source=url))
    assert source is not None
    if request.param == "folder":
        return source, Path(url)
    server: S3Server = request.getfixturevalue("s3_server")
    return source, server.buckets / url.removeprefix("s3://")


def fill(folder: Path, *files: str, content: bytes = b"1234") -> None:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_file_is_found_and_fetched(place: tuple[LoraSource, Path]) -> None:
    source, folder = place
    names = ("ink", "styles/oil", "v1.2", "My Style (v2) +#1", "größe")
    fill(folder, *(f"{name}.safetensors" for name in names), "a%20b.safetensors")
    assert source.names() == sorted(names)
    for name in names:
        file = source.find(name)
        assert (file.name, file.size_bytes) == (name, 4)
        with source.fetched(file) as path:
            assert path.read_bytes() == b"1234"
            assert path.suffix == ".safetensors"


def test_names_are_paths_without_the_suffix(place: tuple[LoraSource, Path]) -> None:
    source, folder = place
    assert source.names() == []
    fill(
        folder,
        "styles/oil.safetensors",
        "ink.safetensors",
        "readme.md",
        "old.bin",
        "v1.2.safetensors",
    )
    assert source.names() == ["ink", "styles/oil", "v1.2"]


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "styles",
        "ink.safetensors",
        "../loras/ink",
        "styles/../ink",
        "./ink",
        "/ink",
        "ink/",
        "a//b",
        "",
        "ink\n",
        "i?k",
        "i%6Ek",
        "x" * 300,
        "\u732b" * 100,
        "ink/x",
        "folder",
    ],
)
def test_other_names_are_not_found(place: tuple[LoraSource, Path], name: str) -> None:
    source, folder = place
    fill(folder, "ink.safetensors", "styles/oil.safetensors", "folder.safetensors/ink")
    with pytest.raises(LoraNotFound):
        source.find(name)


def test_a_file_outside_of_the_folder_is_not_found(folder: Path, tmp_path: Path) -> None:
    fill(tmp_path, "secret.safetensors")
    source = new_source(LoraConfig(lora_source=str(folder)))
    assert source is not None
    for name in ("../secret", str(tmp_path / "secret"), "..%2fsecret", "..\\secret"):
        with pytest.raises(LoraNotFound):
            source.find(name)


def test_a_file_that_has_gone_is_not_found(place: tuple[LoraSource, Path]) -> None:
    source, folder = place
    fill(folder, "ink.safetensors")
    file = source.find("ink")
    (folder / "ink.safetensors").unlink()
    with pytest.raises(LoraNotFound), source.fetched(file):
        pass


def test_a_folder_that_has_gone_is_away(folder: Path) -> None:
    source = new_source(LoraConfig(lora_source=str(folder)))
    assert source is not None
    shutil.rmtree(folder)
    with pytest.raises(LoraSourceAway, match="has gone") as raised:
        source.find("ink")
    assert "/" not in str(raised.value)  # clients need no path of this machine


@pytest.mark.parametrize("what", ["find", "names"])
def test_wrong_credentials_are_no_missing_file(
    bucket: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    source = new_source(LoraConfig(lora_source=bucket))
    assert source is not None
    ask = {"find": lambda: source.find("ink"), "names": source.names}[what]
    with pytest.raises(LoraSourceAway, match="try again later"):
        ask()


def test_a_bucket_leaves_no_file_behind(
    bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fill(s3_server.buckets / bucket.removeprefix("s3://"), "ink.safetensors")
    source = new_source(LoraConfig(lora_source=bucket))
    assert source is not None
    with source.fetched(source.find("ink")) as path:
        assert tmp_path in path.parents
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoraSource:
    """The hub as it is without a network: with two repositories in its cache."""
    cache = tmp_path / "hub"
    for repository in ("artist/styles", "artist/other", "foreign/styles"):
        folder = cache / f"models--{repository.replace('/', '--')}"
        fill(folder / "snapshots" / "abc", "pytorch_lora_weights.safetensors", "v2/ink.safetensors")
        fill(folder / "refs", "main", content=b"abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = new_source(LoraConfig(lora_source=("artist/*", "foreign/one")))
    assert source is not None
    return source


@pytest.mark.parametrize("name", ["artist/styles", "artist/styles/v2/ink", "artist/other"])
def test_an_allowed_repository_is_used(hub: LoraSource, name: str) -> None:
    file = hub.find(name)
    assert file.size_bytes == 4
    with hub.fetched(file) as path:
        assert path.read_bytes() == b"1234"


@pytest.mark.parametrize(
    "name",
    [
        "foreign/styles",
        "artist",
        "artist/",
        "../artist/styles",
        "artist/../foreign/styles",
        "x/y",
        "artist/a b",
        "artist/a--b",
        "artist/.x",
    ],
)
def test_another_repository_is_not_found(hub: LoraSource, name: str) -> None:
    with pytest.raises(LoraNotFound):
        hub.find(name)


def test_a_hub_that_does_not_answer_is_away(hub: LoraSource) -> None:
    with pytest.raises(LoraSourceAway):
        hub.find("foreign/one")


def test_the_names_of_the_hub_are_those_that_are_allowed_by_name(hub: LoraSource) -> None:
    assert hub.names() == ["foreign/one"]
