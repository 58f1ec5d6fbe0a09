"""The page of a session in a real browser: alive, wide and narrow, and asking for nothing."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from helpers import SEGMENT
from mnemic.inspect import inside, page
from pages import HOSTILE, saved

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (Debian: apt install chromium)")


def browse(address, folder, *options):
    """The document as it is when a browser has run its scripts, and what it complained of."""
    folder.mkdir()
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr"
    flags += " --virtual-time-budget=4000 --hide-scrollbars"
    command = [BROWSER, *flags.split(), f"--user-data-dir={folder}", *options, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)})
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


VISITOR = """<!doctype html><meta charset="utf-8"><pre id="told"></pre><script>
const pages = %s, told = {};
function use(doc, width) {
  const $ = (query) => [...doc.querySelectorAll(query)];
  const about = {
    ready: doc.documentElement.dataset.ready, title: doc.title, scripts: $("script").length, images: $("img").length,
    overflow: doc.documentElement.scrollWidth - width, marks: $("mark").map((each) => each.textContent),
    headings: $("h1, h2").map((each) => each.textContent), rows: $("#places-0 tbody tr").length,
  };
  const pick = $("#places-0 select")[0];
  if (pick) {
    const first = () => $("#places-0 tbody tr td:first-child").map((each) => each.textContent);
    about.order = first();
    pick.selectedIndex = [...pick.options].findIndex((each) => each.text === "norm");
    pick.dispatchEvent(new Event("change"));
    about.by_norm = first();
    $("#places-0 button")[0].click();
    about.all = $("#places-0 tbody tr").length;
  }
  const heat = $("canvas.heat")[0];
  if (heat) about.heat = [...heat.getContext("2d").getImageData(0, 0, 2, 1).data];
  const slider = $("#step")[0];
  if (slider) {
    const look = () => ({
      told: $("#told")[0].textContent, fired: $(".node.fired").length, born: $(".node:not(.unborn)").length,
      spots: $(".node").map((each) => each.getAttribute("cx") + " " + each.getAttribute("cy")).join(),
    });
    about.steps = [look()];
    for (const step of [0, Math.floor(slider.max / 2), slider.max]) {
      slider.value = step;
      slider.dispatchEvent(new Event("input"));
      about.steps.push(look());
    }
    $(".node:not(.unborn)")[0].dispatchEvent(new MouseEvent("click", { bubbles: true }));
    about.chosen = $("#graph .readout")[0].textContent;
  }
  return about;
}
function visit(name, width) {
  return new Promise((done) => {
    const frame = document.createElement("iframe");
    frame.width = width;
    frame.height = 900;
    frame.srcdoc = pages[name];
    frame.onload = () => {
      told[name + " " + width] = use(frame.contentDocument, frame.clientWidth);
      frame.remove();
      done();
    };
    document.body.append(frame);
  });
}
(async () => {
  for (const name of Object.keys(pages)) for (const width of [360, 1200]) await visit(name, width);
  document.getElementById("told").textContent = JSON.stringify(told);
})();
</script>"""


def test_pages_live_in_a_browser(tmp_path):
    """All pages in one start of the browser, each in a narrow and in a wide frame, used as a reader would."""
    made = {name: saved(tmp_path / f"{name}.memory", name, 40 * SEGMENT) for name in ("memoria-0", "knn-0", "titans-0")}
    made["emt"] = saved(tmp_path / "emt.memory", "emt-0", 5 * SEGMENT, slots=20)  # slots are not yet all alike
    made["new"] = saved(tmp_path / "new.memory", "emt-0", 0)
    made["emt"][0].name = HOSTILE
    pages = {name: page.render(page.values(*each)) for name, each in made.items()}
    (tmp_path / "visitor.html").write_text(VISITOR % page.embedded(pages), "utf-8")
    document, complaints = browse(f"file://{tmp_path / 'visitor.html'}", tmp_path / "browser")
    assert complaints == []
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', document, re.DOTALL)[1]))
    assert len(told) == 10
    for name, about in told.items():
        assert about["ready"] == "yes", name
        assert about["scripts"] == 2, name
        assert about["images"] == 0, name
        assert about["overflow"] <= 0, f"{name} does not fit its width"
    assert told["new 360"]["headings"] == ["new.memory"]
    assert told["knn-0 1200"]["headings"][-1] == "What is kept token by token"
    emt, memoria = told["emt 1200"], told["memoria-0 360"]
    # hostile text is there, as text
    assert emt["title"].startswith(HOSTILE.replace("\u2028", " ")[:40])
    assert emt["headings"][0] == HOSTILE
    assert any("</script>" in mark for mark in emt["marks"])
    assert (emt["rows"], emt["all"]) == (16, 20)
    norms = [row["norm"] for row in page.values(*made["emt"])["groups"][0]["rows"]]
    assert emt["order"] == [str(i) for i in range(16)]
    assert emt["by_norm"] == [str(i) for i in np.argsort(-np.array(norms), kind="stable")[:16]]
    assert emt["heat"][:4] != emt["heat"][4:], "a slot is as itself and less as another"
    # the slider moves the graph, and nothing else moves in it
    graph = inside.graph_over_time(made["memoria-0"][0])
    first, *moved = memoria["steps"]
    assert first == moved[-1], "it begins at the end"
    for place, look in zip((0, (len(graph["steps"]) - 1) // 2, len(graph["steps"]) - 1), moved, strict=True):
        step = graph["steps"][place]
        assert look["told"].startswith(f"after segment {step} of {graph['steps'][-1]}: ")
        assert look["fired"] == len(graph["fired"][place])
        assert look["born"] == sum(node["born"] <= step for node in graph["nodes"])
        assert look["spots"] == first["spots"]
    assert moved[0]["born"] < moved[-1]["born"]
    assert memoria["chosen"].startswith(f"Engram {graph['nodes'][0]['id']}, ")
    assert "segment" in memoria["chosen"]


def test_an_address_names_a_step(tmp_path):
    found, words = saved(tmp_path / "a.memory", "memoria-0", 30 * SEGMENT)
    page.write_page(found, tmp_path / "a.html", words)
    document, complaints = browse(f"file://{tmp_path / 'a.html'}#step=12", tmp_path / "browser")
    assert complaints == []
    assert 'data-step="12"' in document
    assert re.search(r"<output[^>]*>after segment 12 of 30: ", document)
