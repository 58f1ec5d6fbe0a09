// How Memoria’s engrams fired and were tied, behind a slider; part of page.js.

function graph() {
  const found = data.graph, steps = found.steps, nodes = found.nodes, last = steps.length - 1;
  const fired = found.fired.map((each) => new Set(each));
  // what each node's strongest tie became, and when
  const changes = nodes.map(() => []);
  found.ties.forEach((each, step) => each.forEach(([node, other, times]) => changes[node].push([step, other, times])));
  const dots = nodes.map((node, i) => s("circle", { class: `node ${node.level}`, cx: node.x, cy: -node.y, "data-node": i,
    r: Math.min(0.032, (nodes.length > 250 ? 0.006 : 0.009) + 0.0035 * Math.log2(1 + node.fired)) },
    s("title", {}, `engram ${node.id}`)));
  const lines = nodes.map(() => s("path", { class: "tie none" }));
  const svg = s("svg", { viewBox: "-1.06 -1.06 2.12 2.12", role: "img", "aria-label": "engrams and their strongest ties" }, lines, dots);
  const slider = h("input", { type: "range", id: "step", min: 0, max: last, value: last, step: 1, "aria-label": "after which segment" });
  const output = h("output", { for: "step", id: "told" });
  const about = h("div", { class: "readout", "aria-live": "polite" });
  let chosen = null;
  function draw() {
    const step = Number(slider.value);
    let alive = 0, tied = 0;
    nodes.forEach((node, i) => {
      const born = node.born <= steps[step], lit = fired[step].has(i);
      alive += born;
      dots[i].setAttribute("class", ["node", node.level, born ? "" : "unborn", lit ? "fired" : "", chosen === i ? "on" : ""].filter(Boolean).join(" "));
      let now = null;
      for (const change of changes[i]) { if (change[0] > step) break; now = change; }
      const shown = born && now && now[2] > 0;
      tied += shown ? 1 : 0;
      lines[i].setAttribute("class", `tie ${shown ? "" : "none"} ${lit ? "fired" : ""}`);
      if (!shown) return;
      const other = nodes[now[1]], bend = 0.075;
      lines[i].setAttribute("d", `M${node.x} ${-node.y}Q${bend * (node.x + other.x)} ${-bend * (node.y + other.y)} ${other.x} ${-other.y}`);
      lines[i].setAttribute("stroke-width", Math.min(0.012, 0.0025 + 0.0014 * Math.log2(now[2])));
    });
    const then = found.alive[step] && found.alive[step] > alive ? ` of ${count(found.alive[step])} that were alive then` : "";
    output.textContent = `after segment ${count(steps[step])} of ${count(steps[last])}: ${then ? count(alive) + then : several(alive, "engram", "engrams")}, ${count(fired[step].size)} fired, ${several(tied, "tie", "ties")}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    svg.setAttribute("data-step", steps[step]);
    if (chosen !== null) tell(chosen, step);
  }
  function tell(i, step) {
    const node = nodes[i], row = data.groups[0].rows.find((each) => each.id === node.id);
    let now = null;
    for (const change of changes[i]) { if (change[0] > step) break; now = change; }
    about.replaceChildren(h("p", {}, h("b", {}, `Engram ${count(node.id)}`), `, ${LEVELS[node.level]} at the end, made of segment ${count(node.born)}, fired ${several(node.fired, "time", "times")}`
      + (now && now[2] ? `; its strongest tie here is to engram ${count(nodes[now[1]].id)}, ${several(now[2], "time", "times")}.` : ".")),
      ...(row ? row.written.slice(0, 1).map(passage) : []));
  }
  const usual = "Choose an engram to see what it was made of.";
  about.append(h("p", { class: "quiet" }, usual));
  svg.addEventListener("click", (event) => {
    const node = event.target.closest("[data-node]");
    chosen = node ? Number(node.getAttribute("data-node")) : null;
    if (chosen === null) about.replaceChildren(h("p", { class: "quiet" }, usual));
    draw();
  });
  function follow() {
    const wanted = /^#step=(\d+)$/.exec(location.hash);
    if (!wanted) return;
    const place = steps.findIndex((step) => step >= Number(wanted[1]));
    slider.value = place < 0 ? last : place;
    draw();
  }
  slider.addEventListener("input", draw);
  addEventListener("hashchange", follow);
  const level = (name) => h("span", { class: "key" }, h("i", { class: name }), LEVELS[name]);
  section("graph", "How they were tied over time",
    "Engrams that are alive at the end, clockwise from the oldest at the top, on the ring of their level. Bright ones fired after the chosen segment; each is tied to the engram of another segment that it fired with most so far. "
    + `The state remembers the latest ${count(steps.length)} segments; engrams forgotten on the way are not in it.`
    + (found.left_out ? ` ${count(found.left_out)} that fired least are left out.` : ""),
    h("div", { class: "slide" }, slider), h("p", {}, output),
    h("div", { class: "two" }, svg, h("div", {}, h("div", { class: "tools" }, ["long", "short", "working"].map(level)), about)));
  draw();
  follow();
}
