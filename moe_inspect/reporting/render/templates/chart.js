"use strict";
// Draws a panel of a chart (charts/spec.py) as SVG, and lets it be read with the mouse or the keyboard alone.
// Colours are variables of the page's style, so that lines follow the theme by themselves; texts become text nodes, never markup.
const moe = { plots: [] };

moe.h = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) name in element ? (element[name] = value) : element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
};
moe.s = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

// what `make` returns; where it fails, what `failed` makes of a message that names it: the rest of the page goes on
moe.attempt = (name, make, failed) => {
  try {
    return make();
  } catch (error) {
    reportError(error);
    return failed(moe.h("p", { className: "warning", role: "alert" }, `“${name}” could not be drawn (${error.message}); the rest of the page works.`));
  }
};

// what a colour of page.css comes to in the theme of the moment, as [red, green, blue]
moe.colour = (name) => {
  const probe = document.body.appendChild(moe.h("i"));
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
};
moe.digits = (value) => {
  if (value === null || Number.isNaN(value)) return "–";
  return value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e5) ? value.toPrecision(3) : String(Number(value.toFixed(Math.abs(value) < 10 ? 3 : 1)));
};
moe.wide = ((pen) => (text, size = 12) => ((pen.font = `${size}px system-ui, sans-serif`), pen.measureText(text).width))(document.createElement("canvas").getContext("2d"));

