"use strict";
// The map of layers × experts, domains × experts, and an expert's card. Texts of the corpus become text nodes, never markup.
moe.map = async (data) => {
  const FAR = 2; // colours are saturated at a quarter and at four times the mean
  const DEAD = -2.3;
  const SCALE = [[0, "@dead"], [0.069, "@dead"], [0.07, "@low"], [0.302, "@lower"], [0.535, "@even"], [0.767, "@higher"], [1, "@high"]];
  const at = { row: 0, expert: 0, domain: -1, byLoad: false };

  const h = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) name in element ? (element[name] = value) : element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const whole = (value) => value.toLocaleString("en");
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => sum(values) / values.length;

  const loads = (row, domain = at.domain) => (domain < 0 ? data.all[row] : data.load[domain][row]);
  const ratios = (row, domain = at.domain) => {
    const load = loads(row, domain);
    const even = mean(load);
    return load.map((n) => (even ? n / even : null));
  };
  const colourOf = (ratio) => (ratio === null || Number.isNaN(ratio) ? null : ratio === 0 ? DEAD : Math.max(-FAR, Math.min(FAR, Math.log2(ratio))));
  const activation = (domain, row, expert) => data.load[domain][row][expert] / data.tokens[domain][row];
  const lift = (domain, row, expert) => activation(domain, row, expert) / mean(data.domains.map((_, d) => activation(d, row, expert)));
  const orderOf = (row) => {
    const load = loads(row);
    const order = [...load.keys()];
    return at.byLoad ? order.sort((a, b) => load[b] - load[a] || a - b) : order;
  };
  const among = () => (at.domain < 0 ? "" : ` in ${data.domains[at.domain]}`);
  const sentence = (row, expert) => {
    const ratio = ratios(row)[expert];
    const load = loads(row);
    const said = ratio === null ? "no load" : `${ratio.toFixed(2)}× the mean load`;
    return `Layer ${data.layers[row].label}, expert ${expert}: ${said}${among()}, ${whole(load[expert])} assignments (${percent(load[expert] / Math.max(1, sum(load)))})`;
  };
  const ticks = (labels, most) => {
    const step = Math.max(1, Math.ceil(labels.length / most));
    const shown = [...labels.keys()].filter((i) => i % step === 0);
    return { tickvals: shown, ticktext: shown.map((i) => plain(labels[i])), zeroline: false, showgrid: false };
  };
  const heatmap = (z, text, cells, few) => ({
    type: "heatmap", z, customdata: text, hovertemplate: "%{customdata}<extra></extra>", colorscale: SCALE, zmin: DEAD, zmax: FAR,
    showscale: false, xgap: few ? 2 : 0, ygap: few ? 2 : 0, ...(few ? { text: cells, texttemplate: "%{text}" } : {}),
  });
  const legend = (what) =>
    h("span", { className: "legend" }, h("i", { className: "dead" }), "0", h("i", { className: "ramp" }), `≤ ¼ … 1 … ≥ 4 ${what}`);
  const choose = (name, options, act) => {
    const select = h("select", {}, ...options.map((text, value) => h("option", { value }, text)));
    select.addEventListener("change", () => act(Number(select.value)));
    return [h("label", {}, name, select), select];
  };

  // --- the map
  const place = document.querySelector('[data-widget="map"]');
  const plot = h("div", { className: "plot" });
  const now = h("p", { className: "now", id: "now", "aria-live": "polite" });
  const grid = h("div", {
    className: "grid", tabIndex: 0, role: "application", "aria-roledescription": "heatmap",
    "aria-label": `Load of ${data.layers.length} routers by expert. Arrow keys move from expert to expert, Enter opens the card of one, Escape closes it.`,
    "aria-describedby": "now",
  }, plot);
  const widest = Math.max(...data.layers.map((layer) => layer.experts));
  const few = data.layers.length * widest <= 160;
  let orders = [];

  const map = () => {
    orders = data.layers.map((_, row) => orderOf(row));
    const value = data.layers.map((_, row) => ratios(row));
    const table = (cell) => orders.map((order, row) => Array.from({ length: widest }, (_, i) => (i < order.length ? cell(row, order[i]) : null)));
    const totals = data.layers.map((_, row) => Math.max(1, sum(loads(row))));
    const said = (row, expert) =>
      `layer ${plain(data.layers[row].label)} · expert ${expert}<br>${value[row][expert] === null ? "no load" : `${value[row][expert].toFixed(2)}× the mean load`}${plain(among())}` +
      `<br>${whole(loads(row)[expert])} assignments, ${percent(loads(row)[expert] / totals[row])}`;
    const height = Math.max(11, Math.min(38, 560 / data.layers.length)) * data.layers.length;
    return {
      data: [heatmap(table((row, e) => colourOf(value[row][e])), table(said), table((row, e) => (value[row][e] === null ? "" : value[row][e].toFixed(2))), few)],
      layout: {
        height: height + 64, margin: { l: 60, r: 8, t: 8, b: 48 }, shapes: [cursor()],
        xaxis: { title: { text: at.byLoad ? "experts of each layer, most loaded first" : "expert" }, zeroline: false, showgrid: false, ...(at.byLoad ? { showticklabels: false } : few ? { dtick: 1 } : {}) },
        yaxis: { title: { text: "layer" }, autorange: "reversed", ...ticks(data.layers.map((l) => l.label), 31) },
      },
    };
  };
  const cursor = () => {
    const column = orders[at.row].indexOf(at.expert);
    const line = { color: "@ink", width: 2 };
    return { type: "rect", x0: column - 0.5, x1: column + 0.5, y0: at.row - 0.5, y1: at.row + 0.5, line };
  };
  const move = (row, column) => {
    at.row = Math.max(0, Math.min(data.layers.length - 1, row));
    at.expert = orders[at.row][Math.max(0, Math.min(orders[at.row].length - 1, column))];
    now.textContent = sentence(at.row, at.expert);
    return Plotly.relayout(plot, { shapes: moe.coloured([cursor()]) });
  };
  const redraw = async () => {
    await repaintMap();
    now.textContent = sentence(at.row, at.expert);
    if (!card.hidden) open(at.row, at.expert, false);
    if (layerTable.open) fillTable();
  };
  const [orderLabel, orderSelect] = choose("Order", ["by expert id", "by load"], (value) => ((at.byLoad = value === 1), redraw()));
  const [domainLabel, domainSelect] = choose("Text", ["all domains", ...data.domains], (value) => ((at.domain = value - 1), redraw()));
  domainSelect.id = "map-domain";
  orderSelect.id = "map-order";
  const layerTable = h("details", {}, h("summary", {}, "As a table, a layer at a time"));
  place.append(h("div", { className: "controls" }, data.load.length ? domainLabel : null, orderLabel, legend("× the mean load")), grid, now, layerTable);

  let repaintMap = () => {};
  const paintMap = async () => {
    const figure = moe.coloured(map());
    await Plotly.react(plot, figure.data, moe.coloured(moe.layout(figure.layout)), { displayModeBar: false, responsive: true });
  };
  repaintMap = paintMap;
  moe.drawn.push(paintMap);

  grid.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const column = orders[at.row].indexOf(at.expert);
    if (step) move(at.row + step[0], column + step[1]);
    else if (event.key === "Home") move(at.row, 0);
    else if (event.key === "End") move(at.row, Infinity);
    else if (event.key === "Enter") open(at.row, at.expert);
    else return;
    event.preventDefault();
  });

  // --- its table, for those who listen
  const layerChoice = h("select", {}, ...data.layers.map((layer, row) => h("option", { value: row }, layer.label)));
  const layerPlace = h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Table: load of the experts of a layer" });
  const fillTable = () => {
    const row = Number(layerChoice.value);
    const ratio = ratios(row);
    const total = Math.max(1, sum(loads(row)));
    layerPlace.replaceChildren(
      listed(["expert", "assignments", "share", "load ratio"], orderOf(row).map((e) => [e, whole(loads(row)[e]), percent(loads(row)[e] / total), ratio[e]?.toFixed(3) ?? "–"])),
    );
  };
  const listed = (names, rows, token = -1) => {
    const cell = (value, i) => h("td", { className: i === token ? "token" : "n" }, value instanceof Node ? value : h("bdi", {}, String(value)));
    return h("table", {},
      h("thead", {}, h("tr", {}, ...names.map((name, i) => h("th", { scope: "col", className: i === token ? "" : "n" }, name)))),
      h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map(cell)))));
  };
  layerChoice.addEventListener("change", fillTable);
  layerTable.addEventListener("toggle", () => {
    if (layerTable.open) { layerChoice.value = at.row; fillTable(); }
  });
  layerTable.append(h("div", { className: "controls" }, h("label", {}, "Layer", layerChoice)), layerPlace);

  // --- an expert's card
  const card = h("aside", { id: "card", role: "dialog", "aria-labelledby": "card-title", tabIndex: -1, hidden: true });
  document.body.append(card);
  let before = grid;
  const close = () => {
    if (card.hidden) return;
    card.hidden = true;
    before.focus();
  };
  document.addEventListener("keydown", (event) => event.key === "Escape" && close());
  const entries = (list, row, expert) => {
    const i = data.first[row] + expert;
    return Array.from({ length: list.start[i + 1] - list.start[i] }, (_, j) => list.start[i] + j);
  };
  const jump = (row, expert) => {
    const button = h("button", { type: "button", className: "jump" }, `expert ${expert}`);
    button.addEventListener("click", () => open(row, expert));
    return button;
  };
  const meter = (share, most) => {
    const bar = h("span", { className: "meter" });
    bar.style.width = `${(5.5 * share) / most}em`;
    return bar;
  };
  const part = (title, content) => [h("h3", {}, title), content];

  const open = (row, expert, focus = true) => {
    if (focus && card.hidden) before = document.activeElement === document.body ? grid : document.activeElement;
    const ratio = ratios(row, -1);
    const load = data.all[row][expert];
    const total = Math.max(1, sum(data.all[row]));
    const rank = data.all[row].filter((n) => n > load).length + 1;
    const shut = h("button", { type: "button", "aria-label": "Close the card" }, "✕");
    shut.addEventListener("click", close);
    const said = [
      ratio[expert] === null ? "No load." : `${ratio[expert].toFixed(2)}× the mean load of its layer, number ${rank} of ${data.layers[row].experts} by load.`,
      `${whole(load)} assignments (${percent(load / total)})`,
    ];
    if (load && data.choices[row][expert] !== null) said[1] += `, in ${percent(data.choices[row][expert] / load)} of them as first choice`;
    said[1] += ".";
    if (load && data.weights && data.weights[row][expert] !== null) said.push(`Mean gate weight ${data.weights[row][expert].toPrecision(3)}.`);
    const parts = [];
    if (data.load.length) {
      const rows = data.domains.map((name, d) => [name, activation(d, row, expert), lift(d, row, expert)]);
      const most = Math.max(...rows.map((r) => r[1]), 1e-9);
      rows.sort((a, b) => b[1] - a[1]);
      parts.push(...part("Share of each domain's tokens that come here", listed(["domain", "", "activation", "lift"],
        rows.map(([name, share, times]) => [name, meter(share, most), percent(share), Number.isFinite(times) ? `${times.toFixed(2)}×` : "–"]), 0)));
    }
    if (data.words) {
      const w = data.words;
      const rows = entries(w, row, expert).map((i) => [w.texts[w.text[i]], whole(w.count[i]), percent(w.share[i] / 1000), w.choice[i] === null ? "–" : percent(w.choice[i] / 1000)]);
      parts.push(...part("Tokens most its own", rows.length
        ? listed(["token", "times", "of its occurrences", "as first choice"], rows, 0)
        : h("p", { className: "said" }, "None that occurs often enough to judge.")));
    }
    const linked = (title, list, to) => {
      if (!list || to === null || to === undefined) return;
      const rows = entries(list, row, expert).map((i) => [jump(to, list.other[i]), percent(list.share[i] / 1000), list.lift[i] === null ? "–" : `${list.lift[i].toFixed(2)}×`]);
      if (rows.length) parts.push(...part(title, listed(["", "probability", "lift"], rows, 0)));
    };
    linked("Chosen together with", data.partners, row);
    if (data.next) linked(`Then, at layer ${data.layers[data.next[row]]?.label ?? ""}`, data.nexts, data.next[row]);
    card.replaceChildren(
      h("div", { className: "top" }, h("h2", { id: "card-title" }, `Layer ${data.layers[row].label} · expert ${expert}`), shut),
      ...said.map((text) => h("p", { className: "said" }, text)),
      ...parts,
    );
    card.hidden = false;
    card.scrollTop = 0;
    if (focus) {
      card.focus();
      move(row, orders[row].indexOf(expert));
    }
  };

  await paintMap();
  plot.on("plotly_click", ({ points: [point] }) => {
    const [row, column] = point.pointIndex;
    if (orders[row][column] !== undefined) open(row, orders[row][column]);
  });
  now.textContent = sentence(at.row, at.expert);

  // --- domains × experts of a layer
  const second = document.querySelector('[data-widget="domains"]');
  if (!second) return;
  const domainPlot = h("div", { className: "plot", role: "img", "aria-label": "Activation of each expert in each domain; the table below has the values." });
  const [rowLabel, rowSelect] = choose("Layer", data.layers.map((layer) => layer.label), () => paintDomains());
  rowSelect.value = data.telling;
  second.append(h("div", { className: "controls" }, rowLabel, legend("× the mean over domains")), domainPlot);
  const paintDomains = async () => {
    const row = Number(rowSelect.value);
    const all = [...Array(data.layers[row].experts).keys()];
    const table = (cell) => data.domains.map((_, d) => all.map((e) => cell(d, e)));
    const sparse = data.domains.length * all.length <= 160;
    const said = (d, e) => `${plain(data.domains[d])} · expert ${e}<br>takes ${percent(activation(d, row, e))} of the tokens<br>${Number.isFinite(lift(d, row, e)) ? lift(d, row, e).toFixed(2) : "–"}× its mean over domains`;
    const figure = moe.coloured({
      data: [heatmap(table((d, e) => colourOf(lift(d, row, e))), table(said), table((d, e) => percent(activation(d, row, e))), sparse)],
      layout: {
        height: 70 + data.domains.length * Math.max(14, Math.min(38, 560 / data.domains.length)), margin: { l: 90, r: 8, t: 8, b: 48 },
        xaxis: { title: { text: "expert" }, zeroline: false, showgrid: false, ...(all.length <= 32 ? { dtick: 1 } : {}) },
        yaxis: { autorange: "reversed", ...ticks(data.domains.map((d) => (d.length > 24 ? `${d.slice(0, 23)}…` : d)), 40) },
      },
    });
    await Plotly.react(domainPlot, figure.data, moe.coloured(moe.layout(figure.layout)), { displayModeBar: false, responsive: true });
  };
  moe.drawn.push(paintDomains);
  await paintDomains();
  domainPlot.on("plotly_click", ({ points: [point] }) => open(Number(rowSelect.value), point.pointIndex[1]));
};
