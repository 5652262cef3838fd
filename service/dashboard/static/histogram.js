// How probable the targets are, and how that moved: counts in bins, at a step that a slider chooses, before as an outline.

import { h, show, svg } from "./dom.js";
import { number, percent } from "./format.js";

const WIDTH = 640;
const HEIGHT = 220;
const EDGE = { left: 44, right: 8, top: 8, bottom: 34 };

/** A figure; update(rows) takes GET .../histograms: step, split, part, bin_edges, counts. */
export function histogram(title) {
  const slider = h("input", { type: "range", id: "histogram-step", min: "0", max: "0", value: "0", step: "1" });
  const which = h("select", { id: "histogram-which" });
  const picture = svg("svg", { role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}` });
  const readout = h("p.readout", { "aria-live": "polite" });
  const label = h("label", { for: "histogram-step" }, "Step");
  const element = h("figure.chart.histogram", null, h("figcaption.unseen", null, title),
    h("div.filter", null, h("label", { for: "histogram-which" }, "Tokens"), which), legend(), picture, label, slider, readout);
  let rows = [];
  const draw = () => {
    const chosen = rows.filter((row) => `${row.split} ${row.part}` === which.value);
    const row = chosen[Math.min(Number(slider.value), chosen.length - 1)];
    if (!row) return;
    slider.max = String(chosen.length - 1);
    slider.setAttribute("aria-valuetext", `step ${row.step}`);
    show(label, `Step ${number(row.step)} of ${number(chosen.at(-1).step)}`);
    drawBins(picture, row, chosen[0]);
    picture.setAttribute("aria-label", `${title} at step ${row.step}. ${told(row)}`);
    show(readout, told(row), chosen[0] === row ? "" : ` At step ${number(chosen[0].step)} (outline): ${told(chosen[0])}`);
  };
  slider.addEventListener("input", draw);
  which.addEventListener("change", draw);
  const update = (fresh) => {
    const atEnd = slider.value === slider.max;
    rows = fresh;
    const names = [...new Set(rows.map((row) => `${row.split} ${row.part}`))];
    const before = which.value;
    show(which, ...names.map((name) => h("option", { value: name }, named(name))));
    which.value = names.includes(before) ? before : (names.find((name) => name.endsWith("all")) ?? names[0] ?? "");
    const count = rows.filter((row) => `${row.split} ${row.part}` === which.value).length;
    slider.max = String(Math.max(0, count - 1));
    if (atEnd) slider.value = slider.max;
    draw();
  };
  return { element, update };
}

function legend() {
  const swatch = (...drawn) => svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, drawn);
  return h("ul.legend", null,
    h("li", null, swatch(svg("rect.bar.one", { width: 24, height: 10 })), "at the step below"),
    h("li", null, swatch(svg("path.outline", { d: "M1 5H25" })), "before the training"));
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
function drawBins(picture, row, first) {
  const most = Math.max(10, ...row.counts, ...first.counts);
  const up = HEIGHT - EDGE.top - EDGE.bottom;
  const across = WIDTH - EDGE.left - EDGE.right;
  const y = (count) => EDGE.top + up * (1 - Math.log10(1 + count) / Math.log10(1 + most));
  const x = (p) => EDGE.left + p * across;
  const bars = row.counts.map((count, bin) => svg("rect.bar.one", {
    x: x(row.bin_edges[bin]) + 1, width: x(row.bin_edges[bin + 1]) - x(row.bin_edges[bin]) - 2, y: y(count), height: HEIGHT - EDGE.bottom - y(count),
  }));
  const outline = first.counts.map((count, bin) => `${bin ? "L" : "M"}${x(first.bin_edges[bin])} ${y(count)}H${x(first.bin_edges[bin + 1])}`).join("");
  const ticks = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].filter((count) => count <= most * 1.2);
  picture.replaceChildren(
    ...ticks.flatMap((count) => [
      svg("line.grid", { x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(count), y2: y(count) }),
      svg("text", { x: EDGE.left - 6, y: y(count) + 4, "text-anchor": "end" }, number(count)),
    ]),
    ...bars,
    ...(first === row ? [] : [svg("path.outline", { d: outline })]),
    ...[0, 0.5, 1].map((p, index) => svg("text", { x: x(p), y: HEIGHT - 18, "text-anchor": ["start", "middle", "end"][index] }, String(p))),
    svg("text", { x: x(0.5), y: HEIGHT - 3, "text-anchor": "middle" }, "probability of the target token (number of tokens, logarithmic)"),
  );
}

/** The bins of one part of a preflight, without a slider. */
export function drawParts(part) {
  const picture = svg("svg", { role: "img", viewBox: `0 0 ${WIDTH} ${HEIGHT}` });
  const edges = Array.from({ length: part.counts.length + 1 }, (_, bin) => bin / part.counts.length);
  const row = { counts: part.counts, bin_edges: edges, num_tokens: part.num_tokens };
  drawBins(picture, row, row);
  picture.setAttribute("aria-label", told(row));
  return h("figure.chart.histogram", null, h("figcaption", null, "Probability of the target tokens, before any training"), picture, h("p.readout", null, told(row)));
}
