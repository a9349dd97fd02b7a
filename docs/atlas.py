"""Makes the atlas that the documentation shows, in build/atlas/site: the bundled samples, six
architectures with random weights over the bundled corpus and, where ESFT names a folder with its
four tasks (`results/expert_scores` of its repository), DeepSeek-V2-Lite on those. Draws
docs/pictures/atlas-THEME-WIDTH.png and docs/pictures/atlas-token.png where chromium is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

import moe_inspect
from benchmarks.untrained import configs, traced
from docs.picture import DOCS, SCREENS, opened, save

BUILD = Path("build/atlas")  # as the pages say it, whose root the command is run in
SAMPLES = ("untrained", "collapsed", "balanced")
TASKS = ("intent", "law", "summary", "translation")
LITE = Path("docs/configs/deepseek-v2-lite.json")
ASKED = "return"  # a token


def traces() -> list[Path]:
    found = [Path("sample_traces") / name for name in SAMPLES]
    for said, config in configs():
        name = said.replace(",", "").replace(" ", "-")
        if not (BUILD / name / "trace.json").exists():
            traced(config, 0, BUILD / "models" / name, BUILD / name)
        found.append(BUILD / name)
    if folder := os.environ.get("ESFT"):
        place, sources = BUILD / "deepseek-v2-lite", [Path(folder) / task for task in TASKS]
        moe_inspect.import_trace("esft", sources, place, model=LITE, overwrite=True)
        found.append(place)
    return found


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    site = BUILD / "site"
    print(moe_inspect.atlas(traces(), site).to_string())
    if shutil.which("chromium"):
        draw((site / "index.html").resolve())


def draw(index: Path) -> None:
    with sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for theme, width in (("light", 1440), ("dark", 1440), ("light", 390)):
            view = opened(browser, index, theme, width, SCREENS[width])
            save(view.screenshot(), DOCS / "pictures" / f"atlas-{theme}-{width}.png")
            view.close()
        view = opened(browser, index, "light", 1200, 760)
        view.locator("#find").fill(ASKED)
        view.keyboard.press("Enter")
        view.locator("#card").wait_for(state="visible")
        save(view.screenshot(), DOCS / "pictures" / "atlas-token.png")
        browser.close()


if __name__ == "__main__":
    main()
