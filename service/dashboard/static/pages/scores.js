// How scores are written: with their standard error, their number of items, and who scored them.

import { h, table } from "../dom.js";
import { number, percent } from "../format.js";

export function shownScore(score) {
  return score ? `${(100 * score.value).toFixed(1)} ± ${(100 * score.standard_error).toFixed(1)} %` : "–";
}

/** One row per benchmark of a job, base beside tuned. */
export function scoreTable(job) {
  const trouble = job.evaluation_error && h("p.notice.bad", null, `The evaluation failed: ${job.evaluation_error.message}`);
  if (!job.scores.length) return trouble;
  const names = [...new Set(job.scores.map((score) => score.benchmark))];
  const score = (name, role) => job.scores.find((each) => each.benchmark === name && each.model_role === role);
  const either = (name) => score(name, "tuned") ?? score(name, "base");
  return [trouble, table("Scores", [
    ["Benchmark", (name) => name],
    ["Before", (name) => shownScore(score(name, "base")), "right"],
    ["After", (name) => shownScore(score(name, "tuned")), "right"],
    ["Items", (name) => covered(either(name)), "right"],
    ["No usable answer", (name) => percent(either(name).failure_rate), "right"],
    ["Scored by", (name) => `${either(name).scorer}, judge ${either(name).judge}, ${either(name).prompt}`],
  ], names)];
}

export function covered(score) {
  return `${number(score.n)} of ${number(score.n_total)}${score.whole ? "" : " (subset)"}`;
}
