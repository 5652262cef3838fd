// The tables of a comparison: arms, terms, and per benchmark the scores, intervals, tests and flips.

import { h, phase, section, table } from "../dom.js";
import { duration, number } from "../format.js";
import { covered, shownScore } from "./scores.js";

export function armTable(comparison) {
  return table("Arms", [
    ["Arm", (arm) => h("a", { href: `#/jobs/${arm.job_id}` }, arm.name, arm.name === comparison.reference ? " (reference)" : "")],
    ["Phase", (arm) => phase(arm.phase)],
    ["Objective", (arm) => arm.objective],
    ["Learning rate", (arm) => number(arm.learning_rate), "right"],
    ["Batch", (arm) => number(arm.batch_size), "right"],
    ["Seed", (arm) => String(arm.seed), "right"],
    ["Raw NLL", (arm) => number(arm.last_nll), "right"],
    ["Held-out NLL", (arm) => (arm.valid_nll_after === null ? "–" : `${number(arm.valid_nll_before)} → ${number(arm.valid_nll_after)}`), "right"],
    ["Took", (arm) => duration(arm.wall_seconds), "right"],
  ], comparison.arms);
}

export function termsOf({ terms, differences }) {
  const names = { same_data: "the same data", same_order: "the same order", same_steps: "the same number of steps", same_evaluation: "the same evaluation" };
  const all = Object.entries(names);
  const broken = all.filter(([key]) => terms[key] === false).map(([, name]) => name);
  const open = all.filter(([key]) => terms[key] === null).map(([, name]) => name);
  const text = broken.length ? `The arms do not have ${broken.join(", ")}: what they differ in is more than the objective.` : open.length ? `So far on equal terms; ${open.join(", ")} is known once all have trained.` : `On equal terms: ${all.map(([, name]) => name).join(", ")}.`;
  return [
    h(`p.notice.${broken.length ? "warn" : "good"}`, null, text),
    differences.length > 0 && h("details", null, h("summary", null, `Settings in which they differ (${differences.length})`), table("Differences", [
      ["Setting", (row) => h("code", null, row.field)],
      ["Values", (row) => Object.entries(row.values).map(([arm, value]) => h("div", null, `${arm}: ${JSON.stringify(value)}`)), "text"],
    ], differences)),
  ];
}

export function benchmarkTables(comparison) {
  return comparison.benchmarks.map((result) => section(`Benchmark ${result.benchmark}`, null,
    table(`Scores on ${result.benchmark}`, [
      ["Arm", ([arm]) => arm], ["Score", ([, score]) => shownScore(score), "right"], ["Items", ([, score]) => covered(score), "right"],
      ["Scored by", ([, score]) => `${score.scorer}, judge ${score.judge}, ${score.prompt}`],
    ], Object.entries(result.scores)),
    result.pairs.length > 0 && table(`Against the reference on ${result.benchmark}`, pairColumns(comparison, result.benchmark), result.pairs)));
}

function pairColumns(comparison, benchmark) {
  const job = (arm) => comparison.arms.find((each) => each.name === arm)?.job_id;
  const itemsOf = (pair) => `#/items/${job(pair.arm)}?${new URLSearchParams({ benchmark, ...(job(pair.reference) && { against: job(pair.reference) }) })}`;
  return [
    ["Arm", (pair) => `${pair.arm} − ${pair.reference}`],
    ["Difference, 95 % interval", (pair) => (pair.refused ? h("span.small", null, `not comparable: ${pair.refused}`) : interval(pair)), "wide"],
    ["McNemar p", (pair) => number(pair.mcnemar_p), "right"],
    ["Permutation p", (pair) => number(pair.permutation_p), "right"],
    ["Fixed", (pair) => number(pair.fixed), "right"],
    ["Broken", (pair) => number(pair.broken), "right"],
    ["Both right", (pair) => number(pair.both_right), "right"],
    ["Both wrong", (pair) => number(pair.both_wrong), "right"],
    ["", (pair) => job(pair.arm) && !pair.refused && h("a", { href: itemsOf(pair), "aria-label": `Items of ${pair.arm}` }, "items")],
  ];
}

function interval(pair) {
  const points = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)}`.replace("-", "−");
  return h("span", null, h("strong", null, `${points(pair.difference)} points `), `(${points(pair.low)} to ${points(pair.high)})`, h("span.small", null, pair.told_apart ? "" : " not told apart"));
}

/** Objectives, learning rates and batch sizes, with means over the seeds. */
export function sweepTable(cells) {
  return table("Sweep", [
    ["Objective", (cell) => cell.objective], ["Learning rate", (cell) => number(cell.learning_rate), "right"], ["Batch", (cell) => number(cell.batch_size), "right"],
    ["Of", (cell) => cell.value], ["Mean", (cell) => number(cell.mean), "right"], ["Over seeds ±", (cell) => number(cell.standard_deviation), "right"], ["Arms", (cell) => number(cell.n), "right"],
  ], cells);
}
