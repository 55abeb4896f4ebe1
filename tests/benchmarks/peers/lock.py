"""The simplest server: the stock pipeline behind FastAPI, one request at a time."""

import asyncio
import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel, Field

pipeline = DiffusionPipeline.from_pretrained(Path(__file__).parents[3] / "serve_app/demo/model")
pipeline.set_progress_bar_config(disable=True)

app = FastAPI()
one_thread = ThreadPoolExecutor(max_workers=1)  # first come, first served


class ImageRequest(BaseModel):
    prompt: str
    size: str = Field("64x64", pattern=r"^\d+x\d+$")
    num_inference_steps: int = Field(20, ge=1)
    seed: int = 0


@torch.inference_mode()
def generate(request: ImageRequest) -> bytes:
    width, height = map(int, request.size.split("x"))
    [image] = pipeline(
        request.prompt,
        width=width,
        height=height,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
    ).images
    image.save(file := io.BytesIO(), "png")
    return file.getvalue()


@app.post("/v1/images/generations")
async def create_image(request: ImageRequest) -> dict[str, object]:
    file = await asyncio.get_running_loop().run_in_executor(one_thread, generate, request)
    data = [{"b64_json": base64.b64encode(file).decode()}]
    return {"created": int(time.time()), "data": data}
