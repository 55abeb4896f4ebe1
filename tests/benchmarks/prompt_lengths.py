"""Count batches with prompts of several lengths: ``python -m tests.benchmarks.prompt_lengths``.

Requests with prompts of equal and of mixed lengths run on tiny models of families that pass
embeddings as long as the prompt. "Apart" is the engine without padding: only prompts of the same
length share calls. Counts and arithmetic only, so the machine does not matter.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import torch
import typer

from serve_app.config.models import ModelConfig
from serve_app.engine.batching.axis import Axis, Branch, Mask, Rows, Shared
from serve_app.engine.batching.padding import SHORTEST_BUCKET
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference
from tests.benchmarks.engine import hardware
from tests.conftest import FIFO
from tests.engine.engines import together
from tests.engine.test_prompt_lengths import JOINED, PROMPTS, requests_for

LONGEST = 1024
"""Tokens of the longest prompts: those that Qwen-Image reads."""

SIZES_PX = (512, 1024)
PX_PER_TOKEN = 16
"""Side of an image token of Qwen-Image, Z-Image and FLUX.1."""


def apart(axis: Axis) -> Axis:
    """Return the axis as it is before the prompts' dimensions are learned."""
    match axis:
        case Rows():
            return replace(axis, prompt_dim=None)
        case Mask():
            return Shared(NoneType)
        case Branch(children):
            return Branch(tuple((key, apart(child)) for key, child in children))
        case _:
            return axis


def batches(name: str) -> dict[str, Any]:
    """Return the mean batches of one family, and how far images are from those alone."""
    build, call_kwargs = JOINED[name]
    model = ModelConfig(id=name, device="cpu", default_size_px=(64, 32), call_kwargs=call_kwargs)
    pipeline = LoadedPipeline(build(), model)
    mixed = requests_for(PROMPTS, 4.0)
    alone = [pipeline.generate(params)[0] for params in mixed]
    with Engine(pipeline, model, FIFO) as engine:
        _, equal = together(engine, requests_for(PROMPTS[:1] * len(PROMPTS), 4.0))
        images, after = together(engine, mixed)
        executor = engine._executor
        executor.specs = {
            site: replace(spec, arguments=apart(spec.arguments))
            for site, spec in executor.specs.items()
        }
        _, before = together(engine, mixed)
    return {
        "pipeline": pipeline.class_name,
        "requests": len(mixed),
        "equal": equal,
        "mixed_apart": before,
        "mixed_joined": after,
        "difference": largest_difference(alone, images),
    }


def padding() -> list[dict[str, Any]]:
    """Return the tokens that padding adds at most to a row, as a share of the row's own."""
    rows = []
    shortest, longest = 1, SHORTEST_BUCKET
    while longest <= LONGEST:
        rows.append((shortest, longest))
        shortest, longest = longest + 1, 2 * longest
    rows.append((1, LONGEST))  # without buckets
    return [
        {
            "shortest": shortest,
            "longest": longest,
            "added": {
                size: (longest - shortest) / ((size // PX_PER_TOKEN) ** 2 + shortest)
                for size in SIZES_PX
            },
        }
        for shortest, longest in rows
    ]


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write the result to")] = None,
) -> None:
    """Print the mean batches of each family, and the cost of padding."""
    torch.set_num_threads(1)
    found = {
        "command": "python -m tests.benchmarks.prompt_lengths --output FILE",
        "hardware": hardware(torch.device("cpu")),
        "rows": [batches(name) for name in JOINED],
        "padding": padding(),
    }
    for row in found["rows"]:
        typer.echo(
            f"{row['pipeline']:<20} equal {row['equal']:.2f}, "
            f"mixed apart {row['mixed_apart']:.2f}, "
            f"mixed padded {row['mixed_joined']:.2f}; from alone {row['difference']:.1e}"
        )
    for row in found["padding"]:
        shares = ", ".join(f"{size} px {share:.1%}" for size, share in row["added"].items())
        typer.echo(f"{row['shortest']} to {row['longest']} tokens: at most {shares}")
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
