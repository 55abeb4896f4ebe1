"""Diagrams: a Mermaid source and the SVG that was rendered from it, beside each other.

The SVG is committed, because a site that renders Mermaid loads it from another host. It carries the
hash of its source, so that a test sees a source that was changed and not rendered.
"""

import hashlib
import re
from pathlib import Path

from playwright.sync_api import Browser

_HASH = re.compile(r"<!-- source sha256: (\w+) -->")


def source_hash(source: Path) -> str:
    """Return the hash of a diagram's source."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def rendered_hash(svg: Path) -> str | None:
    """Return the hash of the source that an SVG was rendered from, if it carries one."""
    found = _HASH.search(svg.read_text(encoding="utf-8"))
    return found[1] if found else None


def render(browser: Browser, source: Path, mermaid: Path) -> None:
    """Render a ``.mmd`` file to the ``.svg`` file beside it."""
    page = browser.new_page()
    page.set_content("<!doctype html><body></body>")
    page.add_script_tag(path=mermaid)
    svg = page.evaluate(
        """async source => {
            mermaid.initialize({
                startOnLoad: false, theme: "neutral", htmlLabels: false,
                fontFamily: "system-ui, sans-serif",
                flowchart: {htmlLabels: false, subGraphTitleMargin: {top: 8, bottom: 12}},
            });
            const {svg} = await mermaid.render("diagram", source);
            const drawn = new DOMParser().parseFromString(svg, "text/html").querySelector("svg");
            // Its text is dark, and a reader's page may be dark, too.
            drawn.style.background = "white";
            const {width, height} = drawn.viewBox.baseVal;
            drawn.setAttribute("width", width);
            drawn.setAttribute("height", height);
            return new XMLSerializer().serializeToString(drawn);
        }""",
        source.read_text(encoding="utf-8"),
    )
    marked = f"<!-- source sha256: {source_hash(source)} -->\n{svg}\n"
    source.with_suffix(".svg").write_text(marked, encoding="utf-8")
    page.close()
