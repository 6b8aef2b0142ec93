// Heat maps, on a canvas: expert load by layer, by step, by domain.

const DEAD = 0, ABSENT = 255, EVEN = 127, DOUBLING = 16; // codes of a packed load (reduce.py)

function heatColours() {
  const style = getComputedStyle(document.documentElement);
  const stops = [0, 1, 2, 3, 4].map((i) => style.getPropertyValue(`--heat-${i}`).trim().match(/\w\w/g).map((h) => parseInt(h, 16)));
  const table = [];
  for (let code = 0; code < 256; code++) {
    const place = Math.min(4, Math.max(0, 2 + (code - EVEN) / (1.5 * DOUBLING))); // ends at an eighth and at eight mean loads
    const i = Math.min(3, Math.floor(place)), part = place - i;
    table.push(`rgb(${stops[i].map((c, k) => Math.round(c + part * (stops[i + 1][k] - c))).join(" ")})`);
  }
  const [ink, strong, none] = ["--soft", "--ink", "--page"].map((name) => style.getPropertyValue(name).trim());
  return { table, ink, strong, none };
}

function times(code) {
  const value = 2 ** ((code - EVEN) / DOUBLING);
  return `${value >= 10 ? value.toFixed(0) : value.toFixed(value < 0.1 ? 2 : 1)} ×`;
}

const loaded = (code) => (code === DEAD ? "no token" : `${times(code)} the mean load`);
const used = (code) => (code === DEAD ? "not at all" : `${times(code)} as often as all text does`);

// A map of rows × columns. `code(r, c)`, `rowName(r)`, `columnName(c)`, `describe(r, c)`, `click(r, c)`, `marks() -> {row, column}`.
function heat(box, map, view) {
  const canvas = make("canvas", { tabindex: "0", role: "img" });
  const holder = box.appendChild(make("div", { class: "heat" }, canvas));
  const readout = make("p", { class: "readout" });
  box.append(readout, make("div", { class: "scale" }, map.scale?.[0] ?? "⅛", make("i", { class: map.scale?.[2] ?? "" }), map.scale?.[1] ?? "8 × the mean"));
  const width = Math.max(holder.clientWidth, 240);
  const names = Array.from({ length: map.rows }, (_, r) => map.rowName(r));
  const left = 12 + 6.4 * Math.max(...names.map((n) => String(n).length));
  const tall = map.height ?? map.rows * Math.min(46, Math.max(7, 230 / map.rows));
  const [cw, ch] = [(width - left - 2) / map.columns, tall / map.rows];
  const height = tall + 22;
  const scale = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: width * scale, height: height * scale });
  canvas.style.aspectRatio = `${width} / ${height}`;
  const pen = canvas.getContext("2d");
  let at = null; // the cell under pointer or keys

  const draw = () => {
    const { table, ink, strong, none } = heatColours();
    const marks = map.marks();
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const gap = Math.min(cw, ch) > 7 ? 1 : 0;
    for (let r = 0; r < map.rows; r++)
      for (let c = 0; c < map.columns; c++) {
        const code = map.code(r, c);
        if (code === ABSENT) continue;
        const [x, y] = [left + c * cw, r * ch];
        pen.fillStyle = code === DEAD ? none : table[code];
        pen.fillRect(x, y, cw - gap + (gap ? 0 : 0.5), ch - gap + (gap ? 0 : 0.5));
        if (code === DEAD && Math.min(cw, ch) > 5) {
          const s = Math.min(5, 0.25 * Math.min(cw, ch)), [mx, my] = [x + (cw - gap) / 2, y + (ch - gap) / 2];
          pen.strokeStyle = strong;
          pen.beginPath();
          pen.moveTo(mx - s, my - s); pen.lineTo(mx + s, my + s); pen.moveTo(mx + s, my - s); pen.lineTo(mx - s, my + s);
          pen.stroke();
        }
      }
    pen.fillStyle = ink;
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const everyRow = Math.ceil(13 / ch);
    for (let r = 0; r < map.rows; r += everyRow) pen.fillText(names[r], left - 6, Math.max(6, (r + 0.5) * ch));
    pen.textAlign = "center";
    for (const c of map.labels ?? spread(map.columns, Math.floor((width - left) / 42))) pen.fillText(map.columnName(c), Math.min(left + (c + 0.5) * cw, width - 16), tall + 12);
    pen.strokeStyle = strong;
    pen.lineWidth = 1.5;
    if (marks.row !== undefined) pen.strokeRect(left - 1, marks.row * ch - 0.5, width - left - 0.5, ch);
    if (marks.column !== undefined) { pen.globalAlpha = 0.5; pen.fillStyle = strong; pen.fillRect(left + (marks.column + 0.5) * cw - 0.75, 0, 1.5, tall); pen.globalAlpha = 1; }
    if (at) pen.strokeRect(left + at[1] * cw - 0.5, at[0] * ch - 0.5, cw, ch);
    const text = at ? map.describe(...at) : map.summary();
    readout.textContent = text;
    canvas.setAttribute("aria-label", `${box.title_}: ${text}`);
  };
  const cellOf = (event) => {
    const place = canvas.getBoundingClientRect();
    const c = Math.floor((((event.clientX - place.left) / place.width) * width - left) / cw);
    const r = Math.floor((((event.clientY - place.top) / place.height) * height) / ch);
    return r >= 0 && r < map.rows && c >= 0 && c < map.columns && map.code(r, c) !== ABSENT ? [r, c] : null;
  };
  const show = (cell) => { at = cell; draw(); };
  canvas.addEventListener("pointermove", (event) => show(cellOf(event)));
  canvas.addEventListener("pointerleave", () => show(null));
  canvas.addEventListener("blur", () => show(null));
  canvas.addEventListener("click", (event) => { const cell = cellOf(event); if (cell) map.click?.(...cell); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Enter" && at) map.click?.(...at);
    if (event.key === "Escape") show(null);
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const [r, c] = at ? [at[0] + move[0], at[1] + move[1]] : [map.marks().row ?? 0, map.marks().column ?? 0];
    if (r >= 0 && r < map.rows && c >= 0 && c < map.columns && map.code(r, c) !== ABSENT) show([r, c]);
    view.say(readout.textContent);
  });
  return draw;
}

