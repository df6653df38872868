"""The frame of a report: page, style sheet and script, as texts."""

from __future__ import annotations

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content=\""""
    + POLICY
    + """\">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="Amalgam">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#findings">Skip to the findings</a>
<header><p class="kind">Inspection of task vectors</p><h1>{heading}</h1><p class="subtitle">{subtitle}</p></header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
<noscript><p>Charts need JavaScript, which is part of this file; all their numbers are in the tables.</p></noscript>
{sections}
</main>
<footer>Made with Amalgam. This file holds everything it shows and asks no other computer for anything.</footer>
<script type="application/json" id="figures">{figures}</script>
<script type="application/json" id="templates">{templates}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
)

STYLE = """
:root { --text: #1b1f24; --quiet: #57606a; --back: #ffffff; --box: #f6f7f9; --line: #d8dee4; --link: #0b5cad;
  --problem: #b42318; --warning: #8a5a00; --note: #0b5cad; --ok: #1a6b3c; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --quiet: #a2abb5; --back: #15181c; --box: #1d2126;
  --line: #343b43; --link: #7cb8ff; --problem: #ff9a8d; --warning: #f2c04b; --note: #7cb8ff; --ok: #6fd39a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .2rem 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0 0 .5rem; line-height: 1.3; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0 .7rem; max-width: 48rem; }
a { color: var(--link); }
a:focus-visible, select:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--box); padding: .1em .3em;
  border-radius: 4px; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  margin: .6rem 0; }
pre code { padding: 0; background: none; white-space: pre-wrap; overflow-wrap: anywhere; }
.kind { color: var(--quiet); margin: 0; text-transform: uppercase; letter-spacing: .06em; font-size: .8rem; }
.subtitle, .small, .basis, footer { color: var(--quiet); }
.subtitle { overflow-wrap: anywhere; }
.small { font-size: .85rem; }
.basis { font-size: .8rem; border: 1px solid var(--line); border-radius: 99px; padding: 0 .5em; white-space: nowrap; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; }
nav ul { columns: 20rem; column-gap: 3rem; padding: .8rem 1rem .8rem 2rem; margin: 1rem 0; background: var(--box);
  border: 1px solid var(--line); border-radius: 8px; }
nav li { break-inside: avoid; }
section { margin: 2.6rem 0; }
.scroll { overflow-x: auto; max-width: 100%; }
.plot { min-width: 42rem; }
.choose { display: block; margin: .2rem 0 .4rem; color: var(--quiet); }
select { font: inherit; color: var(--text); background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  padding: .25rem .4rem; max-width: 100%; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--link); padding: .2rem 0; }
table { border-collapse: collapse; font-size: .85rem; margin: .4rem 0; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { border-bottom-width: 2px; font-weight: 600; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.finding { display: grid; grid-template-columns: 7rem 1fr; gap: .2rem 1rem; padding: .9rem 0;
  border-top: 1px solid var(--line); }
.finding p { margin: .15rem 0; }
.badge { font-weight: 600; white-space: nowrap; }
.badge span { display: inline-block; width: 1.5em; height: 1.5em; line-height: 1.4em; text-align: center;
  border: 1.5px solid currentColor; border-radius: 50%; margin-right: .3em; }
.problem .badge { color: var(--problem); } .warning .badge { color: var(--warning); }
.note .badge { color: var(--note); } .ok .badge { color: var(--ok); }
.remedy::before { content: "→ "; color: var(--quiet); }
footer { border-top: 1px solid var(--line); padding-top: 1rem; font-size: .85rem; }
@media (max-width: 36rem) { .finding { grid-template-columns: 1fr; } h1 { font-size: 1.5rem; }
  body { padding: 1rem; } nav ul { columns: 1; } }
@page { margin: 15mm; }
@media print {
  :root { --text: #000; --quiet: #444; --back: #fff; --box: #fff; --line: #bbb; --link: #000; --problem: #000;
    --warning: #000; --note: #000; --ok: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .choose, .skip, details:not([open]) { display: none; }
  section { break-inside: auto; margin: 1.2rem 0; }
  h2, .reading, .finding h3 { break-after: avoid; break-inside: avoid; }
  .scroll { overflow: visible; } .finding, .plot { break-inside: avoid; } .plot { min-width: 0; }
}
"""

SCRIPT = """
(function () {
  "use strict";
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var templates = JSON.parse(document.getElementById("templates").textContent);
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var printing = false;
  var drawn = new Set();
  function draw(box) {
    var figure = figures[box.dataset.figure];
    var look = templates[dark.matches && !printing ? "dark" : "light"];
    box.style.height = figure.layout.height + "px";
    var layout = Object.assign({}, figure.layout, { template: look, autosize: true });
    var options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"],
      toImageButtonOptions: { format: "svg", filename: box.id.slice(5) } };
    drawn.add(box);
    return Plotly.react(box, structuredClone(figure.data), structuredClone(layout), options);
  }
  function redraw() { drawn.forEach(draw); }
  var boxes = Array.from(document.querySelectorAll(".plot"));
  var watcher = new IntersectionObserver(function (seen) {
    seen.forEach(function (one) {
      if (one.isIntersecting) { watcher.unobserve(one.target); draw(one.target); }
    });
  }, { rootMargin: "600px" });
  boxes.forEach(function (box) { watcher.observe(box); });
  document.querySelectorAll("select[data-chart]").forEach(function (select) {
    select.value = "0";
    select.addEventListener("change", function () {
      var box = document.getElementById("plot-" + select.dataset.chart);
      box.dataset.figure = select.dataset.chart + "-" + select.value;
      watcher.unobserve(box);
      draw(box);
    });
  });
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", function () { printing = true; boxes.forEach(draw); });
  window.addEventListener("afterprint", function () { printing = false; redraw(); });
  window.drawAll = function () { return Promise.all(boxes.map(draw)); };
})();
"""

LIMITS = """<section id="limits"><h2>How to read this, and its limits</h2>
<p>A <em>task vector</em> τ is an expert's weights minus the base's. ‖τ‖ is its Frobenius norm; W₀ are the base's
weights; σ are singular values. All numbers come from weights alone unless a section says that it used texts.</p>
<p>Nobody can tell from weights how good a merge will be. Similarity of task vectors predicts it only weakly, and what
matters differs from method to method; a small change can carry a whole skill. Use these pages to find mistakes (a wrong
base, a doubled expert, a change that rounding would erase) and to choose what to try, and decide by evaluating on items
that nothing was chosen on. Whether the base is at chance on a task cannot be seen here either.</p>
<p><em>exact</em>: computed from all weights, correct up to rounding. <em>sampled</em>: from some of the weights.
<em>estimated</em>: from less than would settle it.</p></section>"""
