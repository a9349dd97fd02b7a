"use strict";
// Inflates what lies in the page, draws its figures, and follows the theme.
const moe = { drawn: [] };

moe.inflate = async (id) => {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

// colours live in page.css alone: "@ink" is what --ink comes to in the theme of the moment
moe.colour = (name) => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

moe.coloured = (value, known = {}) => {
  if (typeof value === "string") return value[0] === "@" ? (known[value] ??= moe.colour(value.slice(1))) : value;
  if (Array.isArray(value)) return value.map((v) => moe.coloured(v, known));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, v]) => [key, moe.coloured(v, known)]));
};

moe.axis = (given) => ({ gridcolor: "@line", zerolinecolor: "@line", linecolor: "@soft", automargin: true, ...given });

moe.layout = (given = {}) => {
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    colorway: ["@second", "@accent", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "@soft"],
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "@ink" },
    margin: { l: 50, r: 16, t: 16, b: 44 },
    height: 340,
    hoverlabel: { bgcolor: "@card", bordercolor: "@line", font: { color: "@ink" }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...given,
  };
  for (const name of Object.keys(layout)) if (/^[xy]axis\d*$/.test(name)) layout[name] = moe.axis(layout[name]);
  for (const name of ["xaxis", "yaxis"]) layout[name] ??= moe.axis({});
  return layout;
};

// make() → {data, layout}, asked again whenever the theme changes
moe.draw = (element, make) => {
  const paint = async () => {
    const figure = moe.coloured(make());
    await Plotly.react(element, figure.data, moe.coloured(moe.layout(figure.layout)), { displayModeBar: false, responsive: true });
  };
  moe.drawn.push(paint);
  return paint();
};

moe.repaint = () => Promise.all(moe.drawn.map((paint) => paint()));

moe.start = async () => {
  document.getElementById("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    return moe.repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", moe.repaint);
  if (!document.getElementById("payload")) return;
  const library = document.createElement("script");
  library.textContent = await moe.inflate("plotly"); // runs since the page's policy names its hash
  document.head.append(library);
  const payload = JSON.parse(await moe.inflate("payload"));
  const places = [...document.querySelectorAll("[data-figure]")];
  await Promise.all(places.map((place, i) => moe.draw(place, () => structuredClone(payload.figures[i]))));
  if (payload.map) await moe.map(payload.map);
};

document.addEventListener("DOMContentLoaded", () =>
  moe.start().then(
    () => (document.documentElement.dataset.ready = "yes"),
    (error) => {
      const said = document.createElement("p");
      said.className = "warning";
      said.textContent = `The figures could not be drawn (${error.message}); the tables are below.`;
      document.querySelector("main").prepend(said);
      throw error;
    },
  ),
);
