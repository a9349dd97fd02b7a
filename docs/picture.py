"""Draws the pictures of the page in the documentation, as Chromium shows it: the bundled model over
the bundled corpus.

docs/report.png: the first screen. docs/pictures/page-THEME-WIDTH.png: the first screen in both
themes on a desktop, and on a phone. docs/pictures/text.png: the section of
text. docs/pictures/placement.png: the chart of simulate placement on that trace.
docs/pictures/workloads.png: placements of DeepSeek-V3's experts, where the counts are there.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import moe_inspect
from moe_inspect.making import import_trace
from moe_inspect.reporting.render.page import report_page

DOCS = Path(__file__).parent
SCREENS = (("light", 1440, 900), ("dark", 1440, 900), ("light", 390, 844))  # theme, size
POLICIES = ("contiguous", "greedy", "eplb", "local-search")
LOADS = DOCS.parent.parent / "shared" / "real" / "deepseek_loads"
NOTHING_STAYS = """for (const element of document.querySelectorAll("body *"))
  if (getComputedStyle(element).position === "sticky") element.style.position = "static";"""


def main() -> None:
    (DOCS / "pictures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as tool:
        trace = moe_inspect.trace_model("demo", Path(place) / "demo", logits=True)
        trace.simulate.placement().save_plots(
            DOCS / "pictures", only=["placement"], formats=["png"]
        )
        page = Path(place) / "report.html"
        page.write_text(report_page(moe_inspect.report(trace)), encoding="utf-8")
        browser = tool.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for theme, width, height in SCREENS:
            view = opened(browser, page, theme, width, height)
            save(view.screenshot(), DOCS / "pictures" / f"page-{theme}-{width}.png")
            view.close()
        view = opened(browser, page, "light", 1440, 900, scale=1.25)
        save(view.screenshot(), DOCS / "report.png")
        view.close()
        view = opened(browser, page, "light", 1200, 900)
        view.evaluate(NOTHING_STAYS)  # or the header would lie over a long section
        save(view.locator("#text").screenshot(), DOCS / "pictures" / "text.png")
        browser.close()
    workloads()


def workloads() -> None:
    """Fitted on all workloads but the last, and judged on that."""
    if not LOADS.is_dir():
        print(f"no {LOADS}: docs/pictures/workloads.png stays as it is")
        return
    with tempfile.TemporaryDirectory() as place:
        traces = [
            import_trace("sglang-json", [path], Path(place) / path.stem, top_k=8)
            for path in sorted(LOADS.glob("*.json"))
        ]
        *others, last = traces[1:]
        placed = traces[0].simulate.placement(
            *others, judge=[last], gpus=32, physical_experts=288, policies=POLICIES
        )
        (drawn,) = placed.save_plots(place, formats=["png"])
        save(drawn.read_bytes(), DOCS / "pictures" / "workloads.png")


def opened(browser: Any, page: Path, theme: str, width: int, height: int, scale: float = 1) -> Any:
    view = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=theme, device_scale_factor=scale
    )
    view.goto(page.as_uri())
    view.wait_for_selector("html[data-ready]", state="attached")
    return view


def save(png: bytes, path: Path) -> None:
    """With 256 colours: a third of the size."""
    few = (
        Image.open(io.BytesIO(png)).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    )
    few.save(path, optimize=True)
    print(f"wrote {path.relative_to(DOCS.parent)} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
