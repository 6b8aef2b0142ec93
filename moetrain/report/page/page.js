// The page: cards, findings, figures of the chosen run; the step slider; keys; light and dark; a run in progress.

const DRAW = { lines, area, bars, devices, matrix, load, history, domains, specialists };
const find = (id) => document.getElementById(id);
const reduced = window.matchMedia("(prefers-reduced-motion: reduce)");

let page = JSON.parse(find("data").textContent);
let chosen = 0; // of the runs
let steps = []; // that the slider stops at
const view = {
  step: 0,
  layer: 0,
  hover: null,
  get resumed() { return run().resumed; },
  go(step) { view.step = steps[nearest(steps, step)] ?? 0; view.hover = null; update(); },
  look(step) { if (view.hover !== step) { view.hover = step; update(); } },
  pick(layer) { view.layer = layer; find("layer").value = String(layer); update(); },
  say(text) { find("said").textContent = text; },
};

const run = () => page.runs[chosen];
const boxes = () => [...document.querySelectorAll(".plot")];

function update() {
  const at = steps.indexOf(view.step);
  find("step").value = String(Math.max(0, at));
  find("step").setAttribute("aria-valuetext", `step ${view.step}`);
  const shown = view.hover ?? view.step, of = shown > steps.at(-1) ? "" : ` of ${steps.at(-1)?.toLocaleString("en")}`; // another run may be longer
  find("at").textContent = steps.length ? shown.toLocaleString("en") + of : "no steps";
  for (const box of boxes()) box.update?.();
}

const focusable = (box) => [...box.querySelectorAll("button, [tabindex]")];

function figure(holder, data) {
  const before = holder.querySelector(".plot"), at = before ? focusable(before).indexOf(document.activeElement) : -1;
  before?.remove();
  holder.hidden = data.kind === "absent";
  if (holder.hidden) return;
  const box = make("div", { class: "plot" });
  if (holder.dataset.compare) box.dataset.compared = "";
  if (before?.hidden_) box.hidden_ = before.hidden_; // lines stay hidden, and the focus where it was, when data grow
  box.title_ = holder.querySelector("figcaption b").textContent;
  holder.querySelector("figcaption").after(box);
  box.update = DRAW[holder.dataset.figure === "history" ? "history" : data.kind](box, data, view);
  if (at >= 0) focusable(box)[at]?.focus({ preventScroll: true });
}

// Under each section, what its run did not record, in place of empty frames.
function absences(section) {
  section.querySelector(".absent")?.remove();
  const gone = [...section.querySelectorAll("[data-figure]")].filter((holder) => holder.hidden && holder.dataset.figure !== "history");
  const texts = gone.map((holder) => `${holder.querySelector("figcaption b").textContent} (${run().figures[holder.dataset.figure].text})`);
  if (texts.length) section.append(make("p", { class: "absent" }, `Not recorded: ${texts.join("; ")}.`));
}

// Figures fill their rows: where one was not recorded, its neighbours take its place. Twelve columns.
const SPANS = { third: 4, half: 6, "two-thirds": 8, whole: 12 };
function fill(list) {
  let row = [], taken = 0;
  const close = () => {
    row.forEach(([holder, span], index) => holder.style.setProperty("--span", index === row.length - 1 ? span + 12 - taken : span));
    [row, taken] = [[], 0];
  };
  const even = () => { if (taken < 12 && row.every(([, span]) => span === row[0][1])) { row.forEach((part) => (part[1] = 12 / row.length)); taken = 12; } };
  for (const holder of list.children) {
    if (holder.hidden) continue;
    const span = SPANS[holder.className] ?? 12;
    if (taken + span > 12) { even(); close(); }
    row.push([holder, span]);
    taken += span;
  }
  even();
  close();
}

