"use strict";
// The map of layers × experts, domains × experts, and an expert's card. Texts of the corpus become text nodes, never markup.
moe.map = (data) => {
  const SCALE = { kind: "ratio", title: "× the mean load", unknown: "" };
  const FEW = 160; // cells, up to which each carries its number
  const at = { row: 0, expert: 0, domain: -1, byLoad: false };
  const { h } = moe;
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
  const axis = (title, labels = []) => ({ title, labels });
  const heatmap = (rows, columns, value, text, scale, lengths) => {
    const flat = (cell) => Array.from({ length: rows * columns }, (_, i) => cell(Math.floor(i / columns), i % columns));
    return { kind: "heatmap", rows, columns, values: flat(value), cells: rows * columns <= FEW ? flat(text) : null, scale, lengths };
  };
  const choose = (name, options, act) => {
    const select = h("select", {}, ...options.map((text, value) => h("option", { value }, text)));
    select.addEventListener("change", () => act(Number(select.value)));
    return [h("label", {}, name, select), select];
  };

  // --- the map
  const place = document.querySelector('[data-widget="map"]');
  const now = h("p", { className: "now", id: "now", "aria-live": "polite" });
  const grid = h("div", {
    className: "plot", role: "application", "aria-roledescription": "heatmap",
    "aria-label": `Load of ${data.layers.length} routers by expert. Arrow keys move from expert to expert, Enter opens the card of one, Escape closes it.`,
    "aria-describedby": "now",
  });
  const widest = Math.max(...data.layers.map((layer) => layer.experts));
  let orders = [];

  const panel = () => {
    orders = data.layers.map((_, row) => orderOf(row));
    const value = data.layers.map((_, row) => ratios(row));
    const cell = (row, i) => (i < orders[row].length ? value[row][orders[row][i]] : null);
    const lengths = data.layers.map((layer) => layer.experts);
    return {
      x: at.byLoad ? axis("experts of each layer, most loaded first") : axis("expert"),
      y: axis("layer", data.layers.map((layer) => layer.label)),
      marks: [heatmap(data.layers.length, widest, cell, (row, i) => cell(row, i)?.toFixed(2) ?? "", SCALE, lengths)],
    };
  };
  const moved = (row, column) => {
    at.row = row;
    at.expert = orders[row][column];
    now.textContent = sentence(at.row, at.expert);
  };
  const redraw = () => {
    map.at = [at.row, orderOf(at.row).indexOf(at.expert)];
    map.hide();
    map.redraw();
    now.textContent = sentence(at.row, at.expert);
    if (!card.hidden) open(at.row, at.expert, false);
    if (layerTable.open) fillTable();
  };
  const [orderLabel, orderSelect] = choose("Order", ["by expert id", "by load"], (value) => ((at.byLoad = value === 1), redraw()));
  const [domainLabel, domainSelect] = choose("Text", ["all domains", ...data.domains], (value) => ((at.domain = value - 1), redraw()));
  domainSelect.id = "map-domain";
  orderSelect.id = "map-order";
  const layerTable = h("details", {}, h("summary", {}, "As a table, a layer at a time"));
  place.append(h("div", { className: "controls" }, data.load.length ? domainLabel : null, orderLabel), grid, now, layerTable);

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
      map.move(row, orders[row].indexOf(expert));
    }
  };

  const map = moe.plot(grid, panel, {
    height: (heat) => 64 + heat.rows * Math.max(11, Math.min(38, 560 / heat.rows)),
    note: (row, column) => [sentence(row, orders[row][column])],
    moved,
    open: (row, column) => column < orders[row].length && open(row, orders[row][column]),
  });
  map.at = [0, 0];
  now.textContent = sentence(at.row, at.expert);

  // --- domains × experts of a layer
  const second = document.querySelector('[data-widget="domains"]');
  if (!second) return;
  const domainPlot = h("div", { className: "plot", role: "application", "aria-roledescription": "heatmap", "aria-label": "Activation of each expert in each domain. Arrow keys move from cell to cell, Enter opens an expert's card; the table below has the values." });
  const [rowLabel, rowSelect] = choose("Layer", data.layers.map((layer) => layer.label), () => domains.redraw());
  rowSelect.value = data.telling;
  second.append(h("div", { className: "controls" }, rowLabel), domainPlot);
  const layer = () => Number(rowSelect.value);
  const domains = moe.plot(
    domainPlot,
    () => ({
      x: axis("expert"),
      y: axis("", data.domains.map((name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name))),
      marks: [heatmap(data.domains.length, data.layers[layer()].experts, (d, e) => lift(d, layer(), e), (d, e) => percent(activation(d, layer(), e)), { ...SCALE, title: "× the mean over domains" })],
    }),
    {
      note: (d, e) => [
        `${data.domains[d]}, expert ${e}`,
        `takes ${percent(activation(d, layer(), e))} of the tokens`,
        `${Number.isFinite(lift(d, layer(), e)) ? lift(d, layer(), e).toFixed(2) : "–"}× its mean over domains`,
      ],
      open: (d, e) => open(layer(), e),
    },
  );
};
