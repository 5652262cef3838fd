// The curves of all arms on one axis each, and what became of the probabilities of the targets.

import { get, optional } from "../api.js";
import { curves } from "../chart.js";
import { h, section } from "../dom.js";
import { TERMINAL } from "../format.js";
import { armHistogram } from "../histogram.js";

const CURVES = [["Raw NLL, the same measure for every arm", "nll"], ["Held-out NLL", "valid_nll"], ["Accuracy of the benchmark probe", "probe_value"]];

export function comparisonCharts(path, arms, page) {
  const charts = CURVES.map(([title, key]) => ({ key, chart: curves(title, arms.map((arm) => ({ name: arm.name, key, points: [] }))) }));
  const bins = armHistogram("Probability of the target tokens before and after");
  const binsPart = section("Probability of the target tokens, on a fixed set of rows", { hidden: true }, bins.element);
  const counted = new Map();

  const loadCurves = async () => {
    const found = await get(`${path}/curves`, { keys: charts.map(({ key }) => key).join(","), resolution: 200 }, page.signal);
    for (const { key, chart } of charts) {
      for (const one of chart.series) one.points = found.data.find((curve) => curve.arm === one.name)?.points ?? [];
      chart.update([]);
      chart.element.hidden = key !== "nll" && !chart.series.some((one) => one.points.some((each) => Number.isFinite(each[key])));
    }
  };
  /** Of the arms that have ended, once each: they change no more. */
  const loadBins = async (comparison) => {
    const fresh = comparison.arms.filter((arm) => TERMINAL.has(arm.phase) && !counted.has(arm.name));
    await Promise.all(fresh.map(async ({ name, job_id: id }) => counted.set(name, (await optional(`/v1/fine_tuning/jobs/${id}/histograms`, {}, page.signal))?.data ?? [])));
    if (!fresh.length) return;
    binsPart.hidden = ![...counted.values()].some((rows) => rows.length);
    bins.update(comparison.arms.map(({ name }) => ({ name, rows: counted.get(name) ?? [] })));
  };
  return {
    element: h("div.page", null, section("Curves", null, h("div.columns", null, charts.map(({ chart }) => chart.element))), binsPart),
    load: (comparison) => Promise.all([loadCurves(), loadBins(comparison)]),
  };
}
