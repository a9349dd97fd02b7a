"use strict";
// Inflates what lies in the page, draws its charts, and follows the theme.
moe.inflated = async (element) => {
  const packed = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

// values of a heatmap come as 16-bit codes between low and high; the last code is no value
moe.decoded = (mark) => {
  if (mark.kind !== "heatmap") return mark;
  const bytes = Uint8Array.from(atob(mark.values), (c) => c.charCodeAt(0));
  const codes = new DataView(bytes.buffer);
  const step = (mark.high - mark.low) / 65534;
  const value = (code) => (code === 65535 ? NaN : mark.low + code * step);
  return { ...mark, values: Array.from({ length: bytes.length / 2 }, (_, i) => value(codes.getUint16(2 * i, true))) };
};

// lines take their colours from the style; cells do not, nor do tokens, which text.js redraws
moe.recoloured = [];
moe.recolour = () => {
  moe.plots.filter((plot) => plot.panel.marks.some((mark) => mark.kind === "heatmap")).forEach((plot) => plot.redraw());
  moe.recoloured.forEach((draw) => draw());
};

// name → function (place, data, page): fills a section's widget
moe.widgets = {};

const half = () => moe.s("svg", { width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" },
  moe.s("circle", { cx: 8, cy: 8, r: 6.5, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }),
  moe.s("path", { d: "M8 1.5a6.5 6.5 0 0 1 0 13z", fill: "currentColor" }));

// the menu closes behind who follows it; the group that is read is marked
moe.bar = () => {
  const menu = document.getElementById("menu");
  menu?.addEventListener("click", (event) => event.target.closest("a") && menu.hidePopover());
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries)
      document.querySelector(`.groups a[href="#${target.querySelector("h2")?.id}"]`)?.toggleAttribute("aria-current", isIntersecting);
  }, { rootMargin: "-20% 0px -79% 0px" });
  document.querySelectorAll(".group").forEach((group) => seen.observe(group));
};

// draws in a place of a section; where that fails, the place says so
moe.draw = (place, draw) => {
  const title = place.closest("section").querySelector("h3").firstChild.textContent.trim();
  const failed = (message) => (place.matches(".sheet") ? place.prepend(message) : place.replaceChildren(message));
  return moe.attempt(title, draw, failed);
};

// on paper everything is as in the light theme
moe.print = () => {
  let theme;
  addEventListener("beforeprint", () => {
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    moe.recolour();
  });
  addEventListener("afterprint", () => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    moe.recolour();
  });
};

moe.start = async () => {
  document.getElementById("theme").append(half());
  document.getElementById("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    moe.recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", moe.recolour);
  moe.bar();
  moe.print();
  const packed = document.getElementById("payload");
  const payload = packed ? JSON.parse(await moe.inflated(packed)) : {};
  document.querySelectorAll("[data-panel]").forEach((place, i) => {
    moe.draw(place, () => {
      const panel = { ...payload.panels[i], marks: payload.panels[i].marks.map(moe.decoded) };
      moe.plot(place, () => panel);
    });
  });
  if (payload.map) moe.page = moe.draw(document.querySelector('[data-widget="map"]'), () => moe.map(payload.map));
  moe.tables?.(payload.tables);
  for (const place of document.querySelectorAll("script[data-of]")) {
    const widget = document.querySelector(`[data-widget="${place.dataset.of}"]`);
    const data = JSON.parse(await moe.inflated(place));
    moe.draw(widget, () => moe.widgets[place.dataset.of](widget, data, moe.page));
  }
  moe.find?.(moe.page);
};

document.addEventListener("DOMContentLoaded", () =>
  moe.start().then(
    () => (document.documentElement.dataset.ready = "yes"),
    (error) => {
      const said = document.createElement("p");
      said.className = "warning";
      said.textContent = `The charts could not be drawn (${error.message}); the tables are below.`;
      document.querySelector("main").prepend(said);
      throw error;
    },
  ),
);
