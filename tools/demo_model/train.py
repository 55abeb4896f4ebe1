"""Train the demo model from nothing: ``python -m tools.demo_model.train``.

Four stages, each kept in the work folder so that an interrupted run goes on where it was:

1. an autoencoder (Rombach et al., 2022) on crops of rendered scenes,
2. the latents of a fixed set of scenes,
3. a text encoder, by naming what a caption says: a small stand-in for the text-image contrast
   that CLIP (Radford et al., 2021) learns from,
4. a denoiser on those latents, with the text encoder frozen, which predicts the velocity (Salimans
   & Ho, 2022) under a noise schedule that ends in pure noise (Lin et al., 2024), with one caption
   in ten left out for classifier-free guidance (Ho & Salimans, 2022).

The result is an ordinary `StableDiffusionPipeline` folder.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from serve_app.config.models import DEMO_MODEL_DIR
from serve_app.demo.tokenizer import MAX_TOKENS, build_tokenizer
from serve_app.errors import ConfigError
from tools.demo_model.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    render,
    sample_scene,
    vocabulary,
)

LATENT_FACTOR = 4
"""Pixels a latent cell spans in each direction."""


@dataclass(frozen=True)
class Bucket:
    """Scenes of one size, and its share of the denoiser's steps."""

    width: int
    height: int
    scenes: int
    early_share: float
    """In the first part of the run: small pictures teach the words three times as fast."""
    late_share: float


BUCKETS = [
    Bucket(64, 64, 20_000, early_share=0.20, late_share=0.54),
    Bucket(48, 48, 4_000, early_share=0.35, late_share=0.25),
    Bucket(32, 32, 4_000, early_share=0.35, late_share=0.04),
    Bucket(40, 56, 1_500, early_share=0.05, late_share=0.025),
    Bucket(56, 40, 1_500, early_share=0.05, late_share=0.025),
    Bucket(64, 48, 1_500, early_share=0.0, late_share=0.025),
    Bucket(48, 64, 1_500, early_share=0.0, late_share=0.025),
    Bucket(96, 64, 1_000, early_share=0.0, late_share=0.01),
    Bucket(64, 96, 1_000, early_share=0.0, late_share=0.01),
    Bucket(80, 80, 1_000, early_share=0.0, late_share=0.03),
    Bucket(96, 96, 1_000, early_share=0.0, late_share=0.01),
    Bucket(128, 128, 600, early_share=0.0, late_share=0.01),
]


@dataclass(frozen=True)
class Recipe:
    """What fixes the result, apart from the hardware's rounding."""

    seed: int = 0
    scene_share: float = 1.0
    """Of the scenes that each bucket asks for; less for a quick look."""
    vae_steps: int = 3_000
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    text_steps: int = 600
    text_batch: int = 128
    text_learning_rate: float = 1e-3
    denoiser_steps: int = 12_000
    early_steps: int = 1_800
    denoiser_batch: int = 48
    denoiser_learning_rate: float = 8e-4
    caption_dropout: float = 0.1
    ema_decay: float = 0.998


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_denoiser() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64 // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 4),  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def build_noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def _pixels(scenes: list[Scene], width: int, height: int) -> Tensor:
    """Render to ``[len(scenes), 3, height, width]`` in [-1, 1]."""
    stacked = np.stack([render(scene, width, height) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0


QUESTIONS: dict[str, list[str | None]] = {
    "background": [None, *COLORS],
    "first shape": [None, *SHAPES],
    "first color": [None, *COLORS],
    "second shape": [None, *SHAPES],
    "second color": [None, *COLORS],
    "size": [None, *SIZES],
    "position": [None, *POSITIONS],
    "relation": [None, "left of", "above"],
}
"""What can be asked about a caption, and the answers; ``None`` where the caption leaves it open."""


def _said(scene: Scene, text: str) -> dict[str, str | None]:
    """The answers to `QUESTIONS` for a caption of the scene, which may be empty."""
    if not text:
        return dict.fromkeys(QUESTIONS)
    first, second = scene.objects[0], scene.objects[1] if len(scene.objects) > 1 else None
    return {
        "background": scene.background
        if scene.background in text.replace(",", " ").split()
        else None,
        "first shape": first.shape,
        "first color": first.color,
        "second shape": second.shape if second else None,
        "second color": second.color if second else None,
        "size": scene.size,
        "position": scene.position,
        "relation": scene.relation,
    }


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """``[len(captions), MAX_TOKENS]``, as the stock pipeline makes them."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Short warm-up, long plateau, linear fall over the last third."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (steps / 3))


class Trainer:
    """Runs the stages; owns the device, the work folder and the checkpoints in it.

    Raises:
        ConfigError: if the work folder holds checkpoints of another recipe.
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
        """Checkpoints of one recipe are no use to another."""
        path = self.work_dir / "recipe.json"
        mine = asdict(self.recipe)
        if not path.exists():
            path.write_text(json.dumps(mine, indent=2))
            return
        theirs = json.loads(path.read_text())
        if other := [name for name in mine if theirs.get(name) != mine[name]]:
            raise ConfigError(
                f"{self.work_dir} holds checkpoints of another recipe, which differs in "
                f"{', '.join(other)}. Give another --work-dir, or delete this one."
            )

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _save(self, name: str, state: dict[str, Any]) -> None:
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
        """Yield each step still to be run; restore before the first, checkpoint now and then."""
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
            # Seeded by the step, so that an interrupted run draws what an unbroken one would.
            torch.manual_seed(self.recipe.seed * 1_000_003 + step)
            yield step, bar
            if (step + 1) % self.checkpoint_every == 0 or step + 1 == steps:
                states = {name: module.state_dict() for name, module in modules.items()}
                self._save(
                    checkpoint, {"done": step + 1, "optimizer": optimizer.state_dict(), **states}
                )

    def train_vae(self) -> AutoencoderKL:
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
        """A batch for the autoencoder: mostly 32-pixel crops, which are cheap; some pictures."""
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
        """Scenes and latents per bucket, and the factor that gives the latents unit variance."""
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
            self._save("latents.pt", state)
        latents = state["latents"]
        scaling_factor = 1.0 / latents[0].std().item()
        return scenes, [bucket * scaling_factor for bucket in latents], scaling_factor

    def train_text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        """Teach it to say, from the mean over a caption's tokens, what the caption asks for.

        The mean is what an untrained cross-attention passes on, so the denoiser finds the whole
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
            said = [_said(scene, text) for scene, text in zip(drawn, captions, strict=True)]
            states = text_encoder(_tokens(tokenizer, captions).to(self.device))[0]
            summary = states.mean(dim=1)  # [batch, hidden]
            losses = []
            for head, (question, answers) in zip(heads, QUESTIONS.items(), strict=True):
                right = torch.tensor([answers.index(answer[question]) for answer in said])
                losses.append(functional.cross_entropy(head(summary), right.to(self.device)))
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
        """All stages; writes the pipeline folder to ``output``."""
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
    output: Annotated[Path, typer.Option(help="Where the pipeline folder goes.")] = DEMO_MODEL_DIR,
    work_dir: Annotated[
        Path, typer.Option(help="Checkpoints; an interrupted run goes on from here.")
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
