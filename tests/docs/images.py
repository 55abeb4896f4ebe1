"""Make the images of the documents from the real thing: ``python -m tests.docs.images``.

The program serves the demo, uses its page in Chromium, watches it in ``diffusion-serve top`` and in
Prometheus under mixed load, plans a cluster, and renders the diagrams. The images are committed,
because the README shows them where no program runs. Run it again after a change of what they show.
"""

import io
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from playwright.sync_api import Browser, Page
from rich.console import Console

from monitoring.dashboards import DASHBOARDS
from monitoring.draw import Window, draw
from serve_app.top import Server, watch
from tests.browser import running_browser
from tests.docs.diagrams import render
from tests.e2e.page import DONE, PREVIEW, generate, ready
from tests.monitoring.load import MixedLoad, demo_of_two
from tests.monitoring.prometheus import start_prometheus
from tests.serve_process import demo_config, free_port, serving_config, start_serve

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "images"

LOAD_S = 240
"""Duration of the load behind the dashboards and ``top``."""

RATE_S = 30.0

PROMPTS = (
    "a large pink star on black",
    "two small yellow squares on black",
    "a green ring on white",
    "a small cyan cross at the top left, orange background",
    "a purple triangle on yellow",
    "a red circle on a blue background",
)


class Part(StrEnum):
    """A group of images that one run makes."""

    PAGE = "page"
    LOAD = "load"
    CHARTS = "charts"
    DIAGRAMS = "diagrams"


def save(png: bytes, path: Path) -> None:
    """Write an image with 256 colours, which is enough for a screenshot, and far smaller."""
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def page_images(browser: Browser, folder: Path) -> None:
    """Show the page of the application idle, at work, and with results."""

    def shoot(page: Page, name: str) -> None:
        save(page.screenshot(animations="disabled"), folder / f"{name}.png")

    with serving_config(demo_config(port := free_port())):
        page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5)
        page.goto(f"http://127.0.0.1:{port}")
        ready(page)
        shoot(page, "page-idle")
        generate(page, "a red circle on a blue background", seed=1)
        page.wait_for_selector(DONE)
        generate(page, "a small cyan cross at the top left, orange background", steps=150, seed=11)
        page.wait_for_selector(PREVIEW)
        shoot(page, "page-generating")
        page.wait_for_selector(".card.generating", state="detached")
        for seed, prompt in enumerate(PROMPTS):
            generate(page, prompt, seed=seed)
            page.wait_for_selector(".card.generating", state="detached")
        page.fill("#prompt", "")
        page.set_viewport_size({"width": 1600, "height": 1130})
        shoot(page, "page-gallery")


def load_images(folder: Path) -> None:
    """Show ``top`` and the dashboards of a few minutes of mixed load on two replicas."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    running = start_serve(demo_of_two(port))
    try:
        running.wait_until_ready(url)
        with start_prometheus(url, running) as prometheus:
            start_s = time.time()
            with MixedLoad(url):
                time.sleep(LOAD_S)
                top_image(url, folder / "top.svg")
            window = Window(start_s, time.time(), LOAD_S / 120, RATE_S)
            for dashboard in DASHBOARDS:
                path = folder / f"dashboard-{dashboard.name.lower()}.png"
                draw(prometheus.url, dashboard, window, path)
                save(path.read_bytes(), path)
    finally:
        running.stop()


def top_image(url: str, path: Path) -> None:
    """Write one frame of ``diffusion-serve top`` as it looks in a terminal of 100 columns."""
    console = Console(
        record=True, width=100, file=io.StringIO(), markup=False, emoji=False, highlight=False
    )
    watch(Server.at(url, None), console, every_s=10, once=True)
    console.print()  # the export cuts the last line
    path.write_text(console.export_svg(title="diffusion-serve top"), encoding="utf-8")
    print(path.relative_to(ROOT))


def charts(folder: Path) -> None:
    """Copy the charts that were drawn for committed results."""
    results = ROOT / "tests" / "benchmarks" / "results"
    for source, image in (
        ("plan-4to32.png", "planner.png"),
        ("policies.png", "policies.png"),
        ("extrapolation-demo-cpu.png", "extrapolation.png"),
        ("models-on-few-gpus.png", "models-on-few-gpus.png"),
    ):
        save((results / source).read_bytes(), folder / image)


def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="All by default.")] = None,
    folder: Path = FOLDER,
    mermaid: Annotated[
        Path | None, typer.Option(help="mermaid.min.js, of the npm package mermaid.")
    ] = None,
) -> None:
    """Write the images into the folder."""
    chosen = parts or list(Part)
    if Part.DIAGRAMS in chosen and mermaid is None:
        sys.exit("Diagrams need --mermaid: `npm pack mermaid@11`, package/dist/mermaid.min.js.")
    if Part.CHARTS in chosen:
        charts(folder)
    if Part.LOAD in chosen:
        load_images(folder)
    with running_browser() as browser:
        if Part.PAGE in chosen:
            page_images(browser, folder)
        if Part.DIAGRAMS in chosen and mermaid is not None:
            for source in sorted(folder.glob("*.mmd")):
                render(browser, source, mermaid)


if __name__ == "__main__":
    typer.run(main)
