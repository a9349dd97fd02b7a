"use strict";
// The index of a site of traces (site/index.py): experts, domains, tokens and traces are found, each with a card that leads to the pages.
moe.widgets.atlas = (place, { entries }) => {
  const { h } = moe;
  const CHIPS = 24; // shown of tokens
  const { listed, part, whole, percent } = moe.experts({});
  const card = moe.card(moe.experts({}), document.getElementById("find"), () => {});
  const said = (text) => h("p", { className: "said" }, text);
  const times = (hundredths) => (hundredths === null ? "–" : `${(hundredths / 100).toFixed(2)}×`);
  const link = (entry, row, expert, text) => h("a", { href: `${entry.page}#L${moe.layerKey(entry.layers[row][0])}E${expert}` }, text);
  const named = (entry, row, expert) => link(entry, row, expert, `layer ${entry.layers[row][0]} · expert ${expert}`);
  const to = (entry) => h("a", { href: entry.page }, h("bdi", {}, entry.name));
  const firsts = entries.map((entry) => entry.layers.reduce((starts, [, E]) => [...starts, starts.at(-1) + E], [0]));

  // text or name → [[entry, position in its list], …]
  const gathered = (list) => {
    const found = new Map();
    for (const entry of entries) list(entry).forEach((text, i) => found.set(text, [...(found.get(text) ?? []), [entry, i]]));
    return found;
  };
  const tokens = gathered((entry) => entry.words?.texts ?? []);
  const domains = gathered((entry) => entry.domains.map((domain) => domain.name));

  const ofToken = ({ words }, i) => Array.from({ length: words.start[i + 1] - words.start[i] }, (_, j) => words.start[i] + j);
  // a table per trace: rows of [row, expert, thousandths, hundredths]
  const byTrace = (found, rows, share) =>
    found.flatMap(([entry, i]) => {
      const cells = rows(entry, i).map(([row, expert, thousandths, hundredths]) => [named(entry, row, expert), percent(thousandths / 1000), times(hundredths)]);
      return cells.length ? part(to(entry), listed(["expert", share, "lift"], cells)) : [];
    });
  const tokenCard = (text) => {
    const found = tokens.get(text);
    const rows = (entry, i) => ofToken(entry, i).map((j) => ["row", "expert", "share", "lift"].map((name) => entry.words[name][j]));
    const counts = found.map(([entry, i]) => `${whole(entry.words.times[i])} in ${entry.name}`);
    const note = "The experts of each trace that take it most above their share of all tokens. Lift: share of its occurrences that go to the expert ÷ the expert's share of all tokens.";
    card.show(`Token ${text}`, [said(note), ...byTrace(found, rows, "of its occurrences"), ...part("Occurrences", said(counts.join(", ")))]);
  };
  const domainCard = (name) => {
    const found = domains.get(name);
    const note = "The experts of each trace that take most of its tokens above their mean over the domains.";
    card.show(`Domain ${name}`, [said(note), ...byTrace(found, (entry, i) => entry.domains[i].experts, "of its tokens")]);
  };

  // an expert's load, and which domains and tokens of the index it is listed for
  const having = (asked) =>
    entries.flatMap((entry, m) => {
      const layers = entry.layers.map(([label, experts]) => ({ label, experts }));
      const at = moe.expertAt(asked, { experts: { data: { layers } } });
      return at ? [[entry, m, ...at]] : [];
    });
  const takes = (entry, row, expert) => {
    const of = entry.domains.filter((domain) => domain.experts.some(([r, e]) => r === row && e === expert)).map((domain) => domain.name);
    const w = entry.words;
    const texts = w ? w.texts.filter((_, i) => ofToken(entry, i).some((j) => w.row[j] === row && w.expert[j] === expert)) : [];
    const sentence = (before, names, most) => (names.length ? [`${before} ${names.slice(0, most).join(" · ")}${names.length > most ? " · …" : ""}`] : []);
    return [...sentence("Domains that it takes more of than others:", of, 5), ...sentence("Frequent tokens that it takes most above its share:", texts, 12)];
  };
  const expertCard = (found) => {
    const [[first, , row, expert]] = found;
    const parts = found.flatMap(([entry, m, r, e]) => {
      const ratio = entry.ratio ? [`Takes ${times(entry.ratio[firsts[m][r] + e])} the mean load of its layer.`] : [];
      return part(link(entry, r, e, h("bdi", {}, entry.name)), h("div", {}, ...[...ratio, ...takes(entry, r, e)].map(said)));
    });
    card.show(`Layer ${first.layers[row][0]} · expert ${expert}`, [said("Click a name for its card on the trace's page."), ...parts]);
  };

  moe.finders.push((asked) => {
    const found = having(asked);
    if (!found.length) return [];
    const [entry, , row, expert] = found[0];
    return [{ kind: found.length > 1 ? `expert in ${found.length} traces` : "expert in 1 trace", text: `Layer ${entry.layers[row][0]}, expert ${expert}`, go: () => expertCard(found) }];
  });
  moe.finders.push((asked) =>
    entries.flatMap((entry) => (entry.name.toLowerCase().includes(asked) ? [{ kind: "trace", text: entry.name, go: () => (location.href = entry.page) }] : [])).slice(0, 6));
  moe.finders.push((asked) =>
    [...domains.keys()].flatMap((name) => (name.toLowerCase().includes(asked) ? [{ kind: "domain", text: name, go: () => domainCard(name) }] : [])).slice(0, 6));
  moe.finders.push((asked) => {
    const ranked = [...tokens.keys()].map((text) => [moe.tokenRank(text, asked), text.length, text]).filter(([by]) => by < 3);
    ranked.sort((a, b) => a[0] - b[0] || a[1] - b[1] || (a[2] < b[2] ? -1 : 1));
    return ranked.slice(0, 8).map(([, , text]) => ({ kind: "token", text, go: () => tokenCard(text) }));
  });

  // something to begin with
  const chips = (title, texts, open) => {
    if (!texts.length) return null;
    const buttons = texts.map((text) => {
      const button = h("button", { type: "button" }, h("bdi", {}, text));
      button.addEventListener("click", () => open(text));
      return button;
    });
    return h("p", { className: "chips" }, h("span", {}, title), ...buttons);
  };
  // the tokens whose first expert takes them most above its share, in as many traces as possible
  const telling = ([, held]) => held.reduce((sum, [entry, i]) => sum + (ofToken(entry, i).length ? entry.words.share[entry.words.start[i]] * Math.log2(entry.words.lift[entry.words.start[i]] / 100) : 0), 0);
  const best = [...tokens].filter(([text]) => /\p{L}{4}/u.test(text)).map((one) => [telling(one), one[0]]).sort((a, b) => b[0] - a[0]).slice(0, CHIPS);
  const shown = [chips("Domains", [...domains.keys()].slice(0, CHIPS), domainCard), chips("Tokens", best.map(([, text]) => text), tokenCard)];
  place.append(...shown.filter((one) => one !== null));
};
