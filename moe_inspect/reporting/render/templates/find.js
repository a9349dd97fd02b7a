"use strict";
// The search box, and addresses: #L12E45 opens the card of an expert, #section-id leads to a section.
// A finder is a function in moe.finders: (what is asked for in lower case, page) → [{ kind, text, go }]; `page` is what map.js returns, or undefined.
moe.finders = [];

// "12" and "3 (encoder)" in an address: L12, L3-encoder
moe.layerKey = (label) => label.replace(" (", "-").replace(")", "");
moe.address = (page, row, expert) => `#L${moe.layerKey(page.experts.data.layers[row].label)}E${expert}`;
moe.expertAt = (text, page) => {
  const found = text.trim().match(/^(?:l(?:ayer)?)?[\s#]*(\d+(?:\/\d+)?(?:-[a-z]+)?)[\s,.·:]*(?:(?:e|expert)\s*|\s)(\d+)$/i);
  if (!found || !page) return null;
  const { layers } = page.experts.data;
  const key = found[1].toLowerCase();
  const exact = layers.findIndex((layer) => moe.layerKey(layer.label).toLowerCase() === key);
  const row = exact >= 0 ? exact : layers.findIndex((layer) => layer.label.match(/^\d+/)[0] === key);
  const expert = Number(found[2]);
  return row >= 0 && expert < layers[row].experts ? [row, expert] : null;
};

moe.finders.push((asked, page) => {
  const at = moe.expertAt(asked, page);
  if (!at) return [];
  const go = () => page.card.open(...at);
  return [{ kind: "expert", text: `Layer ${page.experts.data.layers[at[0]].label}, expert ${at[1]}`, go }];
});
moe.finders.push((asked, page) => {
  const found = asked.match(/^l(?:ayer)?\s*(\S+)$/);
  const row = found && page ? page.experts.data.layers.findIndex((layer) => moe.layerKey(layer.label).toLowerCase() === found[1]) : -1;
  if (row < 0) return [];
  return [{ kind: "layer", text: `Layer ${page.experts.data.layers[row].label} on the map`, go: () => page.map.element.scrollIntoView({ block: "center" }) ?? (page.map.move(row, 0), page.map.element.focus({ preventScroll: true })) }];
});
moe.finders.push((asked, page) =>
  !page || !page.experts.data.load.length ? [] : page.experts.data.domains.flatMap((name, domain) => {
    const go = () => {
      page.choose(domain);
      page.map.element.scrollIntoView({ block: "center" });
      page.map.element.focus({ preventScroll: true });
    };
    return name.toLowerCase().includes(asked) ? [{ kind: "domain", text: name, go }] : [];
  }));
moe.finders.push((asked) =>
  [...document.querySelectorAll("#menu a")].flatMap((link) => {
    const go = () => ((location.hash = link.hash), document.querySelector(link.hash)?.scrollIntoView());
    return link.textContent.toLowerCase().includes(asked) ? [{ kind: "section", text: link.textContent, go }] : [];
  }));

// 0: the token is what is asked for, with or without the space before it; 1: it begins so; 2: it holds it; 3: it does not
moe.tokenRank = (text, asked) => {
  const rank = (text) => (text === asked ? 0 : text.startsWith(asked) ? 1 : text.includes(asked) ? 2 : 3);
  const lower = text.toLowerCase();
  return Math.min(rank(lower.replace(/^[␣▁Ġ]+/, "")), rank(lower));
};

// the experts that have a token among those most their own
moe.finders.push((asked, page) => {
  const words = page?.experts.data.words;
  if (!words) return [];
  const ranked = words.texts.map((text, id) => [moe.tokenRank(text, asked), text.length, id]).filter(([by]) => by < 3);
  ranked.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  return ranked.slice(0, 8).map(([, , id]) => ({ kind: "token", text: words.texts[id], go: () => moe.tokenCard(page, id) }));
});
moe.tokenCard = ({ experts, card }, id) => {
  const { data, listed, percent, whole } = experts;
  const { words, first } = data;
  const rows = [];
  data.layers.forEach((layer, row) => {
    for (let expert = 0; expert < layer.experts; expert++)
      for (let i = words.start[first[row] + expert]; i < words.start[first[row] + expert + 1]; i++) if (words.text[i] === id) rows.push([row, expert, i]);
  });
  rows.sort((a, b) => words.share[b[2]] - words.share[a[2]]);
  const cells = rows.map(([row, expert, i]) => [
    experts.jump(row, expert, `layer ${data.layers[row].label} · expert ${expert}`),
    whole(words.count[i]), percent(words.share[i] / 1000), words.choice[i] === null ? "–" : percent(words.choice[i] / 1000),
  ]);
  const note = "Experts that have it among their most exclusive tokens, by their share of its occurrences.";
  card.show(`Token ${words.texts[id]}`, [moe.h("p", { className: "said" }, note), listed(["expert", "times", "of its occurrences", "as first choice"], cells, 0)]);
};

moe.find = (page) => {
  const { h } = moe;
  const box = document.getElementById("find");
  const list = document.getElementById("found");
  let results = [];
  let at = 0;

  const close = () => {
    list.hidden = true;
    box.setAttribute("aria-expanded", "false");
    box.removeAttribute("aria-activedescendant");
  };
  const mark = (to) => {
    at = to;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
    if (!results.length) return;
    box.setAttribute("aria-activedescendant", list.children[at].id);
    list.children[at].scrollIntoView({ block: "nearest" });
  };
  const go = (result) => {
    close();
    box.value = "";
    result.go();
  };
  const ask = () => {
    const asked = box.value.trim().toLowerCase();
    if (!asked) return close();
    results = moe.finders.flatMap((finder) => finder(asked, page)).slice(0, 20);
    const items = results.map((result, i) => {
      const item = h("li", { id: `found-${i}`, role: "option" }, h("bdi", {}, result.text), h("span", {}, result.kind));
      item.addEventListener("pointerdown", (event) => event.preventDefault()); // the box keeps the focus
      item.addEventListener("click", () => go(result));
      return item;
    });
    list.replaceChildren(...(items.length ? items : [h("li", { role: "option", "aria-disabled": "true" }, "Nothing found.")]));
    list.hidden = false;
    box.setAttribute("aria-expanded", "true");
    mark(0);
  };
  box.addEventListener("input", ask);
  box.addEventListener("focus", ask);
  box.addEventListener("blur", close);
  box.addEventListener("keydown", (event) => {
    const n = results.length;
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && !list.hidden && n) go(results[at]);
    else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && n) mark((at + (event.key === "ArrowDown" ? 1 : n - 1)) % n);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    box.focus();
  });

  const follow = () => {
    const asked = decodeURIComponent(location.hash.slice(1));
    if (!/^L\d.*E\d+$/i.test(asked)) return;
    const found = moe.expertAt(asked, page);
    if (found) page.card.open(...found);
    else {
      box.value = asked;
      box.focus();
    }
  };
  window.addEventListener("hashchange", follow);
  follow();
};
