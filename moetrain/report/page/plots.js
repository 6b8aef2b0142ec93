"use strict";
// Curves and bars. Every function here draws `data` into `box` and returns what has to run when step, layer or hover change.
// `view`: {step, layer, hover, go(step), look(step or null), pick(layer), say(text)}.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "g", "path", "line", "text", "rect", "circle", "clipPath", "title"].includes(tag);
  const node = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(value, share = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (share) return value === 0 ? "0 %" : (100 * value).toFixed(Math.abs(value) < 0.0995 ? 1 : 0) + " %";
  const size = Math.abs(value);
  for (const [scale, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= scale) return Number((value / (unit === "k" ? 1e3 : scale)).toPrecision(3)) + (unit === "k" ? "k" : unit);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 1 || size === 0) return String(Number(value.toFixed(size >= 10 ? 1 : 2)));
  return size < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(2)));
}

function ticks(low, high, count) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => span / s <= count) ?? 10 * power;
  const out = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + 1e-9 * span; at += step) out.push(Number(at.toPrecision(12)));
  return out;
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle;
  }
  return Math.abs(sorted[high] - value) < Math.abs(sorted[low] - value) ? high : low;
}

const COLORS = 6, DASHES = ["", "7 3", "2 2.5", "9 3 2 3"]; // observe/palette.py has the same

// {color, dash} of a line. `line.color` is a number that stays that of a run or a domain in every figure.
function strokeOf(line, index, count, ordered) {
  if (line.tone) return { color: `var(--${line.tone})`, dash: "" };
  if (!ordered) {
    const number = line.color ?? index;
    return { color: `var(--c${number % COLORS})`, dash: DASHES[Math.floor(number / COLORS) % DASHES.length] };
  }
  const place = count > 1 ? (4 * index) / (count - 1) : 2, stop = Math.min(3, Math.floor(place));
  return { color: `color-mix(in oklab, var(--o${stop + 1}) ${Math.round(100 * (place - stop))}%, var(--o${stop}))`, dash: "" };
}

function swatch({ color, dash }) {
  return make("svg", { class: "swatch", viewBox: "0 0 20 4", "aria-hidden": "true" }, make("line", { x1: 0, x2: 20, y1: 2, y2: 2, stroke: color, "stroke-dasharray": dash || null }));
}

// The frame that curves and bars stand in: scales, rules, labels.
function frame(box, { low, high, x, share, unit, height = 230, resumed = [] }) {
  const width = Math.max(box.clientWidth, 240);
  const marks = ticks(low, high, 4);
  const left = 10 + 6.4 * Math.max(...marks.map((m) => number(m, share).length));
  const area = { left, right: width - 10, top: unit && !share ? 22 : 8, bottom: height - 22 };
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0" });
  if (unit && !share) svg.append(make("text", { class: "unit", x: 0, y: 10 }, unit));
  const y = (v) => area.bottom - ((v - low) / (high - low || 1)) * (area.bottom - area.top);
  for (const mark of marks) {
    svg.append(make("line", { class: "rule", x1: left, x2: area.right, y1: y(mark), y2: y(mark) }));
    svg.append(Object.assign(make("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }), { textContent: number(mark, share) }));
  }
  svg.append(make("line", { class: "axis", x1: left, x2: area.right, y1: area.bottom, y2: area.bottom }));
  if (!x) return { svg, area, y, width, height };
  const [first, last] = [x[0], x[x.length - 1]];
  const at = (step) => left + ((step - first) / (last - first || 1)) * (area.right - left);
  for (const mark of ticks(first, last, Math.max(2, Math.min(6, width / 90)))) {
    const anchor = at(mark) > area.right - 16 ? "end" : "middle";
    svg.append(Object.assign(make("text", { x: at(mark), y: height - 6, "text-anchor": anchor }), { textContent: number(mark) }));
  }
  for (const step of resumed.filter((s) => s >= first && s < last))
    svg.append(make("line", { class: "resumed", x1: at(step), x2: at(step), y1: area.top, y2: area.bottom }, make("title", {}, `resumed after step ${number(step)}`)));
  return { svg, area, y, at, width, height };
}

function path(points) {
  let out = "", open = false;
  for (const [x, y] of points) {
    if (y === null) { open = false; continue; }
    out += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  }
  return out;
}

const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));

function range(data, shown) {
  const values = shown.flatMap((s) => finite(s.y));
  for (const s of shown) {
    for (const side of ["low", "high"]) {
      const sorted = finite(s[side] ?? []).sort((a, b) => a - b);
      if (sorted.length) values.push(sorted[Math.floor(0.02 * (sorted.length - 1))], sorted[Math.ceil(0.98 * (sorted.length - 1))]);
    }
  }
  if (data.reference !== undefined) values.push(data.reference);
  if (data.floor !== undefined) values.push(data.floor);
  let low = Math.min(...values), high = Math.max(...values);
  if (!Number.isFinite(low)) [low, high] = [0, 1];
  if (high - low < 1e-12) [low, high] = [low - (low ? Math.abs(low) * 0.1 : 0), high + (Math.abs(high) * 0.1 || 1)];
  const pad = 0.04 * (high - low);
  return [data.floor !== undefined && low >= data.floor ? data.floor : low - pad, high + pad];
}

// What pointer and keys do on a figure whose x is the step.
function alongSteps(svg, at, area, width, x, view) {
  const stepOf = (event) => {
    const place = svg.getBoundingClientRect();
    const px = ((event.clientX - place.left) / place.width) * width;
    return x[nearest(x.map(at), px)];
  };
  svg.addEventListener("pointermove", (event) => view.look(stepOf(event)));
  svg.addEventListener("pointerleave", () => view.look(null));
  svg.addEventListener("click", (event) => view.go(stepOf(event)));
}

function legend(box, series, data, hidden, redraw) {
  const list = make("div", { class: "legend" });
  if (data.prefix ?? data.label) list.append(make("span", {}, data.prefix ?? data.label));
  const cells = series.map((line, index) => {
    const value = make("b");
    const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(line.name)) }, swatch(strokeOf(line, index, series.length, data.ordered)), line.name, value);
    button.addEventListener("click", () => {
      hidden.has(line.name) ? hidden.delete(line.name) : hidden.add(line.name);
      redraw(index);
    });
    return { button, value };
  });
  const many = data.ordered && series.length > 12;
  list.append(...cells.filter((_, i) => !many || i === 0 || i === series.length - 1).map((c) => c.button));
  const chosen = many ? list.appendChild(make("span")) : null;
  box.append(list);
  return { cells, chosen };
}

