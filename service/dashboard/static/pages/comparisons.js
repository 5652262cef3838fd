// Comparisons: fine-tunings on equal terms, as a list and one of them with its table, flips, curves and sweep.

import { get, post } from "../api.js";
import { empty, h, phase, progress, section, show, table } from "../dom.js";
import { choice } from "../form.js";
import { TERMINAL, number, short, time } from "../format.js";
import { comparisonCharts } from "./comparison_charts.js";
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
  const look = () => get(path, { reference: page.params.get("reference") }, page.signal);
  let comparison = await look();
  const place = { head: h("div.head"), trouble: h("div"), arms: h("div"), terms: h("div"), results: h("div.page"), sweep: h("div") };
  const charts = comparisonCharts(path, comparison.arms, page);
  const reference = choice("reference", comparison.arms.map((arm) => arm.name), comparison.reference);
  reference.addEventListener("change", () => page.attempt(async () => {
    page.setParams({ reference: reference.value });
    comparison = await look();
    draw();
  }));
  const cancel = () => confirm("Cancel every arm that has not ended?")
    && page.ask(place.trouble, async () => { comparison = await post(`${path}/cancel`); draw(); });
  const draw = () => {
    page.title(`${comparison.status} ${comparison.name}`);
    const ended = TERMINAL.has(comparison.status);
    show(place.head, h("h1", null, `${comparison.name} `, phase(comparison.status)), !ended && h("button.danger", { type: "button", onclick: cancel }, "Cancel"));
    show(place.arms, ended ? null : overall(comparison), armTable(comparison));
    show(place.terms, termsOf(comparison));
    show(place.results, ...benchmarkTables(comparison));
    show(place.sweep, isSweep(comparison.sweep) ? section("Sweep: means over the seeds", null, sweepTables(comparison.sweep)) : null);
  };
  draw();
  root.replaceChildren(place.head, place.trouble,
    section("Arms", null, place.arms, place.terms, h("div.filter", null, h("label", { for: "reference" }, "Compare with"), reference)),
    place.results, charts.element, place.sweep);
  page.every(3, async () => {
    comparison = await look();
    draw();
    await charts.load(comparison);
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