function spread(count, most) {
  const every = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256].find((n) => count / n <= Math.max(2, most)) ?? count;
  return Array.from({ length: Math.ceil(count / every) }, (_, i) => i * every);
}

function unpackLoad(data) {
  data.codes ??= bytes(data.cells);
  data.widest ??= Math.max(...data.experts);
  const size = data.layers.length * data.widest;
  return (f, layer, expert) => data.codes[f * size + layer * data.widest + expert];
}

function load(box, data, view) {
  const code = unpackLoad(data);
  const f = () => nearest(data.steps, view.hover ?? view.step);
  const name = (layer) => data.layers[layer].replace("_", " ");
  return heat(box, {
    rows: data.layers.length,
    columns: data.widest,
    code: (layer, e) => code(f(), layer, e),
    rowName: (layer) => data.layers[layer].replace("layer_", ""),
    columnName: (e) => e,
    describe: (layer, e) => `${name(layer)}, expert ${e}, step ${data.steps[f()]}: ${loaded(code(f(), layer, e))}`,
    summary: () => {
      let most = 0, where = [0, 0], dead = 0;
      for (let layer = 0; layer < data.layers.length; layer++)
        for (let e = 0; e < data.experts[layer]; e++) {
          const value = code(f(), layer, e);
          dead += value === DEAD;
          if (value > most) [most, where] = [value, [layer, e]];
        }
      return `step ${data.steps[f()]}: hottest is expert ${where[1]} of ${name(where[0])} with ${loaded(most)}; ${dead || "no"} dead expert${dead === 1 ? "" : "s"}`;
    },
    click: (layer) => view.pick(layer),
    marks: () => ({ row: Math.min(view.layer, data.layers.length - 1) }),
  }, view);
}

function history(box, data, view) {
  const code = unpackLoad(data);
  const layer = () => Math.min(view.layer, data.layers.length - 1);
  const name = () => data.layers[layer()].replace("_", " ");
  return heat(box, {
    rows: data.widest,
    columns: data.steps.length,
    labels: ticks(data.steps[0], data.steps.at(-1), 6).map((step) => nearest(data.steps, step)),
    code: (e, f) => code(f, layer(), e),
    rowName: (e) => e,
    columnName: (f) => data.steps[f],
    describe: (e, f) => `${name()}, expert ${e}, step ${data.steps[f]}: ${loaded(code(f, layer(), e))}`,
    summary: () => {
      let steady = 0;
      for (let e = 0; e < data.experts[layer()]; e++) steady += data.steps.every((_, f) => code(f, layer(), e) === DEAD);
      return `${name()}: ${data.experts[layer()]} experts, ${steady || "none"} of them without a token in the whole run`;
    },
    click: (_, f) => view.go(data.steps[f]),
    marks: () => ({ column: nearest(data.steps, view.hover ?? view.step) }),
  }, view);
}

