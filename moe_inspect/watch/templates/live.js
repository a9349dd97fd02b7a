"use strict";
// Keeps the page up to date: the server sends what it shows as an event, whenever there is news.
moe.live = (() => {
  const at = (id) => document.getElementById(id);
  const say = (id, text) => (at(id).textContent = text);
  const count = (n) => n.toLocaleString("en");
  let now = null;
  let plots = [];
  let shape = "";

  const draw = () => {
    const places = [...document.querySelectorAll(".plot")];
    const heat = now.panels[0].marks[0];
    if (shape !== `${heat.rows}×${heat.columns}`) {
      // other routers: another trace
      shape = `${heat.rows}×${heat.columns}`;
      moe.plots.length = 0;
      plots = places.map((place, i) => moe.plot(place, () => now.panels[i]));
    } else {
      plots.forEach((plot) => plot.redraw());
    }
  };

  const alarms = () => {
    const items = now.alarms.map((text) => moe.h("li", { className: "critical" }, moe.h("b", { className: "severity" }, "alarm"), ` ${text}`));
    at("alarm-list").replaceChildren(...(items.length ? items : [moe.h("li", {}, "None.")]));
  };

  const words = () => {
    at("text").hidden = !now.text;
    if (!now.text) return;
    say("text-title", `Last text for expert ${now.text.expert} of layer ${now.text.layer}`);
    at("words").replaceChildren(...now.text.words.map(([word, hot]) => (hot ? moe.h("mark", {}, word) : document.createTextNode(word))));
  };

  const status = (name, said) => {
    at("status").className = `status ${name}`;
    say("status", name);
    say("said", said);
  };

  const show = (news) => {
    if (news.panels) news.panels.forEach((panel) => (panel.marks = panel.marks.map(moe.decoded)));
    now = news;
    document.title = `${now.alarms.length ? `(${now.alarms.length}) ` : ""}${now.path} · moe-inspect watch`;
    say("path", now.path);
    const said = {
      waiting: "no trace yet",
      recording: `by ${now.writer}`,
      complete: "",
      interrupted: "it was closed before its end",
      killed: `${now.writer} is gone: it was stopped before its end`,
    };
    status(now.status, said[now.status] + (now.left_tokens ? ` · ${count(now.left_tokens)} tokens not counted yet` : ""));
    at("trouble").hidden = !now.trouble;
    say("trouble", now.trouble);
    say("tokens", count(now.tokens));
    say("decisions", count(now.decisions));
    say("tokens-rate", now.rates ? `${count(Math.round(now.rates[0]))} per second` : "");
    say("decisions-rate", now.rates ? `${count(Math.round(now.rates[1]))} per second` : "");
    alarms();
    if (!now.panels) return;
    say("worst", now.worst.max_over_mean === null ? "–" : `${now.worst.max_over_mean.toFixed(2)}×`);
    say("worst-layer", `layer ${now.worst.layer}, the worst`);
    say("chance", `${now.worst.chance.toFixed(2)}×`);
    say("dead", count(now.dead));
    say("experts", `of ${count(now.experts)}`);
    document.querySelectorAll(".window").forEach((span) => (span.textContent = `the last ${count(now.window_tokens)} tokens`));
    draw();
    words();
  };

  const begin = () => {
    const source = new EventSource("events");
    source.addEventListener("message", (event) => {
      show(JSON.parse(event.data));
      document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates ?? 0) + 1;
    });
    // the browser tries again by itself
    source.addEventListener("error", () => status("lost", "moe-inspect watch does not answer: it has ended, or the network is down"));
  };
  document.addEventListener("DOMContentLoaded", begin);
  return { show };
})();
