"use strict";
// Routes of tokens as section.py packs them, their colours, and the contexts on an expert's card.
// Texts of the corpus become text nodes, never markup.
moe.numbers = (packed) => {
  const { buffer } = Uint8Array.from(atob(packed.slice(1)), (c) => c.charCodeAt(0));
  return new { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[packed[0]](buffer);
};

moe.routes = (data) => {
  const words = moe.numbers(data.words);
  const shown = data.start[data.documents.length];
  const decoded = new Map();
  const weight = (row, level) => data.layers[row].most * (level / data.levels) ** 2;
  const layer = (row, side) => {
    const key = `${side} ${row}`;
    if (!decoded.has(key)) {
      const { k, [side]: packed } = data.layers[row];
      const ids = moe.numbers(packed.ids);
      const levels = packed.weights ? Uint8Array.from(moe.numbers(packed.weights)) : null;
      // the level of a slot is stored as the distance from that of the slot before
      if (levels) for (let i = shown; i < k * shown; i++) levels[i] = (levels[i] + levels[i - shown]) % (data.levels + 1);
      decoded.set(key, { ids, levels });
    }
    return decoded.get(key);
  };
  // the experts of a token at a router, [{ expert, weight }], first choice first; weight null where none is known
  const route = (row, token, side = "a") => {
    const { k, experts } = data.layers[row];
    const { ids, levels } = layer(row, side);
    const found = [];
    for (let at = token; at < k * shown; at += shown)
      if (ids[at] < experts) found.push({ expert: ids[at], weight: levels ? weight(row, levels[at]) : null });
    return found;
  };
  // ln of the ratio of the two smallest gate weights; null where they are not known
  const margin = (row, token) => {
    const last = route(row, token).slice(-2);
    return last.length < 2 || !last[1].weight ? null : Math.log(last[0].weight / last[1].weight);
  };
  return { data, words, text: (token) => data.texts[words[token]], route, margin, weight };
};

// 8 hue families that are told apart by the colour-blind too (Paul Tol's "light"), each of an eighth of the ids, in up to 4 shades
moe.families = ["#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#a3a000"];
moe.expertColour = (expert, experts) => {
  const each = Math.max(1, Math.ceil(experts / moe.families.length));
  const family = moe.families[Math.floor(expert / each)];
  const white = [0, 45, 22, 65][(expert % each) % 4];
  return `color-mix(in srgb, ${family}, #fff ${white}%)`;
};
moe.shown = (text) => text.replaceAll("\n", "↵\n");

// between the tokens that are most its own and its partners
moe.cardParts.splice(2, 0, ["Tokens in context", (experts, row, expert) => {
  const { h } = moe;
  const { routes, show } = moe.text ?? {};
  if (!routes) return [];
  const { data, weight, text } = routes;
  moe.text.follow(row, expert);
  const lists = (moe.text.contexts ??= Object.fromEntries(Object.entries(data.contexts).map(([name, packed]) => [name, packed ? moe.numbers(packed) : null])));
  const at = experts.data.first[row] + expert;
  if (!lists.start) {
    lists.start = new Uint32Array(lists.count.length + 1);
    lists.count.forEach((n, i) => (lists.start[i + 1] = lists.start[i] + n));
  }
  const NEAR = 8;
  const found = Array.from({ length: lists.count[at] }, (_, j) => lists.start[at] + j);
  if (lists.level) found.sort((a, b) => lists.level[b] - lists.level[a]);
  const line = (i) => {
    const token = lists.token[i];
    const document = data.start.findLastIndex((first) => first <= token);
    const [from, to] = [Math.max(data.start[document], token - NEAR), Math.min(data.start[document + 1], token + NEAR + 1)];
    // a token that is a part of a character stands for the whole of it
    let first = token;
    while (first > from && text(first) === "") first--;
    const joined = (a, b) => Array.from({ length: Math.max(0, b - a) }, (_, j) => text(a + j)).join("").replaceAll("\n", "↵");
    const said = [lists.level ? weight(row, lists.level[i]).toFixed(2) : "", data.domainOf[document]].filter((part) => part).join(" · ");
    return h("div", { className: "context", dir: "auto" },
      h("span", { className: "before" }, h("span", {}, joined(from, first))),
      h("mark", {}, joined(first, first + 1)),
      h("span", { className: "after" }, joined(token + 1, to)),
      h("small", { dir: "ltr" }, h("bdi", {}, said)));
  };
  const button = h("button", { type: "button" }, "Show its tokens in the text");
  button.addEventListener("click", () => show(row, expert));
  const sample = `a random sample of ${data.pool.toLocaleString("en")} tokens from all domains`;
  return [
    ...experts.part("Tokens in context", h("div", {}, ...found.map(line))),
    h("p", { className: "said" }, found.length ? `Drawn at random from this expert's tokens in ${sample}${lists.level ? ", with the gate weight" : ""}.` : `None of ${sample} went to this expert.`),
    button,
  ];
}]);