// value → colour of a cell, as [red, green, blue]; null where it has none. scale.stops: [position from 0 to 1, colour]
moe.colours = (scale) => {
  const ratio = scale.kind === "ratio";
  const stops = scale.stops.map(([at, name]) => [at, moe.colour(name)]);
  const dead = ratio ? moe.colour("dead") : null;
  const unknown = scale.unknown ? moe.colour("unknown") : null;
  return (value) => {
    if (value === null || Number.isNaN(value)) return unknown;
    if (ratio && value === 0) return dead;
    const share = ratio || scale.log ? Math.log2(value / scale.low) / Math.log2(scale.high / scale.low) : (value - scale.low) / (scale.high - scale.low);
    const at = Math.max(0, Math.min(1, share));
    const i = Math.max(1, stops.findIndex(([end]) => at <= end));
    const [[from, low], [to, high]] = [stops[i - 1], stops[i]];
    return low.map((part, c) => part + ((at - from) / (to - from)) * (high[c] - part));
  };
};
// black or white, whichever has more contrast to a colour (WCAG: at least 4.5 : 1)
moe.ink = (rgb) => {
  const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
};
// room: pixels that the bar and its labels may take; labels that would run into the next are left out, not that of the end
moe.scaleBar = (scale, room = Infinity) => {
  const EDGE = 14.4; // left of it, in page.css
  const right = moe.wide(scale.ticks.at(-1)[1], 11.5) / 2 + 12;
  const width = Math.min(38.4 * scale.ticks.length, room - EDGE - right);
  let next = Infinity;
  const fits = ([at, label]) => {
    const half = moe.wide(label, 11.5) / 2;
    if (at * width + half + 4 > next) return false;
    next = at * width - half;
    return true;
  };
  const ramp = moe.h("i", { className: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${scale.stops.map(([at, name]) => `var(--${name}) ${100 * at}%`).join(", ")})`;
  const ticks = scale.ticks.toReversed().filter(fits).map(([at, label]) => {
    const tick = moe.h("b", {}, label);
    tick.style.left = `${100 * at}%`;
    return tick;
  });
  const bar = moe.h("span", {}, ramp, moe.h("span", { className: "ends" }, ...ticks));
  bar.style.width = `${width}px`;
  bar.style.marginRight = `${right}px`;
  const named = (kind, text) => moe.h("span", {}, moe.h("i", { className: `cell ${kind}` }), text);
  return moe.h("span", { className: "scale" }, bar, moe.h("span", {}, scale.title),
    scale.kind === "ratio" ? named("dead", "none") : null, scale.unknown ? named("unknown", scale.unknown) : null);
};

// round numbers between low and high, about `most` of them
moe.round = (low, high, most) => {
  const raw = (high - low) / Math.max(1, most) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) ?? 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
};

// the step between ticks of named positions: 1, 2, 5, 10, 20, …
moe.step = (least) => {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return power * ([1, 2, 5].find((factor) => factor * power >= least) ?? 10);
};

// also where the mouse made it and something else has the focus
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelectorAll(".tip").forEach((tip) => (tip.hidden = true));
});

const FEW = 200; // cells in view, up to which each shows its text

// options: height; note(row, column): what is said of a cell; cell(row, column): texts for it, of which the first that fits is shown; moved(row, column); open(row, column): Enter or a click
moe.plot = (element, make, options = {}) => {
  const plot = { element, hidden: new Set(), view: null, at: null };
  const number = moe.plots.length;
  const live = moe.h("p", { className: "unseen", "aria-live": "polite" });
  const tip = moe.h("div", { className: "tip", hidden: true });
  const legend = moe.h("div", { className: "legend" });
  const canvas = moe.h("div", { className: "canvas" }, tip);
  const reset = moe.h("button", { type: "button", className: "reset" }, "Reset zoom");
  reset.addEventListener("click", () => zoom(null));
  element.replaceChildren(legend, canvas, live);
  element.tabIndex = 0;
  let frame, heat, columns, rows;

  // a logarithmic axis cannot show an interval that reaches down to 0
  const valuesOf = (mark) => [...(mark.y ?? []), ...(mark.low ?? []), ...(mark.high ?? [])].filter((v) => v !== null && (v > 0 || !plot.panel.y.log));
  const shown = () => plot.panel.marks.filter((mark) => !plot.hidden.has(mark.name));
  const range = () => {
    const { y, marks } = plot.panel;
    const values = marks.flatMap((mark) => (mark.kind === "rule" ? [mark.y] : valuesOf(mark)));
    let low = Math.min(...values, y.low ?? Infinity);
    let high = Math.max(...values, y.high ?? -Infinity);
    if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
    const margin = 0.04 * (high - low);
    if (y.log) return [low === y.low ? low : low / 1.05, high * 1.05];
    return [low === y.low ? low : low - margin, high === y.high ? high : high + margin];
  };

  // [position, label] of the ticks of an axis that shows `from` to `to` over `length` pixels, each `wide`
  const ticksOf = (axis, from, to, length, wide) => {
    const across = axis === plot.panel.x;
    if (!axis.labels.length && !heat) {
      if (axis.log) return Array.from({ length: 40 }, (_, i) => 2 ** (i - 20)).filter((v) => v >= from && v <= to).map((v) => [v, moe.digits(v)]);
      return moe.round(from, to, length / 45).map((at) => [at, moe.digits(at)]);
    }
    const given = axis.ticks.filter(([at]) => at >= from && at <= to);
    if (given.length > 1) {
      const widest = across ? Math.max(...given.map(([, label]) => moe.wide(label))) + 10 : wide;
      const every = moe.step((given.length * widest * (to - from)) / (length * (given.at(-1)[0] - given[0][0])));
      return given.filter((_, i) => i % every === 0);
    }
    const first = Math.max(0, Math.ceil(from));
    const last = Math.min((axis.labels.length || (across ? heat.columns : heat.rows)) - 1, Math.floor(to));
    const step = moe.step(((last - first + 1) * wide) / length);
    // layers that begin at 3 have their ticks at 5, 10, …, not at 3, 8, …
    const start = Number(axis.labels[0] ?? 0);
    const numbered = axis.labels.every((label, i) => Number(label) === start + i);
    const found = [];
    for (let i = first; i <= last; i++) if ((i + (numbered ? start : 0)) % step === 0) found.push([i, axis.labels[i] ?? String(i)]);
    return found;
  };

  const lines = (marks, g) => {
    const { x, y } = frame;
    const colour = (mark) => `stroke: var(--${mark.colour})`;
    for (const mark of marks) {
      const at = (i) => [x(mark.x[i]), mark.y[i] === null ? null : y(mark.y[i])];
      if (mark.kind === "band") {
        const side = (ends) => mark.x.map((v, i) => `${x(v).toFixed(1)},${y(ends[i]).toFixed(1)}`);
        g.append(moe.s("polygon", { points: [...side(mark.high), ...side(mark.low).reverse()].join(" "), style: "fill: var(--band)" }));
        continue;
      }
      if (mark.kind === "bars") {
        const width = 0.8 * (x(1) - x(0));
        mark.x.forEach((v, i) => g.append(moe.s("rect", { x: x(v) - width / 2, y: y(mark.high[i]), width, height: y(mark.low[i]) - y(mark.high[i]), style: `fill: var(--${mark.colour})` })));
        continue;
      }
      if (mark.kind === "rule") {
        g.append(moe.s("line", { x1: frame.left, x2: frame.right, y1: y(mark.y), y2: y(mark.y), class: `rule ${mark.dash}`, style: colour(mark) }));
        continue;
      }
      if (mark.low)
        mark.x.forEach((v, i) => {
          if (mark.low[i] === null || mark.high[i] === null) return;
          g.append(moe.s("line", { x1: x(v), x2: x(v), y1: y(mark.low[i]), y2: y(mark.high[i]), class: "interval", style: colour(mark) }));
        });
      if (mark.kind === "line") {
        const path = mark.x.map((_, i) => at(i)).map(([px, py], i, all) => (py === null ? "" : `${i && all[i - 1][1] !== null ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`));
        g.append(moe.s("path", { d: path.join(""), class: `line ${mark.dash}`, style: colour(mark) }));
      }
      if (mark.kind === "line" && !mark.dots) continue;
      const few = mark.x.length <= 12;
      const reach = Math.min(few ? 10 : 7, 0.4 * (x(1) - x(0)));
      const size = mark.kind === "line" ? (few ? 3.2 : 2) : few ? 4.5 : 3.2;
      mark.x.forEach((_, i) => {
        const [px, py] = at(i);
        if (py === null) return;
        if (mark.shape === "tick") g.append(moe.s("line", { x1: px - reach, x2: px + reach, y1: py, y2: py, class: "tick", style: colour(mark) }));
        else g.append(moe.s("circle", { cx: px, cy: py, r: size, style: `fill: var(--${mark.colour})` }));
      });
    }
  };

  const cells = (g) => {
    const { x, y, x0, x1, y0, y1 } = frame;
    const colourOf = moe.colours(heat.scale);
    const [wide, high] = [x(1) - x(0), y(1) - y(0)];
    const ends = (from, to, count) => [Math.max(0, Math.ceil(from)), Math.min(count - 1, Math.floor(to))];
    const [[left, right], [top, bottom]] = [ends(x0, x1, columns), ends(y0, y1, rows)];
    if ((right - left + 1) * (bottom - top + 1) <= FEW) {
      for (let row = top; row <= bottom; row++)
        for (let column = left; column <= right; column++) {
          const i = row * heat.columns + column;
          const rgb = colourOf(heat.values[i]);
          if (rgb === null) continue;
          const ink = moe.ink(rgb);
          g.append(moe.s("rect", { x: x(column - 0.5) + 1, y: y(row - 0.5) + 1, width: wide - 2, height: high - 2, fill: `rgb(${rgb})` }));
          const known = heat.values[i] !== null && !Number.isNaN(heat.values[i]);
          const texts = options.cell ? options.cell(row, column) : [heat.cells ? heat.cells[i] : known ? (heat.scale.kind === "ratio" ? heat.values[i].toFixed(2) : moe.digits(heat.values[i])) : ""];
          const text = texts.find((one) => moe.wide(one, 11.5) < wide - 4);
          if (text) g.append(moe.s("text", { x: x(column), y: y(row) + 4, class: "in", style: `fill: ${ink}` }, text));
        }
      return;
    }
    const sheet = moe.h("canvas", { width: heat.columns, height: heat.rows });
    const pen = sheet.getContext("2d");
    const picture = pen.createImageData(heat.columns, heat.rows);
    heat.values.forEach((value, i) => {
      const rgb = colourOf(value);
      if (rgb !== null) picture.data.set([...rgb, 255], 4 * i);
    });
    pen.putImageData(picture, 0, 0);
    const box = { x: x(-0.5), y: y(-0.5), width: wide * heat.columns, height: high * heat.rows };
    g.append(moe.s("image", { ...box, href: sheet.toDataURL(), preserveAspectRatio: "none", class: "pixels" }));
  };

  plot.redraw = () => {
    plot.panel = make();
    heat = plot.panel.marks.find((mark) => mark.kind === "heatmap");
    const { x, y, marks } = plot.panel;
    [columns, rows] = heat ? [heat.columns, heat.rows] : [x.labels.length, 1];
    const width = Math.max(240, canvas.clientWidth);
    const height = options.height?.(heat) ?? (heat ? Math.max(150, Math.min(620, 40 + heat.rows * Math.max(9, Math.min(34, 520 / heat.rows)))) : 260);
    const [x0, x1] = plot.view?.x ?? [-0.5, columns - 0.5];
    const [y0, y1] = heat ? (plot.view?.y ?? [-0.5, rows - 0.5]) : range();
    const bottom = height - 40;
    const across = ticksOf(y, y0, y1, bottom - 8, 15);
    const left = Math.min(width / 3, Math.max(...across.map(([, label]) => moe.wide(label)), 8) + (y.title ? 30 : 14));
    const names = x.labels.length ? x.labels : [String(columns)];
    const longest = Math.max(...names.map((label) => moe.wide(label))) + 10;
    const right = width - Math.max(8, Math.min(40, longest / 2 - 5));
    frame = { left, right, top: 8, bottom, x0, x1, y0, y1 };
    frame.x = (v) => left + ((v - x0) / (x1 - x0)) * (right - left);
    const share = y.log ? (v) => Math.log2(Math.max(v, y0) / y0) / Math.log2(y1 / y0) : (v) => (v - y0) / (y1 - y0);
    frame.y = heat ? (v) => 8 + share(v) * (bottom - 8) : (v) => bottom - share(v) * (bottom - 8);
    const svg = moe.s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const clip = `clip-${number}`;
    svg.append(moe.s("clipPath", { id: clip }, moe.s("rect", { x: left, y: heat ? 8 : 2, width: right - left, height: bottom - (heat ? 8 : 2) })));
    for (const [at, label] of across) {
      if (!heat) svg.append(moe.s("line", { x1: left, x2: right, y1: frame.y(at), y2: frame.y(at), class: "gridline" }));
      svg.append(moe.s("text", { x: left - 6, y: frame.y(at) + 4, class: "ytick" }, label));
    }
    for (const [at, label] of ticksOf(x, x0, x1, right - left, longest)) svg.append(moe.s("text", { x: frame.x(at), y: bottom + 15, class: "xtick" }, label));
    svg.append(moe.s("text", { x: (left + right) / 2, y: height - 6, class: "xtitle" }, x.title));
    if (y.title) svg.append(moe.s("text", { class: "ytitle", transform: `translate(11 ${(8 + bottom) / 2}) rotate(-90)` }, y.title));
    if (!heat) svg.append(moe.s("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    const drawing = moe.s("g", { "clip-path": `url(#${clip})` });
    if (heat) cells(drawing);
    else lines(shown(), drawing);
    plot.cursor = moe.s("rect", { class: heat ? "cursor" : "cursor column", visibility: "hidden" });
    plot.dragged = moe.s("rect", { class: "dragged", visibility: "hidden" });
    svg.append(drawing, plot.cursor, plot.dragged);
    canvas.replaceChildren(svg, tip, ...(plot.view ? [reset] : []));
    fillLegend(marks);
    if (plot.at) mark(...plot.at);
  };

  const swatch = (mark) => {
    const style = `stroke: var(--${mark.colour ?? "band"}); fill: var(--${mark.colour ?? "band"})`;
    const box = moe.s("svg", { width: 20, height: 10, "aria-hidden": "true" });
    if (mark.kind === "band" || mark.kind === "bars") box.append(moe.s("rect", { width: 20, height: 10, style }));
    else if (mark.shape === "dot") box.append(moe.s("circle", { cx: 10, cy: 5, r: 4, style }));
    else box.append(moe.s("line", { x1: mark.shape === "tick" ? 5 : 0, x2: mark.shape === "tick" ? 15 : 20, y1: 5, y2: 5, class: mark.shape === "tick" ? "tick" : `line ${mark.dash}`, style }));
    return box;
  };
  const fillLegend = (marks) => {
    if (heat) return legend.replaceChildren(moe.scaleBar(heat.scale, canvas.clientWidth));
    if (legend.childElementCount) return;
    for (const mark of marks.filter((m) => m.name)) {
      const button = moe.h("button", { type: "button", title: "Show or hide" }, swatch(mark), moe.h("span", { className: "name" }, mark.name));
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        plot.hidden.delete(mark.name) || plot.hidden.add(mark.name);
        button.setAttribute("aria-pressed", String(!plot.hidden.has(mark.name)));
        plot.redraw();
      });
      legend.append(button);
    }
  };

  // --- what is under the mouse, or where the keys have moved to
  const place = (axis, i) => `${axis.title ? `${axis.title} ` : ""}${axis.labels[i] ?? i}`;
  const said = (row, column) => {
    const { x, y } = plot.panel;
    if (heat) {
      if (options.note) return options.note(row, column);
      const i = row * heat.columns + column;
      const value = Number.isNaN(heat.values[i]) && heat.scale.unknown ? heat.scale.unknown : `${moe.digits(heat.values[i])} ${heat.scale.title}`;
      return [`${place(y, row)}, ${place(x, column)}: ${value}`, ...(heat.notes?.[i] ? heat.notes[i].split("\n") : [])];
    }
    const rowsOf = shown().filter((m) => m.x && m.name).map((m) => {
      const i = m.x.findIndex((v) => Math.round(v) === column);
      if (m.kind === "band") return i < 0 || m.high[i] === null ? null : `${m.name}: up to ${moe.digits(m.high[i])}`;
      if (i >= 0 && m.kind === "bars") return `${m.name}: ${moe.digits(m.high[i] - m.low[i])}`;
      if (i < 0 || m.y[i] === null) return null;
      const ends = m.low && m.low[i] !== null ? ` (${moe.digits(m.low[i])} to ${moe.digits(m.high[i])})` : "";
      return `${m.name}: ${moe.digits(m.y[i])}${ends}`;
    });
    const alone = shown().filter((m) => m.y && m.x && !m.name).map((m) => moe.digits(m.y[column]));
    return [place(x, column), ...alone, ...rowsOf.filter((text) => text !== null)];
  };
  const mark = (row, column) => {
    plot.at = [row, column];
    const { x, y, top, bottom } = frame;
    const box = heat
      ? { x: x(column - 0.5), y: y(row - 0.5), width: x(1) - x(0), height: y(1) - y(0) }
      : { x: x(column) - 0.5, y: top, width: 1, height: bottom - top };
    for (const [name, value] of Object.entries({ ...box, visibility: "visible" })) plot.cursor.setAttribute(name, value);
  };
  const show = (row, column, announce) => {
    if (heat && column >= (heat.lengths?.[row] ?? columns)) return;
    mark(row, column);
    const texts = said(row, column);
    tip.replaceChildren(...texts.map((text) => moe.h("div", {}, text)));
    tip.hidden = false;
    const px = frame.x(column);
    const wide = Math.min(tip.offsetWidth, canvas.clientWidth);
    tip.style.left = `${Math.max(0, px + 14 + wide > canvas.clientWidth ? px - 14 - wide : px + 14)}px`;
    tip.style.top = `${Math.max(0, (heat ? frame.y(row) : frame.top + 20) - 10)}px`;
    if (announce && !options.moved) live.textContent = texts.join(". ");
    options.moved?.(row, column);
  };
  plot.move = (row, column, announce = true) => {
    const r = Math.max(0, Math.min(rows - 1, row));
    show(r, Math.max(0, Math.min((heat?.lengths?.[r] ?? columns) - 1, column)), announce);
  };
  plot.hide = () => (tip.hidden = true);
  const zoom = (view) => {
    plot.view = view;
    plot.hide();
    plot.redraw();
  };
  element.addEventListener("keydown", (event) => {
    if (event.target !== element) return;
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const [row, column] = plot.at ?? [0, -1];
    if (step) plot.move(row + step[0], Math.max(0, column + step[1]));
    else if (event.key === "Home") plot.move(row, 0);
    else if (event.key === "End") plot.move(row, Infinity);
    else if (event.key === "Enter" && options.open && plot.at) options.open(row, column);
    else if (event.key === "Escape" && plot.view) zoom(null);
    else return;
    event.preventDefault();
  });

  let start = null;
  const where = (event) => {
    const box = canvas.getBoundingClientRect();
    const share = (px, from, to) => Math.max(0, Math.min(1, (px - from) / (to - from)));
    const { left, right, top, bottom, x0, x1, y0, y1 } = frame;
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    return { px, py, x: x0 + share(px, left, right) * (x1 - x0), y: y0 + share(py, top, bottom) * (y1 - y0), inside: px >= left && px <= right && py >= top && py <= bottom };
  };
  const cellOf = (at) => [heat ? Math.max(0, Math.min(rows - 1, Math.round(at.y))) : 0, Math.max(0, Math.min(columns - 1, Math.round(at.x)))];
  canvas.addEventListener("pointerdown", (event) => {
    const at = where(event);
    if (at.inside && event.button === 0 && event.target !== reset) start = at;
  });
  canvas.addEventListener("pointermove", (event) => {
    const at = where(event);
    if (start && Math.abs(at.px - start.px) > 6) {
      const [a, b] = [frame.x(Math.min(start.x, at.x)), frame.x(Math.max(start.x, at.x))];
      const [c, d] = heat ? [frame.y(Math.min(start.y, at.y)), frame.y(Math.max(start.y, at.y))] : [frame.top, frame.bottom];
      for (const [name, value] of Object.entries({ x: a, y: c, width: b - a, height: d - c, visibility: "visible" })) plot.dragged.setAttribute(name, value);
      return plot.hide();
    }
    if (at.inside) show(...cellOf(at), false);
    else plot.hide();
  });
  canvas.addEventListener("pointerleave", () => plot.hide());
  window.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [from, to] = [start, where(event)];
    start = null;
    if (Math.abs(to.px - from.px) <= 6) return canvas.contains(event.target) && options.open?.(...cellOf(to));
    const ends = (a, b, most) => [Math.max(-0.5, Math.round(Math.min(a, b)) - 0.5), Math.min(most - 0.5, Math.round(Math.max(a, b)) + 0.5)];
    zoom({ x: ends(from.x, to.x, columns), y: heat ? ends(from.y, to.y, rows) : null });
  });

  element.plot = plot;
  plot.redraw();
  moe.plots.push(plot);
  new ResizeObserver(() => canvas.clientWidth !== plot.width && ((plot.width = canvas.clientWidth), plot.redraw())).observe(canvas);
  return plot;
};
