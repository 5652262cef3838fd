// Curves over steps. SVG, drawn for the width that there is; the arrow keys move the cursor, and its numbers are read out.

import { h, show, svg } from "./dom.js";
import { number, numberTick } from "./format.js";

const HEIGHT = 190;
const EDGE = { left: 52, right: 10, top: 8, bottom: 24 };
const FEW = 12;  // points of a curve that are marked one by one
export const INKS = ["one", "two", "three", "four", "five", "six", "seven", "eight"];

/**
 * A chart of several curves. series: [{ name, key, points? }]; update(points) draws; a point has step, each key, and
 * where it stands for many steps also min and max. Series with points of their own keep them.
 */
export function curves(title, series, { format = number, axis = numberTick } = {}) {
  const legend = h("ul.legend");
  const readout = h("p.readout", { "aria-live": "polite" });
  const picture = svg("svg", { role: "img", tabindex: "0", focusable: "true" });
  const element = h("figure.chart", null, h("figcaption", null, title), legend, picture, readout);
  const chart = { title, series, format, axis, element, legend, readout, picture, points: [], at: null, width: 0 };
  chart.update = (points) => { chart.points = points; draw(chart); };
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width && width !== chart.width) { chart.width = width; draw(chart); }
  }).observe(element);
  picture.addEventListener("pointermove", (event) => point(chart, stepAt(chart, event)));
  picture.addEventListener("pointerleave", () => point(chart, null));
  picture.addEventListener("keydown", (event) => moved(chart, event));
  return chart;
}

function known(chart) {
  return chart.series.map((one, index) => ({
    ...one,
    ink: INKS[index % INKS.length],
    points: (one.points ?? chart.points).filter((each) => Number.isFinite(each[one.key])),
  }));
}

function draw(chart) {
  const series = known(chart);
  const drawn = series.filter((one) => one.points.length);
  show(chart.legend, ...(drawn.length ? series.map((one) => entry(one, chart.format)) : []));
  if (!drawn.length) {
    chart.picture.replaceChildren();
    chart.picture.setAttribute("viewBox", "0 0 300 20");
    chart.picture.setAttribute("aria-label", `${chart.title}: nothing measured yet`);
    show(chart.readout, "Nothing measured yet");
    return;
  }
  if (chart.readout.textContent === "Nothing measured yet") show(chart.readout);
  const width = chart.width || 480;
  chart.scale = scales(drawn, width);
  chart.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  chart.picture.setAttribute("aria-label", summary(chart, drawn));
  chart.cursor = svg("line.cursor", { y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  chart.picture.replaceChildren(...axes(chart), ...drawn.flatMap((one) => [band(one, chart.scale), line(one, chart.scale)]), chart.cursor);
  if (chart.at !== null) point(chart, chart.at);
}

function entry(one, format) {
  const last = one.points.at(-1);
  return h("li", null, swatch(one.ink), `${one.name} `, h("strong", null, last ? format(last[one.key]) : "–"));
}

/** How a line is drawn, for a legend. */
export function swatch(ink) {
  return svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, svg(`path.line.${ink}`, { d: "M1 5H25" }));
}

function summary(chart, drawn) {
  const told = drawn.map((one) => {
    const [first, last] = [one.points[0], one.points.at(-1)];
    return `${one.name} from ${chart.format(first[one.key])} at step ${first.step} to ${chart.format(last[one.key])} at step ${last.step}`;
  });
  return `${chart.title}. ${told.join("; ")}. Left and right arrow keys read single steps.`;
}

function scales(drawn, width) {
  const steps = drawn.flatMap((one) => [one.points[0].first_step ?? one.points[0].step, one.points.at(-1).step]);
  const [left, right] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Infinity, -Infinity];
  for (const one of drawn) {
    for (const each of one.points) {
      low = Math.min(low, each.min?.[one.key] ?? each[one.key]);
      high = Math.max(high, each.max?.[one.key] ?? each[one.key]);
    }
  }
  const ticks = ticksOf(low, high === low ? low + (Math.abs(low) || 1) * 0.1 : high);
  const [bottom, top] = [Math.min(low, ticks[0]), Math.max(high, ticks.at(-1))];
  const across = width - EDGE.left - EDGE.right;
  const up = HEIGHT - EDGE.top - EDGE.bottom;
  return {
    width, ticks, left, right,
    x: (step) => EDGE.left + (right > left ? ((step - left) / (right - left)) * across : across / 2),
    y: (value) => EDGE.top + (1 - (value - bottom) / (top - bottom || 1)) * up,
    step: (x) => left + ((x - EDGE.left) / across) * (right - left),
  };
}

