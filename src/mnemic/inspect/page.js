"use strict";
// Draws the page from the values in #data. The graph over time is drawn in page_graph.js, which stands before this.

const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const SVG = "http://www.w3.org/2000/svg";
const LEVELS = { long: "long-term", short: "short-term", working: "working" };

// Text enters the page as text nodes alone: whatever was read stays text.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === "style") for (const [key, each] of Object.entries(value)) node.style.setProperty(key, each);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const count = (value) => Number(value).toLocaleString("en-US");
const digits = (value, places) => (value === null || value === undefined ? "" : Number(value).toFixed(places));
const percent = (value) => (value >= 0.995 ? "all" : `${Math.max(1, Math.round(100 * value))} %`);
const several = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;

function when(seconds) {
  const text = new Date(1000 * seconds).toISOString();
  return `${text.slice(0, 10)} ${text.slice(11, 16)} UTC`;
}
function section(id, title, note, ...children) {
  page.append(h("section", { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title), note && h("p", { class: "note" }, note), ...children));
}

// --- head ---------------------------------------------------------------------------------------------------------

function head() {
  const seen = data.seen, memory = Object.values(data.bytes).reduce((sum, each) => sum + each, 0);
  const fact = (name, value, note, share) => h("div", {}, h("dt", {}, name),
    h("dd", {}, value, note && h("small", {}, note),
      share === undefined ? null : h("span", { class: "bar" }, h("i", { style: { width: `${100 * share}%` } }))));
  page.append(h("header", {}, h("h1", {}, data.name),
    h("div", { class: "quiet" }, [data.title, data.base && `on ${data.base}`, data.saved && `saved ${when(data.saved)}`].filter(Boolean).join(" \u00b7 ")),
    h("dl", { class: "facts" },
      fact("tokens read", count(seen)),
      fact("segments written", count(data.written), `of ${count(data.segment)} tokens`),
      fact("waiting", count(data.waiting), `of ${count(data.segment)} for the next write`, data.waiting / data.segment),
      data.window ? fact("window", count(data.held), `of ${count(data.window)} tokens\u2019 keys` + (data.sinks ? `, the first ${count(data.sinks)} for good` : ""), Math.min(1, data.held / data.window)) : null,
      fact("bytes", count(memory), `memory\u2019s state ${count(data.bytes.state)}`))));
  if (!data.written) page.append(h("section", {}, h("p", {}, "Nothing was written yet: the first segment is not full.")));
}

// --- timeline -----------------------------------------------------------------------------------------------------

function timeline() {
  const writes = data.history;
  if (!writes.length) {
    if (data.written) section("writes", "When it was written", "This session has no history: it was saved before histories were kept.");
    return;
  }
  const told = writes.some((each) => each.left > 0);
  const most = Math.max(...writes.map((each) => each.left), 1e-9), end = Math.max(data.seen, 1);
  const W = 1000, H = told ? 84 : 30;
  const readout = h("p", { class: "note readout", "aria-live": "polite" });
  function tell(each) {
    readout.textContent = `Segment ${count(each.number)}: tokens ${count(each.first)} to ${count(each.last)}, written ${when(each.time)}`
      + (told ? `, ${(100 * each.left).toFixed(1)} % of the memory.` : ".");
  }
  const bars = writes.map((each) => {
    const wide = Math.max(2.5, W * (each.last + 1 - each.first) / end - 1);
    const tall = told ? Math.max(1.5, H * each.left / most) : H;
    return s("rect", { class: told && each.left < 0.0005 ? "write faint" : "write", x: W * each.first / end, y: H - tall, width: wide, height: tall,
      on: { pointerenter: () => tell(each), click: () => tell(each) } });
  });
  const note = (told
    ? "Each bar is a segment at its place in the stream; its height is how much of the memory it still makes up."
    : `Each bar is a segment at its place in the stream. ${data.title} does not tell which of its tokens went where.`)
    + (writes.length < data.written ? ` ${count(writes.length)} of ${count(data.written)} writes are in the history, which keeps those of which most is left.` : "");
  section("writes", "When it was written", note,
    s("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", class: told ? "line tall" : "line", role: "img",
      "aria-label": `${several(writes.length, "write", "writes")} over ${count(end)} tokens` }, bars),
    h("div", { class: "ticks note", "aria-hidden": "true" },
      [0, 0.5, 1].map((part) => h("span", {}, count(Math.round(end * part)) + (part === 1 ? " tokens" : "")))), readout);
  tell(writes.reduce((best, each) => (each.left >= best.left ? each : best)));
}

// --- places -------------------------------------------------------------------------------------------------------