function draw() {
  const { figures: known } = run();
  for (const holder of document.querySelectorAll("[data-figure]")) holder.hidden = known[holder.dataset.figure === "history" ? "load" : holder.dataset.figure].kind === "absent";
  document.querySelectorAll(".figures").forEach(fill);
  for (const holder of document.querySelectorAll("[data-figure]")) {
    const { figures } = run();
    const name = holder.dataset.figure;
    figure(holder, figures[name === "history" ? "load" : name]);
  }
  document.querySelectorAll("main > section").forEach(absences);
  if (page.compare) for (const holder of document.querySelectorAll("[data-compare]")) figure(holder, page.compare.figures[holder.dataset.compare]);
  update();
}

function table(node, columns, rows) {
  const cell = (tag, { text, best, mark }) => make(tag, best ? { class: "best" } : {}, ...(mark ? [mark] : []), text);
  node.replaceChildren(
    make("thead", {}, make("tr", {}, ...columns.map(({ text, unit }) => make("th", { scope: "col" }, text, ...(unit ? [make("small", {}, unit)] : []))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((c) => cell("td", c))))),
  );
}

function head() {
  const { name, about, cards, findings, missing, config, alerts, circumstances } = run();
  find("name").textContent = name;
  find("about").textContent = about;
  find("circumstances").replaceChildren(...circumstances.flatMap(([what, text]) => [make("dt", {}, what), make("dd", {}, text)]));
  find("version").textContent = `${page.version}, ${page.written}`;
  find("live").textContent = page.live ? `· live, read at ${page.written.slice(-5)}` : "";
  find("cards").replaceChildren(...cards.map((c) => make("div", { class: "card" }, make("h3", {}, c.name), make("strong", {}, `${c.value} `, make("small", {}, c.unit)), make("p", {}, c.note))));
  const words = { trouble: "Trouble", watch: "Watch", good: "Good" };
  find("findings").replaceChildren(...findings.map((f) => make("li", { class: f.level }, make("b", {}, words[f.level]), make("a", { href: `#${f.section}` }, f.text))));
  find("missing").replaceChildren();
  if (missing.length) find("missing").append("What this report could not show:", make("ul", {}, ...missing.map((text) => make("li", {}, text))));
  if (alerts.length) find("missing").append(make("p", {}, "Alerts of the run:"), make("ul", {}, ...alerts.map((a) => make("li", {}, `step ${a.step}: ${a.text}`))));
  table(find("config"), [{ text: "field" }, { text: "value" }], Object.entries(config).map(([field, value]) => [{ text: field }, { text: value }]));
  find("runs").hidden = page.runs.length < 2;
  find("runs").replaceChildren(...page.runs.map((r, index) => {
    const button = make("button", { type: "button", "aria-pressed": String(index === chosen) }, swatch(strokeOf({}, index)), r.name);
    button.addEventListener("click", () => choose(index));
    return button;
  }));
  find("compare").hidden = !page.compare;
  if (!page.compare) return;
  const { table: compared, differences } = page.compare;
  table(find("table"), [{ text: "run" }, ...compared.columns], compared.rows.map((r, index) => [{ text: r.name, mark: swatch(strokeOf({}, index)) }, ...r.cells]));
  table(find("differences").querySelector("table"), [{ text: "field" }, ...compared.rows.map((r) => ({ text: r.name }))], differences.map((d) => [{ text: d.field }, ...d.values.map((text) => ({ text }))]));
}

// The slider stops at the steps of the finest figure; it stays where it is when the data grow, or follows the last step.
function prepare() {
  const { figures } = run();
  const followed = !steps.length || view.step === steps.at(-1);
  steps = [figures.loss.x, figures.imbalance.x, figures.load.steps, figures.devices.steps, figures.information.x].find((s) => s?.length) ?? [];
  view.step = followed ? steps.at(-1) ?? 0 : steps[nearest(steps, view.step)];
  view.hover = null;
  find("step").max = String(Math.max(0, steps.length - 1));
  const names = figures.load.layers ?? figures.devices.layers?.slice(1) ?? [];
  view.layer = Math.min(view.layer, Math.max(0, names.length - 1));
  find("layer").replaceChildren(...names.map((name, index) => make("option", { value: index }, name.replace("layer_", ""))));
  find("layer").value = String(view.layer);
}

