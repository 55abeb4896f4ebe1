"""The trainer, for a few steps: every stage runs, and an interruption changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.config.models import ModelConfig
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ConfigError
from serve_app.protocol.params import GenerationParams
from tools.demo_model.recipe import Recipe
from tools.demo_model.train import Trainer

QUICK = Recipe(
    scene_share=0.0005,
    vae_steps=3,
    vae_batch=4,
    text_steps=3,
    text_batch=4,
    denoiser_steps=4,
    early_steps=2,
    denoiser_batch=2,
)
CPU = torch.device("cpu")


def _generate(folder: Path) -> torch.Tensor:
    pipeline = LoadedPipeline.load(ModelConfig(id="quick", path=str(folder), device="cpu"))
    params = GenerationParams("a red circle", 1, width=64, height=64, num_inference_steps=2)
    return pipeline.generate(params)


@pytest.mark.slow
def test_training_makes_a_stock_pipeline_and_continues_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(QUICK, tmp_path / "unbroken", CPU, checkpoint_every=2).run(tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    whole = _generate(tmp_path / "model")

    save = Trainer.save
    for stage in ("vae.pt", "text_encoder.pt", "denoiser.pt"):

        def save_and_stop(
            self: Trainer, name: str, state: dict[str, Any], stage: str = stage
        ) -> None:
            save(self, name, state)
            if name == stage and state["done"] == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            Trainer(QUICK, tmp_path / "broken", CPU, checkpoint_every=2).run(tmp_path / "again")
    monkeypatch.setattr(Trainer, "save", save)
    Trainer(QUICK, tmp_path / "broken", CPU, checkpoint_every=2).run(tmp_path / "again")
    assert torch.equal(_generate(tmp_path / "again"), whole)
    with pytest.raises(ConfigError, match="differs in seed"):
        Trainer(replace(QUICK, seed=1), tmp_path / "broken", CPU)
