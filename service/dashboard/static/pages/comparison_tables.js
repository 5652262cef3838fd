// The tables of a comparison: arms, terms, and per benchmark the scores, intervals, tests and flips.

import { h, phase, section, table } from "../dom.js";
import { TERMINAL, duration, number } from "../format.js";
import { covered, shownScore } from "./scores.js";

export function armTable(comparison) {
  const failed = comparison.arms.filter((arm) => arm.error);
  return [failed.map((arm) => h("p.notice.bad", null, h("strong", null, `${arm.name} failed: `), arm.error.message)), table("Arms", [
    ["Arm", (arm) => h("a", { href: `#/jobs/${arm.job_id}` }, arm.name, arm.name === comparison.reference ? " (reference)" : "")],
    ["Phase", (arm) => phase(arm.phase)],
    ["Objective", (arm) => arm.objective],
    ["Learning rate", (arm) => number(arm.learning_rate), "right"],
    ["Batch", (arm) => number(arm.batch_size), "right"],
    ["Seed", (arm) => String(arm.seed), "right"],
    ["Raw NLL", (arm) => number(arm.last_nll), "right"],
    ["Held-out NLL", (arm) => (arm.valid_nll_after === null ? "–" : `${number(arm.valid_nll_before)} → ${number(arm.valid_nll_after)}`), "right"],
    ["Took", (arm) => duration(arm.wall_seconds), "right"],
  ], comparison.arms)];
}

const TERMS = { same_data: "the same data", same_order: "the same order", same_steps: "the same number of steps", same_evaluation: "the same evaluation" };

export function termsOf({ terms, differences, status }) {
  const those = (value) => Object.keys(TERMS).filter((key) => terms[key] === value).map((key) => TERMS[key]).join(", ");
  const [broken, open] = [those(false), those(null)];
  const ended = TERMINAL.has(status);
  const text = broken ? `The arms do not have ${broken}: what they differ in is more than the objective.`
    : !open ? `On equal terms: ${those(true)}.`
      : ended ? `Not every arm was trained to its end, so ${open} cannot be told. Otherwise on equal terms: ${those(true)}.`
        : `So far on equal terms; ${open} is known once all have trained.`;
  return [
    h(`p.notice.${broken || (open && ended) ? "warn" : "good"}`, null, text),
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

/** Per measure a table: objectives and batch sizes down, learning rates across, in each cell the mean over the seeds. */
export function sweepTables(cells) {
  const measured = cells.filter((cell) => cell.n);
  if (!measured.length) return h("p.small", null, "Nothing measured yet");
  return [...new Set(measured.map((cell) => cell.value))].map((measure) => {
    const rates = [...new Set(cells.map((cell) => cell.learning_rate))].sort((a, b) => a - b);
    const rows = Object.values(Object.groupBy(cells.filter((cell) => cell.value === measure), ({ objective, options, batch_size: batch }) => JSON.stringify([objective, options, batch])));
    return table(measure === "valid_nll_after" ? "Held-out NLL" : measure, [
      [measure === "valid_nll_after" ? "Held-out NLL" : measure, ([{ objective, options }]) => `${objective} ${Object.entries(options).map(([name, value]) => `${name} ${value}`).join(", ")}`],
      ["Batch", ([cell]) => number(cell.batch_size), "right"],
      ...rates.map((rate) => [`Learning rate ${number(rate)}`, (row) => mean(row.find((cell) => cell.learning_rate === rate)), "right"]),
    ], rows);
  });
}

function mean(cell) {
  if (!cell?.n) return "–";
  return cell.n < 2 ? number(cell.mean) : `${number(cell.mean)} ± ${number(cell.standard_deviation)} of ${cell.n}`;
}
