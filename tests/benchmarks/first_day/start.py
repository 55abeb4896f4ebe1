"""Section "start": build the model, start an engine, and certify how requests share it."""

import time
from typing import Any

import torch

from serve_app.engine.engine import Engine
from serve_app.engine.startup.merging import rounding
from tests.benchmarks.first_day.day import Day, aim
from tests.benchmarks.first_day.subject import Subject, Subjects, Target

REUSED_START_S = 10.0
"""Target: seconds that a start with a profile may take beyond loading the weights."""


def start(day: Day, subjects: Subjects, target: Target) -> None:
    """Write the phases of a new start, the certificate, and the phases of a start with profile."""
    subject = subjects.get(target)
    day.row("build", lambda: _build(subject))
    day.row("new start", lambda: _started(subject))
    day.row("certificate", lambda: _certificate(subject))
    day.row("batches", lambda: _batches(subject))
    day.row("start with profile", lambda: _reused(subjects, subject), 2 * subject.built_s)


def _build(subject: Subject) -> dict[str, Any]:
    networks = {
        name: sum(weights.numel() for weights in part.parameters()) / 1e6
        for name, part in subject.pipeline.stock.components.items()
        if isinstance(part, torch.nn.Module)
    }
    on_cuda = subject.pipeline.device.type == "cuda"
    return {
        "weights": "random",
        "dtype": str(subject.pipeline.dtype),
        "side_px": subject.side,
        "built_s": subject.built_s,
        "million_weights": networks,
        "allocated_gib": torch.cuda.memory_allocated() / 2**30 if on_cuda else None,
    }


def _started(subject: Subject) -> dict[str, Any]:
    started_at = time.perf_counter()
    phases = _phases(subject.engine)
    return {"weights": "random", "took_s": time.perf_counter() - started_at, **phases}


def _phases(engine: Engine) -> dict[str, Any]:
    start = engine.cold_start
    return {f"{name}_s": seconds for name, seconds in start.phases_s.items()} | {
        "reuse": start.reuse
    }


def _certificate(subject: Subject) -> dict[str, Any]:
    found = subject.engine.certificate
    values: dict[str, Any] = {
        "weights": "random",
        "sharing": found.sharing,
        "note": found.note,
        "psnr_db": found.psnr_db,
        "difference": found.difference,
    }
    if found.deviation is not None:
        values |= {
            "control": found.deviation.neighbours,
            "repetition": found.deviation.repetition,
            "relative_l2": found.deviation.batching,
            "largest_batch": found.deviation.batch_size,
        }
    limit = rounding(subject.pipeline.dtype, subject.pipeline.device)
    text = f"batched: control 0, relative L2 at most {limit:g}"
    return values | aim(text, found.sharing == "batched")


def _batches(subject: Subject) -> dict[str, Any]:
    """Return the seconds of a call and the worthwhile batch, as the engine measured them."""
    cost, size = subject.engine.cost, (subject.side, subject.side)
    call_ms = {f"{rows:g}": 1000 * seconds for rows, seconds in cost.call_s[size].items()}
    return {
        "weights": "random",
        "cap": cost.cap(size),
        "call_ms": call_ms,
        "encode_ms": 1000 * cost.predict_encode(size),
        "decode_ms": 1000 * cost.predict_decode(size),
    }


def _reused(subjects: Subjects, subject: Subject) -> dict[str, Any]:
    """Start once more with the profile of the first start, and with weights built anew."""
    twin = subjects.twin(subject.target)
    started_at = time.perf_counter()
    with twin.start_engine() as engine:
        took_s = time.perf_counter() - started_at
        phases = _phases(engine)
    text = f"{REUSED_START_S:g} s beyond loading"
    return {"weights": "random", "took_s": took_s, **phases, **aim(text, took_s <= REUSED_START_S)}
