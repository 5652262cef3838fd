// How probable the targets are, and how that moved: counts in bins as bars, others to compare with as lines.

import { INKS, swatch } from "./chart.js";
import { h, show, svg } from "./dom.js";
import { choice } from "./form.js";
import { number, percent } from "./format.js";

const WIDTH = 640;
const HEIGHT = 220;
const EDGE = { left: 44, right: 8, top: 8, bottom: 34 };

/** A job's, at a step that a slider chooses; update(rows) takes GET .../histograms: step, split, part, bin_edges, counts. */
export function histogram(title) {
  const slider = h("input", { type: "range", id: "histogram-step", min: "0", max: "0", value: "0", step: "1" });
  const which = choice("histogram-which", []);
  const picture = svg("svg", { role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}` });
  const readout = h("p.readout", { "aria-live": "polite" });
  const legend = h("ul.legend", null, entry(block("one"), "at the step below"), entry(swatch("two"), "before the training"));
  const label = h("label", { for: "histogram-step" }, "Step");
  const element = h("figure.chart.histogram", null, h("figcaption.unseen", null, title),
    h("div.filter", null, h("label", { for: "histogram-which" }, "Tokens"), which), legend, picture, label, slider, readout);
  let rows = [];
  const draw = () => {
    const chosen = of(rows, which);
    const row = chosen[Math.min(Number(slider.value), chosen.length - 1)];
    if (!row) return;
    slider.max = String(chosen.length - 1);
    slider.setAttribute("aria-valuetext", `step ${row.step}`);
    show(label, `Step ${number(row.step)} of ${number(chosen.at(-1).step)}`);
    drawBins(picture, row, chosen[0] === row ? [] : [{ row: chosen[0], ink: "two" }]);
    picture.setAttribute("aria-label", `${title} at step ${row.step}. ${told(row)}`);
    show(readout, told(row), chosen[0] === row ? "" : ` At step ${number(chosen[0].step)}: ${told(chosen[0])}`);
  };
  slider.addEventListener("input", draw);
  which.addEventListener("change", draw);
  const update = (fresh) => {
    const atEnd = slider.value === slider.max;
    rows = fresh;
    offer(which, rows);
    slider.max = String(Math.max(0, of(rows, which).length - 1));
    if (atEnd) slider.value = slider.max;
    draw();
  };
  return { element, update };
}

/** Several jobs' on the same rows, each after its training, over the model before; update(arms) takes [{ name, rows }]. */
export function armHistogram(title) {
  const which = choice("arms-which", []);
  const picture = svg("svg", { role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}` });
  const legend = h("ul.legend");
  const readout = h("ul.small");
  const element = h("figure.chart.histogram", null, h("figcaption.unseen", null, title),
    h("div.filter", null, h("label", { for: "arms-which" }, "Tokens"), which), legend, picture, readout);
  let arms = [];
  const draw = () => {
    const drawn = arms.map(({ name, rows }, index) => ({ name, rows: of(rows, which), ink: INKS[index % INKS.length] })).filter(({ rows }) => rows.length);
    if (!drawn.length) return;
    const [before] = drawn[0].rows;
    const after = drawn.map(({ name, rows, ink }) => ({ name, ink, row: rows.at(-1) }));
    drawBins(picture, before, after, "before");
    show(legend, entry(block("before"), "before the training"), ...after.map(({ name, ink }) => entry(swatch(ink), name)));
    const lines = [`Before: ${told(before)}`, ...after.map(({ name, row }) => `${name} at step ${number(row.step)}: ${told(row)}`)];
    picture.setAttribute("aria-label", `${title}. ${lines.join(" ")}`);
    show(readout, lines.map((text) => h("li", null, text)));
  };
  which.addEventListener("change", draw);
  const update = (fresh) => {
    arms = fresh;
    offer(which, arms.flatMap(({ rows }) => rows));
    draw();
  };
  return { element, update };
}

function entry(mark, text) {
  return h("li", null, mark, text);
}

function block(ink) {
  return svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, svg(`rect.bar.${ink}`, { width: 24, height: 10 }));
}

/** The rows of the chosen tokens, from the first step to the last. */
function of(rows, which) {
  return rows.filter((row) => `${row.split} ${row.part}` === which.value);
}

/** Let one choose among the tokens that were counted; all of them first. */
function offer(which, rows) {
  const names = [...new Set(rows.map((row) => `${row.split} ${row.part}`))];
  const before = which.value;
  show(which, ...names.map((name) => h("option", { value: name }, named(name))));
  which.value = names.includes(before) ? before : (names.find((name) => name.endsWith("all")) ?? names[0] ?? "");
}

function named(name) {
  const [split, part] = name.split(" ");
  const rows = split === "train" ? "training rows" : "held-out rows";
  return part === "all" ? `all of the ${rows}` : `${part} of the ${rows}`;
}

function told(row) {
  const share = (from, to) => row.counts.filter((_, bin) => row.bin_edges[bin] >= from && row.bin_edges[bin + 1] <= to + 1e-9).reduce((sum, count) => sum + count, 0) / row.num_tokens;
  return `${number(row.num_tokens)} tokens: ${percent(share(0, 0.1))} below 0.1, ${percent(share(0.9, 1))} above 0.9.`;
}

/** Heights are logarithms of counts: most tokens lie at the two ends, and the middle is what differs. */
function drawBins(picture, row, lines, ink = "one") {
  const most = Math.max(10, ...row.counts, ...lines.flatMap((line) => line.row.counts));
  const up = HEIGHT - EDGE.top - EDGE.bottom;
  const across = WIDTH - EDGE.left - EDGE.right;
  const y = (count) => EDGE.top + up * (1 - Math.log10(1 + count) / Math.log10(1 + most));
  const x = (p) => EDGE.left + p * across;
  const bars = row.counts.map((count, bin) => svg(`rect.bar.${ink}`, {
    x: x(row.bin_edges[bin]) + 1, width: x(row.bin_edges[bin + 1]) - x(row.bin_edges[bin]) - 2, y: y(count), height: HEIGHT - EDGE.bottom - y(count),
  }));
  const outline = ({ counts, bin_edges: edges }) => counts.map((count, bin) => `${bin ? "L" : "M"}${x(edges[bin])} ${y(count)}H${x(edges[bin + 1])}`).join("");
  const ticks = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].filter((count) => count <= most * 1.2);
  picture.replaceChildren(
    ...ticks.flatMap((count) => [
      svg("line.grid", { x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(count), y2: y(count) }),
      svg("text", { x: EDGE.left - 6, y: y(count) + 4, "text-anchor": "end" }, number(count)),
    ]),
    ...bars,
    ...lines.map((line) => svg(`path.line.${line.ink}`, { d: outline(line.row) })),
    ...[0, 0.5, 1].map((p, index) => svg("text", { x: x(p), y: HEIGHT - 18, "text-anchor": ["start", "middle", "end"][index] }, String(p))),
    svg("text", { x: x(0.5), y: HEIGHT - 3, "text-anchor": "middle" }, "probability of the target token (number of tokens, logarithmic)"),
  );
}

/** The bins of one part of a preflight, without a slider. */
export function drawParts(part) {
  const picture = svg("svg", { role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}` });
  const edges = Array.from({ length: part.counts.length + 1 }, (_, bin) => bin / part.counts.length);
  const row = { counts: part.counts, bin_edges: edges, num_tokens: part.num_tokens };
  drawBins(picture, row, []);
  picture.setAttribute("aria-label", told(row));
  return h("figure.chart.histogram", null, h("figcaption", null, "Probability of the target tokens, before any training"), picture, h("p.readout", null, told(row)));
}
