"""``diffusion-serve check``: mistakes in a Serve config file are found without Ray."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.gateway.auth import digest

ROOT = Path(__file__).parents[2]


def test_a_misspelt_key_is_named(tmp_path: Path) -> None:
    good = ROOT / "configs" / "demo.yaml"
    assert CliRunner().invoke(cli, ["check", str(good)]).exit_code == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("max_steps", "max_stepz"))
    result = CliRunner().invoke(cli, ["check", str(bad)])
    assert result.exit_code == 2
    assert "engine.limits.max_stepz: unknown key" in result.output


def test_the_file_of_keys_is_checked(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    text = (ROOT / "configs" / "demo.yaml").read_text()
    args = "    args:\n      gateway:\n        keys_path: /no/keys.yaml\n"
    config.write_text(text.replace("    args:\n", args))
    done = CliRunner().invoke(cli, ["check", str(config)])
    assert done.exit_code == 2
    assert "/no/keys.yaml cannot be read" in done.output
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"- {{name: app, sha256: {digest('a')}, models: [demo, other]}}\n"
        f"- {{name: all, sha256: {digest('b')}}}\n"
    )
    config.write_text(config.read_text().replace("/no/keys.yaml", str(keys)))
    done = CliRunner().invoke(cli, ["check", str(config)])
    assert done.exit_code == 0
    [warning] = done.stderr.splitlines()
    assert "the API key 'app' may use 'other', and there is no model with this id" in warning


def test_scaling_parameters_are_checked(tmp_path: Path) -> None:
    good = ROOT / "configs" / "sdxl.yaml"
    assert CliRunner().invoke(cli, ["check", str(good)]).exit_code == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("hold_s:", "hold:"))
    done = CliRunner().invoke(cli, ["check", str(bad)])
    assert done.exit_code == 2
    assert "policy_kwargs.hold: unknown key" in done.output


def test_delays_that_serve_adds_to_the_policy_are_rejected(tmp_path: Path) -> None:
    good, path = (ROOT / "configs" / "sdxl.yaml").read_text(), tmp_path / "serve.yaml"
    path.write_text(good.replace("          downscale_delay_s: 0\n", ""))
    done = CliRunner().invoke(cli, ["check", str(path)])
    assert done.exit_code == 2
    assert "autoscaling_config.downscale_delay_s is 600.0, Serve's default" in done.output
    path.write_text(good.replace("serve_app.autoscaling.ray_policy:WorkPolicy", "mine:Policy"))
    done = CliRunner().invoke(cli, ["check", str(path)])
    assert done.exit_code == 0
    assert "warning" in done.stderr
    assert "mine:Policy scales Generator; its parameters are not checked" in done.stderr


def test_blocking_needs_a_safety_checker(tmp_path: Path) -> None:
    """The bundled model has none, so that nothing would be blocked."""
    config = tmp_path / "serve.yaml"
    text = (ROOT / "configs" / "demo.yaml").read_text()
    args = "    args:\n      gateway:\n        safety: block\n"
    config.write_text(text.replace("    args:\n", args))
    done = CliRunner().invoke(cli, ["check", str(config)])
    assert done.exit_code == 2
    assert "the model 'demo' has no safety checker" in done.output
    config.write_text(config.read_text().replace("safety: block", "safety: flag"))
    assert CliRunner().invoke(cli, ["check", str(config)]).exit_code == 0


@pytest.fixture
def no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of buckets where no server is, and credentials for it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")


def test_a_store_of_images_that_takes_none_is_a_warning(tmp_path: Path, no_bucket: None) -> None:
    """The machines of the server may reach it."""
    text = (ROOT / "configs" / "demo.yaml").read_text()
    config = tmp_path / "serve.yaml"
    for url, problem in (
        (f"file://{tmp_path}/new/images", None),
        (f"file://{config}/images", f"{config} is no folder that this user may write to"),
        ("s3://bucket/prefix", "takes no images: Generic S3 error"),
    ):
        args = f"    args:\n      gateway:\n        storage: {{url: '{url}'}}\n"
        config.write_text(text.replace("    args:\n", args))
        done = CliRunner().invoke(cli, ["check", str(config)])
        assert done.exit_code == 0
        assert ("warning" in done.stderr) == (problem is not None)
        assert problem is None or problem in done.stderr
        assert "the-secret" not in done.output
    assert not (tmp_path / "new").exists()


def test_a_bucket_of_adapters_that_cannot_be_listed_is_a_warning(
    tmp_path: Path, no_bucket: None
) -> None:
    text = (ROOT / "configs" / "demo.yaml").read_text()
    config = tmp_path / "serve.yaml"
    for place, exit_code, message in (
        (tmp_path, 0, ""),
        ("s3://bucket/loras", 0, "warning: "),
        (tmp_path / "none", 2, "model.lora_source: the folder"),
        ("loras", 2, "model.lora_source is 'loras'"),
    ):
        config.write_text(text.replace("id: demo", f"id: demo\n        lora_source: '{place}'"))
        done = CliRunner().invoke(cli, ["check", str(config)])
        assert done.exit_code == exit_code, done.output
        assert message in done.stderr
        assert bool(message) == bool(done.stderr)
        assert "the-secret" not in done.output
