"""Trains the demo model from scratch: ``python -m tools.demo_model.train``.

Four stages, each with checkpoints in the work folder, so that an interrupted run continues:

1. an autoencoder (Rombach et al., 2022) on crops of rendered scenes,
2. the latents of a fixed set of scenes,
3. a text encoder, by questions about captions: a small stand-in for the text-image contrast
   that CLIP (Radford et al., 2021) learns from,
4. a denoiser on those latents, with the text encoder frozen, which predicts the velocity (Salimans
   & Ho, 2022) under a noise schedule that ends in pure noise (Lin et al., 2024), with one caption
   in ten left out for classifier-free guidance (Ho & Salimans, 2022).

The result is an ordinary `StableDiffusionPipeline` folder.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.demo.tokenizer import build_tokenizer
from serve_app.errors import ConfigError
from tools.demo_model.architecture import (
    build_denoiser,
    build_noise_scheduler,
    build_text_encoder,
    build_vae,
)
from tools.demo_model.questions import QUESTIONS, answer_questions
from tools.demo_model.recipe import BUCKETS, Recipe
from tools.demo_model.scenes import Scene, caption, render, sample_scene, vocabulary


def _pixels(scenes: list[Scene], width: int, height: int) -> Tensor:
    """Render to ``[len(scenes), 3, height, width]`` in [-1, 1]."""
    stacked = np.stack([render(scene, width, height) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokenize as the stock pipeline does: ``[len(captions), MAX_TOKENS]``."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: a short warm-up, a plateau, a linear fall over the last third."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (steps / 3))


class Trainer:
    """The stages of the training, with the device, the work folder and its checkpoints.

    Raises:
        ConfigError: if the work folder has checkpoints of another recipe.
    """

    def __init__(
        self, recipe: Recipe, work_dir: Path, device: torch.device, checkpoint_every: int = 250
    ) -> None:
        self.recipe = recipe
        self.checkpoint_every = checkpoint_every
        self.work_dir = work_dir
        self.device = device
        work_dir.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        """Record the recipe in the work folder. Raises `ConfigError` if it has another one."""
        path = self.work_dir / "recipe.json"
        mine = asdict(self.recipe)
        if not path.exists():
            path.write_text(json.dumps(mine, indent=2))
            return
        theirs = json.loads(path.read_text())
        if other := [name for name in mine if theirs.get(name) != mine[name]]:
            raise ConfigError(
                f"{self.work_dir} has checkpoints of another recipe, which differs in "
                f"{', '.join(other)}. Give another --work-dir, or delete this one."
            )

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def save(self, name: str, state: dict[str, Any]) -> None:
        partial = self.work_dir / f"{name}.partial"
        torch.save(state, partial)
        partial.replace(self.work_dir / name)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.work_dir / name
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        return state

    def _steps(
        self,
        title: str,
        checkpoint: str,
        modules: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        steps: int,
        peak: float,
    ) -> Iterator[tuple[int, "tqdm[int]"]]:
        """Yield each remaining step; restore before the first, save checkpoints in between."""
        done = 0
        if state := self._load(checkpoint):
            done = state["done"]
            optimizer.load_state_dict(state["optimizer"])
            for name, module in modules.items():
                module.load_state_dict(state[name])
        bar = tqdm(range(done, steps), initial=done, total=steps, desc=title, mininterval=5)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps, peak)
            # Seeded by the step, so that an interrupted run draws the same numbers.
            torch.manual_seed(self.recipe.seed * 1_000_003 + step)
            yield step, bar
            if (step + 1) % self.checkpoint_every == 0 or step + 1 == steps:
                states = {name: module.state_dict() for name, module in modules.items()}
                self.save(
                    checkpoint, {"done": step + 1, "optimizer": optimizer.state_dict(), **states}
                )

    def train_vae(self) -> AutoencoderKL:
        """Train the autoencoder."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        vae = build_vae().to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.01, fused=True)
        for step, bar in self._steps(
            "autoencoder",
            "vae.pt",
            {"vae": vae},
            optimizer,
            recipe.vae_steps,
            recipe.vae_learning_rate,
        ):
            rng = Random(f"vae {recipe.seed} {step}")
            images = self._crops(rng).to(self.device, memory_format=torch.channels_last)
            with self._autocast():
                posterior = vae.encode(images).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            difference = decoded.float() - images
            loss = difference.abs().mean() + difference.square().mean()
            loss = loss + 1e-5 * posterior.kl().mean() / images[0, 0].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(l1=f"{difference.abs().mean().item():.4f}")
        return vae.eval().requires_grad_(False)

    def _crops(self, rng: Random) -> Tensor:
        """Draw a batch for the autoencoder: mostly cheap 32-pixel crops, some whole images."""
        whole = rng.random() < 0.15
        count = self.recipe.vae_batch // 4 if whole else self.recipe.vae_batch
        crops = []
        for _ in range(count):
            side = 64 if whole else rng.choice([32, 48, 64, 64, 96])
            width = 64 if whole else 32
            image = _pixels([sample_scene(rng)], side, side)
            top, left = rng.randint(0, side - width), rng.randint(0, side - width)
            crops.append(image[:, :, top : top + width, left : left + width])
        return torch.cat(crops)

    @torch.no_grad()
    def encode_scenes(self, vae: AutoencoderKL) -> tuple[list[list[Scene]], list[Tensor], float]:
        """Return scenes and latents per bucket, and the factor for latents of unit variance."""
        rng = Random(f"scenes {self.recipe.seed}")
        scenes = [
            [sample_scene(rng) for _ in range(math.ceil(bucket.scenes * self.recipe.scene_share))]
            for bucket in BUCKETS
        ]
        state = self._load("latents.pt")
        if state is None:
            latents = []
            for bucket, drawn in zip(tqdm(BUCKETS, desc="latents"), scenes, strict=True):
                chunks = []
                for start in range(0, len(drawn), 64):
                    images = _pixels(drawn[start : start + 64], bucket.width, bucket.height).to(
                        self.device, memory_format=torch.channels_last
                    )
                    with self._autocast():
                        mode = vae.encode(images).latent_dist.mode()
                    chunks.append(mode.float().contiguous())
                latents.append(torch.cat(chunks))
            state = {"latents": latents}
            self.save("latents.pt", state)
        latents = state["latents"]
        scaling_factor = 1.0 / latents[0].std().item()
        return scenes, [bucket * scaling_factor for bucket in latents], scaling_factor

    def train_text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        """Train the text encoder to answer `QUESTIONS` from the mean over a caption's tokens.

        An untrained cross-attention passes on this mean, so that the denoiser finds the whole
        scene in it from its first step.
        """
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        text_encoder = build_text_encoder(tokenizer).to(self.device)
        heads = torch.nn.ModuleList(
            torch.nn.Linear(text_encoder.config.hidden_size, len(answers))
            for answers in QUESTIONS.values()
        ).to(self.device)
        modules: dict[str, torch.nn.Module] = {"text_encoder": text_encoder, "heads": heads}
        optimizer = torch.optim.AdamW(
            [*text_encoder.parameters(), *heads.parameters()], weight_decay=0.01, fused=True
        )
        for step, bar in self._steps(
            "text encoder",
            "text_encoder.pt",
            modules,
            optimizer,
            recipe.text_steps,
            recipe.text_learning_rate,
        ):
            rng = Random(f"text {recipe.seed} {step}")
            drawn = [sample_scene(rng) for _ in range(recipe.text_batch)]
            captions = [
                "" if rng.random() < recipe.caption_dropout else caption(scene, rng)
                for scene in drawn
            ]
            right = [
                answer_questions(scene, text) for scene, text in zip(drawn, captions, strict=True)
            ]
            states = text_encoder(_tokens(tokenizer, captions).to(self.device))[0]
            summary = states.mean(dim=1)  # [batch, hidden]
            losses = []
            for head, (question, answers) in zip(heads, QUESTIONS.items(), strict=True):
                labels = torch.tensor([answers.index(answer[question]) for answer in right])
                losses.append(functional.cross_entropy(head(summary), labels.to(self.device)))
            loss = torch.stack(losses).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
        return text_encoder.eval().requires_grad_(False)

    def train_denoiser(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        scenes: list[list[Scene]],
        latents: list[Tensor],
    ) -> UNet2DConditionModel:
        """Train the denoiser on the latents; return its moving average."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        model = build_denoiser().to(self.device, memory_format=torch.channels_last)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema_decay)
        )
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
        noise_scheduler = build_noise_scheduler()
        early = [bucket.early_share for bucket in BUCKETS]
        late = [bucket.late_share for bucket in BUCKETS]
        running = 0.0
        for step, bar in self._steps(
            "denoiser",
            "denoiser.pt",
            {"model": model, "average": average},
            optimizer,
            recipe.denoiser_steps,
            recipe.denoiser_learning_rate,
        ):
            rng = Random(f"denoiser {recipe.seed} {step}")
            shares = early if step < recipe.early_steps else late
            bucket = rng.choices(range(len(BUCKETS)), shares)[0]
            picks = [rng.randrange(len(scenes[bucket])) for _ in range(recipe.denoiser_batch)]
            captions = [
                "" if rng.random() < recipe.caption_dropout else caption(scenes[bucket][pick], rng)
                for pick in picks
            ]
            with torch.no_grad():
                prompt_embeds = text_encoder(_tokens(tokenizer, captions).to(self.device))[0]
            clean = latents[bucket][picks].contiguous(memory_format=torch.channels_last)
            noise = torch.randn_like(clean)
            # Stratified over the batch, so that every step sees all noise levels, but the middle
            # ones, where shapes are decided, more often.
            even = (torch.arange(len(picks)) + torch.rand(len(picks))) / len(picks)
            spread = even + 0.6 * torch.sin(2 * torch.pi * even) / (2 * torch.pi)
            timesteps = (spread * 1000).long().to(self.device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            velocity = noise_scheduler.get_velocity(clean, noise, timesteps)
            with self._autocast():
                predicted = model(noisy, timesteps, prompt_embeds).sample
            loss = functional.mse_loss(predicted.float(), velocity)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            if step % 20 == 0:
                running = loss.item() if running == 0.0 else 0.9 * running + 0.1 * loss.item()
                bar.set_postfix(loss=f"{running:.4f}")
        final: UNet2DConditionModel = average.module
        return final.eval().requires_grad_(False)

    def run(self, output: Path) -> None:
        """Run all stages, and write the pipeline folder to ``output``."""
        tokenizer = build_tokenizer(vocabulary())
        vae = self.train_vae()
        scenes, latents, scaling_factor = self.encode_scenes(vae)
        text_encoder = self.train_text_encoder(tokenizer)
        denoiser = self.train_denoiser(tokenizer, text_encoder, scenes, latents)
        vae.register_to_config(scaling_factor=round(scaling_factor, 5))
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=denoiser,
            scheduler=build_noise_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
        # Half precision halves the two larger networks, and diffusers widens it on loading.
        # transformers loads in the precision of the file, so the small text encoder stays whole.
        vae.half()
        denoiser.half()
        pipeline.save_pretrained(output, safe_serialization=True)


def main(
    output: Annotated[Path, typer.Option(help="The pipeline folder to write.")] = DEMO_MODEL_DIR,
    work_dir: Annotated[
        Path, typer.Option(help="Checkpoints; an interrupted run continues from here.")
    ] = Path("demo-training"),
    seed: int = Recipe.seed,
    vae_steps: int = Recipe.vae_steps,
    text_steps: int = Recipe.text_steps,
    denoiser_steps: int = Recipe.denoiser_steps,
) -> None:
    """Train the demo model, on a GPU if there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(
        seed=seed, vae_steps=vae_steps, text_steps=text_steps, denoiser_steps=denoiser_steps
    )
    try:
        trainer = Trainer(recipe, work_dir, device)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    trainer.run(output)
    typer.echo(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