function lines(box, data, view) {
  box.hidden_ ??= new Set();
  const redraw = (index) => {
    box.replaceChildren();
    box.update = lines(box, data, view);
    box.querySelectorAll(".legend button")[index]?.focus();
  };
  const shown = data.series.filter((s) => !box.hidden_.has(s.name));
  const [low, high] = range(data, shown);
  const { cells, chosen } = legend(box, data.series, data, box.hidden_, redraw);
  const { svg, area, y, at, width } = frame(box, { low, high, x: data.x, share: data.share, unit: data.unit, height: data.height, resumed: "compared" in box.dataset ? [] : view.resumed });
  const clip = `clip${(lines.count = (lines.count ?? 0) + 1)}`;
  svg.append(make("clipPath", { id: clip }, make("rect", { x: area.left, y: area.top - 4, width: area.right - area.left + 6, height: area.bottom - area.top + 5 })));
  const plot = svg.appendChild(make("g", { "clip-path": `url(#${clip})` }));
  if (data.reference !== undefined) plot.append(make("line", { class: "reference", x1: area.left, x2: area.right, y1: y(data.reference), y2: y(data.reference) }));
  const drawn = data.series.map((line, index) => {
    if (box.hidden_.has(line.name)) return null;
    const { color: paint, dash } = strokeOf(line, index, data.series.length, data.ordered);
    const x = line.x ?? data.x;
    const point = (v, i) => [at(x[i]), v === null ? null : y(v)];
    if (line.low) {
      const there = x.map((_, i) => i).filter((i) => line.low[i] !== null);
      const outline = [...there.map((i) => point(line.high[i], i)), ...there.reverse().map((i) => point(line.low[i], i))];
      plot.append(make("path", { class: "band", fill: paint, d: path(outline) + "Z" }));
    }
    if (line.raw && !data.ordered) plot.append(make("path", { class: "raw", stroke: paint, d: path(line.raw.map(point)) }));
    const curve = make("path", { class: "line", stroke: paint, "stroke-dasharray": dash || null, d: path(line.y.map(point)) });
    plot.append(curve);
    if (x.length < 10) line.y.forEach((v, i) => v !== null && plot.append(make("circle", { class: "dot", r: 3.5, fill: paint, cx: at(x[i]), cy: y(v) })));
    return { line, x, paint, curve, dot: plot.appendChild(make("circle", { class: "dot", r: 3.5, fill: paint })) };
  });
  const cursor = svg.appendChild(make("line", { class: "cursor", y1: area.top, y2: area.bottom }));
  alongSteps(svg, at, area, width, data.x, view);
  box.append(svg);
  const main = data.series.find((s) => s.tone) ?? data.series[0];
  svg.setAttribute("aria-label", `${box.title_}: ${main.name} from ${number(finite(main.y)[0], data.share)} to ${number(finite(main.y).at(-1), data.share)}, steps ${data.x[0]} to ${data.x.at(-1)}`);
  return () => {
    const step = view.hover ?? view.step;
    const where = at(Math.min(Math.max(step, data.x[0]), data.x.at(-1)));
    cursor.setAttribute("x1", where);
    cursor.setAttribute("x2", where);
    drawn.forEach((part, index) => {
      const line = data.series[index], x = line.x ?? data.x;
      const i = nearest(x, step), value = line.y[i], said = (line.raw ?? line.y)[i]; // numbers are the step's own
      cells[index].value.textContent = number(said, data.share);
      if (!part) return;
      part.dot.setAttribute("visibility", value === null ? "hidden" : "visible");
      if (value !== null) { part.dot.setAttribute("cx", at(x[i])); part.dot.setAttribute("cy", y(value)); }
      const isChosen = data.ordered && data.prefix && index === view.layer;
      part.curve.setAttribute("class", `line ${isChosen || part.line.tone === "main" ? "chosen" : data.ordered ? "faded" : ""}`);
      if (isChosen) plot.append(part.curve, part.dot);
      if (isChosen && chosen) chosen.textContent = `chosen: ${line.name} ${number(said, data.share)}`;
    });
  };
}