/** Round numbers between low and high, three to six of them. */
export function ticksOf(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((each) => each * power >= rough);
  const first = Math.floor(low / step);
  return Array.from({ length: Math.ceil(high / step) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function axes({ scale, axis }) {
  const apart = scale.ticks[1] - scale.ticks[0];
  const across = scale.ticks.flatMap((value) => [
    svg("line.grid", { x1: EDGE.left, x2: scale.width - EDGE.right, y1: scale.y(value), y2: scale.y(value) }),
    svg("text", { x: EDGE.left - 6, y: scale.y(value) + 4, "text-anchor": "end" }, axis(value, apart)),
  ]);
  const steps = [...new Set([scale.left, Math.round((scale.left + scale.right) / 2), scale.right])];
  const below = steps.map((step, index) =>
    svg("text", { x: scale.x(step), y: HEIGHT - 7, "text-anchor": ["start", "middle", "end"][steps.length < 2 ? 1 : index === steps.length - 1 ? 2 : index] }, `${index ? "" : "step "}${number(step)}`));
  return [...across, ...below];
}

function line(one, scale) {
  const path = one.points.map((each, index) => `${index ? "L" : "M"}${scale.x(each.step).toFixed(1)} ${scale.y(each[one.key]).toFixed(1)}`);
  const dots = one.points.length > FEW ? [] : one.points.map((each) => svg(`circle.dot.${one.ink}`, { cx: scale.x(each.step), cy: scale.y(each[one.key]), r: 3 }));
  return svg("g", null, svg(`path.line.${one.ink}`, { d: path.join("") }), dots);
}

function band(one, scale) {
  const wide = one.points.filter((each) => each.min?.[one.key] !== undefined);
  if (wide.length < 2) return svg("g");
  const upper = wide.map((each) => `${scale.x(each.step).toFixed(1)} ${scale.y(each.max[one.key]).toFixed(1)}`);
  const lower = wide.toReversed().map((each) => `${scale.x(each.step).toFixed(1)} ${scale.y(each.min[one.key]).toFixed(1)}`);
  return svg(`path.band.${one.ink}`, { d: `M${[...upper, ...lower].join("L")}Z` });
}

function stepAt(chart, event) {
  if (!chart.scale) return null;
  const box = chart.picture.getBoundingClientRect();
  return chart.scale.step(((event.clientX - box.left) / box.width) * chart.scale.width);
}

function nearest(points, step) {
  return points.reduce((best, each) => (Math.abs(each.step - step) < Math.abs(best.step - step) ? each : best));
}

/** Put the cursor at a step and tell the numbers there; null takes it away. */
function point(chart, step) {
  const drawn = chart.cursor ? known(chart).filter((one) => one.points.length) : [];
  chart.at = step;
  if (step === null || !drawn.length) {
    chart.cursor?.setAttribute("visibility", "hidden");
    show(chart.readout);
    return;
  }
  const found = drawn.map((one) => [one, nearest(one.points, step)]);
  const at = nearest(found.map(([, each]) => each), step);
  for (const name of ["x1", "x2"]) chart.cursor.setAttribute(name, chart.scale.x(at.step));
  chart.cursor.setAttribute("visibility", "visible");
  const told = found.map(([one, each]) => `${one.name} ${chart.format(each[one.key])}${range(one, each, chart.format)}${each.step === at.step ? "" : ` (step ${each.step})`}`);
  const stretch = at.num_steps > 1 ? `Steps ${number(at.first_step)} to ${number(at.step)}` : `Step ${number(at.step)}`;
  show(chart.readout, `${stretch}: ${told.join(", ")}`);
}

function range(one, each, format) {
  return each.min?.[one.key] === undefined ? "" : ` (${format(each.min[one.key])} to ${format(each.max[one.key])})`;
}

function moved(chart, event) {
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  const points = known(chart).find((one) => one.points.length)?.points;
  if (!by || !points) return;
  event.preventDefault();
  const now = chart.at === null ? (by < 0 ? points.length : -1) : points.indexOf(nearest(points, chart.at));
  point(chart, points[Math.max(0, Math.min(points.length - 1, now + by))].step);
}
