"use strict";
// The map of layers × experts, and domains × experts.
moe.map = (data) => {
  const at = { row: 0, expert: 0, domain: -1, byLoad: false };
  const { h } = moe;
  const experts = moe.experts(data);
  const { whole, percent, sum, activation, lift, listed } = experts;
  const loads = (row, domain = at.domain) => experts.loads(row, domain);
  const ratios = (row, domain = at.domain) => experts.ratios(row, domain);
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
  const axis = (title, labels = []) => ({ title, labels, ticks: [] });
  const heatmap = (rows, columns, value, scale, lengths) => {
    const values = Array.from({ length: rows * columns }, (_, i) => value(Math.floor(i / columns), i % columns));
    return { kind: "heatmap", rows, columns, values, scale, lengths };
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
  const BUSIEST = Math.min(3, widest); // experts named before each layer, in the order of load
  let orders = [];

  const panel = () => {
    orders = data.layers.map((_, row) => orderOf(row));
    const value = data.layers.map((_, row) => ratios(row));
    const cell = (row, i) => (i < orders[row].length ? value[row][orders[row][i]] : null);
    const lengths = data.layers.map((layer) => layer.experts);
    const busiest = (row) => `${data.layers[row].label}: ${orders[row].slice(0, BUSIEST).join(", ")}`;
    return {
      x: at.byLoad ? axis("rank by load", Array.from({ length: widest }, (_, i) => String(i + 1))) : axis("expert"),
      y: at.byLoad ? axis(`layer: its ${BUSIEST} busiest experts`, data.layers.map((_, row) => busiest(row))) : axis("layer", data.layers.map((layer) => layer.label)),
      marks: [heatmap(data.layers.length, widest, cell, data.scale, lengths)],
    };
  };
  // texts of a cell: the expert's id too, where its place does not tell it
  const cellTexts = (row, column) => {
    const expert = orders[row][column];
    const ratio = ratios(row)[expert]?.toFixed(2) ?? "";
    return expert === undefined ? [] : at.byLoad ? [`expert ${expert}: ${ratio}`, `${expert}: ${ratio}`, String(expert)] : [ratio];
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
    card.refresh();
    if (layerTable.open) fillTable();
  };
  const [orderLabel, orderSelect] = choose("Order", ["by expert id", "by load"], (value) => ((at.byLoad = value === 1), redraw()));
  const [domainLabel, domainSelect] = choose("Text", ["all domains", ...data.domains], (value) => ((at.domain = value - 1), redraw()));
  domainSelect.id = "map-domain";
  orderSelect.id = "map-order";
  const layerTable = h("details", {}, h("summary", {}, "As a table, one layer at a time"));
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
  layerChoice.addEventListener("change", fillTable);
  layerTable.addEventListener("toggle", () => {
    if (layerTable.open) { layerChoice.value = at.row; fillTable(); }
  });
  layerTable.append(h("div", { className: "controls" }, h("label", {}, "Layer", layerChoice)), layerPlace);

  const card = moe.card(experts, grid, (row, expert) => map.move(row, orders[row].indexOf(expert)));
  const map = moe.plot(grid, panel, {
    // with what stands above it, on a screen of 1440 × 900; by load each layer has a label of its own
    height: (heat) => 64 + heat.rows * Math.max(at.byLoad ? 15 : 7.5, Math.min(38, 480 / heat.rows)),
    note: (row, column) => [sentence(row, orders[row][column])],
    cell: cellTexts,
    moved,
    open: (row, column) => column < orders[row].length && card.open(row, orders[row][column]),
  });
  // the map opens on the busiest expert of the least balanced router
  const peaks = data.layers.map((_, row) => Math.max(...ratios(row)));
  at.row = Math.max(0, peaks.indexOf(Math.max(...peaks)));
  at.expert = Math.max(0, ratios(at.row).indexOf(peaks[at.row]));
  map.at = [at.row, orderOf(at.row).indexOf(at.expert)];
  now.textContent = sentence(at.row, at.expert);

  // --- domains × experts of a layer
  const second = document.querySelector('[data-widget="domains"]');
  const page = { experts, card, map, choose: (domain) => ((domainSelect.value = domain + 1), domainSelect.dispatchEvent(new Event("change"))) };
  if (!second) return page;
  moe.draw(second, () => {
    const domainPlot = h("div", { className: "plot", role: "application", "aria-roledescription": "heatmap", "aria-label": "Activation of each expert in each domain. Arrow keys move from cell to cell, Enter opens an expert's card; the table below has the values." });
    const [rowLabel, rowSelect] = choose("Layer", data.layers.map((layer) => layer.label), () => domains.redraw());
    rowSelect.value = data.telling;
    second.append(h("div", { className: "controls" }, rowLabel), domainPlot);
    const layer = () => Number(rowSelect.value);
    const rows = [...data.domains, data.uniform];
    const domains = moe.plot(
      domainPlot,
      () => ({
        x: axis("expert"),
        y: axis("domain", rows.map((name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name))),
        marks: [heatmap(rows.length, data.layers[layer()].experts, (d, e) => lift(d, layer(), e), data.lift_scale)],
      }),
      {
        note: (d, e) => [
          `${rows[d]}, expert ${e}`,
          `takes ${percent(activation(d, layer(), e))} of the tokens`,
          `${Number.isFinite(lift(d, layer(), e)) ? lift(d, layer(), e).toFixed(2) : "–"}× its mean over domains`,
        ],
        cell: (d, e) => [percent(activation(d, layer(), e))],
        open: (d, e) => card.open(layer(), e),
      },
    );
  });
  return page;
};
