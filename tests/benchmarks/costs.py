"""Derive step times of SDXL on an H100 for the planner, without a GPU: ``python -m
tests.benchmarks.costs --output configs/costs/sdxl-h100.json``.

The times are derived, not measured. torch counts the floating-point operations of SDXL's UNet and
decoder for each size, on the ``meta`` device, without weights or arithmetic. They are divided by
the speed of a published measurement: the stock pipeline, one image of 1024x1024 in 30 steps. So all
sizes are assumed to be as efficient as that one, and batches to gain nothing. With the GPU, an
engine with ``engine.warmup_sizes_px`` and ``engine.profile_path`` writes a measured file.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from tests.full_size import autoencoder, sdxl_unet

SIZES_PX = (512, 768, 1024, 1536)

PUBLISHED_S, PUBLISHED_STEPS, PUBLISHED_PX = 2.496, 30, 1024
SOURCE = (
    "Derived, not measured: operations of SDXL's UNet (with guidance) and VAE decoder, counted by "
    "torch, at the speed that makes 30 steps of 1024x1024 take 2.496 s, the figure for the stock "
    "pipeline on an H100 in the model card of stabilityai/stable-diffusion-xl-1.0-tensorrt. No "
    "gain from batches is assumed. Made by python -m tests.benchmarks.costs."
)


def operations(side_px: int) -> tuple[int, int]:
    """Count the operations of a UNet call for one image with guidance, and of its decoding."""
    with torch.device("meta"), torch.no_grad():
        unet, vae = sdxl_unet(), autoencoder(sample_size=1024)
        latents = torch.empty(2, 4, side_px // 8, side_px // 8)
        conditions = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        with FlopCounterMode(display=False) as of_step:
            unet(
                latents,
                torch.empty(2),
                encoder_hidden_states=torch.empty(2, 77, 2048),
                added_cond_kwargs=conditions,
            )
        with FlopCounterMode(display=False) as of_decoding:
            vae.decode(latents[:1])
    return of_step.get_total_flops(), of_decoding.get_total_flops()


def main(
    output: Annotated[Path | None, typer.Option(help="Write the table here, as JSON.")] = None,
) -> None:
    """Print the table."""
    counted = {side: operations(side) for side in SIZES_PX}
    step, decoding = counted[PUBLISHED_PX]
    per_s = (PUBLISHED_STEPS * step + decoding) / PUBLISHED_S
    sizes = []
    for side, (step, decoding) in counted.items():
        typer.echo(
            f"{side:>5} px: a step {step / 1e12:6.2f} TFLOP, {1e3 * step / per_s:6.1f} ms; "
            f"decoding {decoding / 1e12:6.2f} TFLOP, {1e3 * decoding / per_s:6.1f} ms"
        )
        sizes.append(
            {
                "size": [side, side],
                "cap": 1,
                "call_s": [[1.0, round(step / per_s, 5)]],
                "encode_s": 0.0,
                "decode_s": round(decoding / per_s, 5),
            }
        )
    if output is not None:
        output.write_text(json.dumps({"source": SOURCE, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
