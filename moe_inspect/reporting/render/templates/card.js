"use strict";
// What the page knows of experts (map_data.py), and the card of one. Texts of the corpus become text nodes, never markup.
// A part of a card is an entry of moe.cardParts: [name, (experts, row, expert) → nodes made with the helpers of `experts`].
moe.cardParts = [];

moe.experts = (data) => {
  const { h } = moe;
  const whole = (value) => value.toLocaleString("en");
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => sum(values) / values.length;

  // domain −1: all of them
  const loads = (row, domain = -1) => (domain < 0 ? data.all[row] : data.load[domain][row]);
  const ratios = (row, domain = -1) => {
    const load = loads(row, domain);
    const even = mean(load);
    return load.map((n) => (even ? n / even : null));
  };
  // of the row after the domains: of every expert alike
  const activation = (domain, row, expert) =>
    domain === data.domains.length ? data.layers[row].k / data.layers[row].experts : data.load[domain][row][expert] / data.tokens[domain][row];
  const lift = (domain, row, expert) => activation(domain, row, expert) / mean(data.domains.map((_, d) => activation(d, row, expert)));

  // the positions of an expert's entries in a list of map_data.py
  const entries = (list, row, expert) => {
    const i = data.first[row] + expert;
    return Array.from({ length: list.start[i + 1] - list.start[i] }, (_, j) => list.start[i] + j);
  };
  const listed = (names, rows, token = -1) => {
    const cell = (value, i) => h("td", { className: i === token ? "token" : "n" }, value instanceof Node ? value : h("bdi", {}, String(value)));
    return h("table", {},
      h("thead", {}, h("tr", {}, ...names.map((name, i) => (name ? h("th", { scope: "col", className: i === token ? "" : "n" }, name) : h("td"))))),
      h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map(cell)))));
  };
  const part = (title, content) => [h("h3", {}, title), content];
  const meter = (share, most) => {
    const bar = h("span", { className: "meter" });
    bar.style.width = `${(5.5 * share) / most}em`;
    return bar;
  };
  return { data, whole, percent, sum, loads, ratios, activation, lift, entries, listed, part, meter };
};

// the card: opened(row, expert) is called when an expert's card opens, `home` has the focus after it where nothing had it before
moe.card = (experts, home, opened) => {
  const { h } = moe;
  const { data, whole, percent, sum } = experts;
  const place = h("div", { id: "card", role: "dialog", "aria-labelledby": "card-title", tabIndex: -1, hidden: true });
  document.body.append(place);
  let before = home;
  let shown = null;

  const address = (hash) => history.replaceState(null, "", hash || location.pathname + location.search);
  const close = (back = true) => {
    if (place.hidden) return;
    place.hidden = true;
    shown = null;
    if (/^#L\d.*E\d+$/.test(location.hash)) address("");
    if (back) before.focus();
  };
  document.addEventListener("keydown", (event) => event.key === "Escape" && close());
  document.addEventListener("pointerdown", (event) => !place.contains(event.target) && close(false));

  // anything in the card: a heading and nodes
  const show = (title, nodes, focus = true) => {
    if (focus && place.hidden) before = document.activeElement === document.body ? home : document.activeElement;
    const shut = h("button", { type: "button", "aria-label": "Close the card" }, "✕");
    shut.addEventListener("click", () => close());
    place.replaceChildren(h("div", { className: "top" }, h("h2", { id: "card-title" }, title), shut), ...nodes);
    place.hidden = false;
    place.scrollTop = 0;
    if (focus) place.focus();
  };

  const said = (row, expert) => {
    const ratio = experts.ratios(row)[expert];
    const load = data.all[row][expert];
    const total = Math.max(1, sum(data.all[row]));
    const rank = data.all[row].filter((n) => n > load).length + 1;
    const first = ratio === null ? "No load." : `${ratio.toFixed(2)}× the mean load of its layer, number ${rank} of ${data.layers[row].experts} by load.`;
    let second = `${whole(load)} assignments (${percent(load / total)})`;
    if (load && data.choices[row][expert] !== null) second += `, in ${percent(data.choices[row][expert] / load)} of them as first choice`;
    const weight = load && data.weights && data.weights[row][expert] !== null ? [`Mean gate weight ${data.weights[row][expert].toPrecision(3)}.`] : [];
    return [first, `${second}.`, ...weight];
  };
  const open = (row, expert, focus = true) => {
    const sentences = said(row, expert).map((text) => h("p", { className: "said" }, text));
    const parts = moe.cardParts.flatMap(([name, make]) => moe.attempt(name, () => make(experts, row, expert), (message) => [message]));
    show(`Layer ${data.layers[row].label} · expert ${expert}`, [...sentences, ...parts], focus);
    shown = [row, expert];
    if (!focus) return;
    address(moe.address({ experts }, row, expert));
    opened(row, expert);
  };
  // shows the card of the same expert again, after what it is made of has changed
  const refresh = () => shown && open(...shown, false);
  experts.jump = (row, expert, text = `expert ${expert}`) => {
    const button = h("button", { type: "button", className: "jump" }, text);
    button.addEventListener("click", () => open(row, expert));
    return button;
  };
  return { place, open, show, close, refresh };
};

moe.cardParts.push(["Domains", (experts, row, expert) => {
  const { data, activation, lift, percent, part, listed, meter } = experts;
  if (!data.load.length) return [];
  const rows = data.domains.map((name, d) => [name, activation(d, row, expert), lift(d, row, expert)]);
  const most = Math.max(...rows.map((r) => r[1]), 1e-9);
  rows.sort((a, b) => b[1] - a[1]);
  const cells = rows.map(([name, share, times]) => [name, meter(share, most), percent(share), Number.isFinite(times) ? `${times.toFixed(2)}×` : "–"]);
  return part("Share of each domain's tokens that come here", listed(["domain", "", "activation", "lift"], cells, 0));
}]);

moe.cardParts.push(["Most exclusive tokens", (experts, row, expert) => {
  const { data, whole, percent, part, listed, entries } = experts;
  const w = data.words;
  if (!w) return [];
  const rows = entries(w, row, expert).map((i) => [w.texts[w.text[i]], whole(w.count[i]), percent(w.share[i] / 1000), w.choice[i] === null ? "–" : percent(w.choice[i] / 1000)]);
  const none = () => moe.h("p", { className: "said" }, "None that occurs often enough to judge.");
  return part("Most exclusive tokens", rows.length ? listed(["token", "times", "of its occurrences", "as first choice"], rows, 0) : none());
}]);

moe.cardParts.push(["Chosen together with", (experts, row, expert) => {
  const { data, percent, part, listed, entries, jump } = experts;
  const linked = (title, list, to) => {
    if (!list || to === null || to === undefined) return [];
    const rows = entries(list, row, expert).map((i) => [jump(to, list.other[i]), percent(list.share[i] / 1000), list.lift[i] === null ? "–" : `${list.lift[i].toFixed(2)}×`]);
    return rows.length ? part(title, listed(["expert", "probability", "lift"], rows, 0)) : [];
  };
  const after = data.next ? data.next[row] : null;
  return [...linked("Chosen together with", data.partners, row), ...linked(`Then, at layer ${data.layers[after]?.label ?? ""}`, data.nexts, after)];
}]);