function show() {
  prepare();
  head();
  draw();
}

function choose(index) {
  chosen = index;
  show();
  find("runs").children[index].focus();
}

const walk = (by) => view.go(steps[Math.min(steps.length - 1, Math.max(0, nearest(steps, view.step) + by))]);

let playing = null;
function play(on) {
  clearInterval(playing);
  playing = on ? setInterval(() => (view.step === steps.at(-1) ? play(false) : walk(1)), reduced.matches ? 400 : Math.max(60, 8000 / steps.length)) : null;
  find("play").textContent = on ? "❚❚" : "▶";
  find("play").setAttribute("aria-label", on ? "Pause" : "Play");
}

find("step").addEventListener("input", (event) => view.go(steps[Number(event.target.value)]));
find("layer").addEventListener("change", (event) => view.pick(Number(event.target.value)));
find("play").addEventListener("click", () => {
  if (!playing && view.step === steps.at(-1)) view.go(steps[0]);
  play(!playing);
});
document.addEventListener("keydown", (event) => {
  const ten = event.shiftKey && event.target === find("step") && ["ArrowLeft", "ArrowRight"].includes(event.key); // the slider does the rest itself
  if (event.altKey || event.ctrlKey || event.metaKey || (event.target.matches("input, select, summary") && !ten)) return;
  const by = event.shiftKey ? 10 : 1;
  const keys = {
    ArrowLeft: () => walk(-by),
    ArrowRight: () => walk(by),
    Home: () => view.go(steps[0]),
    End: () => view.go(steps.at(-1)),
    ArrowUp: () => view.pick(Math.max(0, view.layer - 1)),
    ArrowDown: () => view.pick(Math.min(find("layer").options.length - 1, view.layer + 1)),
    " ": () => find("play").click(),
  };
  const scrolls = ["Home", "End", "ArrowUp", "ArrowDown", " "].includes(event.key) && !event.target.closest("svg, #steps");
  if (!keys[event.key] || scrolls || !steps.length) return; // the page's own scrolling keys stay what they are
  if (event.target.matches("button") && event.key === " ") return;
  event.preventDefault();
  keys[event.key]();
});

// Light, dark: as the system says until the button is pressed. Paper is light.
const root = document.documentElement, dark = window.matchMedia("(prefers-color-scheme: dark)");
let theme = null;
function paint(name) {
  root.dataset.theme = name;
  update();
}
const wanted = () => theme ?? (dark.matches ? "dark" : "light");
dark.addEventListener("change", () => paint(wanted()));
find("theme").addEventListener("click", () => { theme = wanted() === "dark" ? "light" : "dark"; paint(theme); });
let opened = false; // the table of fields that differ, which paper shows in any case
window.addEventListener("beforeprint", () => { opened = find("differences").open; find("differences").open = true; paint("light"); });
window.addEventListener("afterprint", () => { find("differences").open = opened; paint(wanted()); });

let width = 0;
new ResizeObserver(() => {
  if (window.matchMedia("print").matches || Math.abs(document.body.clientWidth - width) < 2) return;
  width = document.body.clientWidth;
  draw();
}).observe(document.body);

root.dataset.theme = wanted();
prepare();
head();
width = document.body.clientWidth;
draw();

if (page.live) setInterval(async () => {
  if (document.hidden) return;
  try {
    const answer = await fetch("data.json");
    if (!answer.ok) { find("live").textContent = "· the run cannot be read at the moment"; return; }
    const fresh = await answer.json();
    const grown = JSON.stringify(fresh.runs) !== JSON.stringify(page.runs);
    page = fresh;
    const held = [find("findings"), find("runs")].find((list) => list.contains(document.activeElement)); // drawn anew
    const at = held ? [...held.querySelectorAll("a, button")].indexOf(document.activeElement) : -1;
    if (grown && !playing) show(); else head();
    held?.querySelectorAll("a, button")[at]?.focus({ preventScroll: true });
  } catch {
    find("live").textContent = "· the server has stopped";
  }
}, 3000);
