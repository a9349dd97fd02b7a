"use strict";
// Tables: sorted by a click on a column's head, downloaded as csv, and the Python that gives them.

// text as `readable` of text.py has it: every character visible
moe.readable = (text) => {
  const escape = (c) => {
    const known = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };
    const code = c.codePointAt(0);
    const hex = (width) => code.toString(16).padStart(width, "0");
    return known[c] ?? (code < 256 ? `\\x${hex(2)}` : code < 65536 ? `\\u${hex(4)}` : `\\U${hex(8)}`);
  };
  const shown = text.replace(/[\p{C}\p{Z}]/gu, (c) => (c === " " ? c : escape(c)));
  return shown.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
};
// a cell as `number` of text.py has it
moe.cell = (value, whole) => {
  if (value === null) return "–";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "string") return moe.readable(value);
  if (whole) return value.toLocaleString("en");
  const small = Math.abs(value) < 0.001 && value !== 0;
  return small ? value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2") : value.toLocaleString("en", { minimumFractionDigits: 3, maximumFractionDigits: 3 });
};

// as in any csv: text that a spreadsheet would take for a formula gets an apostrophe in front
moe.csv = (columns, rows) => {
  const cell = (value) => {
    if (value === null) return "";
    let text = typeof value === "boolean" ? (value ? "True" : "False") : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r\n]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
};
moe.save = (name, text) => {
  const link = moe.h("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};
moe.copy = async (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(moe.h("textarea", { value: text }));
  area.select();
  document.execCommand("copy");
  area.remove();
};

// a name that may break after an underscore and before a capital
moe.breakable = (text) => text.split(/(?<=\w{4}_)|(?<=[a-z])(?=[A-Z])/).flatMap((part) => [part, moe.h("wbr")]);

// place: what page.html writes around a table. name: of the file. given: as `table_json` of payload.py has it, or none
moe.table = (place, name, given) => {
  const { h } = moe;
  const tools = h("div", { className: "tools" });
  const button = (text, act) => {
    const made = h("button", { type: "button" }, text);
    made.addEventListener("click", act);
    tools.append(made);
    return made;
  };
  const said = h("span", { role: "status" });
  if (given && place.querySelector("table")) sortable(given);
  else if (given) download(given, () => Array.from({ length: given.rows }, (_, i) => i));
  if (place.dataset.python) {
    const code = h("pre", { className: "code", tabIndex: 0, hidden: true }, place.dataset.python);
    button("Copy as Python", () => {
      code.hidden = false;
      moe.copy(place.dataset.python).then(
        () => (said.textContent = "Copied."),
        () => (said.textContent = "The browser blocks copying: select the lines instead."),
      );
    });
    tools.append(said);
    place.append(code);
  }
  if (tools.children.length) place.prepend(tools);

  function download({ columns, values }, order) {
    button("Download csv", () => moe.save(`${name}.csv`, moe.csv(columns, order().map((i) => columns.map((_, c) => values[c][i])))));
  }
  function sortable(given) {
    const { columns, values, numeric } = given;
    const held = values[0]?.length ?? 0;
    const whole = given.real.map((real) => !real);
    const body = place.querySelector("tbody");
    const heads = [...place.querySelectorAll("th")];
    let order = Array.from({ length: held }, (_, i) => i);
    let shown = body.rows.length;
    let by = [-1, 0]; // column, direction

    const rest = h("p", { className: "more" });
    const count = () => {
      const cut = given.rows > held ? `, the first ${held.toLocaleString("en")} of ${given.rows.toLocaleString("en")}, which are sorted and downloaded` : "";
      const text = `${shown.toLocaleString("en")} of ${held.toLocaleString("en")} rows${cut}. `;
      const next = h("button", { type: "button", hidden: shown >= held }, "Show more");
      next.addEventListener("click", () => ((shown = Math.min(held, shown + 400)), fill()));
      rest.replaceChildren(text, next);
      rest.hidden = shown >= held && !cut;
    };
    const fill = () => {
      const text = (i, c) => moe.cell(values[c][i], whole[c]);
      const cell = (i, c) => h("td", { className: numeric[c] ? "n" : "" }, ...moe.breakable(text(i, c)));
      body.replaceChildren(...order.slice(0, shown).map((i) => h("tr", {}, ...columns.map((_, c) => cell(i, c)))));
      count();
    };
    // numbers from the largest, text from A; a second click turns it, a third gives the order of the table; empty cells stay last
    const sort = (c) => {
      const ways = numeric[c] ? [-1, 1, 0] : [1, -1, 0];
      by = by[0] === c ? [c, ways[(ways.indexOf(by[1]) + 1) % 3]] : [c, ways[0]];
      const value = values[c].map((v) => (v === "inf" ? Infinity : v === "-inf" ? -Infinity : v));
      const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      order = Array.from({ length: held }, (_, i) => i);
      if (by[1]) order.sort((a, b) => (value[a] === null) - (value[b] === null) || by[1] * compare(value[a], value[b]) || a - b);
      heads.forEach((head, i) => head.setAttribute("aria-sort", i !== c || !by[1] ? "none" : by[1] < 0 ? "descending" : "ascending"));
      fill();
    };
    heads.forEach((head, c) => {
      const sorter = h("button", { type: "button", className: "sort" }, ...moe.breakable(head.textContent));
      sorter.addEventListener("click", () => sort(c));
      head.replaceChildren(sorter);
    });
    place.querySelector(".more")?.remove();
    place.querySelector(".scroll").after(rest);
    count();
    download(given, () => order);
  }
};

moe.tables = (all) => document.querySelectorAll(".sheet").forEach((place) => moe.draw(place, () => moe.table(place, place.dataset.name, all[place.dataset.name])));