// rows: domains, columns: experts; cells: how often a domain uses the expert, in shares of what all text does.
function domains(box, data, view) {
  const codes = bytes(data.cells), wide = Math.max(...data.experts), size = data.domains.length * wide;
  const layer = () => Math.min(view.layer, data.layers.length - 1);
  const code = (d, e) => codes[layer() * size + d * wide + e];
  const name = () => data.layers[layer()].replace("_", " ");
  return heat(box, {
    rows: data.domains.length,
    columns: wide,
    scale: ["⅛", "8 × as often as all text"],
    code,
    rowName: (d) => data.domains[d],
    columnName: (e) => e,
    describe: (d, e) => `${name()}: ${data.domains[d]} selects expert ${e} ${used(code(d, e))}`,
    summary: () => {
      let best = [0, 0, 0];
      for (let d = 0; d < data.domains.length; d++) for (let e = 0; e < data.experts[layer()]; e++) if (code(d, e) !== ABSENT && code(d, e) > best[0]) best = [code(d, e), d, e];
      return `${name()}, step ${data.step}: most specialized is expert ${best[2]}, which ${data.domains[best[1]]} selects ${used(best[0])}`;
    },
    marks: () => ({}),
  }, view);
}

// From rank (row) to rank (column), of one layer or of all; the strongest color stands for `most` and more.
function matrix(box, data, view) {
  const cells = new Uint16Array(bytes(data.cells).buffer), depth = Math.max(1, data.layers.length);
  const f = () => nearest(data.steps, view.hover ?? view.step);
  const layer = () => Math.min(view.layer, depth - 1);
  const value = (r, c) => (data.most * cells[((f() * depth + layer()) * data.size + r) * data.size + c]) / 1000;
  const shown = (v) => number(v, data.unit === "share");
  const name = (i) => (data.block > 1 ? `${i * data.block}–${(i + 1) * data.block - 1}` : i);
  const where = () => (data.layers.length ? `${data.layers[layer()].replace("_", " ")}, ` : "") + `step ${data.steps[f()]}`;
  const said = (r, c) => `${shown(value(r, c))} ${data.what.replace("{row}", name(r)).replace("{column}", name(c))}`;
  return heat(box, {
    rows: data.size,
    columns: data.size,
    height: Math.min(300, 34 * data.size + 40),
    scale: ["0", `${shown(data.most)}${data.unit === "seconds" ? " s" : ""} and more`, "half"],
    code: (r, c) => Math.round(EVEN + 48 * Math.min(1, value(r, c) / (data.most || 1))),
    rowName: name,
    columnName: name,
    describe: (r, c) => `${where()}: ${said(r, c)}`,
    summary: () => {
      let best = [0, 0, 0];
      for (let r = 0; r < data.size; r++) for (let c = 0; c < data.size; c++) if (value(r, c) > best[0]) best = [value(r, c), r, c];
      return best[0] ? `${where()}: most is ${said(best[1], best[2])}` : `${where()}: nothing`;
    },
    marks: () => ({}),
  }, view);
}

function specialists(box, data, view) {
  const list = box.appendChild(make("div", { class: "specialists" }));
  const chip = (t) => make("code", { title: `${t.count} times, ${number(t.lift)} × as often as in all text` }, shown(t.text));
  const shown = (text) => { const seen = text.replaceAll("\n", "↵").replace(/\s/g, "·"); return seen.length > 14 ? `${seen.slice(0, 13)}…` : seen; };
  return () => {
    const layer = data.layers[Math.min(view.layer, data.layers.length - 1)];
    list.replaceChildren(...layer.experts.map((e) => make("div", {},
      make("p", {}, make("b", {}, `Expert ${e.expert}`), `: ${number(e.share, true)} ${e.domain}`),
      make("p", {}, ...(e.tokens ?? []).map(chip)),
    )));
  };
}