// What the MoE layers do has colors; everything else is grey.
const AREAS = { route: "c3", plan: "c5", lend: "c1", dispatch: "c0", experts: "planned", combine: "c4" };
const GREYS = { "other forward": 60, "other backward": 46, optimizer: 33, data: 24, "the rest": 15 };

function area(box, data, view) {
  const sums = data.x.map((_, i) => data.series.reduce((sum, s) => sum + (s.y[i] ?? 0), 0));
  const sorted = [...sums].sort((a, b) => a - b);
  const high = 1.06 * Math.min(sorted.at(-1), 1.6 * sorted[Math.floor(0.98 * (sorted.length - 1))]) || 1;
  const paint = (i) => {
    const { name } = data.series[i];
    return AREAS[name] ? `var(--${AREAS[name]})` : `color-mix(in srgb, var(--soft) ${GREYS[name] ?? 50}%, var(--card))`;
  };
  const list = box.appendChild(make("div", { class: "legend" }));
  const values = data.series.map((s, i) => {
    const value = make("b");
    list.append(make("button", { type: "button", tabindex: "-1", disabled: "" }, make("i", { style: `background:${paint(i)};height:10px` }), s.name, value));
    return value;
  });
  const { svg, area: place, y, at, width } = frame(box, { low: 0, high, x: data.x, unit: data.unit, height: data.height, resumed: view.resumed });
  const clip = `clip${(lines.count = (lines.count ?? 0) + 1)}`;
  svg.append(make("clipPath", { id: clip }, make("rect", { x: place.left, y: place.top, width: place.right - place.left, height: place.bottom - place.top })));
  const plot = svg.appendChild(make("g", { "clip-path": `url(#${clip})` }));
  let below = data.x.map(() => 0);
  data.series.forEach((s, index) => {
    const above = below.map((b, i) => b + (s.y[i] ?? 0));
    const outline = [...above.map((v, i) => [at(data.x[i]), y(v)]), ...below.map((v, i) => [at(data.x[i]), y(v)]).reverse()];
    plot.append(make("path", { fill: paint(index), d: path(outline) + "Z" }));
    below = above;
  });
  const cursor = svg.appendChild(make("line", { class: "cursor", y1: place.top, y2: place.bottom }));
  alongSteps(svg, at, place, width, data.x, view);
  svg.setAttribute("aria-label", `${box.title_}: ${data.series.map((s) => `${s.name} ${number(s.y.at(-1))}`).join(", ")} at the last step`);
  box.append(svg);
  return () => {
    const i = nearest(data.x, view.hover ?? view.step);
    cursor.setAttribute("x1", at(data.x[i]));
    cursor.setAttribute("x2", at(data.x[i]));
    data.series.forEach((s, k) => (values[k].textContent = `${number(s.y[i])} s · ${number((s.y[i] ?? 0) / (sums[i] || 1), true)}`));
  };
}

