// Comparisons: fine-tunings on equal terms, as a list and one of them with its table, flips, curves and sweep.

import { get, optional, post } from "../api.js";
import { curves } from "../chart.js";
import { empty, h, phase, progress, section, show, table } from "../dom.js";
import { TERMINAL, number, short, time } from "../format.js";
import { armHistogram } from "../histogram.js";
import { armTable, benchmarkTables, sweepTables, termsOf } from "./comparison_tables.js";

export async function renderList(root, page) {
  page.title("Comparisons");
  const rows = h("div");
  const make = (kind) => h(kind, { href: "#/new?compare=1" }, "New comparison");
  const load = async () => {
    const found = (await get("/v1/fine_tuning/comparisons", { limit: 50 }, page.signal)).data;
    show(rows, found.length ? listTable(found) : empty("No comparisons yet", h("p", null, "Train SFT and DFT on the same rows in the same order, and see which is better on which items."), make("a.button")));
  };
  await load();
  root.replaceChildren(h("div.head", null, h("h1", null, "Comparisons"), make("a.button.primary")), section("All comparisons", null, rows));
  page.every(4, load);
}

function listTable(rows) {
  return table("Comparisons, newest first", [
    ["Comparison", (row) => h("a", { href: `#/comparisons/${row.id}` }, row.name || short(row.id))],
    ["Model", (row) => row.model],
    ["Arms", (row) => row.arms.map((arm) => arm.name).join(", ")],
    ["State", (row) => phase(row.status)],
    ["Created", (row) => time(row.created_at)],
  ], rows);
}

export async function render(root, page, id) {
  const path = `/v1/fine_tuning/comparisons/${encodeURIComponent(id)}`;
  let comparison = await get(path, {}, page.signal);
  const place = { head: h("div.head"), trouble: h("div"), arms: h("div"), terms: h("div"), results: h("div.page"), sweep: h("div") };
  const charts = [["Raw NLL, the same measure for every arm", "nll"], ["Held-out NLL", "valid_nll"], ["Accuracy of the benchmark probe", "probe_value"]]
    .map(([title, key]) => ({ key, chart: curves(title, comparison.arms.map((arm) => ({ name: arm.name, key, points: [] }))) }));
  const cancel = async () => {
    if (!confirm("Cancel every arm that has not ended?")) return;
    await page.ask(place.trouble, async () => { comparison = await post(`${path}/cancel`); draw(); });
  };
  const draw = () => {
    page.title(`${comparison.status} ${comparison.name}`);
    const ended = TERMINAL.has(comparison.status);
    show(place.head, h("h1", null, `${comparison.name} `, phase(comparison.status)), !ended && h("button.danger", { type: "button", onclick: cancel }, "Cancel"));
    show(place.arms, ended ? null : overall(comparison), armTable(comparison));
    show(place.terms, termsOf(comparison));
    show(place.results, ...benchmarkTables(comparison));
    show(place.sweep, isSweep(comparison.sweep) ? section("Sweep: means over the seeds", null, sweepTables(comparison.sweep)) : null);
  };
  const drawCurves = async () => {
    const found = await get(`${path}/curves`, { keys: charts.map(({ key }) => key).join(","), resolution: 200 }, page.signal);
    for (const { chart } of charts) {
      chart.series.forEach((one) => { one.points = found.data.find((curve) => curve.arm === one.name)?.points ?? []; });
      chart.update([]);
      chart.element.hidden = !chart.series.some((one) => one.points.some((each) => Number.isFinite(each[one.key])));
    }
  };
  const bins = armHistogram("Probability of the target tokens before and after");
  const binsPart = section("Probability of the target tokens, on a fixed set of rows", { hidden: true }, bins.element);
  const counted = new Map();
  /** Of the arms that have ended, once each: by then they change no more. */
  const drawBins = async () => {
    const fresh = comparison.arms.filter((arm) => TERMINAL.has(arm.phase) && !counted.has(arm.name));
    await Promise.all(fresh.map(async (arm) => counted.set(arm.name, (await optional(`/v1/fine_tuning/jobs/${arm.job_id}/histograms`, {}, page.signal))?.data ?? [])));
    if (!fresh.length) return;
    binsPart.hidden = ![...counted.values()].some((rows) => rows.length);
    bins.update(comparison.arms.map(({ name }) => ({ name, rows: counted.get(name) ?? [] })));
  };
  draw();
  root.replaceChildren(place.head, place.trouble, section("Arms", null, place.arms, place.terms), place.results, section("Curves", null, h("div.columns", null, charts.map(({ chart }) => chart.element))), binsPart, place.sweep);
  page.every(3, async () => {
    comparison = await get(path, {}, page.signal);
    draw();
    await Promise.all([drawCurves(), drawBins()]);
    return !TERMINAL.has(comparison.status);
  });
}

/** More than one value of something beside the objective. */
function isSweep(cells) {
  return ["learning_rate", "batch_size"].some((name) => new Set(cells.map((cell) => cell[name])).size > 1) || cells.some((cell) => cell.arms.length > 1);
}

function overall(comparison) {
  const shares = comparison.arms.map((arm) => (TERMINAL.has(arm.phase) ? 100 : (arm.progress?.percent ?? 0)));
  const done = shares.reduce((sum, share) => sum + share, 0) / shares.length;
  return h("div", null, progress(done, "Progress of all arms"), h("p.small", null, `${number(comparison.arms.filter((arm) => TERMINAL.has(arm.phase)).length)} of ${number(comparison.arms.length)} arms have ended`));
}
