"""The simplest server with batches: up to 8 requests of one size and step count share a call.

A call starts when 8 wait, or 50 ms after the oldest arrived. The others keep their order.
"""

import base64
import io
import time
from asyncio import wrap_future
from concurrent.futures import Future
from pathlib import Path
from threading import Condition, Thread

import torch
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from PIL.Image import Image
from pydantic import BaseModel, Field

pipeline = DiffusionPipeline.from_pretrained(Path(__file__).parents[3] / "serve_app/demo/model")
pipeline.set_progress_bar_config(disable=True)


class ImageRequest(BaseModel):
    prompt: str
    size: str = Field("64x64", pattern=r"^\d+x\d+$")
    num_inference_steps: int = Field(20, ge=1)
    seed: int = 0


@torch.inference_mode()
def generate(requests: list[ImageRequest]) -> list[Image]:
    width, height = map(int, requests[0].size.split("x"))
    return pipeline(
        [request.prompt for request in requests],
        width=width,
        height=height,
        num_inference_steps=requests[0].num_inference_steps,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
    ).images


def next_batch() -> list[tuple[float, ImageRequest, Future[Image]]]:
    kinds = [(request.size, request.num_inference_steps) for _, request, _ in waiting]
    return [one for one, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]][:8]


def run() -> None:
    while True:
        with arrival:
            arrival.wait_for(lambda: waiting)
            left_s = waiting[0][0] + 0.05 - time.monotonic()
            arrival.wait_for(lambda: len(next_batch()) == 8, max(0, left_s))
            _, requests, futures = zip(*(batch := next_batch()), strict=True)
            waiting[:] = [one for one in waiting if one not in batch]
        try:
            for future, image in zip(futures, generate(list(requests)), strict=True):
                future.set_result(image)
        except Exception as error:  # noqa: BLE001
            for future in futures:
                future.set_exception(error)


waiting: list[tuple[float, ImageRequest, Future[Image]]] = []
arrival = Condition()
Thread(target=run, daemon=True).start()
app = FastAPI()


@app.post("/v1/images/generations")
async def create_image(request: ImageRequest) -> dict[str, object]:
    with arrival:
        waiting.append((time.monotonic(), request, future := Future[Image]()))
        arrival.notify()
    (await wrap_future(future)).save(file := io.BytesIO(), "png")
    data = [{"b64_json": base64.b64encode(file.getvalue()).decode()}]
    return {"created": int(time.time()), "data": data}