function passage(entry) {
  const from = h("span", { class: "from" }, `segment ${count(entry.number)}, ${percent(entry.left)} left`);
  if (!entry.passage) {
    const tokens = entry.tokens.map((token, i) => `${count(token)} (${Math.round(100 * entry.weights[i])} %)`).join(", ");
    return h("p", { class: "passage" }, tokens ? `tokens ${tokens}` : "", from);
  }
  return h("p", { class: "passage" }, entry.passage.map(([text, weight]) => {
    if (!weight) return text;
    const [, before, word, after] = /^(\s*)([^]*?)(\s*)$/.exec(text);
    return [before, h("mark", { style: { "--w": (0.08 + 0.5 * Math.sqrt(weight)).toFixed(2) }, title: `${Math.round(100 * weight)} % of the weight` }, word), after];
  }), from);
}

function group(each, place) {
  const columns = each.columns, told = each.rows.some((row) => row.written.length);
  const aged = told && !columns.some((column) => column.name === "age");
  const orders = [["number", (row) => row.label]];
  for (const column of columns) {
    if (column.digits !== null) orders.push([column.name, (row) => -(row.values[column.name] ?? -Infinity)]);
  }
  if (aged) orders.push(["newest first", (row) => row.age ?? Infinity], ["oldest first", (row) => -(row.age ?? -Infinity)]);
  if (told) orders.push(["most known", (row) => -row.written.reduce((sum, entry) => sum + entry.left, 0)]);
  orders.push(["norm", (row) => -row.norm], ["most alike", (row) => -(row.nearest ? row.nearest[1] : -2)]);
  let order = each.order ? orders.findIndex(([name]) => name === each.order) : 0, shown = 16;
  const body = h("tbody"), more = h("button", { type: "button", on: { click: () => { shown = Infinity; draw(); } } });
  const names = ["", ...columns.map((column) => column.name), ...(aged ? ["age"] : []), "norm", "most alike", ...(told ? ["what was written into it"] : [])];
  function draw() {
    const key = orders[Math.max(0, order)][1];
    const rows = each.rows.map((row, i) => [key(row), i, row]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((row) => row[2]);
    body.replaceChildren(...rows.slice(0, shown).map((row) => h("tr", {},
      h("td", { class: "id", "data-name": each.unit }, count(row.label)),
      columns.map((column) => h("td", { class: column.digits === null ? "level" : (row.values[column.name] ?? null) === null ? "n empty" : "n", "data-name": column.name },
        column.digits === null ? LEVELS[row.values[column.name]] || row.values[column.name] : digits(row.values[column.name], column.digits))),
      aged ? h("td", { class: "n", "data-name": "age" }, digits(row.age, 1)) : null,
      h("td", { class: "n", "data-name": "norm" }, digits(row.norm, 2)),
      h("td", { class: "n", "data-name": "most alike" }, row.nearest ? `${count(row.nearest[0])} (${digits(row.nearest[1], 2)})` : ""),
      told ? h("td", { class: row.written.length ? "passages" : "passages empty" },
        row.written.slice(0, 3).map(passage)) : null)));
    more.hidden = each.rows.length <= shown;
    more.textContent = `show all ${count(each.rows.length)}`;
  }
  draw();
  const pick = h("select", { "aria-label": `order of the ${each.name}`, on: { change: () => { order = pick.selectedIndex; draw(); } } },
    orders.map(([name], i) => h("option", i === order ? { selected: "" } : {}, name)));
  const note = (told ? (data.text
    ? "Marked are the tokens that weighed most when it was written, with what stands around them; \u201cleft\u201d is how much of the place still comes from that segment."
    : "Positions in the stream of the tokens that weighed most. For words, keep the text with the session (keep_text) or pass it, and name a tokenizer.")
    : `${data.title} does not tell which tokens went into which of them.`) + (aged ? " Age is in segments, the mean over what is known." : "");
  section(`places-${place}`, `${several(each.rows.length, each.unit, each.units)}${each.of ? ` ${each.of}` : ""}`, note,
    h("div", { class: "tools" }, h("label", {}, "Order by ", pick),
      h("span", { class: "quiet" }, `width ${count(each.width)}` + (each.directions === null ? "" : `, in use ${digits(each.directions, 1)} of ${count(Math.min(each.width, each.rows.length))} directions`))),
    h("table", { class: "cards" }, h("thead", {}, h("tr", {}, names.map((name, i) => h("th", { scope: "col",
      class: i > 0 && name !== "level" && name !== names[names.length - 1] || (!told && i > 0) ? "n" : "" }, name)))), body), h("p", {}, more));
  if (each.similarity) heat(each, place);
}

// --- similarity ---------------------------------------------------------------------------------------------------

function heat(each, place) {
  const raw = atob(each.similarity.values), labels = each.similarity.labels, n = labels.length;
  const values = Array.from(raw, (letter) => ((letter.charCodeAt(0) << 24) >> 24) / 100);
  const canvas = h("canvas", { class: "heat", width: n, height: n, role: "img",
    "aria-label": `similarity of ${n} ${each.units}; mean ${digits(each.similarity.mean, 2)}` });
  const readout = h("p", { class: "readout" });
  const usual = `Cosine of each two; ${each.units} that are alike hold one thing. The mean is ${digits(each.similarity.mean, 2)}`
    + (each.similarity.most ? `; the most alike are ${count(each.similarity.most[0])} and ${count(each.similarity.most[1])} (${digits(each.similarity.most[2], 2)}).` : ".");
  readout.textContent = usual;
  function paint() {
    const style = getComputedStyle(document.documentElement);
    const rgb = (name) => { const hex = style.getPropertyValue(name).trim(); return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)); };
    const ground = rgb("--ground"), blue = rgb("--blue"), amber = rgb("--amber");
    const context = canvas.getContext("2d"), image = context.createImageData(n, n);
    values.forEach((value, i) => {
      const end = value < 0 ? amber : blue, part = Math.abs(value);
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(ground[c] + (end[c] - ground[c]) * part);
      image.data[4 * i + 3] = 255;
    });
    context.putImageData(image, 0, 0);
  }
  function point(event) {
    const box = canvas.getBoundingClientRect();
    const [j, i] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((part) => Math.min(n - 1, Math.max(0, Math.floor(n * part))));
    readout.textContent = `${each.unit} ${count(labels[i])} and ${count(labels[j])}: ${digits(values[n * i + j], 2)}`;
  }
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("click", point);
  canvas.addEventListener("pointerleave", () => { readout.textContent = usual; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  section(`alike-${place}`, "How alike they are", n < each.rows.length ? `Every ${Math.ceil(each.rows.length / n)}th of ${count(each.rows.length)} ${each.units} is shown.` : null,
    h("div", { class: "two" }, canvas, h("div", {}, readout, h("div", { class: "scale" }, "\u22121", h("i"), "1"))));
  paint();
}

// --- the rest -------------------------------------------------------------------------------------------------------

function table(names, rows, numbers) {
  return h("table", { class: "cards" }, h("thead", {}, h("tr", {}, names.map((name, i) => h("th", { scope: "col", class: numbers.includes(i) ? "n" : "" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h("td", {
      class: numbers.includes(i) ? "n" : i ? "" : "id", "data-name": i ? names[i] : "" }, cell))))));
}
function spectrum(values) {
  const most = Math.max(...values, 1e-9), wide = 120 / values.length;
  return s("svg", { class: "spectrum", viewBox: "0 0 120 22", preserveAspectRatio: "none", role: "img", "aria-label": "singular values" },
    values.map((value, i) => s("rect", { x: i * wide, y: 22 - 22 * value / most, width: Math.max(0.6, 0.8 * wide), height: 22 * value / most })));
}

head();
timeline();
if (data.written_into.length && !data.groups.length) {
  section("written", `What was written into ${several(data.written_into.length, "head", "heads")}`, "The writes of which most is left, and the tokens that weighed most in them.",
    table(["", ""], data.written_into.map((each) => [each.name, h("div", { class: "passages" }, each.written.slice(0, 6).map(passage))]), []));
}
data.groups.forEach(group);
if (data.graph) graph();
if (data.queues.length) {
  section("queues", "What is kept token by token", "Of the newest tokens that were written.",
    table(["", "held", "at most", "tokens of the stream"], data.queues.map((each) => [each.name, count(each.held), count(each.size),
      each.first === null ? "older ones, several in each" : `${count(each.first)} to ${count(each.last)}`]), [1, 2]));
}
if (data.matrices.length) {
  section("matrices", several(data.matrices.length, "matrix", "matrices"), "The effective rank is in how many directions a matrix works: 1 where it holds one pair, as many as it has rows where all are used alike.",
    table(["", "shape", "norm", "effective rank", "singular values"], data.matrices.map((each) => [each.name, each.shape.join(" \u00d7 "), digits(each.norm, 3), digits(each.rank, 1), spectrum(each.values)]), [2, 3]));
}
const writes = table(["segment", "first token", "last token", "written", "of the memory, %"], data.history.map((each) => [
  count(each.number), count(each.first), count(each.last), when(each.time), (100 * each.left).toFixed(1)]), [1, 2, 4]);
page.append(h("section", { id: "more" },
  data.history.length ? h("details", {}, h("summary", {}, "History"), writes) : null,
  h("details", {}, h("summary", {}, "Bytes"), table(["", "bytes"], Object.entries(data.bytes).map(([name, size]) => [name, count(size)]), [1])),
  h("details", {}, h("summary", {}, "Tensors of the state"), table(["tensor", "shape", "type", "bytes", "finite"],
    data.tensors.map((each) => [each.name, each.shape.join(" \u00d7 "), each.dtype, count(each.bytes), each.finite ? "yes" : "no"]), [3])),
  h("details", {}, h("summary", {}, "Settings and fingerprints"), table(["setting", "value"],
    [...data.settings.map(([name, value, changed]) => [name, h("span", changed ? { class: "changed" } : {}, JSON.stringify(value))]),
      ...Object.entries(data.fingerprints).map(([name, value]) => [`fingerprint of the ${name}`, value])], []))));
document.documentElement.dataset.ready = "yes";
