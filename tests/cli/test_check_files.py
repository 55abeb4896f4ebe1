"""`check` of a model's files by the command: single files and LoRA adapters."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from serve_app.cli import cli
from tests.test_model_files import POINTER

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def check_by_command(folder: Path, model: dict[str, object]) -> str:
    file = folder / "serve.yaml"
    content = yaml.safe_load(CONFIG.read_text())
    content["applications"][0]["args"]["model"] = model
    file.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(cli, ["check", str(file)])
    assert result.exit_code == (0 if result.output.endswith(": ok\n") else 2)
    return result.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.safetensors", "is damaged (its header has no end)"),
        ("m.ckpt", "is a pickle"),
        ("m.gguf", "holds a transformer only"),
    ],
)
def test_a_single_file_is_checked_by_command(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x" * 100)
    model: dict[str, object] = {"id": "m", "path": str(tmp_path / name)}
    assert words in check_by_command(tmp_path, model)
    # A path without a dot in front might be a repository.
    for model in ({"id": "m", "path": f"models/{name}"}, {"id": f"models/{name}"}):
        output = check_by_command(tmp_path, model)
        assert "as a path that starts with '/'" in output or words in output


def test_adapters_are_checked(tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    good, bad = adapters / "good.safetensors", adapters / "bad.safetensors"
    save_file({"a": torch.ones(2)}, good)
    demo: dict[str, object] = {"id": "demo"}
    assert "ok" in check_by_command(tmp_path, demo | {"lora_folder": str(adapters)})
    sources = {
        "missing.safetensors": "does not exist",
        "ink.bin": "only .safetensors files are loaded",
    }
    for name, words in sources.items():
        loras = {"ink": str(adapters / name)}
        assert words in check_by_command(tmp_path, demo | {"loras": loras})
    for content, words in ((POINTER, "Git LFS pointer"), ("", "it is empty")):
        bad.write_text(content)
        for source in ({"loras": {"ink": str(bad)}}, {"lora_folder": str(adapters)}):
            output = check_by_command(tmp_path, demo | source)
            assert str(bad) in output
            assert words in output
    bad.unlink()
    bad.symlink_to("/no/such/blob")
    assert "cannot be read" in check_by_command(tmp_path, demo | {"lora_folder": str(adapters)})
