"use strict";
// Inflates what lies in the page, draws its charts, and follows the theme.
moe.inflate = async (id) => {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
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

// lines take their colours from the style; cells do not
moe.recolour = () => moe.plots.filter((plot) => plot.panel.marks.some((mark) => mark.kind === "heatmap")).forEach((plot) => plot.redraw());

moe.start = async () => {
  document.getElementById("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    moe.recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", moe.recolour);
  if (!document.getElementById("payload")) return;
  const payload = JSON.parse(await moe.inflate("payload"));
  document.querySelectorAll("[data-panel]").forEach((place, i) => {
    const panel = { ...payload.panels[i], marks: payload.panels[i].marks.map(moe.decoded) };
    moe.plot(place, () => panel);
  });
  if (payload.map) moe.map(payload.map);
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
