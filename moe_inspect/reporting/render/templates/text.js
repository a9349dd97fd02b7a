"use strict";
// The text of documents, each token in the colour of its route at one layer; the route through all layers beside it.
moe.widgets.text = (place, data, page) => {
  const { h } = moe;
  const routes = moe.routes(data);
  const { route, text, margin } = routes;
  const compared = data.layers[0].b !== undefined;
  const known = data.layers.every((layer) => layer.first);
  const weights = data.layers.some((layer) => layer.most > 0);
  const at = { document: 0, row: data.row, mode: "", expert: 0, token: null, pinned: null };
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
  const number = (value) => (value === null ? "" : value.toFixed(value < 0.0995 ? 3 : 2));

  // --- what a token is coloured by: name → [label, colour of a token, legend]
  const AMOUNT = (title, low, high) => ({
    kind: "amount", title, low, high, unknown: "", log: false, stops: [[0, "least"], [0.5, "middle"], [1, "most"]],
    ticks: [[0, moe.digits(low)], [0.5, ""], [1, moe.digits(high)]],
  });
  const ink = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 128 ? "#000" : "#fff");
  const scaled = (scale) => {
    const colours = moe.colours(scale);
    return (value) => {
      const rgb = value === null ? null : colours(value);
      return rgb && { back: `rgb(${rgb.map(Math.round)})`, ink: ink(rgb) };
    };
  };
  const swatch = (back) => {
    const box = h("i", { className: "swatch" });
    box.style.background = back;
    return box;
  };
  const said = (words) => h("span", {}, words);
  const tokens = () => Array.from({ length: data.start[at.document + 1] - data.start[at.document] }, (_, i) => data.start[at.document] + i);
  const layer = () => data.layers[at.row];
  const byExpert = (expert) => ({ back: moe.expertColour(expert, layer().experts), ink: "#000" });
  const same = (token) => {
    const [a, b] = [route(at.row, token), route(at.row, token, "b")];
    const mine = new Set(a.map((slot) => slot.expert));
    return a.length && b.length ? b.filter((slot) => mine.has(slot.expert)).length / Math.max(a.length, b.length) : null;
  };
  const highest = (values) => Math.max(...values.filter((v) => v !== null && Number.isFinite(v)), 1e-6);
  const MODES = {
    agreement: () => {
      const colour = scaled(AMOUNT("", 0, 1));
      return {
        of: (token) => {
          const share = same(token);
          return share === null || share === 1 ? null : colour(1 - share);
        },
        legend: () => [moe.scaleBar(AMOUNT("share of its experts that differ in B", 0, 1)), said("no colour: the same experts, or not compared")],
      };
    },
    first: () => ({
      of: (token) => {
        const first = route(at.row, token)[0];
        return first ? byExpert(first.expert) : null;
      },
      legend: firstLegend,
    }),
    weight: () => {
      const scale = AMOUNT("gate weight of the first expert", 0, highest(tokens().map((t) => route(at.row, t)[0]?.weight ?? null)));
      const colour = scaled(scale);
      return { of: (token) => colour(route(at.row, token)[0]?.weight ?? null), legend: () => [moe.scaleBar(scale)] };
    },
    margin: () => {
      const all = tokens().map((t) => margin(at.row, t)).filter((v) => v !== null && Number.isFinite(v)).sort((a, b) => a - b);
      const scale = AMOUNT("ln(weight ÷ weight) of the last two experts: faint is undecided", 0, Math.max(0.1, all[Math.floor(0.95 * all.length)] ?? 0));
      const colour = scaled(scale);
      return { of: (token) => colour(margin(at.row, token)), legend: () => [moe.scaleBar(scale)] };
    },
    expert: () => {
      const mine = (token) => route(at.row, token).find((slot) => slot.expert === at.expert);
      const scale = AMOUNT(`gate weight of expert ${at.expert}`, 0, highest(tokens().map((t) => mine(t)?.weight ?? null)));
      const colour = weights ? scaled(scale) : () => byExpert(at.expert);
      return {
        of: (token) => (mine(token) ? { ...colour(mine(token).weight), reached: true } : null),
        legend: () => {
          const n = tokens().filter(mine).length;
          return [...(weights ? [moe.scaleBar(scale)] : []), said(`${n.toLocaleString("en")} of ${tokens().length.toLocaleString("en")} tokens reach expert ${at.expert} (${percent(n / tokens().length)}), underlined`)];
        },
      };
    },
  };
  const LABELS = { agreement: "agreement with B", first: "first expert", weight: "gate weight", margin: "margin", expert: "reaches expert" };
  const offered = Object.keys(MODES).filter((name) => ({ agreement: compared, first: known, weight: known && weights, margin: known && weights && data.layers.some((l) => l.k > 1), expert: true })[name]);
  at.mode = offered[0];

  const firstLegend = () => {
    const counts = new Map();
    for (const token of tokens()) {
      const first = route(at.row, token)[0];
      if (first) counts.set(first.expert, (counts.get(first.expert) ?? 0) + 1);
    }
    const ranked = [...counts].sort((a, b) => b[1] - a[1]);
    const most = 12;
    const button = ([expert, n]) => {
      const name = h("button", { type: "button", title: `Show the tokens that reach expert ${expert}` }, swatch(moe.expertColour(expert, layer().experts)), h("b", {}, String(expert)), ` ${percent(n / tokens().length)}`);
      name.addEventListener("click", () => set({ mode: "expert", expert }));
      return name;
    };
    return [said("first expert"), ...ranked.slice(0, most).map(button), ...(ranked.length > most ? [said(`and ${ranked.length - most} more of ${layer().experts}`)] : [])];
  };

  // --- the controls
  const select = (name, options, chosen, act) => {
    const list = h("select", {}, ...options.map(([value, label]) => h("option", { value, selected: value === chosen }, label)));
    list.addEventListener("change", () => act(list.value));
    return { list, label: h("label", {}, name, list) };
  };
  const domains = [...new Set(data.documents.map((document) => document.domain))];
  const tokensOf = (i, n = data.start[i + 1] - data.start[i]) => `${n.toLocaleString("en")} ${n === 1 ? "token" : "tokens"}`;
  const documentChoice = h("select", { id: "text-document" }, ...domains.map((domain) => h("optgroup", { label: domain },
    ...data.documents.map((document, i) => [document, i]).filter(([document]) => document.domain === domain)
      .map(([document, i]) => h("option", { value: i }, `${domain} · document ${document.number} · ${tokensOf(i)}`)))));
  documentChoice.addEventListener("change", () => set({ document: Number(documentChoice.value), token: null, pinned: null }));
  const mode = select("Colour", offered.map((name) => [name, LABELS[name]]), at.mode, (value) => set({ mode: value }));
  const slider = h("input", { type: "range", id: "text-layer", min: 0, max: data.layers.length - 1, value: at.row });
  const layerName = h("output", {});
  slider.addEventListener("input", () => set({ row: Number(slider.value) }));
  const expert = h("input", { type: "number", id: "text-expert", min: 0, value: 0 });
  expert.addEventListener("input", () => expert.value !== "" && set({ expert: Number(expert.value), mode: "expert" }));
  const ids = h("input", { type: "checkbox", id: "text-ids", checked: true });
  ids.addEventListener("change", () => draw());
  const expertLabel = h("label", {}, "Expert", expert);
  const idsLabel = h("label", {}, ids, "expert ids");
  mode.list.id = "text-mode";

  const box = h("div", {
    className: "routed", tabIndex: 0, role: "application", "aria-roledescription": "text with routes",
    "aria-label": "The document. Left and right arrows move from token to token, up and down from line to line, Page Up and Page Down through the layers; Enter pins a token, Escape releases it.",
  });
  const labels = h("div", { className: "ids", "aria-hidden": "true" });
  const body = h("div", { className: "body", dir: "auto" });
  const tip = h("div", { className: "tip", hidden: true });
  const live = h("p", { className: "unseen", "aria-live": "polite" });
  const legend = h("div", { className: "legend" });
  const panel = h("div", { className: "route", role: "region", "aria-label": "Route of the token", tabIndex: 0 });
  box.append(body, labels);
  place.append(
    h("div", { className: "controls" }, h("label", {}, "Document", documentChoice), data.layers.length > 1 ? h("label", {}, "Layer", slider, layerName) : null, mode.label, expertLabel, idsLabel),
    legend, h("div", { className: "read" }, h("div", { className: "stage" }, box, h("div", { className: "below" }, tip)), panel), live,
  );

  // --- the text: a span for each unit, which is a token and those after it that only end its last character
  let units = [];
  let unitOf = new Map();
  const build = () => {
    units = [];
    for (const token of tokens()) {
      if (text(token) === "" && units.length) units.at(-1).n++;
      else units.push({ first: token, n: 1 });
    }
    unitOf = new Map(units.flatMap((unit) => Array.from({ length: unit.n }, (_, j) => [unit.first + j, unit])));
    for (const unit of units) {
      unit.span = h("span", {}, moe.shown(text(unit.first)) || "·");
      unit.span.unit = unit;
      // an escape is read from the left within Hebrew too
      if (/\\[xuU][0-9a-f]{2}/.test(text(unit.first))) unit.span.className = "escape";
    }
    body.replaceChildren(...units.map((unit) => unit.span));
    box.scrollTop = 0;
  };
  const colourUnit = (unit, of) => {
    const colours = Array.from({ length: unit.n }, (_, j) => of(unit.first + j));
    const { style } = unit.span;
    const backs = colours.map((colour) => colour?.back ?? "transparent");
    const stops = backs.map((back, j) => `${back} ${(100 * j) / unit.n}% ${(100 * (j + 1)) / unit.n}%`);
    style.background = unit.n > 1 ? `linear-gradient(to right, ${stops.join(", ")})` : backs[0];
    style.color = colours.find((colour) => colour)?.ink ?? "";
    unit.span.classList.toggle("reached", colours.some((colour) => colour?.reached));
  };
  // where a run of tokens with one first expert begins, its id below, as long as there is room
  const place_ids = () => {
    labels.replaceChildren();
    box.classList.toggle("with-ids", ids.checked && at.mode === "first");
    if (!ids.checked || at.mode !== "first") return;
    const frame = body.getBoundingClientRect();
    const made = [];
    let [before, line, end] = [null, 0, 0];
    for (const unit of units) {
      const first = route(at.row, unit.first)[0]?.expert ?? null;
      if (first === before) continue;
      before = first;
      if (first === null) continue;
      const rect = unit.span.getClientRects()[0];
      if (!rect || !rect.width) continue;
      const [x, y] = [rect.left - frame.left, rect.bottom - frame.top];
      const wide = 5.6 * String(first).length + 3;
      if (Math.abs(y - line) < 4 && x < end) continue;
      [line, end] = [y, x + wide];
      made.push(h("i", { style: `left: ${x.toFixed(1)}px; top: ${y.toFixed(1)}px` }, String(first)));
    }
    labels.append(...made);
  };
  const draw = () => {
    const { of, legend: made } = MODES[at.mode]();
    units.forEach((unit) => colourUnit(unit, of));
    legend.replaceChildren(...made());
    mode.list.value = at.mode;
    slider.value = at.row;
    slider.setAttribute("aria-valuetext", `layer ${layer().label}`);
    layerName.textContent = layer().label;
    documentChoice.value = at.document;
    expert.max = layer().experts - 1;
    expert.value = at.expert;
    expertLabel.hidden = at.mode !== "expert";
    idsLabel.hidden = at.mode !== "first";
    place_ids();
    describe();
  };
  const set = (changed) => {
    const other = changed.document !== undefined && changed.document !== at.document;
    Object.assign(at, changed);
    at.expert = Math.max(0, Math.min(layer().experts - 1, Math.floor(at.expert)));
    if (other) build();
    draw();
  };

  // --- the route of a token through all layers
  const chip = (row, slot, apart) => {
    const tag = page ? "button" : "span";
    const made = h(tag, { className: apart ? "chip apart" : "chip" }, h("b", {}, String(slot.expert)), slot.weight === null ? "" : ` ${number(slot.weight)}`);
    made.style.background = moe.expertColour(slot.expert, data.layers[row].experts);
    if (page) {
      made.type = "button";
      made.setAttribute("aria-label", `Layer ${data.layers[row].label}, expert ${slot.expert}: open its card`);
      made.addEventListener("click", () => page.card.open(row, slot.expert));
    }
    return made;
  };
  const partOf = (token) => {
    const unit = unitOf.get(token);
    const whole = text(unit.first) || "·";
    return unit.n > 1 ? [whole, ` part ${token - unit.first + 1} of ${unit.n}`] : [whole, ""];
  };
  const describe = () => {
    const token = at.pinned ?? at.token;
    units.forEach((unit) => unit.span.classList.remove("pointed", "pinned"));
    if (token === null || !unitOf.has(token)) {
      panel.replaceChildren(h("p", { className: "said" }, "Point at a token to see its route through all layers; click to keep it."));
      return;
    }
    if (at.token !== null) unitOf.get(at.token)?.span.classList.add("pointed");
    if (at.pinned !== null) unitOf.get(at.pinned).span.classList.add("pinned");
    const [whole, part] = partOf(token);
    const rows = data.layers.map((one, row) => {
      const name = h("button", { type: "button", className: "jump", title: "Colour the text by this layer" }, one.label);
      name.addEventListener("click", () => set({ row }));
      const of = (side, others) => route(row, token, side).map((slot) => chip(row, slot, others && !others.some((other) => other.expert === slot.expert)));
      const [a, b] = compared ? [of("a", route(row, token, "b")), of("b", route(row, token, "a"))] : [of("a"), null];
      const none = (made) => (made.length ? made : [said("–")]);
      return h("tr", { className: row === at.row ? "now" : "" }, h("th", { scope: "row" }, name), h("td", {}, ...(compared ? [h("div", {}, h("i", {}, "A"), ...none(a)), h("div", {}, h("i", {}, "B"), ...none(b))] : none(a))));
    });
    const scrolled = panel.scrollTop;
    panel.replaceChildren(
      h("p", { className: "token" }, h("bdi", {}, moe.shown(whole)), h("small", {}, `${part} token ${token - data.start[at.document] + 1}${at.pinned === null ? "" : ", pinned"}`)),
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"), h("th", { scope: "col" }, weights ? "experts and gate weights" : "experts"))), h("tbody", {}, ...rows)),
    );
    panel.scrollTop = scrolled;
  };
  const sentence = (token, most = Infinity) => {
    const list = (side) => {
      const slots = route(at.row, token, side);
      const names = slots.slice(0, most).map((slot) => `${slot.expert}${slot.weight === null ? "" : ` (${number(slot.weight)})`}`);
      return slots.length ? `${slots.length > 1 ? "experts" : "expert"} ${names.join(", ")}${slots.length > most ? " …" : ""}` : "no expert";
    };
    return compared ? `layer ${layer().label}: A ${list("a")}; B ${list("b")}` : `layer ${layer().label}: ${list("a")}`;
  };
  const point = (token, announce) => {
    if (token === at.token) return;
    at.token = token;
    describe();
    tip.hidden = token === null;
    if (token === null) return;
    const [whole, part] = partOf(token);
    tip.replaceChildren(h("div", {}, h("bdi", {}, moe.shown(whole).trim() || "␣"), part), h("div", {}, sentence(token, 3)));
    if (announce) live.textContent = `${whole}${part}. ${sentence(token)}`;
  };
  const pin = (token) => {
    at.pinned = at.pinned === token ? null : token;
    describe();
  };
  const under = (event) => {
    const unit = event.target.unit;
    if (!unit) return null;
    const rect = [...unit.span.getClientRects()].find((r) => event.clientX >= r.left && event.clientX <= r.right) ?? unit.span.getBoundingClientRect();
    return unit.first + Math.max(0, Math.min(unit.n - 1, Math.floor(((event.clientX - rect.left) / rect.width) * unit.n)));
  };
  body.addEventListener("pointermove", (event) => point(under(event), false));
  box.addEventListener("pointerleave", () => point(null, false));
  body.addEventListener("click", (event) => {
    const token = under(event);
    if (token === null) return;
    point(token, true);
    pin(token);
  });

  const upOrDown = (token, step) => {
    const here = unitOf.get(token).span.getClientRects()[0];
    const middle = (here.left + here.right) / 2;
    const lines = new Map();
    for (const unit of units) {
      const r = unit.span.getClientRects()[0];
      const line = Math.round(r.top);
      const off = Math.abs((r.left + r.right) / 2 - middle);
      if (r.width && !(lines.get(line)?.off <= off)) lines.set(line, { off, token: unit.first });
    }
    const tops = [...lines.keys()].sort((a, b) => a - b);
    const now = tops.findIndex((top) => Math.abs(top - here.top) < 4);
    return lines.get(tops[Math.max(0, Math.min(tops.length - 1, now + step))]).token;
  };
  box.addEventListener("keydown", (event) => {
    const [first, last] = [data.start[at.document], data.start[at.document + 1] - 1];
    const now = at.token ?? at.pinned ?? first - 1;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: first, End: last }[event.key];
    if (to !== undefined) point(Math.max(first, Math.min(last, to)), true);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") point(now < first ? first : upOrDown(now, event.key === "ArrowUp" ? -1 : 1), true);
    else if (event.key === "PageUp" || event.key === "PageDown") {
      set({ row: Math.max(0, Math.min(data.layers.length - 1, at.row + (event.key === "PageUp" ? -1 : 1))) });
      live.textContent = at.token === null ? `layer ${layer().label}` : sentence(at.token);
    } else if (event.key === "Enter" && at.token !== null) pin(at.token);
    else if (event.key === "Escape") {
      at.pinned = null;
      point(null, false);
      describe();
    } else return;
    event.preventDefault();
    if (at.token !== null) unitOf.get(at.token)?.span.scrollIntoView({ block: "nearest" });
  });

  new ResizeObserver(place_ids).observe(body);
  moe.recoloured.push(draw);
  moe.text = {
    routes,
    // the map and the cards choose the layer and the expert
    follow: (row, chosen) => set({ row, expert: chosen }),
    show: (row, chosen) => {
      set({ row, expert: chosen, mode: "expert" });
      page?.card.close();
      place.closest("section").scrollIntoView({ behavior: "smooth" });
      box.focus({ preventScroll: true });
    },
  };
  build();
  draw();
};
