"""Draws docs/report.png: the page of the bundled model over the bundled corpus, as Chromium shows
it."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import moe_inspect
from moe_inspect.reporting.render.page import report_page

WIDTH, HEIGHT = 1180, 1176  # down to the map
OUTPUT = Path(__file__).parent / "report.png"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        trace = moe_inspect.trace_model("demo", Path(place) / "demo", logits=True)
        page = Path(place) / "report.html"
        page.write_text(report_page(moe_inspect.report(trace)), encoding="utf-8")
        with sync_playwright() as tool:
            browser = tool.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            view = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5
            )
            view.goto(page.as_uri())
            view.wait_for_selector("html[data-ready]", state="attached")
            picture = view.screenshot()
            browser.close()
    few = (
        Image.open(io.BytesIO(picture))
        .convert("RGB")
        .quantize(256, kmeans=2, dither=Image.Dither.NONE)
    )
    few.save(OUTPUT, optimize=True)
    print(f"wrote {OUTPUT} ({OUTPUT.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