function bars(box, data) {
  const most = 1.05 * Math.max(...data.rows.flatMap((r) => [r.value, r.mark ?? 0]));
  const list = make("div", { class: "bars", style: `--bar:${Math.min(30, Math.max(11, 230 / data.rows.length - 6))}px` });
  for (const row of data.rows) {
    const track = make("div", { class: "track" }, make("div", { class: "fill", style: `width:${(100 * row.value) / most}%` }));
    if (row.mark !== null && row.mark !== undefined) track.append(make("div", { class: "mark", style: `left:${(100 * row.mark) / most}%`, title: `${data.mark} ${number(row.mark)}` }));
    list.append(make("span", { class: row.name === "all" ? "whole" : "" }, row.name), track, make("span", { class: "value" }, data.digits === undefined ? number(row.value) : row.value.toFixed(data.digits)));
  }
  box.append(list);
  if (data.mark) box.append(make("p", { class: "note" }, `Mark: ${data.mark}.`));
  return () => {};
}

// Load of every device with all experts at home, and as planned, what guests compute in another shade; in mean loads.
function devices(box, data, view) {
  const { ranks } = data, depth = data.layers.length;
  const [home, planned, guests] = [data.home, data.planned, data.guests].map((text) => new Uint16Array(bytes(text).buffer));
  const readout = make("p", { class: "readout" });
  const inner = box.appendChild(make("div"));
  box.append(readout);
  const list = make("div", { class: "legend" });
  let drawnLayer = -1, parts = [];
  const redraw = (layer) => {
    drawnLayer = layer;
    let most = 1;
    for (let f = 0; f < data.steps.length; f++) for (let r = 0; r < ranks; r++) most = Math.max(most, home[(f * depth + layer) * ranks + r]);
    const { svg, area: place, y } = frame(inner, { low: 0, high: 1.08 * Math.max(most / 1000, 1.15) });
    const slot = (place.right - place.left) / ranks, width = Math.min(34, Math.max(0.8, 0.36 * slot));
    parts = [];
    for (let r = 0; r < ranks; r++) {
      const middle = place.left + (r + 0.5) * slot;
      const bar = (dx, tone) => svg.appendChild(make("rect", { x: middle + dx, width, rx: Math.min(2, width / 4), fill: `var(--${tone})`, y: 0, height: 0 }));
      parts.push([bar(-width - Math.min(1, slot / 20), "home"), bar(Math.min(1, slot / 20), "planned"), bar(Math.min(1, slot / 20), "guest")]);
      if (r % Math.ceil(ranks / Math.max(4, Math.floor((place.right - place.left) / 34))) === 0)
        svg.append(Object.assign(make("text", { x: middle, y: place.bottom + 16, "text-anchor": "middle" }), { textContent: r }));
    }
    svg.append(make("line", { class: "reference", x1: place.left, x2: place.right, y1: y(1), y2: y(1) }));
    list.replaceChildren(...[["home", "experts at home"], ["planned", "as planned: own experts"], ["guest", "guests"]].map(([tone, text]) => make("button", { disabled: "", type: "button" }, make("i", { style: `background:var(--${tone});height:10px` }), text)));
    inner.replaceChildren(list, svg);
    return { svg, place, y };
  };
  let drawn = null;
  return () => {
    const layer = Math.min(view.layer + 1, depth - 1);
    if (layer !== drawnLayer) drawn = redraw(layer);
    const f = nearest(data.steps, view.hover ?? view.step);
    const worst = [0, 0], who = [0, 0];
    for (let r = 0; r < ranks; r++)
      [home, planned].forEach((loads, k) => {
        const value = loads[(f * depth + layer) * ranks + r] / 1000;
        if (value > worst[k]) [worst[k], who[k]] = [value, r];
        parts[r][k].setAttribute("y", drawn.y(value));
        parts[r][k].setAttribute("height", drawn.place.bottom - drawn.y(value));
        if (k === 0) return;
        const lent = guests[(f * depth + layer) * ranks + r] / 1000; // stands on top of the own experts' rows
        parts[r][2].setAttribute("y", drawn.y(value));
        parts[r][2].setAttribute("height", drawn.y(value - lent) - drawn.y(value));
      });
    const what = `${data.layers[layer].replace("_", " ")}, step ${data.steps[f]}: busiest device ${who[0]} with ${worst[0].toFixed(2)} mean loads at home, ${who[1]} with ${worst[1].toFixed(2)} as planned`;
    readout.textContent = what;
    drawn.svg.setAttribute("aria-label", what);
  };
}

function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}
